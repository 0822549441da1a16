"""Which row of a container's table of settings a dataset and memory get: the nearest one that the budget pays for.

Where that row was made for a larger budget, :func:`made_smaller` leaves room for images. docs/tuning.md has what that
is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from hmn.budget import budget_floats
from hmn.containers.base import ContainerShape

T = TypeVar("T")

SHARED_AT_MOST = 0.4  # of the budget
INSTANCES_AT_LEAST = 8.0  # of each class for each image of the budget


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
    return instances_held(shape, images_per_class) >= 1


def made_smaller(
    settings: T,
    shape_of: Callable[[T], ContainerShape],
    images_per_class: int,
    share_less: Callable[[T], T | None],
    store_less: Callable[[T], T | None],
    own: ContainerShape | None = None,
    own_images_per_class: int = 1,
) -> T:
    """``settings`` with a smaller shared part while it takes more than ``SHARED_AT_MOST`` of the budget, then with
    smaller instances while fewer than ``INSTANCES_AT_LEAST`` fit for each of ``images_per_class``.

    ``share_less`` and ``store_less`` return the next smaller settings, or None where there are none. Where ``own``, the
    shape for the data and memory that the settings were made for, shares more or holds fewer, that is the limit.
    """
    shared_at_most, instances_at_least = SHARED_AT_MOST, INSTANCES_AT_LEAST
    if own is not None and fits(own, own_images_per_class):
        shared_at_most = max(shared_at_most, shared_share(own, own_images_per_class))
        instances_at_least = min(instances_at_least, instances_held(own, own_images_per_class) / own_images_per_class)

    def too_much_shared(settings: T) -> bool:
        return shared_share(shape_of(settings), images_per_class) > shared_at_most

    def too_few_instances(settings: T) -> bool:
        return instances_held(shape_of(settings), images_per_class) < instances_at_least * images_per_class

    for crowded, less in ((too_much_shared, share_less), (too_few_instances, store_less)):
        while crowded(settings) and (smaller := less(settings)) is not None:
            settings = smaller
    return settings


def shared_share(shape: ContainerShape, images_per_class: int) -> float:
    """The share of the budget that the shared part takes."""
    return shape.shared_floats / _budget(shape, images_per_class)


def instances_held(shape: ContainerShape, images_per_class: int) -> int:
    """The instances per class that the budget pays for; negative where it does not pay for the shared part."""
    return (_budget(shape, images_per_class) - shape.shared_floats) // (shape.classes * shape.instance_floats)


def _budget(shape: ContainerShape, images_per_class: int) -> int:
    return budget_floats(images_per_class, shape.classes, shape.channels, shape.image_size)
