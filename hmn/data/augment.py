"""Differentiable augmentation (DSA, Zhao & Bilen, ICML 2021), its two rules of composition, and CutMix.

Every operator takes one parameter per image, so a siamese draw is one parameter repeated. No code branches on a drawn
value, so the host never waits for the device. Operators work on mean/std-normalised images (n, channels, H, W), where
the zeros that they fill in are the mean colour.

Both rules use the same operators and differ in how many of the listed ones an image gets. ``idc`` (Kim et al., ICML
2022): flip, all three colour operators, exactly one of crop, scale and rotate, then cutout. ``vico`` (DSA, followed by
DM, MTT and others): exactly one operator, where the three colour operators count as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hmn.data.sampling import permutations

# Of these operators, an image gets exactly one that the strategy lists; it gets every other listed operator as well.
ALTERNATIVES = {
    "idc": ("crop", "scale", "rotate"),
    "vico": ("color", "crop", "cutout", "flip", "scale", "rotate"),
}
CROP_RATIO = 0.125
CUTOUT_RATIO = 0.5
MAX_SCALE = 1.2
MAX_DEGREES = 15.0


@dataclass(frozen=True)
class Draw:
    """Parameters of one augmentation of n images, each (n,); ``None`` where the strategy lacks the operator.

    ``chosen`` (n,) is the position in ``alternatives`` of the one among them that each image gets.
    """

    alternatives: tuple[str, ...]
    flip: Tensor | None = None  # bool
    brightness: Tensor | None = None  # u in [0, 1), as for saturation and contrast
    saturation: Tensor | None = None
    contrast: Tensor | None = None
    chosen: Tensor | None = None
    crop: Tensor | None = None  # (n, 2) int64, shifts (y, x)
    scale: Tensor | None = None  # (n, 2) factors (x, y)
    rotate: Tensor | None = None  # radians
    cutout: Tensor | None = None  # (n, 2) int64, centre offsets (y, x)

    def repeat(self, count: int) -> Draw:
        """The draw with every image's parameters repeated ``count`` times: one siamese draw for a whole group."""
        return replace(self, **{name: value.repeat_interleave(count, dim=0) for name, value in self.tensors().items()})

    def __getitem__(self, part: slice) -> Draw:
        """The draw of the images ``part``."""
        return replace(self, **{name: value[part] for name, value in self.tensors().items()})

    def applies(self, name: str) -> Tensor | None:
        """Mask (n,) of the images that get the operator ``name``; ``None`` if all do, as it is not an alternative."""
        return self.chosen == self.alternatives.index(name) if name in self.alternatives else None

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that the strategy draws; :func:`draw_of` rebuilds the draw from them."""
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}


def operators(strategy: str) -> tuple[str, ...]:
    return () if strategy == "none" else tuple(strategy.split("_"))


def usable(strategy: str, flip: bool) -> str:
    """``strategy`` without ``flip`` unless flips are allowed: mirroring changes the class of data such as digits."""
    return strategy if flip else "_".join(name for name in operators(strategy) if name != "flip") or "none"


def draw(
    strategy: str,
    n: int,
    size: int,
    generator: torch.Generator,
    *,
    rule: str = "idc",
    one_choice: bool = True,
    batches: int = 1,
) -> Draw:
    """Draw parameters for ``n`` images of side ``size``, from the ranges that IDC and DSA share.

    With ``one_choice``, all images of each of ``batches`` equal parts of the ``n`` get the same alternative, as in a
    batch that a network trains on. Without it, each image (or, after :meth:`Draw.repeat`, each group) gets its own.
    """
    names = operators(strategy)
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def integer(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (n, 2), generator=generator, device=device)

    values: dict[str, Tensor] = {}
    if "flip" in names:
        values["flip"] = uniform(n) < 0.5
    if "color" in names:
        values |= {name: uniform(n) for name in ("brightness", "saturation", "contrast")}
    alternatives = alternatives_of(strategy, rule)
    if alternatives:
        choices = batches if one_choice else n
        chosen = torch.randint(len(alternatives), (choices, 1), generator=generator, device=device)
        values["chosen"] = chosen.expand(-1, n // choices).flatten()
    if "crop" in names:
        shift = int(CROP_RATIO * size + 0.5)
        values["crop"] = integer(-shift, shift)
    if "scale" in names:
        values["scale"] = 1 / MAX_SCALE + (MAX_SCALE - 1 / MAX_SCALE) * uniform(n, 2)
    if "rotate" in names:
        values["rotate"] = (uniform(n) * 2 - 1) * (MAX_DEGREES * torch.pi / 180)
    if "cutout" in names:
        values["cutout"] = integer(0, size - _cutout_side(size) % 2)
    return draw_of(strategy, values, rule)


def draw_of(strategy: str, tensors: dict[str, Tensor], rule: str = "idc") -> Draw:
    """The draw whose :meth:`Draw.tensors` are ``tensors``."""
    return Draw(alternatives=alternatives_of(strategy, rule), **tensors)


def joined(draws: Sequence[Draw]) -> Draw:
    """Concatenate draws that were made by the same strategy and rule."""
    names = draws[0].tensors()
    return replace(draws[0], **{name: torch.cat([one.tensors()[name] for one in draws]) for name in names})


def alternatives_of(strategy: str, rule: str) -> tuple[str, ...]:
    return tuple(name for name in ALTERNATIVES[rule] if name in operators(strategy))


def apply(images: Tensor, drawn: Draw) -> Tensor:
    """Apply flip, colours, crop, scale or rotate, and cutout, in this order, to the images that ``drawn`` selects."""
    if drawn.flip is not None:
        images = _where(drawn.applies("flip"), _where(drawn.flip, images.flip(-1), images), images)
    images = _where(drawn.applies("color"), _colours(images, drawn), images)
    if drawn.crop is not None:
        images = shift(images, torch.where(drawn.applies("crop")[:, None], drawn.crop, 0))
    if drawn.scale is not None or drawn.rotate is not None:
        images = _resample(images, drawn)
    if drawn.cutout is not None:
        images = _where(drawn.applies("cutout"), cutout(images, drawn.cutout), images)
    return images


def _colours(images: Tensor, drawn: Draw) -> Tensor:
    """Apply brightness, saturation and contrast, in this order."""
    if drawn.brightness is not None:
        images = images + _column(drawn.brightness - 0.5)
    if drawn.saturation is not None:
        grey = images.mean(1, keepdim=True)
        images = (images - grey) * _column(2 * drawn.saturation) + grey
    if drawn.contrast is not None:
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * _column(drawn.contrast + 0.5) + mean
    return images


def shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Move image i by ``offsets[i]`` = (y, x) pixels: output[y, x] = input[y + oy, x + ox], zero outside.

    Two products with 0/1 matrices per image: exact but for ``compute.precision=tf32``, which rounds pixels to 10 bits,
    and neither direction needs a scatter, which is slow on a CPU and not deterministic on a GPU.
    """
    size = images.shape[-1]
    positions = torch.arange(size, device=images.device)
    # one[i, y, s] = 1 where output row y of image i is input row s
    rows, columns = ((positions + offsets[:, axis, None])[..., None] == positions for axis in (0, 1))
    rows, columns = rows.to(images.dtype)[:, None], columns.to(images.dtype)[:, None]
    return rows @ images @ columns.mT


