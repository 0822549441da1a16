"""HMN shapes by data set and memory size. The paper's own are not public; these fill its budgets and decode alike.

With them come the rules for data of another size: the nearest row, its latent side moved to divide the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One row: the data it was made for, then the shape. Names as in :class:`hmn.config.HmnConfig`."""

    image_size: int
    classes: int
    images_per_class: int
    latent_side: int
    dataset_channels: int
    feature_channels: int
    feature_kernel: int
    class_channels: int
    instance_channels: int
    decoder_width: int
    by_default: bool = True  # False: a variant that is only used by name


# fmt: off
PRESETS = {
    #                     side classes  IPC    s  C_D  C_F  k_f  C_C  C_I    W
    "p1":           Preset(  32,      10,   1,    4,    8,   4,   1,   2,   2,   16),
    "p1b":          Preset(  32,      10,   1,    8,    4,   4,   1,   2,   1,   16, by_default=False),
    "p2":           Preset(  32,      10,  10,    8,    8,   8,   3,   8,   2,   64),
    "p3":           Preset(  32,      10,  50,    8,   16,  16,   3,  16,   3,  128),
    "p4":           Preset(  32,     100,   1,    4,   16,   8,   1,   4,   2,   32),
    "p5":           Preset(  32,     100,  10,    8,   16,   8,   3,   8,   2,   64),
    "p6":           Preset(  32,     100,  50,    8,   16,  16,   3,  16,   3,  128),
    "p6c":          Preset(  32,     100,  50,    8,   64,  32,   3,  64,   3,  120, by_default=False),
    "p7":           Preset(  64,     200,   1,    8,   16,   8,   1,   4,   2,   64),
    "p8":           Preset(  64,     200,  10,    8,   32,  16,   3,  16,   4,   96),
    "p8b":          Preset(  64,     200,  50,    8,   32,  16,   3,  16,  16,  128),
    "p9":           Preset( 224,      10,   1,   14,   16,   8,   3,   8,   4,   64),
    "p9b":          Preset( 224,      10,   1,   28,    8,   8,   3,   4,   2,   64, by_default=False),
    "p10":          Preset( 224,      10,  10,   28,   16,   8,   3,   8,   8,   96),
    "p11":          Preset( 128,      10,   1,    8,   16,   8,   3,   8,   4,   48),
    "p11b":         Preset( 128,      10,  10,   16,   16,   8,   3,   8,   4,   64),
    "digits_ipc1":  Preset(   8,      10,   1,    2,    2,   2,   1,   1,   1,    4),
    "digits_ipc10": Preset(   8,      10,  10,    4,    4,   2,   1,   1,   1,    8),
}
# fmt: on


def by_distance(image_size: int, classes: int, images_per_class: int) -> list[str]:
    """The default presets, nearest data first: by image side, then number of classes, then images per class."""

    def distance(name: str) -> tuple[float, float, float]:
        row = PRESETS[name]
        pairs = ((row.image_size, image_size), (row.classes, classes), (row.images_per_class, images_per_class))
        return tuple(abs(math.log(made_for / here)) for made_for, here in pairs)  # type: ignore[return-value]

    return sorted((name for name, row in PRESETS.items() if row.by_default), key=distance)


def latent_side(preset: Preset, image_size: int) -> int:
    """The preset's number of doublings, or fewer where the image's side is not divisible by that power of two."""
    doublings = round(math.log2(preset.image_size / preset.latent_side))
    while doublings and (image_size % 2**doublings or image_size >> doublings < 2):
        doublings -= 1
    return image_size >> doublings
