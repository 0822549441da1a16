"""The official formats, tested with small files in them, to which the checksums are patched."""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import http.server
import io
import pickle
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from hmn.config import DatasetConfig
from hmn.data import datasets, official, vision
from hmn.errors import DataError
from hmn.explain import explain


def load(kind: str, data_dir: Path, **changes: object) -> datasets.RealData:
    settings = {"kind": kind, "image_size": 32, "held_out_fraction": 0.0, "download": False, "std": [1.0, 1.0, 1.0]}
    generator = torch.Generator().manual_seed(0)
    return datasets.load(DatasetConfig(**settings | changes), data_dir, generator)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def noise(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def refused(message: str, kind: str, data_dir: Path, code: int = 2, **changes: object) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(kind, data_dir, **changes)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == code


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    """The base URL of a server for ``tmp_path/server`` on the loopback interface."""
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


# CIFAR


def write_cifar(
    archive: Path, monkeypatch, kind: str, url: str = "http://absent.invalid"
) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Write ``archive``: per class, an image per batch for CIFAR-10, two training and one test image for CIFAR-100."""
    classes = 10 if kind == "cifar10" else 100
    dataset = getattr(vision.torchvision().datasets, kind.upper())
    names = [name for name, _ in (*dataset.train_list, *dataset.test_list)]
    contents, written = {}, {}
    for seed, name in enumerate(names):
        labels = [(7 * i + seed) % classes for i in range(classes * (2 if name == "train" else 1))]
        written[name] = (noise(seed, len(labels)), labels)
        batch = {"data": written[name][0].reshape(len(labels), -1)}
        batch |= {"labels": labels} if classes == 10 else {"fine_labels": labels, "coarse_labels": [0] * len(labels)}
        contents[name] = pickle.dumps(batch)
    meta_name, key = dataset.meta["filename"], dataset.meta["key"]
    contents[meta_name] = pickle.dumps({key: [f"class {i}" for i in range(classes)]})
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{dataset.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(dataset, "url", f"{url}/{archive.name}")
    for attribute in ("train_list", "test_list"):
        patched = [[name, md5(contents[name])] for name, _ in getattr(dataset, attribute)]
        monkeypatch.setattr(dataset, attribute, patched)
    monkeypatch.setattr(dataset, "meta", {"filename": meta_name, "key": key, "md5": md5(contents[meta_name])})
    return written


@pytest.mark.parametrize(
    ("kind", "archive", "classes"),
    [("cifar10", "cifar-10-python.tar.gz", 10), ("cifar100", "cifar-100-python.tar.gz", 100)],
)
def test_cifar_is_read_from_its_archive(tmp_path, monkeypatch, kind, archive, classes):
    written = write_cifar(tmp_path / kind / archive, monkeypatch, kind)
    data = load(kind, tmp_path)
    assert data.class_names == tuple(f"class {i}" for i in range(classes))
    for split, is_test in ((data.train, False), (data.test, True)):
        batches = [batch for name, batch in written.items() if ("test" in name) == is_test]
        pixels = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        order = np.argsort(labels, kind="stable")
        assert np.array_equal(split.labels, labels[order])
        assert np.array_equal(split.images, pixels[order])
    (tmp_path / kind / archive).unlink()  # the unpacked files suffice from now on
    assert load(kind, tmp_path).fingerprint == data.fingerprint
    assert len(list((tmp_path / kind).iterdir())) == 1


def test_a_step_of_cifar100_is_the_classes_of_its_order(tmp_path, monkeypatch):
    written = write_cifar(tmp_path / "cifar100" / "cifar-100-python.tar.gz", monkeypatch, "cifar100")
    data = load("cifar100", tmp_path, class_order=4, class_range=[20, 40])
    step = np.random.RandomState(4).permutation(100)[20:40].tolist()
    assert data.class_names == tuple(f"class {label}" for label in step)
    for name, split in (("train", data.train), ("test", data.test)):
        pixels, labels = written[name]
        chosen = [pixels[i] for label in step for i in range(len(labels)) if labels[i] == label]
        assert np.array_equal(split.images.numpy(), np.stack(chosen))
        assert split.labels.tolist() == sorted(split.labels.tolist()) and set(split.labels.tolist()) == set(range(20))


@pytest.mark.parametrize("kind", ["mnist", "cifar10", "svhn", "tiny_imagenet"])
def test_an_archive_in_the_place_of_its_folder_is_refused(tmp_path, kind):
    archive = tmp_path / "archive"
    archive.touch()
    refused(f"dataset.root={archive}: is a file: give its folder instead", kind, tmp_path, root=str(archive))


def test_cifar_is_downloaded_if_allowed(tmp_path, monkeypatch, server):
    write_cifar(tmp_path / "server" / "cifar-10-python.tar.gz", monkeypatch, "cifar10", server)
    refused(r"cifar-10-python\.tar\.gz does not exist: .* set dataset.download=true", "cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()
    here = tmp_path / "mine"
    assert len(load("cifar10", tmp_path, download=True, root=str(here)).train) == 50
    assert sorted(path.name for path in here.iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_a_server_that_says_nothing_is_not_waited_for_without_end(tmp_path, monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))
    write_cifar(tmp_path / "a.tar.gz", monkeypatch, "cifar10", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setattr(official, "SILENT_SECONDS", 0.2)
    with silent:
        refused(r"cannot be downloaded \(.*timed out.*\): put the file at", "cifar10", tmp_path, 1, download=True)
    assert socket.getdefaulttimeout() is None


def test_a_full_disk_is_not_blamed_on_the_server(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(official.vision.torchvision().datasets.utils, "download_url", full)
    with pytest.raises(OSError) as raised:
        load("cifar10", tmp_path, download=True)
    assert explain(raised.value)[0].startswith("no space left on the disk")


def test_a_wrong_download_leaves_nothing_behind(tmp_path, monkeypatch, server):
    archive = tmp_path / "server" / "cifar-10-python.tar.gz"
    write_cifar(archive, monkeypatch, "cifar10", server)
    archive.write_bytes(b"a login page")
    refused(
        rf"{server}/{archive.name}: the downloaded file has a wrong checksum", "cifar10", tmp_path, 1, download=True
    )
    archive.unlink()
    message = (
        rf"{server}/{archive.name} cannot be downloaded \(.*404.*\): put the file at {tmp_path}/cifar10/{archive.name}"
    )
    refused(message, "cifar10", tmp_path, 1, download=True)
    assert list((tmp_path / "cifar10").iterdir()) == []


def test_wrong_checksums_name_the_file_and_leave_it(tmp_path, monkeypatch):
    archive = tmp_path / "cifar10" / "cifar-10-python.tar.gz"
    write_cifar(archive, monkeypatch, "cifar10")
    good = archive.read_bytes()
    archive.write_bytes(good + b"x")
    refused(rf"{archive}: wrong checksum", "cifar10", tmp_path, download=True)
    assert archive.read_bytes() == good + b"x"
    archive.write_bytes(good)
    load("cifar10", tmp_path)
    for name in ("data_batch_3", "test_batch", "batches.meta"):
        path = archive.parent / "cifar-10-batches-py" / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"!")
        refused(rf"{path}: wrong checksum", "cifar10", tmp_path)
        path.unlink()
        refused(rf"{path} is missing", "cifar10", tmp_path)
        path.write_bytes(content)
    load("cifar10", tmp_path)


def test_official_images_take_the_configured_size_and_channels(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar10" / "cifar-10-python.tar.gz", monkeypatch, "cifar10")
    data = load("cifar10", tmp_path, image_size=16, channels=1, std=[1.0])
    assert data.train.images.shape == (50, 1, 16, 16)
    assert data.notes == ("converted 60 RGB images to grey",)


def test_the_held_out_share_comes_from_train(tmp_path, monkeypatch):
    written = write_cifar(tmp_path / "cifar10" / "cifar-10-python.tar.gz", monkeypatch, "cifar10")
    data = load("cifar10", tmp_path, held_out_fraction=0.2)
    assert torch.bincount(data.held_out.labels).tolist() == [1] * 10
    assert torch.bincount(data.train.labels).tolist() == [4] * 10
    both = torch.cat([data.train.images, data.held_out.images]).flatten(1).unique(dim=0)
    train = np.concatenate([images for name, (images, _) in written.items() if name != "test_batch"])
    assert torch.equal(both, torch.from_numpy(train).flatten(1).unique(dim=0))


# MNIST and Fashion-MNIST


@pytest.fixture(params=["mnist", "fashion_mnist"])
def mnist(request, tmp_path, monkeypatch) -> tuple[str, Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The kind, the folder of its four packed files, which is written, and the images and labels in them."""
    name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[request.param]
    dataset = getattr(vision.torchvision().datasets, name)
    folder = tmp_path / request.param / name / "raw"
    folder.mkdir(parents=True)
    written, resources = {}, []
    for seed, (part, count) in enumerate((("train", 23), ("t10k", 11))):
        images, labels = noise(seed, count)[:, 0, :28, :28], (np.arange(count) * 3 % 10).astype(np.uint8)
        written[part] = (images, labels)
        files = {"images-idx3": ((2051, count, 28, 28), images), "labels-idx1": ((2049, count), labels)}
        for kind, (header, array) in files.items():
            path = folder / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(np.array(header, ">i4").tobytes() + array.tobytes()))
            resources.append((path.name, md5(path.read_bytes())))
    monkeypatch.setattr(dataset, "resources", resources)
    monkeypatch.setattr(dataset, "mirrors", ["http://absent.invalid/"])
    return request.param, folder, written


