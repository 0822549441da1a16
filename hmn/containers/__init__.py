"""Data containers: parameters that decode to images, how many fit a budget, and how to rebuild a kept one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from hmn.budget import budget_floats, instances_that_fit
from hmn.config import ContainerConfig
from hmn.containers import coreset, fred, haba, image, linba, multiformation, presets, speed
from hmn.containers.base import Container, ContainerShape
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape


class Kind(NamedTuple):
    """A kind of container: ``container(shape, instances)`` makes an empty one with that many instances per class.

    ``fill(config, classes=, channels=, image_size=, images_per_class=)`` chooses what ``config`` leaves null, and
    ``shape.of(config, classes=, channels=, image_size=)`` is a filled one's shape. Both raise ``ConfigError``.
    """

    container: type[Container]
    shape: type[ContainerShape]
    fill: Callable[..., ContainerConfig]


KINDS = {
    "hmn": Kind(HierarchicalMemory, HmnShape, presets.fill),
    "image": Kind(image.RawImages, image.RawShape, image.fill),
    "coreset": Kind(image.RawImages, image.RawShape, coreset.fill),
    "multiformation": Kind(
        multiformation.Multiformation,
        multiformation.MultiformationShape,
        multiformation.fill,
    ),
    "haba": Kind(haba.Haba, haba.HabaShape, haba.fill),
    "linba": Kind(linba.LinearBases, linba.LinbaShape, linba.fill),
    "speed": Kind(speed.SparseCodes, speed.SpeedShape, speed.fill),
    "fred": Kind(fred.FrequencyMemory, fred.FredShape, fred.fill),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """What a container takes of the budget, in float32 numbers, and how many instances per class fit into it."""

    budget_floats: int
    shared_floats: int
    instance_floats: int
    images_per_instance: int
    instances: int  # per class
    over_budget_instances: int

    @property
    def images_per_class(self) -> int:
        """Images per class, G."""
        return self.instances * self.images_per_instance

    @property
    def over_budget_images_per_class(self) -> int:
        """Images per class that are condensed before pruning, G_o."""
        return self.over_budget_instances * self.images_per_instance

    @property
    def cut_per_class(self) -> int:
        """Images per class that pruning cuts."""
        return self.over_budget_images_per_class - self.images_per_class

    def stored_floats(self, classes: int) -> int:
        return self.shared_floats + classes * self.instances * self.instance_floats


def storage(shape: ContainerShape, images_per_class: int, over_budget: float) -> Storage:
    """What a container of ``shape`` stores within the budget of ``images_per_class``.

    Raises ``ConfigError`` if the budget does not pay for one instance of every class.
    """
    budget = budget_floats(images_per_class, shape.classes, shape.channels, shape.image_size)
    counts = [
        instances_that_fit(budget, shape.shared_floats, shape.instance_floats, shape.classes, over_budget=fraction)
        for fraction in (0.0, over_budget)
    ]
    return Storage(
        budget_floats=budget,
        shared_floats=shape.shared_floats,
        instance_floats=shape.instance_floats,
        images_per_instance=shape.images_per_instance,
        instances=counts[0],
        over_budget_instances=counts[1],
    )


def rebuild(specification: dict[str, Any]) -> Container:
    """An uninitialised container from a :meth:`Container.specification`; raises ``KeyError`` for an unknown name."""
    values = dict(specification)
    kind = KINDS[values.pop("name")]
    count = values.pop("images_per_class")
    # JSON has no tuples.
    shape = kind.shape(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    return kind.container(shape, count // shape.images_per_instance)
