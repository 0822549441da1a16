"""HaBa (Liu et al., NeurIPS 2022): each class has bases, seen through styles ("hallucinators") that all share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.budget import budget_floats
from hmn.config.checks import require
from hmn.config.containers import HabaConfig
from hmn.containers.base import Container, PixelShape, PixelSpace, RealImages, parameter_floats

MOST_STYLES = 5  # the paper's number
KERNEL = 3


@dataclass(frozen=True, kw_only=True)
class HabaShape(PixelShape):
    base_channels: int  # 1: grey
    styles: int  # S

    @classmethod
    def of(cls, config: HabaConfig, *, channels: int, **data: int) -> Self:
        known = config.base_channels in (1, channels)
        require("container.base_channels", known, config.base_channels, f"1 or the image's channels, {channels}")
        return super().of(config, channels=channels, **data)

    @property
    def instance_floats(self) -> int:
        return self.base_channels * self.image_size**2

    @property
    def shared_floats(self) -> int:
        return parameter_floats(lambda: Hallucinators(self))

    @property
    def images_per_instance(self) -> int:
        return self.styles

    @property
    def inner_side(self) -> int:
        """Side of the map after the first convolution, which takes off a border."""
        return self.image_size - KERNEL + 1

    @property
    def tied(self) -> str | None:
        if self.styles == 1:
            return None
        return f"dropping a base drops the images of all {self.styles} styles, and dropping one of these frees nothing"


class Hallucinators(nn.Module):
    """S styles h_s(x) = ConvTranspose(scale_s * Conv(x) + shift_s), 3x3 kernels without padding, no activation."""

    def __init__(self, shape: HabaShape) -> None:
        super().__init__()
        styles, channels, side = shape.styles, shape.channels, shape.inner_side
        self.encoder_weight = nn.Parameter(torch.empty(styles, channels, shape.base_channels, KERNEL, KERNEL))
        self.encoder_bias = nn.Parameter(torch.empty(styles, channels))
        self.scale = nn.Parameter(torch.empty(styles, channels, side, side))
        self.shift = nn.Parameter(torch.empty(styles, channels, side, side))
        # A transposed convolution's weight has its inputs first.
        self.decoder_weight = nn.Parameter(torch.empty(styles, channels, channels, KERNEL, KERNEL))
        self.decoder_bias = nn.Parameter(torch.empty(styles, channels))

    def forward(self, bases: Tensor, style: Tensor) -> Tensor:
        """Images (n, channels, H, W) of ``bases`` (n, base_channels, H, W), each through its own ``style`` (n,).

        A convolution with n groups lets images of different styles share a batch, and none touches another.
        """
        count = len(bases)
        weight, bias = self.encoder_weight[style].flatten(0, 1), self.encoder_bias[style].flatten()
        inner = F.conv2d(bases.flatten(0, 1)[None], weight, bias, groups=count)[0].unflatten(0, (count, -1))
        inner = self.scale[style] * inner + self.shift[style]
        weight, bias = self.decoder_weight[style].flatten(0, 1), self.decoder_bias[style].flatten()
        images = F.conv_transpose2d(inner.flatten(0, 1)[None], weight, bias, groups=count)
        return images[0].unflatten(0, (count, -1))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """PyTorch's defaults, weights and biases U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)); scale 1, shift 0."""
        self.scale.fill_(1)
        self.shift.zero_()
        for weight, bias in ((self.encoder_weight, self.encoder_bias), (self.decoder_weight, self.decoder_bias)):
            bound = 1 / math.sqrt(weight[0, 0].numel())
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-bound, bound, generator=generator)


class Haba(Container):
    """``instances`` (C, N, base_channels, H, W), the bases: image g of a class is its base g // S in style g % S.

    Unit-space bases are clamped to [0, 1], as all stored pixels are; decoded images are not.
    """

    NAME = "haba"

    shape: HabaShape

    def __init__(self, shape: HabaShape, instances: int) -> None:
        super().__init__()
        self.shape = shape
        self.space = PixelSpace(shape)
        side = shape.image_size
        self.instances = nn.Parameter(torch.empty(shape.classes, instances, shape.base_channels, side, side))
        self.hallucinators = Hallucinators(shape)

    def decode(self, index: Tensor) -> Tensor:
        bases = self.instances.flatten(0, 1)[index // self.shape.styles]
        return self.space.to_images(self.hallucinators(bases, index % self.shape.styles))

    def views(self) -> Tensor:
        """One view per style, with all bases in it: (S, C * bases)."""
        return torch.arange(self.classes * self.images_per_class).view(-1, self.shape.styles).T

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, config: HabaConfig, real: RealImages) -> None:
        """``real``: a random real image per base; a grey base takes its mean over channels."""
        if config.init == "real":
            images = self.space.from_images(real.draw(self.instances.shape[1]))
            bases = images.mean(1, keepdim=True) if self.shape.base_channels == 1 else images
            self.instances.copy_(bases.view_as(self.instances))
        else:
            self.instances.copy_(self.space.noise(tuple(self.instances.shape), generator))
        self.hallucinators.initialise(generator)

    def tiers(self) -> dict[str, list[nn.Parameter]]:
        return {"instances": [self.instances], "hallucinators": list(self.hallucinators.parameters())}

    def memory_tiers(self) -> frozenset[str]:
        return frozenset({"instances"})

    @torch.no_grad()
    def project(self) -> None:
        if not self.space.normalised:
            self.instances.clamp_(0, 1)


def fill(config: HabaConfig, *, classes: int, channels: int, image_size: int, images_per_class: int) -> HabaConfig:
    """Choose up to the paper's 5 ``styles``: for the most images that the budget pays for, then for the most bases.

    Bases have the image's channels, as in the paper's tables. They are grey only if the budget, which pays for the
    styles too, has no room for one such base per class, as at 1 image per class. If not even grey ones fit, this
    returns the smallest container, which is refused when its storage is counted.
    """
    data = {"classes": classes, "channels": channels, "image_size": image_size}
    budget = budget_floats(images_per_class, **data)

    def images(filled: HabaConfig) -> int:
        shape = HabaShape.of(filled, **data)
        return max(0, budget - shape.shared_floats) // (classes * shape.instance_floats) * shape.styles

    all_styles = range(1, MOST_STYLES + 1) if config.styles is None else (config.styles,)
    for base_channels in (channels, 1) if config.base_channels is None else (config.base_channels,):
        choices = [dataclasses.replace(config, base_channels=base_channels, styles=styles) for styles in all_styles]
        best = max(choices, key=images)
        if images(best):
            break
    return best
