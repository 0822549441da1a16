"""Convert images of any size and pixel format to uint8 arrays of one shape."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from hmn.errors import DataError

Item = TypeVar("Item")
CHUNK = 128  # images per task of the thread pool
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # tried in this order; no other format is read
TARGETS = {1: "L", 3: "RGB"}  # Pillow's mode for a number of channels
GREY = ("1", "L", "LA")
MODE_NAMES = {"1": "black-and-white", "L": "grey", "LA": "grey with alpha", "P": "palette"}


def stack(
    decode: Callable[[Item], tuple[np.ndarray, str]], items: Sequence[Item], shape: tuple[int, int, int], label: str
) -> tuple[Tensor, list[str]]:
    """Decode every item in threads: returns images uint8 (N, *shape) and their N original modes.

    Raises the error of the first item (by position) that cannot be decoded.
    """
    try:
        images = np.empty((len(items), *shape), np.uint8)
    except MemoryError:
        size = len(items) * math.prod(shape) / 2**30
        raise DataError(
            f"{label}: {len(items)} images of side {shape[-1]} take {size:.0f} GiB of memory: lower "
            "dataset.image_size or use fewer images"
        ) from None
    modes = [""] * len(items)

    def fill(start: int) -> int:
        stop = min(start + CHUNK, len(items))
        for i in range(start, stop):
            images[i], modes[i] = decode(items[i])
        return stop - start

    Image.init()  # register every file format now: threads that do so on demand would race
    workers = min(8, os.cpu_count() or 1)
    bar = tqdm(total=len(items), desc=f"reading {label}", unit="img", disable=None)
    with bar, ThreadPoolExecutor(workers) as pool:
        for done in pool.map(fill, range(0, len(items), CHUNK)):
            bar.update(done)
    return torch.from_numpy(images), modes


def stack_files(paths: Sequence[Path], side: int, channels: int, label: str) -> tuple[Tensor, list[str]]:
    """The image files ``paths`` as uint8 (N, channels, side, side), and their original modes.

    Raises :class:`DataError` naming the file that is not an image, is truncated or is corrupt.
    """
    decode = partial(_decode_file, side=side, channels=channels)
    return stack(decode, paths, (channels, side, side), label)


def stack_array(array: np.ndarray, side: int, channels: int, label: str) -> tuple[Tensor, list[str]]:
    """Pixels uint8 (N, H, W, 1 or 3) as uint8 (N, channels, side, side), and their original modes."""
    if array.shape[1:] == (side, side, channels):
        return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))), [TARGETS[channels]] * len(array)
    decode = partial(_decode_pixels, side=side, channels=channels)
    return stack(decode, array, (channels, side, side), label)


def fit(image: Image.Image, side: int, channels: int) -> np.ndarray:
    """``image`` as uint8 (channels, side, side): converted, resized to a short side of ``side``, and centre-cropped.

    Both steps round as torchvision's ``Resize(side)`` and ``CenterCrop(side)`` do. An image that already has the size
    and format keeps its exact pixels. Orientation tags are ignored.
    """
    image = _convert(image, TARGETS[channels])
    short = min(image.size)
    if short != side:
        image = image.resize([side if n == short else int(side * n / short) for n in image.size], Image.BILINEAR)
    left, top = (round((n - side) / 2) for n in image.size)
    pixels = np.asarray(image)[top : top + side, left : left + side]
    return pixels.reshape(side, side, channels).transpose(2, 0, 1)


def is_grey(path: Path) -> bool:
    """Whether the file is a grey image, by its header; false for a file that cannot be read, which reading names."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode in GREY or image.mode.startswith("I;16")
    except Exception:  # as in _decode_file
        return False


def conversions(modes: Sequence[str], channels: int, paths: Sequence[Path] | None = None) -> tuple[str, ...]:
    """A note for each pixel format that :func:`fit` had to convert, naming its first file if there are ``paths``."""
    target = TARGETS[channels]
    notes = []
    for mode, count in sorted(Counter(modes).items()):
        if mode != target:
            what = f"{count} {MODE_NAMES.get(mode, mode)} {'image' if count == 1 else 'images'}"
            first = "" if paths is None else f": first {paths[modes.index(mode)]}"
            notes.append(f"converted {what} to {MODE_NAMES.get(target, target)}{first}")
    return tuple(notes)


def _convert(image: Image.Image, target: str) -> Image.Image:
    if image.mode == target:
        return image
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known range: save it as PNG with 8 or 16 bits per channel")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the conversion that Pillow asks for
    return image.convert(target)


def _decode_file(path: Path, side: int, channels: int) -> tuple[np.ndarray, str]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            return fit(image, side, channels), image.mode
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "not an image, or its header is damaged"
    except Exception as error:  # damaged bytes make Pillow's decoders raise errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
    raise DataError(f"{path} cannot be read ({reason}): replace or remove it")


def _decode_pixels(pixels: np.ndarray, side: int, channels: int) -> tuple[np.ndarray, str]:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return fit(image, side, channels), image.mode