def test_mnist_is_read_from_its_packed_files(tmp_path, mnist):
    kind, _, written = mnist
    data = load(kind, tmp_path, image_size=28, channels=1, std=[1.0])
    names = {"mnist": tuple("0123456789"), "fashion_mnist": ("T-shirt/top", "Trouser", "Pullover")}[kind]
    assert data.class_names[: len(names)] == names and len(data.class_names) == 10
    for split, (pixels, labels) in ((data.train, written["train"]), (data.test, written["t10k"])):
        order = np.argsort(labels, kind="stable")
        assert np.array_equal(split.labels, labels[order])
        assert np.array_equal(split.images[:, 0], pixels[order])


def test_damaged_or_missing_mnist_files_are_named_and_downloaded(tmp_path, mnist, monkeypatch, server):
    kind, folder, _ = mnist
    settings = {"image_size": 28, "channels": 1, "std": [1.0]}
    path = folder / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused(rf"{path}: wrong checksum", kind, tmp_path, download=True, **settings)
    path.unlink()
    refused(rf"{path} does not exist", kind, tmp_path, **settings)
    (tmp_path / "server" / path.name).write_bytes(content)
    monkeypatch.setattr(getattr(vision.torchvision().datasets, folder.parent.name), "mirrors", [f"{server}/"])
    assert len(load(kind, tmp_path, download=True, **settings).test) == 11
    assert path.read_bytes() == content


