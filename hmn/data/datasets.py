"""The kinds of dataset, as uint8 tensors split into train, held out and test."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmn.config import DatasetConfig, require
from hmn.data import arrays, folder, official
from hmn.data.splits import Source, Split, check_classes, listing, split_off
from hmn.errors import ConfigError, DataError

__all__ = ["RealData", "Shape", "display_name", "load", "peek"]

TEST_SPLIT_SEED = 0  # for datasets without a test split: the one made for them must not depend on a run's seed


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The properties of a dataset that a budget depends on."""

    classes: int
    channels: int
    image_size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class RealData:
    """A dataset in memory. ``mean`` and ``std`` are per channel, of pixels in [0, 1]."""

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    held_out: Split  # from the official training split, never trained on; may be empty, (0, channels, H, W)
    test: Split
    notes: tuple[str, ...]  # what loading had to decide, for the log
    fingerprint: str  # SHA-256 over shapes, images and labels of the three splits

    def to(self, device: torch.device | str) -> RealData:
        splits = {name: getattr(self, name).to(device) for name in ("train", "held_out", "test")}
        return dataclasses.replace(self, **splits)

    def fingerprint_of(self, class_names: Sequence[str]) -> str:
        """The ``fingerprint`` of these data restricted to the classes ``class_names``, in this order."""
        if tuple(class_names) == self.class_names:
            return self.fingerprint
        labels = [self.class_names.index(name) for name in class_names]
        return _fingerprint(*(split.of_classes(labels) for split in (self.train, self.held_out, self.test)))


def peek(config: DatasetConfig, data_dir: Path) -> Shape:
    """The dataset's shape from the configuration, folder names and headers, or an array's labels: no pixel is read.

    Raises :class:`ConfigError` or :class:`DataError` if these already show that the dataset cannot be loaded.
    """
    _check(config)
    root = _root(config, data_dir)
    side, channels = config.image_size, config.channels
    if config.kind == "arrays":
        classes, side, channels = arrays.peek_npz(config, root)
    elif config.kind == "folder":
        tree = folder.find(root, config.test_fraction)
        classes, channels = len(tree.class_names), channels or folder.channels_of(tree)
    elif config.kind == "tiny_imagenet":
        classes = official.count_tiny_classes(root)
    else:
        if config.kind == "imagenet10" and config.root is not None:
            official.check_imagenet10(root)
        classes = 10 if config.kind == "digits" else official.CLASSES[config.kind]
    _check_count(config, classes)
    return Shape(classes=len(_chosen(config, classes)), channels=channels, image_size=side)


def display_name(config: DatasetConfig) -> str:
    """The name in tables and run ids: ``dataset.name`` or a default, which shows the class range if there is one."""
    if config.name is not None or config.class_range is None:
        return _whole_name(config)
    first, last = config.class_range
    return f"{_whole_name(config)}_classes{first}-{last - 1}"


def _whole_name(config: DatasetConfig) -> str:
    if config.name is not None:
        return config.name
    if config.kind == "folder":
        return Path(os.path.abspath(_path(config.root))).name  # of a link, as its target may differ by machine
    return _path(config.root).stem if config.kind == "arrays" else config.kind


def load(config: DatasetConfig, data_dir: Path, generator: torch.Generator) -> RealData:
    """Load and check a dataset, downloading it if necessary and allowed.

    ``generator`` (CPU) draws the held-out images. Splits and statistics are those of the whole dataset, even if only
    some of its classes are used. Raises :class:`DataError` naming the class, file or array that cannot be used.
    """
    _check(config)
    source = _LOADERS[config.kind](config, _root(config, data_dir))
    _check_count(config, len(source.class_names))
    train, test = _with_test(source, config)
    train, held_out = split_off(train, config.held_out_fraction, generator)
    mean, std = _statistics(config, train.images)
    chosen, class_names, notes = _chosen(config, len(source.class_names)), source.class_names, source.notes
    if chosen != list(range(len(class_names))):
        train, held_out, test = (split.of_classes(chosen) for split in (train, held_out, test))
        class_names = tuple(class_names[label] for label in chosen)
        notes += (f"{len(chosen)} of {len(source.class_names)} classes: {listing(class_names)}",)
    return RealData(
        name=display_name(config),
        class_names=class_names,
        mean=mean,
        std=std,
        train=train,
        held_out=held_out,
        test=test,
        notes=notes,
        fingerprint=_fingerprint(train, held_out, test),
    )


