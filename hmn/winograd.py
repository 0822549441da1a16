"""Winograd's 3 x 3 convolution for CPUs in fp32: F(4 x 4, 3 x 3) of Lavin & Gray (CVPR 2016).

    Y = A' [(G g G') * (B' d B)] A        their equation 8; ' is the transpose, * element by element

A tile d of 6 x 6 inputs and the weights g of 3 x 3 give a tile Y of 4 x 4 outputs with 36 products per pair of channels
instead of 144. For all tiles together these are 36 matrix products; the rest are additions. Rounding errors are up to
ten times those of the direct convolution.

:func:`backend` compiles a function with these convolutions. They replace PyTorch's after it has differentiated the
function, so they work for derivatives of any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

Matrix = Sequence[Sequence[float]]

INPUTS: Matrix = (  # B'
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
WEIGHTS: Matrix = (  # G
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUTS: Matrix = (  # A'
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
OUTPUTS_TRANSPOSED: Matrix = tuple(zip(*OUTPUTS, strict=True))

# With fewer channels the additions cost more than the products save. AVX-512 makes direct convolutions twice as fast.
LEAST_CHANNELS = 128 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64

# Tiles that are transformed and multiplied together. All at once they would take 4.5 times the memory of their maps.
TILES = 512


def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
    """The usual backend of ``torch.compile``, with Winograd's convolutions where :func:`fits` says so."""
    # Importing them takes seconds, which runs that do not compile should not pay for.
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import make_fallback

    def layout(count: int, node: fx.Node, *arguments: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        return [*map(ExternKernel.require_channels_last, arguments[:count]), *arguments[count:]], {}

    # As with PyTorch's convolutions, what makes their maps makes them channels last.
    for operator, count in ((convolve, 1), (weight_gradient, 2), (bias_gradient, 1)):
        make_fallback(operator, functools.partial(layout, count), warn=False)
    replaced = {
        torch.ops.aten.convolution.default: convolution,
        torch.ops.aten.convolution_backward.default: convolution_backward,
    }
    # The cache of differentiated graphs does not tell them apart by what replaces their operators.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(graph, inputs, decompositions=_Named(select_decomp_table() | replaced))


class _Named(dict):
    """A table that stands in the key of a cached graph by this file's content: with its own none would be cached."""

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        return bytes, (Path(__file__).read_bytes(),)


def fits(
    images: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether Winograd's convolution can replace, and is faster than, this one of ``images`` (n, c, H, W)."""
    same = weight.ndim == 4 and weight.shape[2:] == (3, 3) and groups == 1
    same = same and {*stride, *padding, *dilation} == {1}
    tiled = same and images.shape[2] % 4 == 0 and images.shape[3] % 4 == 0
    return tiled and images.dtype == weight.dtype == torch.float32 and min(weight.shape[:2]) >= LEAST_CHANNELS


def convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Replace ``aten.convolution``."""
    if any(output_padding) or not fits(images, weight, stride, padding, dilation, groups):
        return NotImplemented
    return convolve(images, weight, bias, transposed)


def convolution_backward(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Replace ``aten.convolution_backward``: the derivatives ``wanted`` of images, weight and bias."""
    if transposed or not fits(images, weight, stride, padding, dilation, groups):
        return NotImplemented
    return (
        convolve(gradient, weight, None, True) if wanted[0] else None,
        weight_gradient(images, gradient) if wanted[1] else None,
        bias_gradient(gradient) if wanted[2] else None,
    )


# These are operators, which a graph calls as they are. As parts of the graph the compiler would fuse padding and
# additions into code that takes minutes to compile, and some graphs make it fail. The bias and its derivative are parts
# of operators as they are of PyTorch's: in the graph they change what is fused around them, to twice the time.

_LIBRARY = torch.library.Library("hmn_winograd", "DEF")


def _operator(empty: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function an operator; ``empty`` makes a tensor of its result's shape and layout."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"hmn_winograd::{name}", empty, lib=_LIBRARY)
        return getattr(torch.ops.hmn_winograd, name).default

    return register


def _empty_maps(images: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    n, _, height, width = images.shape
    return images.new_empty(n, height, width, weight.shape[1 if transposed else 0]).permute(0, 3, 1, 2)


@_operator(_empty_maps)
def convolve(images: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``F.conv2d(images, weight, bias, padding=1)``, or if ``transposed`` ``F.conv_transpose2d`` of the same.

    images is (n, c, H, W), where 4 divides H and W, and weight (k, c, 3, 3), or (c, k, 3, 3) if ``transposed``. The
    maps (n, k, H, W) are channels last.
    """
    maps = _empty_maps(images, weight, bias, transposed)
    if transposed:
        weight = weight.transpose(0, 1).flip(2, 3)
    k, c = weight.shape[:2]
    factors = (_weights_matrix(weight.dtype) @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36 * k, c, 1, 1)
    for part, into in zip(_parts(images), _parts(maps), strict=True):
        tiles = _input_tiles(part)
        # Each of the 36 products is a group of a 1 x 1 convolution, which oneDNN computes. Matrix products go to MKL,
        # which takes twice as long on AMD's processors with AVX-512.
        products = F.conv2d(tiles.view(1, 1, -1, 36 * c).permute(0, 3, 1, 2), factors, groups=36)
        outputs = _compiled(_of_products)(products.permute(0, 2, 3, 1).view(*tiles.shape[:3], 6, 6, k))
        torch.add(outputs, 0 if bias is None else bias, out=_tiled(into))
    return maps


@_operator(lambda images, gradient: images.new_empty(3, 3, gradient.shape[1], images.shape[1]).permute(2, 3, 0, 1))
def weight_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """The derivative (k, c, 3, 3) of a convolution's weight, for images (n, c, H, W) and gradient (n, k, H, W)."""
    c, k = images.shape[1], gradient.shape[1]
    products = images.new_zeros(36, k, c)
    for part, of_outputs in zip(_parts(images), _parts(gradient), strict=True):
        tiles = _input_tiles(part).flatten(0, 2)
        gradients = _compiled(_of_gradients)(_tiled(of_outputs)).flatten(0, 2)
        products.baddbmm_(gradients.permute(1, 2, 0), tiles.transpose(0, 1))
    return (_weights_matrix(images.dtype).T @ products.view(36, -1)).view(3, 3, k, c).permute(2, 3, 0, 1)


@_operator(lambda gradient: gradient.new_empty(gradient.shape[1]))
def bias_gradient(gradient: Tensor) -> Tensor:
    """The derivative (k) of a convolution's bias, for gradient (n, k, H, W)."""
    return gradient.sum((0, 2, 3))


def _parts(maps: Tensor) -> tuple[Tensor, ...]:
    """``maps`` (n, c, H, W) in parts of up to :data:`TILES` tiles, or single images that have more."""
    return maps.split(max(1, TILES * 16 // maps[0, 0].numel()))


def _tiled(maps: Tensor) -> Tensor:
    """The tiles of ``maps`` (n, c, H, W): (n, H / 4, W / 4, 4, 4, c)."""
    return maps.permute(0, 2, 3, 1).unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).transpose(2, 3)


def _weights_matrix(dtype: torch.dtype) -> Tensor:
    """G for both axes at once, (36, 9)."""
    matrix = torch.tensor(WEIGHTS, dtype=dtype)
    return torch.kron(matrix, matrix)


def _input_tiles(images: Tensor) -> Tensor:
    """B' d B of all tiles d of ``images`` (n, c, H, W): (n, H / 4, W / 4, 36, c)."""
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return _compiled(_of_inputs)(padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 1, 2, 4, 5, 3))


# Tiles are (n, H / 4, W / 4, rows, columns, channels), with rows and columns in one dimension for new ones.


def _of_inputs(tiles: Tensor) -> Tensor:
    """B' d B of all tiles d: (n, H / 4, W / 4, 36, c) for (n, H / 4, W / 4, 6, 6, c)."""
    return torch.stack(_along_both_axes(INPUTS, tiles), dim=3)


def _of_gradients(tiles: Tensor) -> Tensor:
    """A y A' of all tiles y: (n, H / 4, W / 4, 36, k) for (n, H / 4, W / 4, 4, 4, k); the adjoint of that below."""
    return torch.stack(_along_both_axes(OUTPUTS_TRANSPOSED, tiles), dim=3)


def _of_products(tiles: Tensor) -> Tensor:
    """A' m A of all tiles m: (n, H / 4, W / 4, 4, 4, k) for (n, H / 4, W / 4, 6, 6, k), 16 tensors in memory."""
    values = torch.stack(_along_both_axes(OUTPUTS, tiles))
    return values.unflatten(0, (4, 4)).permute(2, 3, 4, 0, 1, 5)


@functools.cache
def _compiled(transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``transform``, compiled for any sizes. As a product with a matrix of 36 rows it takes longer."""
    from torch._dynamo import config
    from torch.fx.experimental import _config as sizes

    compiled = torch.compile(transform, fullgraph=True, dynamic=True)
    # It is compiled anew for every dimension that is 1, for which 8 times, the usual limit, may be too few. Sizes that
    # are equal at first are not taken to be the same. (Before PyTorch 2.7 recompile_limit has only this name.)
    return config.patch(cache_size_limit=64)(sizes.patch(use_duck_shape=False)(compiled))


def _along_both_axes(matrix: Matrix, tiles: Tensor) -> list[Tensor]:
    """The elements of ``matrix @ m @ matrix.T`` of all m in ``tiles`` (n, rows, columns, m, m, channels)."""

    def along_one(line: Sequence[Tensor]) -> list[Tensor]:
        return [
            sum(factor * value for factor, value in zip(row, line, strict=True) if factor) for row in matrix
        ]  # no products with 0

    columns = [along_one(column) for column in zip(*(row.unbind(3) for row in tiles.unbind(3)), strict=True)]
    return [value for row in zip(*columns, strict=True) for value in along_one(row)]
