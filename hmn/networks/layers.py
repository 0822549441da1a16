"""Layers that several architectures share, and the rule that pads 28-pixel images."""

from __future__ import annotations

from torch import Tensor, nn

from hmn.compute import wide


class FanOutConv2d(nn.Conv2d):
    """A convolution that :func:`hmn.networks.initialise` draws from N(0, 2 / (k * k * output channels)).

    He et al. (ICCV 2015), in the mode that keeps the backward pass's variance: what IDC's ResNets start from.
    """


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's, in fp32 at least under autocast too: its statistics stay exact, and vmap has no other form."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(wide(images))


class GroupNorm(nn.GroupNorm):
    """PyTorch's, in fp32 at least under autocast too: compiled, it rounds statistics that its gradient needs."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(wide(images)).to(images.dtype)


def norm_layer(norm: str, channels: int) -> nn.Module:
    """``instance``: GroupNorm with one channel per group, affine, no running statistics; ``batch``; ``none``."""
    if norm == "instance":
        return GroupNorm(channels, channels)
    return BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def padded(size: int) -> int:
    """The side that the networks for 32 pixels see: their first convolution pads 28 pixels to 32."""
    return 32 if size == 28 else size