def measure(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel of uint8 (N, channels, H, W), as pixels in [0, 1].

    Both come from exact counts of the 256 values, so neither depends on the order or the number of images.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(4096):  # counting copies a chunk's channel
        for channel, pixels in enumerate(chunk.unbind(1)):
            counts[channel] += torch.bincount(pixels.flatten(), minlength=256)
    share = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


_LOADERS: dict[str, Callable[[DatasetConfig, Path], Source]] = {
    "mnist": official.mnist,
    "fashion_mnist": official.fashion_mnist,
    "svhn": official.svhn,
    "cifar10": official.cifar10,
    "cifar100": official.cifar100,
    "tiny_imagenet": official.tiny_imagenet,
    "imagenet10": official.imagenet10,
    "folder": folder.read,
    "arrays": arrays.npz,
    "digits": arrays.digits,
}


def _check(config: DatasetConfig) -> None:
    """Refuse settings that this kind of dataset would not use."""
    kind, share = config.kind, config.test_fraction
    if kind == "digits" and share is None:
        raise ConfigError("dataset.test_fraction=null: must be given for dataset=digits")
    if kind not in ("digits", "folder") and share is not None:
        raise ConfigError(f"dataset.test_fraction={share}: must be null, dataset={kind} has a test split of its own")
    if kind == "digits" and config.root is not None:
        raise ConfigError(f"dataset.root={config.root}: must be null, dataset=digits comes with scikit-learn")


def _check_count(config: DatasetConfig, found: int) -> None:
    if found < 2:
        raise DataError(f"dataset={_whole_name(config)} has {found} class: at least 2 are needed")
    if config.classes not in (None, found):
        raise DataError(f"dataset.classes={config.classes}: dataset={_whole_name(config)} has {found}")


def _chosen(config: DatasetConfig, classes: int) -> list[int]:
    """The labels of the classes to use, out of ``classes``, in the order in which they are renumbered."""
    order = list(range(classes))
    if config.class_order is not None:
        # The generator of the published orders (DM's continual learning: Zhao & Bilen, WACV 2023)
        order = np.random.RandomState(config.class_order).permutation(classes).tolist()
    first, last = config.class_range or (0, classes)
    rule = f"within the {classes} classes of dataset={_whole_name(config)}"
    require("dataset.class_range", last <= classes, config.class_range, rule)
    return order[first:last]


def _path(root: str) -> Path:
    return Path(root).expanduser()


def _root(config: DatasetConfig, data_dir: Path) -> Path:
    return data_dir / config.kind if config.root is None else _path(config.root)


def _with_test(source: Source, config: DatasetConfig) -> tuple[Split, Split]:
    """The train and test splits, checked to have every class."""
    if source.test is not None:
        check_classes(source.train, source.class_names, "train")
        check_classes(source.test, source.class_names, "test")
        return source.train, source.test
    check_classes(source.train, source.class_names, f"dataset={_whole_name(config)}", least=2)
    return split_off(source.train, config.test_fraction, torch.Generator().manual_seed(TEST_SPLIT_SEED))


def _statistics(config: DatasetConfig, images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The configured mean and std; either one that is null is measured."""
    if config.mean is not None and config.std is not None:
        return tuple(config.mean), tuple(config.std)
    mean, std = measure(images)
    if config.std is None and min(std) == 0:
        raise DataError("all training pixels of a channel are equal: set dataset.std")
    return tuple(config.mean or mean), tuple(config.std or std)


def _fingerprint(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(repr(tuple(split.images.shape)).encode())
        digest.update(memoryview(split.images.cpu().contiguous().numpy()))
        digest.update(memoryview(split.labels.cpu().numpy().astype("<i8")))
    return digest.hexdigest()
