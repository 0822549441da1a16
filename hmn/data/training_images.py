"""Real training images from which containers are initialised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hmn.data.kmeans import nearest_to_centres
from hmn.data.preprocess import unit_range
from hmn.data.sampling import repeated_subset


class TrainingImages:
    """Chooses from ``images`` (N, channels, H, W) uint8 with ``labels`` (N,), which are ordered by class.

    ``k_means`` clusters ``features(images)`` (n, f); ``k_means_of_pixels`` needs no features.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: tuple[str, ...],
        generator: torch.Generator,
        features: Callable[[Tensor], Tensor],
    ) -> None:
        self.images, self.labels, self.class_names, self.generator = images, labels, class_names, generator
        self.features = features

    def draw(self, count: int, how: str = "random") -> Tensor:
        """``count`` images of every class: see ``containers.base.RealImages``."""
        return unit_range(self.images[self.choose(count, how)])

    def choose(self, count: int, how: str = "random") -> Tensor:
        """Indices (C * count,) of the images that :meth:`draw` returns."""
        if how == "random":
            return repeated_subset(self.labels, count, self.class_names, self.generator)
        return torch.cat([self._of_class(label, count, how) for label in range(len(self.class_names))])

    def _of_class(self, label: int, count: int, how: str) -> Tensor:
        members = (self.labels == label).nonzero().flatten()
        distinct = min(count, len(members))
        if how in ("k_means", "k_means_of_pixels"):
            images = self.images[members]
            found = self.features(images) if how == "k_means" else unit_range(images).flatten(1)
            members = members[nearest_to_centres(found, distinct, self.generator)]
        return members[torch.arange(count, device=members.device) % distinct]
