"""Image grids of a condensed set: one row per class."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def class_grid(images: Tensor, labels: Tensor, *, columns: int = 10, rows: int = 20, pixels: int = 64) -> Image.Image:
    """The first ``columns`` images of the first ``rows`` classes, a row each, enlarged to about ``pixels`` a side.

    ``images`` (N, channels, H, W) in [0, 1], ``labels`` (N,). Enlarging repeats pixels, so that none is invented.
    """
    shown = [images[labels == label][:columns] for label in labels.unique(sorted=True)[:rows]]
    channels, side = images.shape[1], images.shape[-1]
    gap = max(1, side // 16)
    width = max(map(len, shown)) * (side + gap) - gap
    canvas = torch.ones(channels, len(shown) * (side + gap) - gap, width)
    for row, pictures in enumerate(shown):
        for column, picture in enumerate(pictures):
            top, left = row * (side + gap), column * (side + gap)
            canvas[:, top : top + side, left : left + side] = picture.cpu()
    return enlarge(to_pil(canvas), max(1, round(pixels / side)))


def to_pil(image: Tensor) -> Image.Image:
    """A picture of ``image`` (channels, H, W) in [0, 1]."""
    array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array)


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
