"""A split of a dataset, and fractions taken from it class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hmn.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, channels, H, W), uint8 or decoded in [0, 1], and labels int64 (N,), grouped by class.

    Splits to condense from are ordered by class, which per-class sampling relies on.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def select(self, index: Tensor) -> Split:
        """The images ``index`` (n,); an ascending index keeps the order by class."""
        return Split(self.images[index], self.labels[index])

    def of_classes(self, labels: Sequence[int]) -> Split:
        """The images of the classes ``labels``, renumbered in this order."""
        members = [(self.labels == label).nonzero().squeeze(1) for label in labels]
        counts = torch.tensor([len(index) for index in members], device=self.labels.device)
        numbers = torch.arange(len(members), device=self.labels.device)
        return Split(self.images[torch.cat(members)], numbers.repeat_interleave(counts))


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """What a loader read. ``test`` is None if the dataset has no test split of its own."""

    class_names: tuple[str, ...]
    train: Split
    test: Split | None
    notes: tuple[str, ...] = ()


def by_class(images: Tensor, labels: Tensor) -> Split:
    """A split from images in any order, sorted by class; images of one class keep their order."""
    order = torch.argsort(labels, stable=True)
    in_order = bool((labels[1:] >= labels[:-1]).all())
    return Split(images, labels) if in_order else Split(images[order], labels[order])


def split_off(split: Split, fraction: float, generator: torch.Generator) -> tuple[Split, Split]:
    """Divide ``split`` into the rest and a random ``fraction`` of each class.

    ``round(fraction * n)`` of a class's n images are taken: at least 1 if ``fraction`` is positive, but never all, so a
    class with a single image keeps it.
    """
    taken = torch.zeros(len(split), dtype=torch.bool)
    for label in split.labels.unique():
        members = (split.labels == label).nonzero().squeeze(1)
        n = len(members)
        count = min(max(round(fraction * n), 1), n - 1) if fraction > 0 else 0
        taken[members[torch.randperm(n, generator=generator)[:count]]] = True
    return split.select((~taken).nonzero().squeeze(1)), split.select(taken.nonzero().squeeze(1))


def check_classes(split: Split, class_names: Sequence[str], name: str, least: int = 1) -> None:
    """Raise :class:`DataError` naming the classes of which the split ``name`` has fewer than ``least`` images."""
    counts = torch.bincount(split.labels, minlength=len(class_names)).tolist()
    short = [class_name for class_name, count in zip(class_names, counts, strict=True) if count < least]
    if short:
        rule = "no image" if least == 1 else f"fewer than {least} images"
        raise DataError(f"{name} has {rule} of class {listing(short)}: add some, or remove the class everywhere")


def listing(names: Sequence[str], most: int = 10) -> str:
    """The first ``most`` names on one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
