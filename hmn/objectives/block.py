"""A ConvNet block between two convolutions, and its derivatives, as the R-operator needs them.

Of a convolution's maps y (n, c, H, W), with statistics over an image's plane, a block makes

    h = (y - mean y) / deviation,   p = pool(relu(gamma h + beta))

``d_`` is the derivative of the loss and ``_dot`` the tangent when the weights of the convolutions move. The four passes
below are the only ones between convolutions. :mod:`hmn.objectives.block_triton` has them as kernels of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hmn.compute import wide

PLANE = (-2, -1)


class Passes(NamedTuple):
    """The four passes of a block. What they keep for each other is their own affair.

    - ``forward(y, gamma, beta, epsilon)``: p and what it keeps; epsilon is added to the variance
    - ``backward(d_p, of_forward)``: d_y and what it keeps
    - ``tangent_forward(y_dot, of_forward)``: p_dot and what it keeps
    - ``tangent_backward(d_p_dot, of_forward, of_backward, of_tangent_forward)``: d_y_dot
    """

    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Any]]
    backward: Callable[[Tensor, Any], tuple[Tensor, Any]]
    tangent_forward: Callable[[Tensor, Any], tuple[Tensor, Any]]
    tangent_backward: Callable[[Tensor, Any, Any, Any], Tensor]


class Forward(NamedTuple):
    h: Tensor
    scale: Tensor  # 1 / deviation, one number per plane
    slope: Tensor  # gamma where the ReLU is active, else 0


class Backward(NamedTuple):
    d_h: Tensor
    along: Tensor  # mean(d_h h), one number per plane
    d_y: Tensor


class TangentForward(NamedTuple):
    h_dot: Tensor
    along: Tensor  # mean(y_dot h), one number per plane


def forward(y: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> tuple[Tensor, Forward]:
    """p (n, c, H // 2, W // 2) of y (n, c, H, W), gamma and beta (c,)."""
    centred = _centred(wide(y))
    scale = (_mean(centred.square()) + epsilon).rsqrt()
    h = centred * scale
    z = _column(gamma) * h + _column(beta)
    return F.avg_pool2d(z.relu(), 2), Forward(h, scale, _column(gamma) * (z > 0).to(h.dtype))


def backward(d_p: Tensor, block: Forward) -> tuple[Tensor, Backward]:
    """d_y, shaped as y, of d_p, shaped as p."""
    d_h = _unpool(wide(d_p), block.h) * block.slope
    along = _mean(d_h * block.h)
    d_y = block.scale * (_centred(d_h) - block.h * along)
    return d_y, Backward(d_h, along, d_y)


def tangent_forward(y_dot: Tensor, block: Forward) -> tuple[Tensor, TangentForward]:
    """p_dot of y_dot: how the forward pass moves."""
    y_dot = wide(y_dot)
    along = _mean(y_dot * block.h)
    h_dot = block.scale * (_centred(y_dot) - block.h * along)
    return F.avg_pool2d(block.slope * h_dot, 2), TangentForward(h_dot, along)


def tangent_backward(d_p_dot: Tensor, block: Forward, back: Backward, moved: TangentForward) -> Tensor:
    """d_y_dot of d_p_dot: how the backward pass moves."""
    d_h_dot = _unpool(wide(d_p_dot), block.h) * block.slope
    along_dot = _mean(d_h_dot * block.h + back.d_h * moved.h_dot)
    inner = _centred(d_h_dot) - block.h * along_dot - moved.h_dot * back.along
    return block.scale * inner - moved.along * block.scale * back.d_y


PLAIN = Passes(forward, backward, tangent_forward, tangent_backward)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


def _mean(maps: Tensor) -> Tensor:
    return maps.mean(PLANE, keepdim=True)


def _centred(maps: Tensor) -> Tensor:
    return maps - _mean(maps)


def _unpool(d_p: Tensor, like: Tensor) -> Tensor:
    """The adjoint of 2 x 2 average pooling; an odd side's last row or column is not pooled and gets zero."""
    spread = (d_p / 4).repeat_interleave(2, -2).repeat_interleave(2, -1)
    bottom, right = like.shape[-2] - spread.shape[-2], like.shape[-1] - spread.shape[-1]
    return F.pad(spread, (0, right, 0, bottom)) if bottom or right else spread
