"""Convert stored pixels to a network's input: to [0, 1], then normalised by mean and std per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalise:
    """Callable on images (n, channels, H, W): uint8, or floats already in [0, 1]; returns normalised float32."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (unit_range(images) - self.mean) / self.std


def unit_range(images: Tensor) -> Tensor:
    """uint8 pixels as float32 in [0, 1]; other types are taken to be in that range already and returned as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images
