"""Data containers: parameters that decode to images, how many fit a budget, and how a kept one is made again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from hmn.budget import budget_floats, images_that_fit
from hmn.config import HmnConfig, require
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape, shared_floats
from hmn.containers.presets import PRESETS, by_distance, latent_side


def with_preset(
    config: HmnConfig, *, classes: int, image_size: int, images_per_class: int, channels: int = 3
) -> HmnConfig:
    """``config`` with every null field taken from its preset; ``preset`` becomes the row's name.

    ``auto`` is the row of the nearest data that the budget pays for. Raises ``ConfigError`` for an unknown preset or a
    latent side from which doubling cannot reach the image's side.
    """

    def fits(name: str) -> bool:
        shape = hmn_shape(_filled(config, name, image_size), classes=classes, channels=channels, image_size=image_size)
        needed = shared_floats(shape) + classes * shape.instance_floats
        return needed <= budget_floats(images_per_class, classes, channels, image_size)

    if config.preset != "auto":
        require("container.preset", config.preset in PRESETS, config.preset, f"auto or one of {', '.join(PRESETS)}")
        return _filled(config, config.preset, image_size)
    ranked = by_distance(image_size, classes, images_per_class)
    return _filled(config, next(filter(fits, ranked), ranked[0]), image_size)


def _filled(config: HmnConfig, name: str, image_size: int) -> HmnConfig:
    row = dataclasses.asdict(PRESETS[name]) | {"latent_side": latent_side(PRESETS[name], image_size)}
    fields = ("latent_side", "dataset_channels", "feature_channels", "feature_kernel", "class_channels")
    fields += ("instance_channels", "decoder_width")
    filled = {key: row[key] for key in fields if getattr(config, key) is None}
    config = dataclasses.replace(config, preset=name, **filled)
    factor = image_size / config.latent_side
    doubles = factor >= 2 and math.log2(factor).is_integer()
    rule = "the image side divided by a power of two: "
    rule += f"dataset.image_size={image_size} is not {config.latent_side} doubled"
    require("container.latent_side", doubles, config.latent_side, rule)
    return config


def hmn_shape(config: HmnConfig, *, classes: int, channels: int, image_size: int) -> HmnShape:
    names = {field.name for field in dataclasses.fields(HmnShape)} - {"classes", "channels", "image_size"}
    values = {name: getattr(config, name) for name in names}
    return HmnShape(classes=classes, channels=channels, image_size=image_size, **values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """What a container takes of the budget, in float32 numbers, and how many images per class that leaves."""

    budget_floats: int
    shared_floats: int
    instance_floats: int
    images_per_class: int  # G
    over_budget_images_per_class: int  # G_o

    def stored_floats(self, classes: int) -> int:
        return self.shared_floats + classes * self.images_per_class * self.instance_floats


def storage(shape: HmnShape, images_per_class: int, over_budget: float) -> Storage:
    """Raises ``ConfigError`` if the budget of ``images_per_class`` does not pay for one image of every class."""
    budget = budget_floats(images_per_class, shape.classes, shape.channels, shape.image_size)
    shared = shared_floats(shape)
    counts = [
        images_that_fit(budget, shared, shape.instance_floats, shape.classes, over_budget=fraction)
        for fraction in (0.0, over_budget)
    ]
    return Storage(
        budget_floats=budget,
        shared_floats=shared,
        instance_floats=shape.instance_floats,
        images_per_class=counts[0],
        over_budget_images_per_class=counts[1],
    )


def rebuild(specification: dict[str, Any]) -> nn.Module:
    """An uninitialised container from what :meth:`Container.specification` wrote; ``KeyError`` for another name."""
    values = dict(specification)
    makers = {"hmn": lambda count, **shape: HierarchicalMemory(HmnShape(**shape), count)}
    return makers[values.pop("name")](values.pop("images_per_class"), **values)