def cutout(images: Tensor, centres: Tensor) -> Tensor:
    """Zero a square of half the side centred at ``centres[i]`` = (y, x); the part outside the image is cut off."""
    size = images.shape[-1]
    side = _cutout_side(size)
    positions = torch.arange(size, device=images.device)
    low = centres - side // 2
    rows, columns = ((positions >= low[:, axis, None]) & (positions < low[:, axis, None] + side) for axis in (0, 1))
    hidden = rows[:, None, :, None] & columns[:, None, None, :]
    return images.masked_fill(hidden, 0)


def _resample(images: Tensor, drawn: Draw) -> Tensor:
    """Scale or rotate the images for which that was chosen, in one bilinear resampling; the others stay unchanged."""
    n = len(images)
    theta = torch.zeros(n, 2, 3, device=images.device, dtype=images.dtype)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    resampled = torch.zeros(n, dtype=torch.bool, device=images.device)
    if drawn.scale is not None:
        applies = drawn.applies("scale")
        theta[:, 0, 0] = torch.where(applies, drawn.scale[:, 0], theta[:, 0, 0])
        theta[:, 1, 1] = torch.where(applies, drawn.scale[:, 1], theta[:, 1, 1])
        resampled = resampled | applies
    if drawn.rotate is not None:
        applies = drawn.applies("rotate")
        cos, sin = drawn.rotate.cos(), drawn.rotate.sin()
        turned = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
        theta[:, :, :2] = torch.where(applies[:, None, None], turned, theta[:, :, :2])
        resampled = resampled | applies
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    return torch.where(_column(resampled), moved, images)


