"""FreD (Shin et al., NeurIPS 2023): the discrete cosine coefficients that vary most within a class, all others zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hmn.config import require
from hmn.config.containers import FredConfig
from hmn.containers import positions as packed
from hmn.containers.base import Container, PixelShape, PixelSpace, RealImages

# Coefficients per channel by image side: for 32 and 128 as published for trajectory matching; for 8, 64 and 224 chosen
# so that 4, 16 and 12 images take the storage of one.
COEFFICIENTS = {8: 16, 32: 64, 64: 256, 128: 2048, 224: 4096}


@dataclass(frozen=True, kw_only=True)
class FredShape(PixelShape):
    coefficients: int  # per image and channel
    count_mask: bool = False
    orthonormal: bool = True

    @property
    def shared_floats(self) -> int:
        """The kept positions, 16 bits each, if they are charged; the paper does not charge them."""
        return math.ceil(self.classes * self.coefficients / 2) if self.count_mask else 0

    @property
    def instance_floats(self) -> int:
        return self.channels * self.coefficients


class FrequencyMemory(Container):
    """x = IDCT(M_c F_{c,i}): of every image's DCT, only the coefficients at its class's positions are stored.

    Shapes: ``instances`` (C, G, channels, k); ``positions`` (C, k) int16, a persistent buffer: their places in the
    flattened (H, W) coefficients, the same for all images and channels of the class.
    """

    NAME = "fred"

    def __init__(self, shape: FredShape, instances: int) -> None:
        super().__init__()
        self.shape = shape
        self.space = PixelSpace(shape)
        self.instances = nn.Parameter(torch.empty(shape.classes, instances, shape.channels, shape.coefficients))
        self.register_buffer("positions", torch.zeros(shape.classes, shape.coefficients, dtype=torch.int16))
        inverse = inverse_dct_matrix(shape.image_size, shape.orthonormal)
        self.register_buffer("inverse", inverse, persistent=False)

    def decode(self, index: Tensor) -> Tensor:
        kept = self.instances.flatten(0, 1)[index]
        where = packed.unpack(self.positions)[index // self.images_per_class, None].expand_as(kept)
        side = self.shape.image_size
        spectrum = kept.new_zeros(*kept.shape[:2], side**2).scatter(2, where, kept).unflatten(2, (side, side))
        return self.space.to_images(self.inverse @ spectrum @ self.inverse.T)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, config: FredConfig, real: RealImages) -> None:
        """Start from real images, which also decide each class's positions."""
        images = self.space.from_images(real.draw(self.images_per_class))
        by_class = (self.classes, self.images_per_class)
        chosen = most_varying(dct(images, orthonormal=False).unflatten(0, by_class), self.shape.coefficients)
        self.positions.copy_(packed.pack(chosen))
        spectrum = dct(images, self.shape.orthonormal).unflatten(0, by_class).flatten(3)
        self.instances.copy_(spectrum.gather(3, chosen[:, None, None].expand_as(self.instances)))

    def tier_floats(self) -> dict[str, int]:
        mask = self.shape.shared_floats
        return super().tier_floats() | ({"positions": mask} if mask else {})


def most_varying(spectrum: Tensor, count: int) -> Tensor:
    """The ``count`` positions (C, count) int64, ascending, where ``spectrum`` (C, G, channels, H, W), averaged over the
    channels, has the largest variance over a class's images. Ties go to the lower vertical frequency, then to the
    lower horizontal one.

    The order depends on the scale of the coefficients: the paper's are not normalised.
    """
    variance = spectrum.mean(dim=2).flatten(2).var(dim=1, correction=0)
    return variance.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def dct(images: Tensor, orthonormal: bool) -> Tensor:
    """Type-II discrete cosine transform of the last two axes, which are equally long."""
    matrix = dct_matrix(images.shape[-1], orthonormal).to(images)
    return matrix @ images @ matrix.T


def dct_matrix(side: int, orthonormal: bool) -> Tensor:
    """Row k: 2 cos(pi k (2n + 1) / 2N), or scaled so that the rows are orthonormal; float64."""
    n = torch.arange(side, dtype=torch.float64)
    matrix = 2 * torch.cos(torch.pi * n[:, None] * (2 * n + 1) / (2 * side))
    return matrix / _row_norms(side)[:, None] if orthonormal else matrix


def inverse_dct_matrix(side: int, orthonormal: bool) -> Tensor:
    """The inverse of :func:`dct_matrix`, float32: the transpose with scaled columns, as its rows are orthogonal."""
    transposed = dct_matrix(side, orthonormal).T
    return (transposed if orthonormal else transposed / _row_norms(side).square()).float()


def _row_norms(side: int) -> Tensor:
    """Row norms of the unnormalised matrix: 2 sqrt(N) for the constant row, sqrt(2 N) for the others."""
    squares = torch.full((side,), 2.0 * side, dtype=torch.float64)
    squares[0] *= 2
    return squares.sqrt()


def fill(config: FredConfig, *, image_size: int, **_data: int) -> FredConfig:
    """Fill in ``coefficients`` from the nearest side in the table.

    Raises ``ConfigError`` for more of them than an image has.
    """
    pixels = image_size**2
    require("dataset.image_size", pixels <= packed.LIMIT, image_size, "at most 256: positions must fit in 16 bits")
    count = config.coefficients
    if count is None:
        nearest_side = min(COEFFICIENTS, key=lambda side: abs(math.log(side / image_size)))
        count = min(COEFFICIENTS[nearest_side], pixels)
    require("container.coefficients", count <= pixels, count, f"at most the {pixels} coefficients of a channel")
    return replace(config, coefficients=count)
