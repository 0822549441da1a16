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

# With fewer channels the additions cost more than the products that they save.
LEAST_CHANNELS = 32


def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
    """The usual backend of ``torch.compile``, with Winograd's convolutions where :func:`fits` says so."""
    # Importing them takes seconds, which runs that do not compile should not pay for.
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    replaced = {
        torch.ops.aten.convolution.default: convolution,
        torch.ops.aten.convolution_backward.default: convolution_backward,
    }
    # The cache of differentiated graphs does not tell them apart by what replaces their operators.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(graph, inputs, decompositions=_Named(select_decomp_table() | replaced))


class _Named(dict):
    """A table that stands in the key of a compiled graph by this module's name: by its contents no graph is cached."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (__name__,)


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
    maps = convolve(images, adjoint(weight) if transposed else weight)
    return maps if bias is None else maps + bias[:, None, None]


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
        convolve(gradient, adjoint(weight)) if wanted[0] else None,
        weight_gradient(images, gradient) if wanted[1] else None,
        gradient.sum((0, 2, 3)) if wanted[2] else None,
    )


def convolve(images: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(images, weight, padding=1)`` of images (n, c, H, W) and weight (k, c, 3, 3); 4 divides H and W."""
    tiles = input_tiles(images)
    products = tiles.flatten(1, 3) @ weight_tiles(weight)
    return outputs(products.view(*tiles.shape[:4], weight.shape[0]))


def weight_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """The derivative (k, c, 3, 3) of :func:`convolve`'s weight, for images (n, c, H, W), gradient (n, k, H, W)."""
    return weight_of(input_tiles(images).flatten(1, 3).mT @ gradient_tiles(gradient).flatten(1, 3))


def adjoint(weight: Tensor) -> Tensor:
    """The weight of the transposed convolution, (c, k, 3, 3) for (k, c, 3, 3)."""
    return weight.transpose(0, 1).flip(2, 3)


# The rest are operators of their own, which a graph calls as they are. As parts of the graph the compiler would fuse
# padding and additions into code that takes minutes to compile, and some graphs make it fail.


def _operator(name: str, empty: Callable[[Tensor], Tensor]) -> Callable[[Callable], Callable[[Tensor], Tensor]]:
    """Make a function of one tensor an operator; ``empty`` makes a tensor of its result's shape and layout."""

    def register(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        _LIBRARY.define(f"{name}(Tensor values) -> Tensor")
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"hmn_winograd::{name}", empty, lib=_LIBRARY)
        return getattr(torch.ops.hmn_winograd, name).default

    return register


_LIBRARY = torch.library.Library("hmn_winograd", "DEF")


def _empty_tiles(maps: Tensor) -> Tensor:
    n, channels, height, width = maps.shape
    return maps.new_empty(36, n, height // 4, width // 4, channels)


def _empty_maps(tiles: Tensor) -> Tensor:
    _, n, rows, columns, channels = tiles.shape
    return tiles.new_empty(n, 4 * rows, 4 * columns, channels).permute(0, 3, 1, 2)


@_operator("input_tiles", _empty_tiles)
def input_tiles(images: Tensor) -> Tensor:
    """B' d B of all tiles d of ``images`` (n, c, H, W): (36, n, H / 4, W / 4, c)."""
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    tiles = padded.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)
    return _compiled(INPUTS)(tiles.reshape(36, -1)).view(36, *tiles.shape[2:])


@_operator("gradient_tiles", _empty_tiles)
def gradient_tiles(gradient: Tensor) -> Tensor:
    """A y A' of all tiles y of ``gradient`` (n, k, H, W): (36, n, H / 4, W / 4, k); the adjoint of :func:`outputs`."""
    tiles = gradient.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(3, 5, 0, 2, 4, 1)
    return _compiled(OUTPUTS_TRANSPOSED)(tiles.reshape(16, -1)).view(36, *tiles.shape[2:])


@_operator("outputs", _empty_maps)
def outputs(tiles: Tensor) -> Tensor:
    """A' m A of all tiles m of ``tiles`` (36, n, H / 4, W / 4, k): maps (n, k, H, W), channels last."""
    values = _compiled(OUTPUTS)(tiles.view(36, -1)).view(4, 4, *tiles.shape[1:])
    maps = values.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)
    return maps.contiguous().permute(0, 3, 1, 2)  # a map of one tile has not been copied


@_operator("weight_tiles", lambda weight: weight.new_empty(36, *weight.shape[1::-1]))
def weight_tiles(weight: Tensor) -> Tensor:
    """G g G' of all g of ``weight`` (k, c, 3, 3): (36, c, k)."""
    k, c = weight.shape[:2]
    return (_weights_matrix(weight.dtype) @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, c, k)


@_operator("weight_of", lambda products: products.new_empty(3, 3, *products.shape[1:]).permute(3, 2, 0, 1))
def weight_of(products: Tensor) -> Tensor:
    """G' m G of all m of ``products`` (36, c, k): (k, c, 3, 3); the adjoint of :func:`weight_tiles`."""
    c, k = products.shape[1:]
    return (_weights_matrix(products.dtype).T @ products.reshape(36, -1)).view(3, 3, c, k).permute(3, 2, 0, 1)


def _weights_matrix(dtype: torch.dtype) -> Tensor:
    """G for both axes at once, (36, 9)."""
    matrix = torch.tensor(WEIGHTS, dtype=dtype)
    return torch.kron(matrix, matrix)


@functools.cache
def _compiled(matrix: Matrix) -> Callable[[Tensor], Tensor]:
    """:func:`_along_both_axes` of ``matrix``, compiled once for any number of tiles.

    As one product with a matrix of 36 rows it would take twice as long.
    """
    return torch.compile(lambda numbers: _along_both_axes(matrix, numbers), fullgraph=True, dynamic=True)


def _along_both_axes(matrix: Matrix, numbers: Tensor) -> Tensor:
    """``matrix @ m @ matrix.T`` for the matrix m of every tile, without the products with 0: (m m, tiles) to alike."""

    def along_one(line: Sequence[Tensor]) -> list[Tensor]:
        return [sum(factor * value for factor, value in zip(row, line, strict=True) if factor) for row in matrix]

    size = len(matrix[0])
    rows = [row.unbind() for row in numbers.unflatten(0, (size, size)).unbind()]
    columns = [along_one(column) for column in zip(*rows, strict=True)]
    return torch.stack([value for row in zip(*columns, strict=True) for value in along_one(row)])