# SVHN


@pytest.fixture
def svhn(tmp_path, monkeypatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write ``{train,test}_32x32.mat`` to ``tmp_path/svhn``: images along the last axis, digit 0 labelled 10."""
    dataset = vision.torchvision().datasets.SVHN
    folder = tmp_path / "svhn"
    folder.mkdir()
    written, patched = {}, {}
    for seed, (name, count) in enumerate((("train", 23), ("test", 11))):
        digits = np.arange(count) * 3 % 10
        written[name] = (noise(seed, count), digits)
        content = {"X": written[name][0].transpose(2, 3, 1, 0), "y": np.where(digits == 0, 10, digits)[:, None]}
        path = folder / f"{name}_32x32.mat"
        scipy.io.savemat(path, content)
        patched[name] = ["http://absent.invalid", path.name, md5(path.read_bytes())]
    monkeypatch.setattr(dataset, "split_list", patched)
    return written


def test_svhn_is_read_from_its_matrices(tmp_path, svhn):
    data = load("svhn", tmp_path)
    assert data.class_names == tuple("0123456789")
    for split, (pixels, digits) in ((data.train, svhn["train"]), (data.test, svhn["test"])):
        order = np.argsort(digits, kind="stable")
        assert np.array_equal(split.labels, digits[order])
        assert np.array_equal(split.images, pixels[order])


def test_damaged_or_missing_svhn_files_are_named(tmp_path, svhn):
    path = tmp_path / "svhn" / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1])
    refused(rf"{path}: wrong checksum", "svhn", tmp_path, download=True)
    path.unlink()
    refused(rf"{path} does not exist", "svhn", tmp_path)


# Tiny-ImageNet

WNIDS = ["n03000000", "n01000000", "n02000000"]  # deliberately not sorted


def jpeg(path: Path, grey: int, mode: str = "RGB") -> None:
    """Write a flat image, whose value survives JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (64, 64), grey if mode == "L" else (grey,) * 3).save(path, "JPEG")


