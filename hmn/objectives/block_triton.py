"""The four passes of :mod:`hmn.objectives.block` as one Triton kernel each, for GPUs.

A kernel reads every map once and writes one: statistics, ReLU, pooling and their derivatives stay in registers. What
later passes need is computed again from the convolution's maps and two numbers per plane, so nothing is kept between
passes but maps that exist anyway. A program has some channels of one image, as a tile (cells of 2 x 2 pixels, their
four corners, channels), in which pooling is a mean over the corners.

Maps are (n, c, H, W) of any strides; channels last is fastest. Numbers are computed in fp32, or in fp64 for maps in
fp64, and maps are returned in the dtype of y. Planes of more than :data:`LARGEST` pixels are left to the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmn.objectives import block

LARGEST = 64 * 64  # pixels of a plane that the registers of a program hold
TILE = 8192  # numbers of a tile, unless one plane has more
WARPS = 16

# Names in the kernels: image ``row``, of N in each class; ``channels``, of C; planes of H x W pixels; tiles of CELLS
# cells and CHANNELS channels, computed in WIDE. Strides are those of class, image, channel and pixel.


@triton.jit
def _plane(channels, strides, C, H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr):
    """Offsets (cells, corners, channels) in an image's maps, and which of them exist."""
    cells, corners = tl.arange(0, CELLS)[:, None], tl.arange(0, 4)[None, :]
    i = 2 * (cells // ((W + 1) // 2)) + corners // 2
    j = 2 * (cells % ((W + 1) // 2)) + corners % 2
    offsets = (i * W + j)[:, :, None] * strides[3] + channels[None, None, :] * strides[2]
    return offsets, ((i < H) & (j < W))[:, :, None] & (channels < C)[None, None, :]


@triton.jit
def _pooled(channels, strides, C, H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr):
    """Offsets (cells, channels) in an image's pooled maps, and which exist: an odd side's last pixels are in none."""
    cells = tl.arange(0, CELLS)
    i, j = cells // ((W + 1) // 2), cells % ((W + 1) // 2)
    offsets = (i * (W // 2) + j)[:, None] * strides[3] + channels[None, :] * strides[2]
    return offsets, ((i < H // 2) & (j < W // 2))[:, None] & (channels < C)[None, :]


@triton.jit
def _image(maps, strides, row, N):
    """Where the maps of image ``row`` begin."""
    return maps + (row // N).to(tl.int64) * strides[0] + (row % N).to(tl.int64) * strides[1]


@triton.jit
def _read(
    maps, strides, row, channels, N, C, H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr, WIDE: tl.constexpr
):
    """A tile of ``maps``, zero outside the plane."""
    offsets, exist = _plane(channels, strides, C, H, W, CELLS)
    return tl.load(_image(maps, strides, row, N) + offsets, mask=exist, other=0.0).to(WIDE)


@triton.jit
def _read_pooled(
    maps, strides, row, channels, N, C, H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr, WIDE: tl.constexpr
):
    """What each corner gets from a tile of pooled ``maps``, (cells, 1, channels): a quarter, or zero without a pool."""
    offsets, exist = _pooled(channels, strides, C, H, W, CELLS)
    values = tl.load(_image(maps, strides, row, N) + offsets, mask=exist, other=0.0).to(WIDE)
    return values[:, None, :] / 4


@triton.jit
def _write(maps, strides, tile, row, channels, N, C, H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr):
    offsets, exist = _plane(channels, strides, C, H, W, CELLS)
    tl.store(_image(maps, strides, row, N) + offsets, tile, mask=exist)


@triton.jit
def _write_pooled(maps, strides, tile, row, channels, N, C, H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr):
    """Write the means of the corners."""
    offsets, exist = _pooled(channels, strides, C, H, W, CELLS)
    tl.store(_image(maps, strides, row, N) + offsets, tl.sum(tile, 1) / 4, mask=exist)


@triton.jit
def _mean(tile, PIXELS: tl.constexpr):
    """The mean over the plane of a tile that is zero outside it, as a tile (1, 1, channels)."""
    return (tl.sum(tl.sum(tile, 1), 0) / PIXELS)[None, None, :]


@triton.jit
def _get(numbers, channels, C, WIDE: tl.constexpr):
    """One number per channel, as a tile (1, 1, channels)."""
    return tl.load(numbers + channels, mask=channels < C, other=0.0).to(WIDE)[None, None, :]


@triton.jit
def _put(numbers, tile, channels, C):
    tl.store(numbers + channels[None, None, :], tile, mask=(channels < C)[None, None, :])


@triton.jit
def _slope(h, gamma, beta, channels, C, WIDE: tl.constexpr):
    """gamma where the ReLU is active, else 0."""
    gamma = _get(gamma, channels, C, WIDE)
    return tl.where(gamma * h + _get(beta, channels, C, WIDE) > 0, gamma, 0.0)


@triton.jit
def _forward(
    y, y_strides, gamma, beta, p, p_strides, means, scales, epsilon, N, C,
    H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, channels = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    values = _read(y, y_strides, row, channels, N, C, H, W, CELLS, WIDE)
    mean = _mean(values, H * W)
    _, exist = _plane(channels, y_strides, C, H, W, CELLS)
    centred = tl.where(exist, values - mean, 0.0)
    scale = tl.rsqrt(_mean(centred * centred, H * W) + epsilon)
    h = centred * scale
    z = _get(gamma, channels, C, WIDE) * h + _get(beta, channels, C, WIDE)
    _write_pooled(p, p_strides, tl.maximum(z, 0.0), row, channels, N, C, H, W, CELLS)
    _put(means + row * C, mean, channels, C)
    _put(scales + row * C, scale, channels, C)


@triton.jit
def _backward(
    d_p, d_p_strides, y, y_strides, gamma, beta, means, scales, d_y, d_y_strides, centres, alongs, N, C,
    H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, channels = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean, scale = _get(means + row * C, channels, C, WIDE), _get(scales + row * C, channels, C, WIDE)
    h = (_read(y, y_strides, row, channels, N, C, H, W, CELLS, WIDE) - mean) * scale
    d_h = _slope(h, gamma, beta, channels, C, WIDE)
    d_h *= _read_pooled(d_p, d_p_strides, row, channels, N, C, H, W, CELLS, WIDE)
    centre, along = _mean(d_h, H * W), _mean(d_h * h, H * W)
    _write(d_y, d_y_strides, scale * (d_h - centre - h * along), row, channels, N, C, H, W, CELLS)
    _put(centres + row * C, centre, channels, C)
    _put(alongs + row * C, along, channels, C)


@triton.jit
def _tangent_forward(
    y_dot, y_dot_strides, y, y_strides, gamma, beta, means, scales, p_dot, p_dot_strides, centres, alongs, N, C,
    H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, channels = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean, scale = _get(means + row * C, channels, C, WIDE), _get(scales + row * C, channels, C, WIDE)
    h = (_read(y, y_strides, row, channels, N, C, H, W, CELLS, WIDE) - mean) * scale
    moved = _read(y_dot, y_dot_strides, row, channels, N, C, H, W, CELLS, WIDE)
    centre, along = _mean(moved, H * W), _mean(moved * h, H * W)
    h_dot = scale * (moved - centre - h * along)
    tile = _slope(h, gamma, beta, channels, C, WIDE) * h_dot
    _write_pooled(p_dot, p_dot_strides, tile, row, channels, N, C, H, W, CELLS)
    _put(centres + row * C, centre, channels, C)
    _put(alongs + row * C, along, channels, C)


@triton.jit
def _tangent_backward(
    d_p_dot, d_p_dot_strides, d_p, d_p_strides, y_dot, y_dot_strides, y, y_strides, gamma, beta, means, scales,
    d_centres, d_alongs, dot_centres, dot_alongs, d_y_dot, d_y_dot_strides, N, C,
    H: tl.constexpr, W: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, channels = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean, scale = _get(means + row * C, channels, C, WIDE), _get(scales + row * C, channels, C, WIDE)
    h = (_read(y, y_strides, row, channels, N, C, H, W, CELLS, WIDE) - mean) * scale
    dot_along = _get(dot_alongs + row * C, channels, C, WIDE)
    h_dot = _read(y_dot, y_dot_strides, row, channels, N, C, H, W, CELLS, WIDE)
    h_dot = scale * (h_dot - _get(dot_centres + row * C, channels, C, WIDE) - h * dot_along)
    slope = _slope(h, gamma, beta, channels, C, WIDE)
    d_h = slope * _read_pooled(d_p, d_p_strides, row, channels, N, C, H, W, CELLS, WIDE)
    d_h_dot = slope * _read_pooled(d_p_dot, d_p_dot_strides, row, channels, N, C, H, W, CELLS, WIDE)
    d_along = _get(d_alongs + row * C, channels, C, WIDE)
    d_y = scale * (d_h - _get(d_centres + row * C, channels, C, WIDE) - h * d_along)
    along = _mean(d_h_dot * h + d_h * h_dot, H * W)
    inner = d_h_dot - _mean(d_h_dot, H * W) - h * along - h_dot * d_along
    tile = scale * inner - dot_along * scale * d_y
    _write(d_y_dot, d_y_dot_strides, tile, row, channels, N, C, H, W, CELLS)


# Operators of PyTorch, so that the compiler takes them as they are. Maps may have a class axis in front.


def _with_classes(maps: Tensor) -> Tensor:
    """``maps`` as (classes, n, c, H, W), in which all pixels of a plane have one stride."""
    maps = maps if maps.ndim == 5 else maps[None]
    height, width = maps.shape[3:]
    flat = height == 1 or width == 1 or maps.stride(3) == width * maps.stride(4)
    return maps if flat else maps.contiguous()


def _strides(maps: Tensor) -> tuple[int, int, int, int]:
    """The strides of class, image, channel and pixel."""
    return *maps.stride()[:3], maps.stride(3 if maps.shape[4] == 1 else 4)


def _empty(y: Tensor, halved: bool = False) -> Tensor:
    """A tensor for maps like ``y``, or for pooled ones, channels last if y is."""
    height, width = (side // 2 for side in y.shape[-2:]) if halved else y.shape[-2:]
    if y.stride(-3) == 1:
        return y.new_empty(*y.shape[:-3], height, width, y.shape[-3]).movedim(-1, -3)
    return y.new_empty(*y.shape[:-2], height, width)


def _numbers(y: Tensor) -> Tensor:
    """A tensor for one number per plane of ``y``."""
    return y.new_empty(y.shape[:-2], dtype=torch.float64 if y.dtype == torch.float64 else torch.float32)


def _launch(kernel: Any, y: Tensor, *arguments: Tensor | float) -> None:
    """Run ``kernel`` on ``arguments``, of which maps, and y itself, are followed by their strides."""
    classes, images, channels, height, width = _with_classes(y).shape
    given: list[Any] = []
    for argument in arguments:
        if not isinstance(argument, Tensor):
            given.append(argument)
        elif argument.ndim < 4:  # one number per plane or channel
            given.append(argument.contiguous())
        else:
            argument = _with_classes(argument)
            given += [argument, _strides(argument)]
    cells = triton.next_power_of_2(((height + 1) // 2) * ((width + 1) // 2))
    each = min(triton.next_power_of_2(channels), max(1, TILE // (4 * cells)))
    kernel[classes * images, triton.cdiv(channels, each)](
        *given,
        images,
        channels,
        H=height,
        W=width,
        CELLS=cells,
        CHANNELS=each,
        WIDE=tl.float64 if y.dtype == torch.float64 else tl.float32,
        num_warps=WARPS,
    )


def _operator(empty: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make an operator of a function; ``empty`` makes tensors of its results' shapes and layouts."""

    def register(function: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(f"hmn_block::{function.__name__}", function, mutates_args=())
        operator.register_fake(empty)
        operator.register_vmap(functools.partial(_over_classes, operator))
        return operator

    return register


def _over_classes(operator: Any, info: Any, dims: Sequence[int | None], *arguments: Tensor | float) -> Any:
    """The rule of ``torch.vmap``: classes become an axis of the maps and of the numbers per plane."""

    def with_classes(argument: Any, dim: int | None) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        if dim is None:
            return argument if argument.ndim == 1 else argument.expand(info.batch_size, *argument.shape)
        if argument.ndim == 2:
            raise NotImplementedError("gamma and beta must be those of all classes")
        return argument.movedim(dim, 0)

    results = operator(*map(with_classes, arguments, dims))
    return results, 0 if isinstance(results, Tensor) else (0,) * len(results)


def _empty_forward(y: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(y, halved=True), _numbers(y), _numbers(y)


@_operator(_empty_forward)
def forward(y: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """p, and the mean and scale of every plane."""
    results = _empty_forward(y)
    _launch(_forward, y, y, gamma, beta, *results, epsilon)
    return results


def _empty_backward(d_p: Tensor, y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(y), _numbers(y), _numbers(y)


@_operator(_empty_backward)
def backward(
    d_p: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d_y, and the means of d_h and of d_h h over every plane."""
    results = _empty_backward(d_p, y)
    _launch(_backward, y, d_p, y, gamma, beta, mean, scale, *results)
    return results


def _empty_tangent_forward(y_dot: Tensor, y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(y, halved=True), _numbers(y), _numbers(y)


@_operator(_empty_tangent_forward)
def tangent_forward(
    y_dot: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """p_dot, and the means of y_dot and of y_dot h over every plane."""
    results = _empty_tangent_forward(y_dot, y)
    _launch(_tangent_forward, y, y_dot, y, gamma, beta, mean, scale, *results)
    return results


def _empty_tangent_backward(d_p_dot: Tensor, d_p: Tensor, y_dot: Tensor, y: Tensor, *_: Tensor) -> Tensor:
    return _empty(y)


@_operator(_empty_tangent_backward)
def tangent_backward(
    d_p_dot: Tensor,
    d_p: Tensor,
    y_dot: Tensor,
    y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    scale: Tensor,
    d_centre: Tensor,
    d_along: Tensor,
    dot_centre: Tensor,
    dot_along: Tensor,
) -> Tensor:
    """d_y_dot; the last four are what :func:`backward` and :func:`tangent_forward` keep."""
    result = _empty(y)
    numbers = mean, scale, d_centre, d_along, dot_centre, dot_along
    _launch(_tangent_backward, y, d_p_dot, d_p, y_dot, y, gamma, beta, *numbers, result)
    return result


# The passes, as hmn.objectives.block has them


class Forward(NamedTuple):
    y: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    scale: Tensor  # 1 / deviation


class Kept(NamedTuple):
    """Of the backward pass or the tangent's forward pass."""

    maps: Tensor  # d_p or y_dot
    centre: Tensor  # the mean of d_h or y_dot, one number per plane
    along: Tensor  # the mean of their products with h


def _forward_pass(y: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> tuple[Tensor, Forward | block.Forward]:
    if y.shape[-2] * y.shape[-1] > LARGEST:
        return block.forward(y, gamma, beta, epsilon)
    p, mean, scale = forward(y, gamma, beta, epsilon)
    return p, Forward(y, gamma, beta, mean, scale)


def _backward_pass(d_p: Tensor, of_forward: Any) -> tuple[Tensor, Kept | block.Backward]:
    if isinstance(of_forward, block.Forward):
        return block.backward(d_p, of_forward)
    d_y, centre, along = backward(d_p, *of_forward)
    return d_y, Kept(d_p, centre, along)


def _tangent_forward_pass(y_dot: Tensor, of_forward: Any) -> tuple[Tensor, Kept | block.TangentForward]:
    if isinstance(of_forward, block.Forward):
        return block.tangent_forward(y_dot, of_forward)
    p_dot, centre, along = tangent_forward(y_dot, *of_forward)
    return p_dot, Kept(y_dot, centre, along)


def _tangent_backward_pass(d_p_dot: Tensor, of_forward: Any, back: Any, moved: Any) -> Tensor:
    if isinstance(of_forward, block.Forward):
        return block.tangent_backward(d_p_dot, of_forward, back, moved)
    return tangent_backward(d_p_dot, back.maps, moved.maps, *of_forward, *back[1:], *moved[1:])


TRITON = block.Passes(_forward_pass, _backward_pass, _tangent_forward_pass, _tangent_backward_pass)
