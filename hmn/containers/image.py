"""Raw images, each stored as its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hmn.config.containers import ImageConfig
from hmn.containers.base import Container, PixelShape, PixelSpace, RealImages


@dataclass(frozen=True, kw_only=True)
class RawShape(PixelShape):
    @property
    def pixels(self) -> tuple[int, int, int]:
        return (self.channels, self.image_size, self.image_size)

    @property
    def instance_floats(self) -> int:
        return math.prod(self.pixels)


class RawImages(Container):
    """``instances`` (C, G, channels, H, W): pixels in the shape's space, clamped to [0, 1] in unit space, as in IDC."""

    NAME = "image"

    def __init__(self, shape: RawShape, instances: int) -> None:
        super().__init__()
        self.shape = shape
        self.space = PixelSpace(shape)
        self.instances = nn.Parameter(torch.empty(shape.classes, instances, *shape.pixels))

    def decode(self, index: Tensor) -> Tensor:
        return self.space.to_images(self.instances.flatten(0, 1)[index])

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, config: ImageConfig, real: RealImages) -> None:
        if config.init == "noise":
            self.instances.copy_(self.space.noise(tuple(self.instances.shape), generator))
        else:
            how = "random" if config.init == "real" else config.init
            self.hold(real.draw(self.images_per_class, how))

    @torch.no_grad()
    def hold(self, images: Tensor) -> None:
        """Store ``images`` (C * G, channels, H, W) in [0, 1], ordered by class."""
        self.instances.copy_(self.space.from_images(images).view_as(self.instances))

    @torch.no_grad()
    def project(self) -> None:
        if not self.space.normalised:
            self.instances.clamp_(0, 1)


def fill(config: ImageConfig, **_data: int) -> ImageConfig:
    """``config`` as it is: no field is left to be filled in."""
    return config
