"""MNIST, Fashion-MNIST, SVHN, CIFAR-10, CIFAR-100, Tiny-ImageNet and ImageNet-10 from their official files."""

from __future__ import annotations

import contextlib
import errno
import gzip
import http.client
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hmn.config import DatasetConfig
from hmn.data import folder, vision
from hmn.data.arrays import from_pixels
from hmn.data.splits import Source
from hmn.errors import DataError, Unreachable

SILENT_SECONDS = 60.0  # without an answer from the server, before a download counts as failed

CLASSES = {"mnist": 10, "fashion_mnist": 10, "svhn": 10}
CLASSES |= {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet10": 10}
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_FOLDER = "tiny-imagenet-200"
IMAGENET10 = {  # the first ten of IDC's class list, in its label order; these are not Imagenette's
    "n02869837": "bonnet",
    "n01749939": "green mamba",
    "n02488291": "langur",
    "n02107142": "doberman",
    "n13037406": "gyromitra",
    "n02091831": "saluki",
    "n04517823": "vacuum",
    "n04589890": "window screen",
    "n03062245": "cocktail shaker",
    "n01773797": "garden spider",
}


def mnist(config: DatasetConfig, root: Path) -> Source:
    return _idx(vision.torchvision().datasets.MNIST, config, root, tuple(str(digit) for digit in range(10)))


def fashion_mnist(config: DatasetConfig, root: Path) -> Source:
    dataset = vision.torchvision().datasets.FashionMNIST
    return _idx(dataset, config, root, tuple(dataset.classes))


def svhn(config: DatasetConfig, root: Path) -> Source:
    """SVHN's splits train (without ``extra``) and test; digit 0, stored as 10, is class 0."""
    dataset = vision.torchvision().datasets.SVHN
    parts = {}
    for name in ("train", "test"):
        url, filename, md5 = dataset.split_list[name]
        fetch(root, filename, url, md5, config.download)
        part = dataset(root, split=name)
        parts[name] = (part.data.transpose(0, 2, 3, 1), torch.from_numpy(part.labels))
    return from_pixels(parts, tuple(str(digit) for digit in range(10)), config)


def cifar10(config: DatasetConfig, root: Path) -> Source:
    return _cifar(vision.torchvision().datasets.CIFAR10, config, root)


def cifar100(config: DatasetConfig, root: Path) -> Source:
    """CIFAR-100 with the 100 fine labels."""
    return _cifar(vision.torchvision().datasets.CIFAR100, config, root)


def tiny_imagenet(config: DatasetConfig, root: Path) -> Source:
    """Tiny-ImageNet, classes in the order of ``wnids.txt``; the test split is the official validation images."""
    tree = _tiny_tree(root)
    if not tree.is_dir():
        archive = fetch(root, f"{TINY_FOLDER}.zip", TINY_URL, TINY_MD5, config.download)
        unpack(archive, tree)
    wnids = _lines(tree / "wnids.txt")
    train = folder.class_files(tree / "train", wnids, below="images")
    test = _tiny_validation(tree / "val", wnids)
    size = (config.image_size, config.channels)
    return folder.read_files(train, test, wnids, size, ())


def count_tiny_classes(root: Path) -> int:
    tree = _tiny_tree(root)
    return len(_lines(tree / "wnids.txt")) if tree.is_dir() else CLASSES["tiny_imagenet"]


def imagenet10(config: DatasetConfig, root: Path) -> Source:
    """Ten classes of an ImageNet tree that has ``train/<wnid>/`` and ``val/<wnid>/``."""
    check_imagenet10(root)
    train, test = (folder.class_files(root / name, tuple(IMAGENET10)) for name in ("train", "val"))
    size = (config.image_size, config.channels)
    return folder.read_files(train, test, tuple(IMAGENET10.values()), size, ())


def check_imagenet10(root: Path) -> None:
    for split in ("train", "val"):
        present = folder.class_folders(root / split)
        if missing := [f"{wnid} ({name})" for wnid, name in IMAGENET10.items() if wnid not in present]:
            raise DataError(
                f"{root / split} lacks the class folder {', '.join(missing)}: its classes are folders named by wnid"
            )


def fetch(root: Path, filename: str, url: str, md5: str, download: bool) -> Path:
    """The archive ``root/filename`` with a verified checksum, downloaded if it is missing and ``download`` is set."""
    _check_folder(root)
    utils = vision.torchvision().datasets.utils
    path = root / filename
    if path.is_file():
        if not utils.check_integrity(path, md5):
            raise DataError(f"{path}: wrong checksum (its MD5 must be {md5}): remove it to download it again")
        return path
    if not download:
        raise DataError(f"{path} does not exist: put it there, or set dataset.download=true")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:  # never a partial file at `path`
        try:
            with _answers_within(SILENT_SECONDS):
                utils.download_url(url, scratch, filename, md5)
        except (OSError, http.client.HTTPException, RecursionError) as error:  # the last: too many redirects
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Unreachable(f"{url} cannot be downloaded ({error}): put the file at {path}") from None
        except RuntimeError:  # what torchvision raises for a wrong checksum
            raise Unreachable(
                f"{url}: the downloaded file has a wrong checksum (its MD5 must be {md5}): try again, or put the file "
                f"at {path}"
            ) from None
        os.replace(Path(scratch, filename), path)
    return path


def _check_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise DataError(f"dataset.root={root}: is a file: give its folder instead")


@contextlib.contextmanager
def _answers_within(seconds: float) -> Iterator[None]:
    """Within the block, a server silent for this long raises ``OSError``: by itself torchvision would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def unpack(archive: Path, target: Path) -> None:
    """Extract the folder ``target.name`` of ``archive`` to ``target``, atomically: other processes may do the same."""
    print(f"unpacking {archive}", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
        vision.torchvision().datasets.utils.extract_archive(str(archive), scratch)
        try:
            os.rename(Path(scratch, target.name), target)
        except OSError:
            if not target.is_dir():
                raise


def _idx(dataset: type, config: DatasetConfig, root: Path, names: tuple[str, ...]) -> Source:
    """The packed IDX files of MNIST and those made like it, where torchvision puts them."""
    _check_folder(root)
    folder, url = root / dataset.__name__ / "raw", dataset.mirrors[0]
    paths = [fetch(folder, name, f"{url}{name}", md5, config.download) for name, md5 in dataset.resources]
    images = [_bytes(path, header=16).reshape(-1, 28, 28, 1) for path in paths[::2]]
    labels = [torch.from_numpy(_bytes(path, header=8)).long() for path in paths[1::2]]
    return from_pixels(dict(zip(("train", "test"), zip(images, labels, strict=True), strict=True)), names, config)


def _bytes(path: Path, header: int) -> np.ndarray:
    """The unpacked bytes after the header, in memory of their own: torch wants to be able to write."""
    return np.frombuffer(bytearray(gzip.decompress(path.read_bytes())), np.uint8, offset=header)


def _cifar(dataset: type, config: DatasetConfig, root: Path) -> Source:
    batches = root / dataset.base_folder
    if not batches.is_dir():
        unpack(fetch(root, dataset.filename, dataset.url, dataset.tgz_md5, config.download), batches)
    _check_batches(dataset, batches)
    parts = {}
    for name in ("train", "test"):
        part = dataset(root, train=name == "train")
        parts[name] = (part.data, torch.tensor(part.targets))
    return from_pixels(parts, tuple(part.classes), config)


def _check_batches(dataset: type, batches: Path) -> None:
    meta = (dataset.meta["filename"], dataset.meta["md5"])
    for filename, md5 in (*dataset.train_list, *dataset.test_list, meta):
        path = batches / filename
        if not path.is_file():
            raise DataError(f"{path} is missing: remove {batches} to unpack it again")
        if not vision.torchvision().datasets.utils.check_integrity(path, md5):
            raise DataError(f"{path}: wrong checksum (its MD5 must be {md5}): remove {batches} to unpack it again")


def _tiny_tree(root: Path) -> Path:
    """The folder of Tiny-ImageNet: ``root`` itself or the one that the archive unpacks into it."""
    return root if (root / "wnids.txt").is_file() else root / TINY_FOLDER


def _tiny_validation(val: Path, wnids: list[str]) -> folder.Files:
    """The validation images by class, which is the second column of ``val_annotations.txt``; a box follows it."""
    per_class: dict[str, list[Path]] = {wnid: [] for wnid in wnids}
    for line in _lines(val / "val_annotations.txt"):
        filename, wnid = (line.split() + ["", ""])[:2]
        if wnid not in per_class:
            raise DataError(f"{val / 'val_annotations.txt'}: {filename} has the class {wnid!r}, not one of wnids.txt")
        per_class[wnid].append(val / "images" / filename)
    return folder.Files(per_class=tuple(tuple(paths) for paths in per_class.values()))


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): the tree is incomplete") from None
