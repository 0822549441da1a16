"""Which row of a container's table of settings a dataset and memory get: the nearest one that the budget pays for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from hmn.budget import budget_floats
from hmn.containers.base import ContainerShape

T = TypeVar("T")


class MadeFor(Protocol):
    """The data and memory that a row's settings were made for."""

    @property
    def image_size(self) -> int: ...
    @property
    def classes(self) -> int: ...
    @property
    def images_per_class(self) -> int: ...


def distance(row: MadeFor, image_size: int, classes: int, images_per_class: int) -> tuple[float, float, float]:
    """Sort key of a row: by image side, then number of classes, then images per class, each as a ratio."""
    pairs = ((row.image_size, image_size), (row.classes, classes), (row.images_per_class, images_per_class))
    side, count, memory = (abs(math.log(made_for / here)) for made_for, here in pairs)
    return side, count, memory


def first_paid(ranked: Sequence[T], shape_of: Callable[[T], ContainerShape], images_per_class: int) -> T:
    """The first row that the budget pays for; if it pays for none, the first of all, whose storage is then refused."""
    return next((row for row in ranked if fits(shape_of(row), images_per_class)), ranked[0])


def fits(shape: ContainerShape, images_per_class: int) -> bool:
    """Whether the budget of ``images_per_class`` pays for one instance of every class."""
    needed = shape.shared_floats + shape.classes * shape.instance_floats
    return needed <= budget_floats(images_per_class, shape.classes, shape.channels, shape.image_size)
