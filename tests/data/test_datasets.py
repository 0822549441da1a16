"""Splits, statistics, arrays, digits, and what all datasets have in common."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image

from hmn.config import DATASETS, DatasetConfig
from hmn.data import datasets, official, vision
from hmn.data.datasets import Shape
from hmn.data.splits import Split, by_class, split_off
from hmn.errors import ConfigError, DataError

CONF = Path(__file__).parents[2] / "conf"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load(config: DatasetConfig, seed: int = 0) -> datasets.RealData:
    return datasets.load(config, Path("absent"), generator(seed))


def digits(**changes: object) -> DatasetConfig:
    return DatasetConfig(**{"kind": "digits", "image_size": 8, "channels": 1, "test_fraction": 0.2, **changes})


def numbered(counts: list[int]) -> Split:
    """A split with ``counts[c]`` images of class c; image i has the single pixel i."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Split(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)


# Splits


def test_images_are_ordered_by_class_and_keep_their_order_inside_one():
    labels = torch.tensor([2, 0, 1, 0, 2, 1, 0])
    split = by_class(torch.arange(7, dtype=torch.uint8).view(-1, 1, 1, 1), labels)
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert split.images.flatten().tolist() == [1, 3, 6, 2, 5, 0, 4]


def test_a_share_of_each_class_is_split_off():
    split = numbered([20, 26, 3, 2, 1])
    kept, taken = split_off(split, 0.1, generator())
    assert torch.bincount(taken.labels, minlength=5).tolist() == [2, 3, 1, 1, 0]  # rounded, at least 1, never the last
    assert torch.bincount(kept.labels, minlength=5).tolist() == [18, 23, 2, 1, 1]
    pixels = [part.images.flatten().tolist() for part in (kept, taken)]
    assert sorted(pixels[0] + pixels[1]) == list(range(52))
    for part, values in zip((kept, taken), pixels, strict=True):
        assert values == sorted(values)  # the order of classes and within a class is preserved
        assert part.labels.tolist() == split.labels[values].tolist()


def test_a_split_off_share_depends_on_the_generator_alone():
    split = numbered([40, 40])
    first, again, other = (split_off(split, 0.25, generator(seed))[1].images.flatten().tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_nothing_is_split_off_at_fraction_zero():
    kept, taken = split_off(numbered([3, 3]), 0.0, generator())
    assert len(kept) == 6 and taken.images.shape == (0, 1, 1, 1) and taken.labels.shape == (0,)


def test_a_large_fraction_leaves_one_image_of_every_class():
    kept, _ = split_off(numbered([4, 2]), 0.99, generator())
    assert torch.bincount(kept.labels).tolist() == [1, 1]


def test_statistics_are_the_exact_population_ones():
    images = torch.randint(0, 256, (5000, 2, 1, 3), dtype=torch.uint8, generator=generator())  # more than one chunk
    images[:, 1] //= 7
    mean, std = datasets.measure(images)
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)


# Digits


def test_digits_are_scaled_and_complete():
    from sklearn.datasets import load_digits

    data = load(digits())
    bunch = load_digits()
    expected = Counter(
        (label, tuple(round(float(value) * 255 / 16) for value in image.flatten()))
        for image, label in zip(bunch.images, bunch.target.tolist(), strict=True)
    )
    found = Counter(
        (label, tuple(image.flatten().tolist()))
        for split in (data.train, data.held_out, data.test)
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    )
    assert found == expected
    assert data.class_names == tuple("0123456789") and data.name == "digits" and data.notes == ()
    for split in (data.train, data.held_out, data.test):
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert split.images.shape == (len(split), 1, 8, 8)
        assert (split.labels.diff() >= 0).all()
    counts = np.bincount(bunch.target)
    in_test = [round(0.2 * n) for n in counts]
    assert torch.bincount(data.test.labels).tolist() == in_test
    assert torch.bincount(data.held_out.labels).tolist() == [
        round(0.1 * (n - t)) for n, t in zip(counts, in_test, strict=True)
    ]


