"""HMN shapes by dataset and memory size. The paper's own are not public; these fill its budgets and decode alike.

Other data take the nearest row, with its latent side changed to divide the image's side, and made smaller where its
decoder or its instance memories take too much of the budget.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from hmn.config import HmnConfig, require
from hmn.containers.hierarchical import HmnShape
from hmn.containers.nearest import distance, first_paid, made_smaller


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
    "p1":           Preset(  32,      10,   1,    4,    8,   4,   1,   2,   2,   16, by_default=False),
    "p1b":          Preset(  32,      10,   1,    8,    4,   4,   1,   2,   1,   16, by_default=False),
    "p1c":          Preset(  32,      10,   1,    4,    8,   4,   1,   2,   4,   16),
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
    names = [name for name, row in PRESETS.items() if row.by_default]
    return sorted(names, key=lambda name: distance(PRESETS[name], image_size, classes, images_per_class))


def latent_side(preset: Preset, image_size: int) -> int:
    """The preset's number of doublings, or fewer where the image's side is not divisible by that power of two."""
    doublings = round(math.log2(preset.image_size / preset.latent_side))
    while doublings and (image_size % 2**doublings or image_size >> doublings < 2):
        doublings -= 1
    return image_size >> doublings


def fill(config: HmnConfig, *, classes: int, channels: int, image_size: int, images_per_class: int) -> HmnConfig:
    """``config`` with every null field taken from its preset; ``preset`` becomes the row's name.

    ``auto`` is the row for the nearest data that the budget pays for, if need be made smaller in what ``config`` leaves
    open. Raises ``ConfigError`` for an unknown preset or a latent side from which doubling cannot reach the image's
    side.
    """

    def shape(filled: HmnConfig) -> HmnShape:
        return HmnShape.of(filled, classes=classes, channels=channels, image_size=image_size)

    def share_less(filled: HmnConfig) -> HmnConfig | None:
        width = filled.decoder_width // 4 * 2  # half, and even
        return replace(filled, decoder_width=width) if width >= 4 and config.decoder_width is None else None

    def store_less(filled: HmnConfig) -> HmnConfig | None:
        channels = filled.instance_channels // 2
        return replace(filled, instance_channels=channels) if channels and config.instance_channels is None else None

    def fitted(name: str) -> HmnConfig:
        filled = _filled(config, name, image_size)
        return made_smaller(filled, shape, images_per_class, share_less, store_less)

    if config.preset == "auto":
        ranked = by_distance(image_size, classes, images_per_class)
        return fitted(first_paid(ranked, lambda name: shape(fitted(name)), images_per_class))
    require("container.preset", config.preset in PRESETS, config.preset, f"auto or one of {', '.join(PRESETS)}")
    return _filled(config, config.preset, image_size)


def _filled(config: HmnConfig, name: str, image_size: int) -> HmnConfig:
    row = asdict(PRESETS[name]) | {"latent_side": latent_side(PRESETS[name], image_size)}
    names = ("latent_side", "dataset_channels", "feature_channels", "feature_kernel", "class_channels")
    names += ("instance_channels", "decoder_width")
    filled = {key: row[key] for key in names if getattr(config, key) is None}
    config = replace(config, preset=name, **filled)
    factor = image_size / config.latent_side
    doubles = factor >= 2 and math.log2(factor).is_integer()
    rule = "the image side divided by 2, 4, 8 or a higher power of two: "
    rule += f"dataset.image_size={image_size} is not {config.latent_side} doubled one or more times"
    require("container.latent_side", doubles, config.latent_side, rule)
    return config
