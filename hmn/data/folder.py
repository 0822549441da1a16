"""Class-folder trees: one folder per class, named like the class, with images anywhere below it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hmn.config import DatasetConfig
from hmn.data.images import conversions, is_grey, stack_files
from hmn.data.splits import Source, Split, listing
from hmn.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # in lower case


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Where the class folders are. ``test`` is None if the test split is a share of ``train``."""

    train: Path
    test: Path | None
    class_names: tuple[str, ...]  # sorted
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Files:
    """The image files of one split, class by class."""

    per_class: tuple[tuple[Path, ...], ...]
    skipped: tuple[Path, ...] = ()  # files beside them that are not images


def find(root: Path, test_fraction: float | None) -> Tree:
    """Find the tree in ``root``: ``train/`` with ``test/`` or ``val/``, or class folders directly. Reads names only.

    Raises :class:`DataError` if there is no class folder, if the classes of the two splits differ, or if both or
    neither of a test folder and ``test_fraction`` are given.
    """
    top = class_folders(root)
    train = root / "train" if "train" in top and _has_folders(root / "train") else root
    if train == root and set(top) <= {"train", "test", "val"}:
        raise DataError(f"dataset.root={root}: no class folders in it or in its train/, make one per class")
    if train == root and set(map(str.lower, top)) <= SPLITS:
        raise DataError(f"dataset.root={root}: {listing(top)} are not classes: name the folders train/ and test/")
    tests = [name for name in ("test", "val") if train != root and name in top and _has_folders(root / name)]
    if tests and test_fraction is not None:
        raise DataError(f"dataset.test_fraction={test_fraction}: must be null, {root} has {tests[0]}/")
    if not tests and test_fraction is None:
        near = [f"rename {name}/ to test/, or " for name in top if name != "train" and name.lower() in SPLITS][:1]
        raise DataError(
            f"dataset.root={root}: no class folders in a test/ or val/ beside train/, {''.join(near)}set "
            "dataset.test_fraction"
        )
    notes = (f"{root / 'val'} is not used: {root / 'test'} is the test split",) if len(tests) == 2 else ()
    if train != root and (others := sorted(set(top) - {"train", "test", "val"})):
        notes += (f"not used, as they lie beside {train}: {listing(others)}",)
    tree = Tree(
        train=train,
        test=root / tests[0] if tests else None,
        class_names=class_folders(train),
        notes=notes,
    )
    if tree.test is not None:
        check_same_classes(tree.train, tree.test)
    return tree


def read(config: DatasetConfig, root: Path) -> Source:
    """Read the images of the tree in ``root``. Raises :class:`DataError` for an empty class or an unreadable image."""
    tree = find(root, config.test_fraction)
    channels = config.channels or channels_of(tree)
    train = class_files(tree.train, tree.class_names)
    test = None if tree.test is None else class_files(tree.test, tree.class_names)
    return read_files(train, test, tree.class_names, (config.image_size, channels), tree.notes)


def channels_of(tree: Tree) -> int:
    """1 if the first training image of every class is grey, else 3."""
    return 1 if all(_starts_grey(tree.train / name) for name in tree.class_names) else 3


def _starts_grey(folder: Path) -> bool:
    first = next((path for path in _walk(folder) if path.suffix.lower() in SUFFIXES), None)
    return first is not None and is_grey(first)


def read_files(
    train: Files, test: Files | None, class_names: Sequence[str], size: tuple[int, int], notes: tuple[str, ...]
) -> Source:
    """Read the listed files; ``size`` is (side, channels). Notes are added on what was converted or skipped."""
    paths, modes, splits = [], [], []
    for name, files in (("train", train), ("test", test)):
        if files is None:
            splits.append(None)
            continue
        split_paths = [path for members in files.per_class for path in members]
        images, split_modes = stack_files(split_paths, *size, name)
        counts = torch.tensor([len(members) for members in files.per_class])
        splits.append(Split(images, torch.arange(len(counts)).repeat_interleave(counts)))
        paths += split_paths
        modes += split_modes
        if files.skipped:
            notes += (f"skipped in {name}, as not an image: {len(files.skipped)}, first {files.skipped[0]}",)
    notes += conversions(modes, size[1], paths)
    return Source(class_names=tuple(class_names), train=splits[0], test=splits[1], notes=notes)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names of the folders in ``folder``, except hidden ones. Raises :class:`DataError` if unreadable."""
    try:
        return tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))
    except OSError as error:
        raise DataError(f"dataset.root: {folder} cannot be listed ({error.strerror})") from None


def class_files(folder: Path, class_names: Sequence[str], below: str = "") -> Files:
    """The image files in ``folder/<class>/below``, sorted by path. Raises :class:`DataError` naming an empty class."""
    per_class, skipped = [], []
    for name in class_names:
        files = _files(folder / name / below)
        images = tuple(path for path in files if path.suffix.lower() in SUFFIXES)
        if not images:
            raise DataError(f"class {name} has no images in {folder / name}: add some, or remove the class everywhere")
        per_class.append(images)
        skipped += [path for path in files if path.suffix.lower() not in SUFFIXES]
    return Files(per_class=tuple(per_class), skipped=tuple(skipped))


def check_same_classes(train: Path, test: Path) -> None:
    names = {folder: set(class_folders(folder)) for folder in (train, test)}
    differing = []
    for folder, other in ((train, test), (test, train)):
        if only := sorted(names[folder] - names[other]):
            differing.append(f"only in {folder.name}/: {listing(only)}")
    if differing:
        raise DataError(f"dataset.root={train.parent}: the class folders differ, {'; '.join(differing)}")


def _has_folders(folder: Path) -> bool:
    return bool(class_folders(folder))


def _files(folder: Path) -> list[Path]:
    """Every file below ``folder`` that is neither hidden nor in a hidden folder, sorted by path."""
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    """The same files, folder by folder.

    Links are followed, except to a folder above ``folder`` or to one that was already visited.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror})")

    top, seen = Path(os.path.realpath(folder)), set[Path]()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(os.path.realpath(where))
        if real in seen or real in top.parents:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # only one of two links is followed
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))
