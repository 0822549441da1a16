"""Layers that several architectures share, and the rule that pads 28-pixel images."""

from __future__ import annotations

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


def norm_layer(norm: str, channels: int) -> nn.Module:
    """The norm ``instance`` (affine GroupNorm, one channel per group, no running statistics), ``batch`` or ``none``."""
    if norm == "instance":
        return GroupNorm(channels, channels)
    return BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def padded(size: int) -> int:
    """The side after padding: the first convolution of networks for 32 pixels pads 28 pixels to 32."""
    return 32 if size == 28 else size
