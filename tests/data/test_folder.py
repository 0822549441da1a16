"""Class-folder trees of real image files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from hmn.config import DatasetConfig
from hmn.data import datasets, folder, images, vision
from hmn.data.datasets import Shape
from hmn.errors import DataError

SIDE = 8


def noise(seed: int, height: int = SIDE, width: int = SIDE, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path)
    return path


def config(root: Path, **changes: object) -> DatasetConfig:
    settings = {"kind": "folder", "root": str(root), "image_size": SIDE, "held_out_fraction": 0.0}
    return DatasetConfig(**settings | changes)


def load(root: Path, **changes: object) -> datasets.RealData:
    generator = torch.Generator().manual_seed(0)
    return datasets.load(config(root, **changes), Path("absent"), generator)


def peek(root: Path, **changes: object) -> Shape:
    return datasets.peek(config(root, **changes), Path("absent"))


def tree(root: Path, names: tuple[str, ...] = ("train", "test"), classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """A tree with two images per class and split, each of its own noise."""
    for seed, (name, class_name, i) in enumerate((n, c, i) for n in names for c in classes for i in range(2)):
        save(root / name / class_name / f"{i}.png", noise(seed))
    return root


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def refused(message: str, root: Path, **changes: object) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(root, **changes)
    assert "\n" not in str(caught.value)


# Layouts


def test_images_of_the_right_size_keep_their_pixels(tmp_path):
    data = load(tree(tmp_path))
    assert (data.class_names, data.name, data.notes) == (("ant", "bee"), tmp_path.name, ())
    for split, first in ((data.train, 0), (data.test, 4)):
        assert split.labels.tolist() == [0, 0, 1, 1]
        assert torch.equal(split.images, torch.stack([chw(noise(first + i)) for i in range(4)]))
    assert peek(tmp_path) == Shape(classes=2, channels=3, image_size=SIDE)


GREYS = [Image.fromarray(noise(0, channels=1)), Image.new("1", (SIDE, SIDE)), Image.new("LA", (SIDE, SIDE))]
GREYS += [Image.fromarray(noise(0, channels=1).astype(np.uint16))]
COLOURS = [Image.fromarray(noise(0)), Image.new("RGBA", (SIDE, SIDE)), Image.new("P", (SIDE, SIDE))]


@pytest.mark.parametrize("image", [*GREYS, *COLOURS], ids=lambda image: image.mode)
def test_images_have_their_own_channels_where_none_are_asked_for(tmp_path, image):
    for name, class_name in itertools.product(("train", "test"), ("ant", "bee")):
        save(tmp_path / name / class_name / "deeper" / "0.png", image)
    channels = 1 if image in GREYS else 3
    assert peek(tmp_path, channels=None) == Shape(classes=2, channels=channels, image_size=SIDE)
    data = load(tmp_path, channels=None, std=[1.0] * channels)
    assert data.train.images.shape == (2, channels, SIDE, SIDE)
    assert peek(tmp_path, channels=4 - channels).channels == 4 - channels


def test_one_class_in_colour_makes_all_colour_and_a_later_image_does_not(tmp_path):
    grey, colour = noise(0, channels=1), noise(0)
    for class_name, members in (("ant", [grey, colour]), ("bee", [grey, grey])):
        for i, pixels in enumerate(members):
            save(tmp_path / "train" / class_name / f"{i}.png", pixels)
        save(tmp_path / "test" / class_name / "0.png", colour)
    data = load(tmp_path, channels=None)
    assert data.train.images.shape[1] == 1
    assert data.notes == (f"converted 3 RGB images to grey: first {tmp_path / 'train' / 'ant' / '1.png'}",)
    save(tmp_path / "train" / "bee" / "0.png", colour)
    assert peek(tmp_path, channels=None).channels == 3


def test_an_image_that_cannot_be_read_is_named_when_it_is(tmp_path):
    root = tree(tmp_path)
    (root / "train" / "ant" / "0.png").write_bytes(b"no image")
    assert peek(root, channels=None).channels == 3
    refused("0.png cannot be read", root, channels=None)


def test_some_classes_of_a_tree_in_an_order_of_their_own(tmp_path):
    names = ("ant", "bee", "cat", "dog")
    whole = load(tree(tmp_path, classes=names))
    some = {"class_order": 2, "class_range": [1, 3]}
    data = load(tmp_path, **some)
    wanted = [names[label] for label in np.random.RandomState(2).permutation(4)[1:3]]
    assert data.class_names == tuple(wanted) and wanted != sorted(wanted)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    for label, name in enumerate(wanted):
        expected = whole.test.images[whole.test.labels == names.index(name)]
        assert torch.equal(data.test.images[data.test.labels == label], expected)
    assert peek(tmp_path, **some).classes == 2
    assert data.name == f"{tmp_path.name}_classes1-2"


def test_val_serves_as_test_and_gives_way_to_it(tmp_path):
    tree(tmp_path, ("train", "val"))
    assert torch.equal(load(tmp_path).test.images[0], chw(noise(4)))
    save(tmp_path / "test" / "ant" / "0.png", noise(50))
    save(tmp_path / "test" / "bee" / "0.png", noise(51))
    data = load(tmp_path)
    assert torch.equal(data.test.images, torch.stack([chw(noise(50)), chw(noise(51))]))
    assert data.notes == (f"{tmp_path / 'val'} is not used: {tmp_path / 'test'} is the test split",)


def test_class_folders_alone_are_divided(tmp_path):
    for i in range(20):
        save(tmp_path / ("ant" if i < 15 else "bee") / f"{i:02}.png", noise(i))
    data = load(tmp_path, test_fraction=0.2, held_out_fraction=0.25)
    assert [torch.bincount(s.labels).tolist() for s in (data.train, data.held_out, data.test)] == [
        [9, 3],
        [3, 1],
        [3, 1],
    ]
    everything = torch.cat([data.train.images, data.held_out.images, data.test.images])
    assert len(everything.unique(dim=0)) == 20
    assert peek(tmp_path, test_fraction=0.2).classes == 2


def test_a_train_folder_without_a_test_folder_is_divided_too(tmp_path):
    tree(tmp_path, ("train",))
    assert [len(s) for s in (load(tmp_path, test_fraction=0.5).train, load(tmp_path, test_fraction=0.5).test)] == [2, 2]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("plane", "train"):
        for i in range(2):
            save(tmp_path / name / f"{i}.png", noise(i))
    assert load(tmp_path, test_fraction=0.5).class_names == ("plane", "train")


def test_images_may_lie_deeper_and_hidden_or_other_files_are_left_out(tmp_path):
    tree(tmp_path)
    deep = save(tmp_path / "train" / "ant" / "more" / "x.PNG", noise(40))
    save(tmp_path / "train" / "ant" / ".thumb.png", noise(41))
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "bee" / "about.txt").write_text("bees")
    data = load(tmp_path)
    assert torch.bincount(data.train.labels).tolist() == [3, 2]
    assert torch.equal(data.train.images[2], chw(noise(40))) and deep.is_file()
    assert data.notes == (f"skipped in train, as not an image: 1, first {tmp_path}/train/bee/about.txt",)


def test_hidden_folders_and_links_that_lead_back_are_left_out(tmp_path):
    tree(tmp_path)
    ant = tmp_path / "train" / "ant"
    save(ant / ".ipynb_checkpoints" / "0-checkpoint.png", noise(40))
    save(tmp_path / "elsewhere" / "y.png", noise(41))
    (ant / "up").symlink_to("..")
    (ant / "itself").symlink_to(".")
    (ant / "linked").symlink_to(tmp_path / "elsewhere")
    assert torch.bincount(load(tmp_path).train.labels).tolist() == [3, 2]


def test_folders_beside_the_splits_are_noted(tmp_path):
    tree(tmp_path)
    save(tmp_path / "valid" / "ant" / "0.png", noise(40))
    assert load(tmp_path).notes == (f"not used, as they lie beside {tmp_path}/train: valid",)


def test_images_that_memory_cannot_hold_are_counted(monkeypatch):
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images.np, "empty", full)
    with pytest.raises(DataError, match="^train: 1024 images of side 1024 take 3 GiB of memory: lower dataset.image_s"):
        images.stack_files([Path("a.png")] * 1024, 1024, 3, "train")


def test_many_files_stay_in_the_order_of_their_names(tmp_path):
    count = 2 * images.CHUNK + 5
    for i in range(count):
        save(tmp_path / "ant" / f"{i:04}.png", np.full((4, 4, 3), [i % 256, i // 256, 7], np.uint8))
    paths = folder.class_files(tmp_path, ["ant"]).per_class[0]
    stacked, modes = images.stack_files(paths, 4, 3, "train")
    pixels = stacked[:, :, 2, 1].long()
    assert (pixels[:, 0] + 256 * pixels[:, 1]).tolist() == list(range(count))
    assert modes == ["RGB"] * count


def test_a_quiet_load_prints_nothing(tmp_path, capfd):
    load(tree(tmp_path))
    assert capfd.readouterr() == ("", "")


# Pixels


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 13), (20, 31), (31, 20), (5, 7), (300, 8), (3, 3), (17, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_torchvision_s_resize_and_centre_crop(size, channels):
    image = Image.fromarray(noise(3, *size, channels))
    transforms = vision.torchvision().transforms
    expected = np.asarray(transforms.CenterCrop(SIDE)(transforms.Resize(SIDE)(image)))
    found = images.fit(image, SIDE, channels)
    assert np.array_equal(found, expected.reshape(SIDE, SIDE, channels).transpose(2, 0, 1))


def test_orientation_tags_are_ignored(tmp_path):
    tree(tmp_path)
    image = Image.fromarray(noise(9))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    plain, tagged = tmp_path / "plain.jpg", tmp_path / "train" / "ant" / "9.jpg"
    image.save(plain)
    image.save(tagged, exif=exif)
    assert torch.equal(load(tmp_path).train.images[2], chw(np.asarray(Image.open(plain))))


GREY = noise(20, channels=1)
ALPHA = np.dstack([noise(21), noise(22, channels=1)])
CMYK = Image.frombytes("CMYK", (SIDE, SIDE), ALPHA.tobytes())
PALETTE = Image.fromarray(noise(23)).quantize(16)


def transparent_palette() -> Image.Image:
    image = PALETTE.copy()
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


@pytest.mark.parametrize(
    ("name", "image", "expected", "format_name"),
    [
        ("a.png", Image.fromarray(GREY), np.dstack([GREY] * 3), "grey"),
        ("a.png", Image.fromarray(GREY > 99), np.dstack([np.where(GREY > 99, 255, 0)] * 3), "black-and-white"),
        ("a.png", Image.fromarray(np.dstack([GREY, GREY // 2])), np.dstack([GREY] * 3), "grey with alpha"),
        ("a.png", Image.fromarray(ALPHA), ALPHA[..., :3], "RGBA"),
        ("a.png", PALETTE, np.asarray(PALETTE.convert("RGB")), "palette"),
        ("a.png", transparent_palette(), np.asarray(PALETTE.convert("RGB")), "palette"),
        ("a.png", Image.fromarray(GREY.astype(np.uint16) * 256 + 200), np.dstack([GREY] * 3), "I;16"),
        ("a.tif", CMYK, np.asarray(CMYK.convert("RGB")), "CMYK"),
    ],
)
def test_other_pixel_formats_become_rgb_and_are_noted(tmp_path, name, image, expected, format_name):
    tree(tmp_path)
    path = save(tmp_path / "train" / "ant" / name, image)
    data = load(tmp_path)
    assert torch.equal(data.train.images[2], chw(expected.astype(np.uint8)))
    assert data.notes == (f"converted 1 {format_name} image to RGB: first {path}",)


KINDS = {".png": "RGB", ".jpg": "RGB", ".jpeg": "RGB", ".bmp": "RGB", ".gif": "P", ".webp": "RGB", ".tif": "RGB"}
KINDS |= {".tiff": "RGB", ".ppm": "RGB", ".pgm": "L", ".pbm": "1", ".pnm": "RGB"}


@pytest.mark.parametrize("suffix", KINDS)
def test_files_of_every_listed_kind_are_read(tmp_path, suffix):
    tree(tmp_path)
    path = save(tmp_path / "train" / "ant" / f"a{suffix}", Image.fromarray(noise(24)).convert(KINDS[suffix]))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    data = load(tmp_path)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(data.train.images[2], chw(expected))


def test_no_kind_of_file_is_listed_that_is_not_tried():
    assert sorted(folder.SUFFIXES) == sorted(KINDS)


def test_a_mix_of_grey_and_rgb_takes_the_configured_channels(tmp_path):
    tree(tmp_path)
    grey = [save(tmp_path / name / "bee" / "grey.png", GREY) for name in ("train", "test")]
    data = load(tmp_path)
    assert torch.equal(data.train.images[4], chw(np.dstack([GREY] * 3)))
    assert data.notes == (f"converted 2 grey images to RGB: first {grey[0]}",)
    data = load(tmp_path, channels=1)
    assert data.train.images.shape == (5, 1, SIDE, SIDE)
    assert np.array_equal(data.train.images[4, 0], GREY)
    assert np.array_equal(data.train.images[0, 0], np.asarray(Image.fromarray(noise(0)).convert("L")))
    assert data.notes == (f"converted 8 RGB images to grey: first {tmp_path / 'train' / 'ant' / '0.png'}",)


# What is refused


@pytest.mark.parametrize(
    ("name", "keep", "reason"), [("x.jpg", 0.6, "truncated"), ("x.png", 0.6, ""), ("x.bmp", 0.5, ""), ("x.jpg", 0, "")]
)
def test_a_truncated_image_is_named(tmp_path, name, keep, reason):
    tree(tmp_path)
    path = save(tmp_path / "test" / "bee" / name, noise(30, 64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    refused(rf"{path} cannot be read \(.*{reason}.*\): replace or remove it", tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_corrupt_image_is_named(tmp_path):
    tree(tmp_path)
    path = save(tmp_path / "train" / "bee" / "x.png", noise(30, 64, 64))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    refused(f"{path} cannot be read", tmp_path)
    path.write_text("not an image")
    refused(rf"{path} cannot be read \(not an image", tmp_path)


def test_pixels_without_a_known_range_are_refused(tmp_path):
    tree(tmp_path)
    path = save(tmp_path / "train" / "bee" / "x.tif", noise(30, channels=1).astype(np.float32))
    refused(rf"{path} cannot be read \(mode F has no known range", tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class_is_named(tmp_path, split):
    tree(tmp_path)
    for name in ("train", "test"):
        save(tmp_path / name / "cat" / "0.png", noise(0))
    (tmp_path / split / "cat" / "0.png").unlink()
    refused(f"class cat has no images in {tmp_path / split / 'cat'}", tmp_path)


def test_differing_classes_are_listed(tmp_path):
    tree(tmp_path)
    for name in ("train/cat", "train/dog", "test/eel"):
        save(tmp_path / name / "0.png", noise(0))
    message = r"the class folders differ, only in train/: cat, dog; only in test/: eel"
    refused(message, tmp_path)
    with pytest.raises(DataError, match=message):
        peek(tmp_path)


def test_a_class_of_one_image_cannot_be_divided(tmp_path):
    tree(tmp_path, ("",))
    save(tmp_path / "cat" / "0.png", noise(0))
    refused("has fewer than 2 images of class cat", tmp_path, test_fraction=0.2)


def test_layouts_that_cannot_be_used(tmp_path):
    absent, empty, single, lone, flat, complete = (tmp_path / str(i) for i in range(6))
    empty.mkdir()
    tree(single, ("train", "test"), ("ant",))
    tree(lone, ("train",))
    save(flat / "train" / "0.png", noise(0))
    save(flat / "test" / "0.png", noise(0))
    tree(complete)
    for root, changes, message in [
        (absent, {}, f"dataset.root: {absent} cannot be listed"),
        (empty, {}, f"dataset.root={empty}: no class folders"),
        (flat, {}, f"dataset.root={flat}: no class folders"),
        (single, {}, "has 1 class: at least 2"),
        (lone, {}, f"dataset.root={lone}: .* set dataset.test_fraction"),
        (complete, {"test_fraction": 0.1}, f"dataset.test_fraction=0.1: must be null, {complete} has test/"),
        (complete, {"classes": 3}, "dataset.classes=3: dataset=5 has 2"),
        (
            tree(tmp_path / "6", ("Train", "Test")),
            {"test_fraction": 0.1},
            "Test, Train are not classes: name the folders",
        ),
        (
            tree(tmp_path / "7", ("train", "valid")),
            {},
            "beside train/, rename valid/ to test/, or set dataset.test_fraction",
        ),
    ]:
        refused(message, root, **changes)
        with pytest.raises(DataError, match=message):
            peek(root, **changes)


# Real files


@pytest.mark.skipif(
    not os.environ.get("HMN_TEST_IMAGES"), reason="HMN_TEST_IMAGES names no class-folder tree of images"
)
def test_a_real_tree_loads():
    root = Path(os.environ["HMN_TEST_IMAGES"])
    data = load(root, image_size=32, held_out_fraction=0.1)
    assert set(data.class_names) == {path.name for path in (root / "train").iterdir()}
    counts = torch.bincount(data.train.labels) + torch.bincount(data.held_out.labels)
    assert counts.tolist() == [len(list((root / "train" / name).iterdir())) for name in data.class_names]
    last = sorted((root / "test" / data.class_names[-1]).iterdir())[-1]
    assert np.array_equal(data.test.images[-1], images.fit(Image.open(last), 32, 3))
