"""IDC's multi-formation (Kim et al., ICML 2022): one stored image is several smaller ones, enlarged when decoded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.config.checks import require
from hmn.config.containers import MultiformationConfig
from hmn.containers.base import Container, PixelShape, PixelSpace, RealImages

BOUND = 128  # IDC's number


class Form(NamedTuple):
    """The stored images ``first`` to ``first + count`` of every class, each cut into ``factor`` x ``factor`` tiles."""

    factor: int
    first: int
    count: int

    @property
    def images(self) -> int:
        return self.count * self.factor**2


@dataclass(frozen=True, kw_only=True)
class MultiformationShape(PixelShape):
    """``tiles``: the form after pruning, in which every image is stored as the tile that it is enlarged from."""

    factor: int
    decode: str = "single"
    bound: int | None = None
    tiles: bool = False

    @classmethod
    def of(cls, config: MultiformationConfig, *, image_size: int, **data: int) -> Self:
        """As in the base class; also refuses a factor whose last tiles would hold nothing but padding."""
        shape = super().of(config, image_size=image_size, **data)
        used = range(1, config.factor + 1) if config.decode == "bound" else shape.factors
        holds = all((factor - 1) * tile_side(image_size, factor) < image_size for factor in used)
        rule = f"such that every tile has pixels of the image, with container.decode={config.decode} at every factor "
        rule += f"used: dataset.image_size={image_size}"
        require("container.factor", holds, config.factor, rule)
        return shape

    @property
    def instance_floats(self) -> int:
        side = tile_side(self.image_size, self.factor) if self.tiles else self.image_size
        return self.channels * side**2

    @property
    def images_per_instance(self) -> int:
        return 1 if self.tiles else sum(factor**2 for factor in self.factors)

    @property
    def tied(self) -> str | None:
        if len(self.factors) > 1:
            return "decode=multi shows every pixel at several factors: dropping one of the images frees none"
        if self.image_size % self.factor:
            rule = f"factor {self.factor} does not divide the image side {self.image_size}"
            return f"{rule}: its tiles have unequal numbers of pixels, so no image can be stored without the others"
        return None

    @property
    def factors(self) -> Sequence[int]:
        """The factors at which every stored image is decoded, in the order of its images."""
        return range(1, self.factor + 1) if self.decode == "multi" else (self.factor,)

    def forms(self, instances: int) -> list[Form]:
        """What a class of ``instances`` stored images decodes to, in the order of its images."""
        return [Form(factor, 0, instances) for factor in self.factors]

    def matched_forms(self, instances: int) -> list[Form]:
        """Like :meth:`forms`, for the images that condensing sees."""
        return bound_forms(instances, self.factor, self.bound) if self.decode == "bound" else self.forms(instances)


def bound_forms(instances: int, factor: int, bound: int) -> list[Form]:
    """Each stored image at one factor, so that at most ``bound`` images are decoded, or as many as are stored.

    From ``factor`` downwards, each factor takes as many stored images as fit while one image is set aside for each that
    no larger factor took. As in IDC's code, those that this factor takes are counted there too, so a few more would
    fit.
    """
    forms, first, decoded = [], 0, 0
    for size in range(factor, 0, -1):
        waiting = instances - first
        room = max(0, bound - decoded - waiting)
        form = Form(size, first, min(waiting, room // size**2) if size > 1 else waiting)
        if form.count:
            forms.append(form)
        first, decoded = first + form.count, decoded + form.images
    return forms


def tile_side(image_size: int, factor: int) -> int:
    return math.ceil(image_size / factor)


class Multiformation(Container):
    """``instances`` (C, N, channels, H, W): image g of a class is tile g // N of its stored image g % N.

    Tiles are ordered row by row. A tile has the side t = ceil(H / f), in images padded at right and bottom to f * t
    pixels, and is enlarged to H x W (bilinear, half-pixel centres). With several factors, the images of the first
    factor come first.
    """

    NAME = "multiformation"

    shape: MultiformationShape

    def __init__(self, shape: MultiformationShape, instances: int) -> None:
        super().__init__()
        self.shape = shape
        self.space = PixelSpace(shape)
        side = tile_side(shape.image_size, shape.factor) if shape.tiles else shape.image_size
        self.instances = nn.Parameter(torch.empty(shape.classes, instances, shape.channels, side, side))

    def decode(self, index: Tensor) -> Tensor:
        if self.shape.tiles:
            return self.space.to_images(self._enlarged(self.instances.flatten(0, 1)[index]))
        return self._decoded(index, self.shape.forms(self.instances.shape[1]))

    @property
    def matched_per_class(self) -> int:
        if self.shape.tiles:
            return self.images_per_class
        return sum(form.images for form in self.shape.matched_forms(self.instances.shape[1]))

    def decode_matched(self, index: Tensor) -> Tensor:
        if self.shape.tiles:
            return self.decode(index)
        return self._decoded(index, self.shape.matched_forms(self.instances.shape[1]))

    def _decoded(self, index: Tensor, forms: Sequence[Form]) -> Tensor:
        """Images (n, channels, H, W) of ``index`` (n,), where a class has the images of ``forms``, form after form."""
        per_class = sum(form.images for form in forms)
        label, image = index // per_class, index % per_class
        pixels, start = None, 0
        for form in forms:
            place = (image - start).clamp(0, form.images - 1)
            stored = label * self.instances.shape[1] + form.first + place % form.count
            tiles = self._tiles(self.instances.flatten(0, 1)[stored], form.factor, place // form.count)
            found = self._enlarged(tiles)
            # Every form decodes all of ``index``: selecting its own would have to wait for the device to count them.
            here = (image >= start)[:, None, None, None]
            pixels = found if pixels is None else torch.where(here, found, pixels)
            start += form.images
        return self.space.to_images(pixels)

    def _tiles(self, pixels: Tensor, factor: int, tile: Tensor) -> Tensor:
        """Tile ``tile`` (n,) of every one of ``pixels`` (n, channels, H, W): (n, channels, t, t)."""
        side = tile_side(self.shape.image_size, factor)
        if missing := factor * side - self.shape.image_size:
            # Grey in [0, 1]; the mean colour where pixels are normalised.
            pixels = F.pad(pixels, (0, missing, 0, missing), value=0.0 if self.space.normalised else 0.5)
        grid = pixels.unflatten(3, (factor, side)).unflatten(2, (factor, side))
        rows = torch.arange(len(pixels), device=pixels.device)
        return grid[rows, :, tile // factor, :, tile % factor]

    def _enlarged(self, tiles: Tensor) -> Tensor:
        return F.interpolate(tiles, size=self.shape.image_size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, config: MultiformationConfig, real: RealImages) -> None:
        """``mix``: the first N f^2 real images of the class (IDC); ``k_means``: as many representative ones (DREAM);
        ``random``: as many random ones, shrunk by averaging pixels instead of picking them (IDM)."""
        if config.init == "noise":
            self.instances.copy_(self.space.noise(tuple(self.instances.shape), generator))
            return
        classes, stored = self.instances.shape[:2]
        count = stored * self.shape.factor**2
        images = self.space.from_images(real.draw(count, "first" if config.init == "mix" else config.init))
        tiles = images.view(classes, self.shape.factor**2, stored, *images.shape[1:])
        sides = mix_slices(self.shape.image_size, self.shape.factor)
        for tile, (rows, columns) in enumerate(product(sides, sides)):
            size = (rows.stop - rows.start, columns.stop - columns.start)
            how = {"mode": "bilinear", "align_corners": False} if config.init == "random" else {"mode": "nearest"}
            shrunk = F.interpolate(tiles[:, tile].flatten(0, 1), size=size, **how)
            self.instances[..., rows, columns] = shrunk.unflatten(0, (classes, stored))

    @torch.no_grad()
    def project(self) -> None:
        if not self.space.normalised:
            self.instances.clamp_(0, 1)

    def keep(self, index: Tensor) -> None:
        """As in the base class; from then on every image is stored as its tile."""
        if self.tied is None and not self.shape.tiles:
            self.kept_rows(index)  # refuses before anything has changed
            factor = self.shape.factor
            side = tile_side(self.shape.image_size, factor)
            grid = self.instances.detach().unflatten(4, (factor, side)).unflatten(3, (factor, side))
            by_image = grid.permute(0, 3, 5, 1, 2, 4, 6).flatten(1, 3)  # (C, G, channels, t, t)
            self.instances = nn.Parameter(by_image.contiguous())
            self.shape = dataclasses.replace(self.shape, decode="single", bound=None, tiles=True)
        super().keep(index)


def mix_slices(image_size: int, factor: int) -> list[slice]:
    """Places of the ``factor`` real images along one side: H // f pixels each, the first H % f one pixel larger.

    They fill the stored image; if f does not divide H, they are not quite the tiles that decoding cuts, as in IDC.
    """
    side, larger = divmod(image_size, factor)
    starts = [tile * side + min(tile, larger) for tile in range(factor + 1)]
    return [slice(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


def fill(config: MultiformationConfig, **_data: int) -> MultiformationConfig:
    """Fill in ``bound``, which only ``decode=bound`` reads."""
    if config.decode == "bound" and config.bound is None:
        return dataclasses.replace(config, bound=BOUND)
    return config
