"""Stands in for the training images that containers start from."""

from __future__ import annotations

import torch
from torch import Tensor


class RandomImages:
    """The same uniform noise at every draw, other images for every class; ``draws`` records what was asked for."""

    def __init__(self, classes: int, channels: int, image_size: int, seed: int = 0) -> None:
        self.classes, self.size, self.seed = classes, (channels, image_size, image_size), seed
        self.draws: list[tuple[int, str]] = []

    def draw(self, count: int, how: str = "random") -> Tensor:
        self.draws.append((count, how))
        stream = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.classes * count, *self.size, generator=stream)
