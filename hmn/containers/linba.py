"""LinBa (Deng & Russakovsky, NeurIPS 2022): images are linear combinations of bases that all classes share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.config import require
from hmn.config.containers import LinbaConfig
from hmn.containers.base import Container, PixelShape, PixelSpace, RealImages
from hmn.containers.nearest import distance, first_paid, made_smaller


@dataclass(frozen=True)
class Row:
    image_size: int
    classes: int
    images_per_class: int
    bases: int
    channels: int = 3  # of the data


SMALLEST = 4  # number of bases that they may be halved to

# For bases at half the image's side. The authors' only setting for a budget is 16 bases for CIFAR-10 at 1 image per
# class, which leaves G = 115. The others are the powers of two that leave G nearest to that, but more bases for the
# 8 x 8 digits.
# fmt: off
ROWS = (
    #    side classes  IPC  bases
    Row(    8,     10,   1,     4, channels=1),
    Row(    8,     10,  10,    16, channels=1),
    Row(    8,     10,  50,    32, channels=1),
    Row(   32,     10,   1,    16),
    Row(   32,     10,  10,   128),
    Row(   32,     10,  50,  1024),
    Row(   32,    100,   1,    32),
    Row(   32,    100,  10,   256),
    Row(   32,    100,  50,  1024),
    Row(   64,    200,   1,   128),
    Row(   64,    200,  10,  1024),
    Row(   64,    200,  50,  4096),
    Row(  128,     10,   1,    32),
    Row(  128,     10,  10,   256),
    Row(  128,     10,  50,  1024),
    Row(  224,     10,   1,    32),
    Row(  224,     10,  10,   256),
    Row(  224,     10,  50,  1024),
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class LinbaShape(PixelShape):
    bases: int
    downsample: int = 2

    @property
    def basis(self) -> tuple[int, int, int]:
        side = self.image_size // self.downsample
        return (self.channels, side, side)

    @property
    def shared_floats(self) -> int:
        channels, height, width = self.basis
        return self.bases * channels * height * width

    @property
    def instance_floats(self) -> int:
        return self.bases


class LinearBases(Container):
    """x_{c,i} = up(sum_k a_{c,i,k} b_k): bilinear upsampling of a combination of low-resolution bases.

    Shapes: ``bases`` (K, channels, H / ds, W / ds), ``instances`` (C, G, K), the coefficients. Nothing is clamped.
    """

    NAME = "linba"

    def __init__(self, shape: LinbaShape, instances: int) -> None:
        super().__init__()
        self.shape = shape
        self.space = PixelSpace(shape)
        self.instances = nn.Parameter(torch.empty(shape.classes, instances, shape.bases))
        self.bases = nn.Parameter(torch.empty(shape.bases, *shape.basis))

    def decode(self, index: Tensor) -> Tensor:
        combined = self.instances.flatten(0, 1)[index] @ self.bases.flatten(1)
        low = combined.unflatten(1, self.shape.basis)
        side = self.shape.image_size
        return self.space.to_images(F.interpolate(low, size=(side, side), mode="bilinear", align_corners=False))

    def initialise(self, generator: torch.Generator, config: LinbaConfig, real: RealImages) -> None:
        """Xavier uniform for the coefficients as one (C * G, K) matrix, and for the bases as (K, pixels)."""
        nn.init.xavier_uniform_(self.instances.flatten(0, 1), generator=generator)
        nn.init.xavier_uniform_(self.bases.flatten(1), generator=generator)

    def tiers(self) -> dict[str, list[nn.Parameter]]:
        return {"instances": [self.instances], "bases": [self.bases]}


def fill(config: LinbaConfig, *, classes: int, channels: int, image_size: int, images_per_class: int) -> LinbaConfig:
    """Fill in ``bases`` from the nearest row that the budget pays for.

    They are halved, if need be, down to the share of the budget and the number of images that the row has where it was
    made for. Raises ``ConfigError`` unless ``downsample`` divides the image's side.
    """
    divides = image_size % config.downsample == 0
    require("container.downsample", divides, config.downsample, f"a divisor of dataset.image_size={image_size}")
    if config.bases is not None:
        return config

    def shape(filled: LinbaConfig) -> LinbaShape:
        return LinbaShape.of(filled, classes=classes, channels=channels, image_size=image_size)

    def half(filled: LinbaConfig) -> LinbaConfig | None:
        return replace(filled, bases=filled.bases // 2) if filled.bases >= 2 * SMALLEST else None

    def fitted(row: Row) -> LinbaConfig:
        filled = replace(config, bases=row.bases)
        own = LinbaShape.of(filled, classes=row.classes, channels=row.channels, image_size=row.image_size)
        return made_smaller(filled, shape, images_per_class, half, half, own, row.images_per_class)

    ranked = sorted(ROWS, key=lambda row: distance(row, image_size, classes, images_per_class))
    return first_paid([fitted(row) for row in ranked], shape, images_per_class)
