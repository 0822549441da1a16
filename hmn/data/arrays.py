"""Datasets that are already arrays: a user's ``.npz`` and the digits that ship with scikit-learn."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmn.config import DatasetConfig
from hmn.data.images import conversions, stack_array
from hmn.data.splits import Source, by_class, listing
from hmn.errors import DataError

KEYS = ("x_train", "y_train", "x_test", "y_test")
DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)  # raised for damaged files and object arrays


def from_pixels(
    parts: Mapping[str, tuple[np.ndarray, Tensor]], class_names: tuple[str, ...], config: DatasetConfig
) -> Source:
    """A source made of pixel arrays.

    ``parts`` maps ``train``, and ``test`` if there is one, to pixels uint8 (N, H, W, 1 or 3) and labels int64 (N,).
    """
    splits, modes = {}, []
    channels = config.channels or parts["train"][0].shape[3]
    for name, (pixels, labels) in parts.items():
        side = config.image_size or pixels.shape[1]
        images, part_modes = stack_array(pixels, side, channels, name)
        splits[name] = by_class(images, labels)
        modes += part_modes
    notes = conversions(modes, channels)
    return Source(class_names=class_names, train=splits["train"], test=splits.get("test"), notes=notes)


def npz(config: DatasetConfig, path: Path) -> Source:
    """Read ``x_train y_train x_test y_test`` from an archive: images uint8 (N, H, W) or (N, H, W, 1 or 3), labels (N,).

    Labels are integers that count from 0, up to ``dataset.classes`` - 1 or, where that is null, to the largest label.
    Raises :class:`DataError` naming the array that is missing, has the wrong type or shape, or holds a label that is
    out of range.
    """
    with _open(path) as archive:
        labels = _labels(archive, path)
        classes = config.classes or _count(labels, path)
        parts = {}
        for name, split_labels in labels.items():
            pixels = archive[f"x_{name}"]
            key = f"{path}: x_{name}"
            _check_images(key, pixels.shape, pixels.dtype, config.image_size)
            if len(pixels) != len(split_labels):
                raise DataError(f"{key} has {len(pixels)} images, but y_{name} has {len(split_labels)} labels")
            _check_range(f"{path}: y_{name}", split_labels, classes)
            parts[name] = (pixels if pixels.ndim == 4 else pixels[..., None], split_labels)
    if config.image_size is None and parts["train"][0].shape[1:3] != parts["test"][0].shape[1:3]:
        raise DataError(f"{path}: x_train and x_test differ in size, set dataset.image_size to resize both")
    return from_pixels(parts, _digits(classes), config)


def peek_npz(config: DatasetConfig, path: Path) -> tuple[int, int, int]:
    """Return (classes, image side, channels), read from the labels and the header of ``x_train``; no pixel is read."""
    with _open(path) as archive:
        classes = config.classes or _count(_labels(archive, path), path)
    if config.image_size is not None and config.channels is not None:
        return classes, config.image_size, config.channels
    with _damage_named(path), zipfile.ZipFile(path) as members, members.open("x_train.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    _check_images(f"{path}: x_train", shape, dtype, config.image_size)
    return classes, config.image_size or shape[1], config.channels or (*shape, 1)[3]


def digits(config: DatasetConfig, _root: Path) -> Source:
    """The 1,797 8x8 images of the UCI test digits, with their 17 grey levels scaled to 0 to 255."""
    from sklearn.datasets import load_digits  # takes a second to import, and only this dataset needs it

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    parts = {"train": (pixels, torch.from_numpy(bunch.target.astype(np.int64)))}
    return from_pixels(parts, _digits(10), config)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as an .npz of plain arrays ({reason})") from None


@contextmanager
def _open(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open the archive and check that it has every key. Arrays are read on access; pickled ones are refused."""
    if not path.is_file():
        raise DataError(f"dataset.root={path}: no such file")
    with _damage_named(path), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path} holds a single array: save an .npz with {', '.join(KEYS)}")
        with archive:
            if missing := [key for key in KEYS if key not in archive]:
                raise DataError(f"{path} lacks {', '.join(missing)}")
            yield archive


def _labels(archive: Mapping[str, np.ndarray], path: Path) -> dict[str, Tensor]:
    labels = {}
    for name in ("train", "test"):
        array = archive[f"y_{name}"]
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise DataError(f"{path}: y_{name} must be integers (N,), is {array.dtype} {array.shape}")
        labels[name] = torch.from_numpy(array.astype(np.int64))
    return labels


def _count(labels: Mapping[str, Tensor], path: Path) -> int:
    largest = int(max(split.max() for split in labels.values()))
    if largest >= len(labels["train"]):
        images = len(labels["train"])
        raise DataError(
            f"{path}: the largest label is {largest}, but y_train has {images} images: number the classes from 0 up"
        )
    return largest + 1


def _check_images(key: str, shape: tuple[int, ...], dtype: np.dtype, side: int | None) -> None:
    if dtype != np.uint8:
        raise DataError(f"{key} must be uint8, is {dtype}")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or 0 in shape:
        raise DataError(f"{key} must be (N, H, W) or (N, H, W, C) with 1 or 3 channels, is {shape}")
    if side is None and shape[1] != shape[2]:
        raise DataError(f"{key} has {shape[1]}x{shape[2]} images, set dataset.image_size to make them square")


def _check_range(key: str, labels: Tensor, classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)].unique().tolist()
    if wrong:
        raise DataError(f"{key} must be labels from 0 to {classes - 1}, has {listing([str(label) for label in wrong])}")


def _digits(classes: int) -> tuple[str, ...]:
    return tuple(str(label) for label in range(classes))
