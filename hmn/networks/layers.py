"""Layers that several architectures share, and the rule that pads 28-pixel images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.compute import wide


class FanOutConv2d(nn.Conv2d):
    """A convolution that :func:`hmn.networks.initialise` draws from N(0, 2 / (k * k * output channels)).

    This is the initialisation of IDC's ResNets: He et al. (ICCV 2015), in the mode that preserves the variance of the
    backward pass.
    """


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's batch norm, in at least fp32 even under autocast: statistics stay exact, and vmap supports no other."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(wide(images))


class GroupNorm(nn.GroupNorm):
    """PyTorch's group norm, in at least fp32 even under autocast: compiled, it rounds statistics its gradient needs."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(wide(images)).to(images.dtype)


class AveragePool2d(nn.Module):
    """The average of 2 x 2 pixels.

    Compiled for a CPU, the derivative of PyTorch's own takes up to three times as long: for each pixel it works out
    which windows, of those that might overlap, the pixel is in.
    """

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if images.is_cuda or height % 2 or width % 2 or not torch.compiler.is_compiling():
            return F.avg_pool2d(images, 2)
        pixels = images.permute(0, 2, 3, 1)  # the layout that compiled convolutions have on a CPU, which the mean keeps
        return pixels.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4)).permute(0, 3, 1, 2)


def norm_layer(norm: str, channels: int) -> nn.Module:
    """The norm ``instance`` (affine GroupNorm, one channel per group, no running statistics), ``batch`` or ``none``."""
    if norm == "instance":
        return GroupNorm(channels, channels)
    return BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def padded(size: int) -> int:
    """The side after padding: the first convolution of networks for 32 pixels pads 28 pixels to 32."""
    return 32 if size == 28 else size