def test_the_test_split_does_not_depend_on_the_run_but_the_held_out_one_does():
    one, other = load(digits(), seed=1), load(digits(), seed=2)
    assert torch.equal(one.test.images, other.test.images)
    assert not torch.equal(one.held_out.images, other.held_out.images)
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == load(digits(), seed=1).fingerprint


def test_the_test_images_of_digits_are_those_that_kept_results_were_measured_on():
    """A fifth of every class, chosen class after class by torch's permutations from seed 0."""
    from sklearn.datasets import load_digits

    bunch, stream, expected = load_digits(), generator(0), []
    for label in range(10):
        images = np.round(bunch.images[bunch.target == label] * (255 / 16)).astype(np.uint8)
        chosen = torch.randperm(len(images), generator=stream)[: round(0.2 * len(images))]
        expected.append(images[chosen.sort().values.numpy()])
    assert np.array_equal(load(digits()).test.images[:, 0].numpy(), np.concatenate(expected))


def test_statistics_are_measured_on_train_without_the_held_out_images():
    data = load(digits(held_out_fraction=0.5))
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx((pixels.mean().item(),), rel=1e-12)
    assert data.std == pytest.approx((pixels.std(correction=0).item(),), rel=1e-12)


def test_configured_statistics_win_one_by_one():
    measured = load(digits())
    assert load(digits(mean=[0.25], std=[0.5])).mean == (0.25,)
    assert load(digits(std=[0.5])).mean == measured.mean
    assert load(digits(mean=[0.25])).std == measured.std


def test_digits_can_be_resized_and_made_rgb():
    data = load(digits(image_size=16, channels=3))
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert data.notes == ("converted 1797 grey images to RGB",)
    assert torch.equal(data.test.images[:, 0], data.test.images[:, 2])


def test_everything_moves_to_the_device():
    data = load(digits()).to("meta")
    for split in (data.train, data.held_out, data.test):
        assert split.images.device.type == split.labels.device.type == "meta"
    assert data.name == "digits"


# Arrays


