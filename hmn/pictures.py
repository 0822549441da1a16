"""Image grids of a condensed set: one row per class."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

HARDEST, EASIEST = (213, 94, 0), (0, 114, 178)  # vermilion and blue, which remain distinct with colour blindness
COLUMNS, ROWS, PIXELS = 10, 20, 64  # at most as many images of as many classes, enlarged to about this side


def class_grid(
    images: Tensor, labels: Tensor, *, columns: int = COLUMNS, rows: int = ROWS, pixels: int = PIXELS
) -> Image.Image:
    """The first ``columns`` images of the first ``rows`` classes, one class per row.

    ``images`` (N, channels, H, W) in [0, 1], ``labels`` (N,). Images are enlarged to a side of about ``pixels``, by
    repeating pixels rather than interpolating.
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


def pruning_grid(images: Tensor, scores: Tensor, keep: int, hardest: int) -> Image.Image:
    """The over-budget set before pruning: one row per class, from its hardest image to its easiest.

    ``images`` (C, G, channels, H, W) in [0, 1], ``scores`` (C, G): their AUM, written below each image. Each class
    keeps ``keep`` images and drops the others: its ``hardest`` hardest ones, and the rest from the easy end. Dropped
    images are framed and labelled "hard" or "easy".
    """
    count, side = scores.shape[1], images.shape[-1]
    factor = max(1, round(PIXELS / side))
    font = ImageFont.load_default(max(10, factor * side // 6))
    gap, text = max(8, factor * side // 16), font.size + 4
    width, height = factor * side + gap, factor * side + text + gap
    positions = _across(count, hardest, count - keep - hardest, COLUMNS)
    canvas = Image.new("RGB", (len(positions) * width + gap, min(ROWS, len(scores)) * height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for row, order in enumerate(scores.argsort(dim=1, stable=True)[:ROWS].tolist()):
        for column, position in enumerate(positions):
            left, top, index = gap + column * width, gap + row * height, order[position]
            end, colour = _dropped(position, hardest, hardest + keep)
            canvas.paste(enlarge(to_pil(images[row, index].cpu()), factor), (left, top))
            right, bottom = left + factor * side, top + factor * side
            if end:
                draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=colour, width=3)
            words = f"{end} {scores[row, index].item():.2f}".strip()
            draw.text(((left + right) / 2, bottom + 3), words, fill=colour, font=font, anchor="ma")
    return canvas


def _across(count: int, hardest: int, easiest: int, columns: int) -> list[int]:
    """Ascending positions of at most ``columns`` of ``count`` images, up to a third of them from each dropped end."""
    if count <= columns:
        return list(range(count))
    low, high = min(hardest, columns // 3), min(easiest, columns // 3)
    kept = np.linspace(hardest, count - easiest - 1, min(columns - low - high, count - hardest - easiest))
    return [*range(low), *kept.round().astype(int).tolist(), *range(count - high, count)]


def _dropped(position: int, first_kept: int, first_easy: int) -> tuple[str, tuple[int, int, int]]:
    """The end from which the image at ``position`` in AUM order is dropped, or "" if it stays, and its colour."""
    if position < first_kept:
        return "hard", HARDEST
    return ("easy", EASIEST) if position >= first_easy else ("", (90, 90, 90))


def to_pil(image: Tensor) -> Image.Image:
    """Convert ``image`` (channels, H, W) in [0, 1] to a PIL image."""
    array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array)


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