def _where(applies: Tensor | None, changed: Tensor, images: Tensor) -> Tensor:
    return changed if applies is None else torch.where(_column(applies), changed, images)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _cutout_side(size: int) -> int:
    return int(CUTOUT_RATIO * size + 0.5)


class MixDraw(NamedTuple):
    """Parameters of CutMix for one batch of n images, or for m batches of n images, each with its own."""

    uniform: Tensor  # (2,) or (2, m) in [0, 1): whether the batch is mixed, and lambda
    centre: Tensor  # (2,) or (2, m) int64, centre (y, x) of the box
    partners: Tensor  # (n,) or (m, n) int64, positions in the batch


def draw_mix(shape: Sequence[int], size: int, generator: torch.Generator, *, real: int | None = None) -> MixDraw:
    """Draw CutMix parameters for labels of ``shape`` and images of side ``size``.

    Only the first ``real`` images of a batch are mixed with one another: the padding after them stays out.
    """
    *batches, total = shape
    n, device = total if real is None else real, generator.device
    uniform = torch.rand(2, *batches, generator=generator, device=device)
    centre = torch.randint(size, (2, *batches), generator=generator, device=device)
    partners = permutations(batches, n, generator)
    rest = torch.arange(n, total, device=device).expand(*batches, -1)
    return MixDraw(uniform, centre, torch.cat([partners, rest], -1))


def cutmix(images: Tensor, labels: Tensor, probability: float, drawn: MixDraw) -> tuple[Tensor, Tensor, Tensor]:
    """CutMix of one batch (Yun et al., ICCV 2019) as IDC applies it: returns mixed images, partners' labels and r.

    With ``probability``, a box of side H * sqrt(1 - lambda), lambda ~ U(0, 1), is pasted from a random partner. The
    loss is r * CE(labels) + (1 - r) * CE(partners' labels), where r is the image's own share of the area after the box
    was clipped. Batches (m, n, channels, H, W) with labels (m, n) are mixed each by its own draw; r is then (m,).
    """
    *batches, total = labels.shape
    size, device = images.shape[-1], images.device
    mixes, keep = drawn.uniform
    half = (size * (1 - keep).sqrt()).long() // 2
    low, high = (drawn.centre - half).clamp(0, size), (drawn.centre + half).clamp(0, size)
    positions = torch.arange(size, device=device)
    inside = (positions >= low[..., None]) & (positions < high[..., None])
    box = inside[0][..., None] & inside[1][..., None, :] & (mixes < probability)[..., None, None]
    own_share = 1 - box.float().mean((-2, -1))
    starts = torch.arange(labels.numel() // total, device=device).view(*batches, 1) * total
    others = images.flatten(0, -4)[drawn.partners + starts]
    mixed = torch.where(box[..., None, None, :, :], others, images)
    return mixed, labels.gather(-1, drawn.partners), own_share