def write_tiny(tree: Path) -> Path:
    """Write two training images of class c with the pixels 10 c and 10 c + 1, and a validation image with 100 + c."""
    for c, wnid in enumerate(WNIDS):
        for i in range(2):
            jpeg(tree / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 10 * c + i, "L" if i else "RGB")
        (tree / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        jpeg(tree / "val" / "images" / f"val_{2 - c}.JPEG", 100 + c)
    (tree / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    lines = [f"val_{2 - c}.JPEG\t{wnid}\t0\t0\t62\t62\n" for c, wnid in enumerate(WNIDS)]
    (tree / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return tree


def check_tiny(data: datasets.RealData) -> None:
    assert data.class_names == tuple(WNIDS)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and data.test.labels.tolist() == [0, 1, 2]
    assert data.train.images.shape == (6, 3, 64, 64)
    assert data.train.images.float().mean((1, 2, 3)).tolist() == [0, 1, 10, 11, 20, 21]
    assert data.test.images.float().mean((1, 2, 3)).tolist() == [100, 101, 102]


def test_tiny_imagenet_is_read_from_its_tree(tmp_path):
    tree = write_tiny(tmp_path / "tiny_imagenet" / "tiny-imagenet-200")
    data = load("tiny_imagenet", tmp_path, image_size=64)
    check_tiny(data)
    first = tree / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_1.JPEG"
    assert data.notes == (f"converted 3 grey images to RGB: first {first}",)
    check_tiny(load("tiny_imagenet", Path("absent"), image_size=64, root=str(tree)))
    config = DatasetConfig(kind="tiny_imagenet", image_size=64)
    assert datasets.peek(config, tmp_path).classes == 3
    assert datasets.peek(config, Path("absent")).classes == 200


def test_tiny_imagenet_is_downloaded_verified_and_unpacked(tmp_path, monkeypatch, server):
    write_tiny(tmp_path / "made" / "tiny-imagenet-200")
    archive = tmp_path / "server" / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted((tmp_path / "made").rglob("*")):
            packed.write(path, path.relative_to(tmp_path / "made"))
    monkeypatch.setattr(official, "TINY_URL", f"{server}/{archive.name}")
    refused("the downloaded file has a wrong checksum", "tiny_imagenet", tmp_path, 1, image_size=64, download=True)
    monkeypatch.setattr(official, "TINY_MD5", md5(archive.read_bytes()))
    refused("tiny-imagenet-200.zip does not exist", "tiny_imagenet", tmp_path, image_size=64)
    check_tiny(load("tiny_imagenet", tmp_path, image_size=64, download=True))
    archive.unlink()
    check_tiny(load("tiny_imagenet", tmp_path, image_size=64))
    here = tmp_path / "tiny_imagenet"
    assert sorted(path.name for path in here.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_tiny_imagenet_trees_with_parts_missing_are_refused(tmp_path):
    tree = write_tiny(tmp_path / "tiny_imagenet" / "tiny-imagenet-200")
    annotations = tree / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    annotations.write_text(lines + "val_9.JPEG\tn99999999\t0\t0\t1\t1\n")
    refused(rf"{annotations}: val_9.JPEG has the class 'n99999999'", "tiny_imagenet", tmp_path, image_size=64)
    annotations.write_text(lines.replace("val_2", "val_7"))
    missing = tree / "val" / "images" / "val_7.JPEG"
    refused(rf"{missing} cannot be read", "tiny_imagenet", tmp_path, image_size=64)
    annotations.write_text(lines.replace(WNIDS[0], WNIDS[1]))
    refused(f"test has no image of class {WNIDS[0]}", "tiny_imagenet", tmp_path, image_size=64)
    annotations.unlink()
    refused(rf"{annotations} cannot be read", "tiny_imagenet", tmp_path, image_size=64)
    annotations.write_text(lines)
    (tree / "wnids.txt").write_text("\n".join([*WNIDS, "n04000000"]))
    refused(r"train/n04000000/images cannot be listed", "tiny_imagenet", tmp_path, image_size=64)


# ImageNet-10

TEN = [  # in IDC's label order
    ("n02869837", "bonnet"),
    ("n01749939", "green mamba"),
    ("n02488291", "langur"),
    ("n02107142", "doberman"),
    ("n13037406", "gyromitra"),
    ("n02091831", "saluki"),
    ("n04517823", "vacuum"),
    ("n04589890", "window screen"),
    ("n03062245", "cocktail shaker"),
    ("n01773797", "garden spider"),
]


def write_imagenet(root: Path) -> None:
    """Write an image of class c per split, with pixels 20 c in train and 20 c + 1 in val, and one of another class."""
    for offset, split in enumerate(("train", "val")):
        for c, (wnid, _) in enumerate([*TEN, ("n01440764", "tench")]):
            jpeg(root / split / wnid / f"{wnid}_{c}.JPEG", 20 * c + offset)


def test_imagenet10_takes_its_ten_classes_in_their_order(tmp_path):
    write_imagenet(tmp_path)
    data = load("imagenet10", Path("absent"), root=str(tmp_path), image_size=16)
    assert data.class_names == tuple(name for _, name in TEN)
    assert data.train.images.float().mean((1, 2, 3)).tolist() == [20 * c for c in range(10)]
    assert data.test.images.float().mean((1, 2, 3)).tolist() == [20 * c + 1 for c in range(10)]
    shape = datasets.peek(DatasetConfig(kind="imagenet10", root=str(tmp_path), image_size=224), Path("absent"))
    assert shape == datasets.Shape(classes=10, channels=3, image_size=224)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_imagenet_class_is_named(tmp_path, split):
    write_imagenet(tmp_path)
    (tmp_path / split / "n02107142").rename(tmp_path / split / "doberman")
    message = rf"{tmp_path / split} lacks the class folder n02107142 \(doberman\)"
    refused(message, "imagenet10", Path("absent"), root=str(tmp_path))
    with pytest.raises(DataError, match=message):
        datasets.peek(DatasetConfig(kind="imagenet10", root=str(tmp_path), image_size=224), Path("absent"))