def contents(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays of 6x6 RGB images: for each of three classes two for training and one for testing, labels not in order."""
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (6, 6, 6, 3), dtype=np.uint8),
        "y_train": np.array([2, 0, 1, 0, 2, 1]),
        "x_test": random.integers(0, 256, (3, 6, 6, 3), dtype=np.uint8),
        "y_test": np.array([1, 2, 0], dtype=np.uint8),
    }
    return arrays | changes


def npz(folder: Path, arrays: dict[str, np.ndarray], **changes: object) -> DatasetConfig:
    np.savez_compressed(folder / "mine.npz", **arrays)
    return DatasetConfig(**{"kind": "arrays", "root": str(folder / "mine.npz"), "held_out_fraction": 0.0, **changes})


def test_arrays_keep_their_pixels(tmp_path):
    arrays = contents()
    config = npz(tmp_path, arrays)
    data = load(config)
    order = [1, 3, 2, 5, 0, 4]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(data.train.images.numpy(), arrays["x_train"][order].transpose(0, 3, 1, 2))
    assert np.array_equal(data.test.images.numpy(), arrays["x_test"][[2, 0, 1]].transpose(0, 3, 1, 2))
    assert data.held_out.images.shape == (0, 3, 6, 6)
    assert (data.name, data.class_names, data.notes) == ("mine", ("0", "1", "2"), ())
    assert datasets.peek(config, Path("absent")) == Shape(classes=3, channels=3, image_size=6)


def test_grey_arrays_stay_grey_or_become_rgb(tmp_path):
    arrays = contents()
    grey = {key: array[..., 0] if key[0] == "x" else array for key, array in arrays.items()}
    data = load(npz(tmp_path, grey, channels=1))
    assert np.array_equal(data.train.images[:, 0].numpy(), grey["x_train"][[1, 3, 2, 5, 0, 4]])
    data = load(npz(tmp_path, grey))
    assert np.array_equal(data.test.images[:, 1].numpy(), grey["x_test"][[2, 0, 1]])
    assert data.notes == ("converted 9 grey images to RGB",)


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 1), (6, 6, 3)])
@pytest.mark.parametrize("side", [None, 5])
def test_arrays_have_their_own_channels_where_none_are_asked_for(tmp_path, shape, side):
    pixels = np.random.default_rng(2).integers(0, 256, (9, *shape), dtype=np.uint8)
    config = npz(tmp_path, contents(x_train=pixels[:6], x_test=pixels[6:]), channels=None, image_size=side)
    channels = (*shape, 1)[2]
    assert datasets.peek(config, Path("absent")) == Shape(classes=3, channels=channels, image_size=side or 6)
    data = load(config)
    assert (data.train.images.shape[1], data.notes) == (channels, ())


def test_arrays_are_resized_as_images_are(tmp_path):
    arrays = contents(x_train=np.random.default_rng(1).integers(0, 256, (6, 9, 14, 3), dtype=np.uint8))
    data = load(npz(tmp_path, arrays, image_size=5))
    transforms = vision.torchvision().transforms
    fit = transforms.Compose([transforms.Resize(5), transforms.CenterCrop(5)])
    expected = np.stack([np.asarray(fit(Image.fromarray(arrays["x_train"][i]))) for i in (1, 3, 2, 5, 0, 4)])
    assert np.array_equal(data.train.images.numpy(), expected.transpose(0, 3, 1, 2))


def test_the_fingerprint_follows_every_pixel_and_label(tmp_path):
    first = load(npz(tmp_path, contents())).fingerprint
    assert load(npz(tmp_path, contents())).fingerprint == first
    pixels = contents()["x_test"].copy()
    pixels[2, 5, 5, 1] ^= 1
    assert load(npz(tmp_path, contents(x_test=pixels))).fingerprint != first
    labels = [np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 2])]  # the images keep their order
    assert len({load(npz(tmp_path, contents(y_train=y_train))).fingerprint for y_train in labels}) == 2


def test_peeking_reads_no_pixel(tmp_path):
    config = npz(tmp_path, contents())
    with zipfile.ZipFile(config.root) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(config.root, "w") as cut:
        for name, content in members.items():
            cut.writestr(name, content[:140] if name == "x_train.npy" else content)  # the header and a few pixels
    assert datasets.peek(config, Path("absent")) == Shape(classes=3, channels=3, image_size=6)
    with pytest.raises(DataError, match=r"mine\.npz cannot be read"):
        load(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((6, 6, 6, 3), np.float32)}, "x_train must be uint8, is float32"),
        ({"x_test": np.zeros((3, 6, 6, 3), np.int64)}, "x_test must be uint8, is int64"),
        ({"x_train": np.zeros((6, 3, 6, 6), np.uint8)}, r"x_train must be .* 1 or 3 channels, is \(6, 3, 6, 6\)"),
        ({"x_train": np.zeros((6, 108), np.uint8)}, r"x_train must be \(N, H, W\)"),
        ({"x_train": np.zeros((0, 6, 6), np.uint8)}, r"x_train must be \(N, H, W\)"),
        ({"x_train": np.zeros((6, 6, 5), np.uint8)}, "x_train has 6x5 images, set dataset.image_size"),
        ({"x_test": np.zeros((3, 7, 7), np.uint8)}, "x_train and x_test differ in size, set dataset.image_size"),
        ({"x_train": np.zeros((5, 6, 6), np.uint8)}, "x_train has 5 images, but y_train has 6 labels"),
        ({"y_train": np.zeros(6)}, "y_train must be integers .* is float64"),
        ({"y_test": np.zeros((3, 1), np.int64)}, r"y_test must be integers \(N,\), is int64 \(3, 1\)"),
        ({"y_train": np.array([2, 0, 1, 0, 2, -1])}, "y_train must be labels from 0 to 2, has -1"),
        ({"y_test": np.array([0, 1, 4])}, "train has no image of class 3, 4"),
        ({"y_test": np.array([0, 1, 10**12])}, "the largest label is 1000000000000, but y_train has 6 images"),
        ({"y_train": np.array([2, 0, 2, 0, 2, 2])}, "train has no image of class 1"),
        ({"y_test": np.array([2, 0, 2])}, "test has no image of class 1"),
        ({"y_train": np.zeros(6, np.int64), "y_test": np.zeros(3, np.int64)}, "has 1 class: at least 2"),
        ({"x_train": np.array([object()])}, "cannot be read as an .npz of plain arrays .*allow_pickle"),
        ({"y_train": np.array([0, None])}, "cannot be read as an .npz of plain arrays .*allow_pickle"),
    ],
)
def test_unusable_arrays_are_named(tmp_path, changes, message):
    config = npz(tmp_path, contents(**changes))
    with pytest.raises(DataError, match=message) as caught:
        load(config)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_labels_beyond_the_configured_classes_are_refused(tmp_path):
    config = npz(tmp_path, contents(), classes=2)
    with pytest.raises(DataError, match="y_train must be labels from 0 to 1, has 2"):
        load(config)
    with pytest.raises(DataError, match="train has no image of class 3"):
        load(npz(tmp_path, contents(), classes=4))


def test_missing_keys_and_files_are_named(tmp_path):
    arrays = contents()
    del arrays["y_test"], arrays["x_train"]
    config = npz(tmp_path, arrays)
    for read in (load, lambda config: datasets.peek(config, Path("absent"))):
        with pytest.raises(DataError, match=r"mine\.npz lacks x_train, y_test"):
            read(config)
        with pytest.raises(DataError, match=r"none\.npz: no such file"):
            read(DatasetConfig(kind="arrays", root=str(tmp_path / "none.npz")))


def test_files_that_are_no_npz_are_refused(tmp_path):
    config = npz(tmp_path, contents())
    whole = Path(config.root).read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        Path(config.root).write_bytes(damaged)
        with pytest.raises(DataError, match=r"mine\.npz cannot be read"):
            load(config)
    with open(config.root, "wb") as file:
        np.save(file, contents()["x_train"])
    with pytest.raises(DataError, match="holds a single array: save an .npz with x_train, y_train, x_test, y_test"):
        load(config)
    Path(config.root).write_bytes(whole.replace(b"PK\x05\x06", b"PK\x05\x07"))
    with pytest.raises(DataError, match="cannot be read"):
        datasets.peek(config, Path("absent"))


# Classes of a dataset


def imbalanced(folder: Path, **changes: object) -> DatasetConfig:
    """A dataset of five classes with 10, 7, 2, 12 and 5 training images in random order; all images are different."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, counts in (("train", (10, 7, 2, 12, 5)), ("test", (3, 1, 2, 4, 2))):
        arrays[f"y_{split}"] = random.permutation(np.arange(5).repeat(counts))
        arrays[f"x_{split}"] = random.integers(0, 256, (sum(counts), 4, 4), dtype=np.uint8)
    return npz(folder, arrays, **{"channels": 1, "held_out_fraction": 0.3, **changes})


def naive_classes(split: Split, order: list[int], first: int, last: int) -> list[tuple[bytes, int]]:
    """Images and new labels of the classes at positions first .. last - 1 of ``order``, class after class."""
    found = []
    for position in range(first, last):
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            if label == order[position]:
                found.append((image.numpy().tobytes(), position - first))
    return found


def pairs(split: Split) -> list[tuple[bytes, int]]:
    images = [image.numpy().tobytes() for image in split.images]
    return list(zip(images, split.labels.tolist(), strict=True))


@pytest.mark.parametrize("span", [None, (0, 2), (1, 4), (3, 5), (0, 5)])
@pytest.mark.parametrize("seed", [None, 0, 3])
def test_classes_are_chosen_by_order_and_position_in_every_split(tmp_path, seed, span):
    config = imbalanced(tmp_path)
    whole = load(config)
    config = dataclasses.replace(config, class_order=seed, class_range=span and list(span))
    some, (first, last) = load(config), span or (0, 5)
    order = list(range(5)) if seed is None else np.random.RandomState(seed).permutation(5).tolist()
    for name in ("train", "held_out", "test"):
        expected = naive_classes(getattr(whole, name), order, first, last)
        assert expected and pairs(getattr(some, name)) == expected
    assert some.class_names == tuple(str(order[position]) for position in range(first, last))
    assert (some.mean, some.std) == (whole.mean, whole.std)
    assert datasets.peek(config, Path("absent")).classes == last - first
    unchanged = order[first:last] == [0, 1, 2, 3, 4]
    assert (some.fingerprint == whole.fingerprint) is unchanged
    assert some.fingerprint == whole.fingerprint_of(some.class_names)
    names = ", ".join(some.class_names)
    assert some.notes == (() if unchanged else (f"{last - first} of 5 classes: {names}",))


def test_every_class_is_in_one_of_the_steps(tmp_path):
    whole = load(imbalanced(tmp_path))
    spans = ([0, 2], [2, 5])
    steps = [load(imbalanced(tmp_path, class_order=1, class_range=span)) for span in spans]
    assert sorted(name for step in steps for name in step.class_names) == sorted(whole.class_names)
    for split in ("train", "held_out", "test"):
        images = [image for step in steps for image, _ in pairs(getattr(step, split))]
        assert sorted(images) == sorted(image for image, _ in pairs(getattr(whole, split)))


def test_digits_have_the_published_order_of_a_seed():
    data = load(digits(class_order=0, class_range=[2, 6]))
    assert data.class_names == ("4", "9", "1", "6")  # numpy's RandomState(0).permutation(10) is 2 8 4 9 1 6 7 3 0 5
    assert data.name == "digits_classes2-5"
    assert load(digits(name="mine", class_range=[2, 6])).name == "mine"


@pytest.mark.parametrize(("kind", "found"), [("digits", 10), *official.CLASSES.items()])
def test_positions_beyond_the_classes_are_refused_before_data_are_read(kind, found):
    config = DatasetConfig(kind=kind, image_size=8, test_fraction=0.2 if kind == "digits" else None)
    for count in (2, found):
        chosen = dataclasses.replace(config, class_range=[found - count, found])
        assert datasets.peek(chosen, Path("absent")).classes == count
    beyond = dataclasses.replace(config, class_range=[found - 1, found + 1])
    rule = rf"\[{found - 1}, {found + 1}\]: must be within the {found} classes of dataset={kind}$"
    with pytest.raises(ConfigError, match=rf"^dataset.class_range={rule}"):
        datasets.peek(beyond, Path("absent"))


# Settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (digits(test_fraction=None), "dataset.test_fraction=null: must be given for dataset=digits"),
        (digits(root="here"), "dataset.root=here: must be null"),
        (DatasetConfig(kind="cifar10", image_size=32, test_fraction=0.2), "dataset.test_fraction=0.2: must be null"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(config, message):
    for read in (load, lambda config: datasets.peek(config, Path("absent"))):
        with pytest.raises(ConfigError, match=message):
            read(config)


@pytest.mark.parametrize("kind", ["digits", *(kind for kind in official.CLASSES if kind != "imagenet10")])
def test_another_number_of_classes_than_the_data_set_has_is_refused(kind):
    share = 0.2 if kind == "digits" else None
    config = DatasetConfig(kind=kind, image_size=8, classes=7, test_fraction=share)
    with pytest.raises(DataError, match=rf"dataset.classes=7: dataset={kind} has \d+"):
        datasets.peek(config, Path("absent"))


def test_constant_pixels_need_a_given_std(tmp_path):
    arrays = contents(x_train=np.full((6, 6, 6), 9, np.uint8))
    with pytest.raises(DataError, match="set dataset.std"):
        load(npz(tmp_path, arrays, image_size=6))
    assert load(npz(tmp_path, arrays, image_size=6, std=[1.0, 1.0, 1.0])).mean == pytest.approx((9 / 255,) * 3)


def test_names_in_tables():
    assert datasets.display_name(digits()) == "digits"
    assert datasets.display_name(digits(name="eights")) == "eights"
    for root in ("some/where.v2", "some/where.v2/", "some/where.v2/train/.."):
        assert datasets.display_name(DatasetConfig(kind="folder", root=root, image_size=8)) == "where.v2"
    assert datasets.display_name(DatasetConfig(kind="arrays", root="some/mine.npz")) == "mine"


def test_a_linked_folder_has_the_name_of_its_link(tmp_path: Path, monkeypatch):
    """What the link points to may have another name on another machine; a run's id must not."""
    (tmp_path / "scratch-7").mkdir()
    (tmp_path / "pets").symlink_to(tmp_path / "scratch-7")
    monkeypatch.chdir(tmp_path)
    for root in ("pets", "./pets/", str(tmp_path / "pets")):
        assert datasets.display_name(DatasetConfig(kind="folder", root=root, image_size=8)) == "pets"


CIFAR = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OWN_ROOT = ("imagenet10", "folder", "arrays")  # dataset.root has no default
COMPOSED = {
    "mnist": (28, 1, 10, [0.1307], [0.3081], False, None),
    "fashion_mnist": (28, 1, 10, [0.2861], [0.3530], True, None),
    "svhn": (32, 3, 10, [0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970], False, None),
    "cifar10": (32, 3, 10, *CIFAR, True, None),
    "cifar100": (32, 3, 100, *CIFAR, True, None),
    "tiny_imagenet": (64, 3, 200, *IMAGENET, True, None),
    "imagenet10": (224, 3, 10, *IMAGENET, True, None),
    "folder": (32, None, None, None, None, True, None),
    "arrays": (None, None, None, None, None, True, None),
    "digits": (8, 1, 10, None, None, False, 0.2),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_the_yaml_of_each_data_set_composes(kind):
    ConfigStore.instance().store(group="dataset", name="schema", node=DatasetConfig)
    root = ["dataset.root=here"] if kind in OWN_ROOT else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose(overrides=[f"+dataset={kind}", *root]).dataset)
    assert isinstance(config, DatasetConfig)
    assert (config.kind, config.held_out_fraction, config.download) == (kind, 0.1, True)
    shape = (config.image_size, config.channels, config.classes)
    assert (*shape, config.mean, config.std, config.flip, config.test_fraction) == COMPOSED[kind]
    if not root:
        found = datasets.peek(config, Path("absent"))
        assert (found.image_size, found.channels, found.classes) == shape


def test_there_is_one_yaml_per_data_set():
    assert {path.stem for path in (CONF / "dataset").glob("*.yaml")} == set(DATASETS)


# torchvision


def test_torchvision_is_imported_late_and_without_its_compiled_operators():
    program = """
import sys, torch, hmn.data.datasets
assert not [name for name in sys.modules if name.startswith(("torchvision", "sklearn", "scipy"))], "imported early"
def refuse(path): raise OSError(path)
torch.ops.load_library = refuse
from hmn.data import vision
package = vision.torchvision()
assert package.datasets.CIFAR10 and package.datasets.utils.check_integrity and package.transforms.Resize
assert not package.extension._has_ops()
assert vision.torchvision() is package is sys.modules["torchvision"]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CONF.parent)
    assert done.returncode == 0, done.stderr
