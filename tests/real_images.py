"""Stand-in for the training images that containers start from."""

from __future__ import annotations

import torch
from torch import Tensor


class RandomImages:
    """Uniform noise, the same at every draw and different for every class; ``draws`` records the requests."""

    def __init__(self, classes: int, channels: int, image_size: int, seed: int = 0) -> None:
        self.classes, self.size, self.seed = classes, (channels, image_size, image_size), seed
        self.draws: list[tuple[int, str]] = []

    def draw(self, count: int, how: str = "random") -> Tensor:
        self.draws.append((count, how))
        stream = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.classes * count, *self.size, generator=stream)
