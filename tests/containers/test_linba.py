"""LinBa against explicit sums and upsampling; starting values, storage, and the number of bases per dataset."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn.budget import budget_floats
from hmn.config.containers import LinbaConfig
from hmn.containers import KINDS, storage
from hmn.containers.linba import ROWS, LinbaShape, LinearBases, fill
from hmn.errors import ConfigError

SMALL = LinbaShape(classes=2, channels=3, image_size=8, bases=5)
CIFAR10 = dict(classes=10, channels=3, image_size=32)
CIFAR100 = dict(classes=100, channels=3, image_size=32)
TINY = dict(classes=200, channels=3, image_size=64)
IMAGENET10 = dict(classes=10, channels=3, image_size=224)
DIGITS = dict(classes=10, channels=1, image_size=8)


def configured(**changes: object) -> LinbaConfig:
    return LinbaConfig(**{"name": "linba", **changes})


def started(shape: LinbaShape = SMALL, instances: int = 3, seed: int = 0) -> LinearBases:
    container = LinearBases(shape, instances)
    container.initialise(torch.Generator().manual_seed(seed), configured(), None)
    return container


def planned(data: dict[str, int], images_per_class: int, **changes: object) -> LinbaShape:
    return LinbaShape.of(fill(configured(**changes), **data, images_per_class=images_per_class), **data)


@torch.no_grad()
def test_an_image_is_the_sum_of_its_weighted_bases_upsampled():
    container = started(replace(SMALL, pixel_space="normalised", mean=(0.5,) * 3, std=(0.25,) * 3))
    # Bilinear upsampling by 2: a new pixel lies a quarter of a pixel from the nearest old one.
    up = torch.zeros(8, 4)
    for row in range(8):
        for weight, old in ((0.75, row // 2), (0.25, row // 2 + (1 if row % 2 else -1))):
            up[row, min(max(old, 0), 3)] += weight
    for index in range(6):
        low = sum(container.instances[index // 3, index % 3, k] * container.bases[k] for k in range(5))
        expected = up @ low @ up.T * 0.25 + 0.5
        torch.testing.assert_close(container.decode(torch.tensor([index]))[0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_at_downsample_1_the_combination_is_the_image():
    container = started(replace(SMALL, downsample=1))
    expected = container.instances[1, 2] @ container.bases.flatten(1)
    torch.testing.assert_close(container.decode(torch.tensor([5])).flatten(), expected)


@torch.no_grad()
def test_nothing_is_clamped():
    container = started(replace(SMALL, pixel_space="unit"))
    container.instances.mul_(100)
    container.project()
    images = container.decode(torch.arange(6))
    assert images.min() < 0 and images.max() > 1


def test_both_matrices_start_xavier_uniform():
    container = started(replace(SMALL, bases=40), instances=50)
    for matrix, rows, columns in ((container.instances, 100, 40), (container.bases, 40, 48)):
        bound = math.sqrt(6 / (rows + columns))
        assert 0.98 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_start_depends_on_the_generator_alone():
    first, again, other = started(seed=0), started(seed=0), started(seed=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])


def test_tiers_are_coefficients_and_bases_both_memories():
    container = started()
    assert {name: [id(p) for p in ps] for name, ps in container.tiers().items()} == {
        "instances": [id(container.instances)],
        "bases": [id(container.bases)],
    }
    assert container.memory_tiers() == {"instances", "bases"}


# Storage


def test_16_bases_for_cifar10_at_1_image_per_class_are_the_published_setting():
    shape = planned(CIFAR10, 1)
    assert (shape.bases, shape.downsample, shape.pixel_space) == (16, 2, "normalised")
    stored = storage(shape, 1, 0.0)
    assert (stored.instances, stored.stored_floats(10)) == (115, 30_688)
    assert LinearBases(shape, 115).storage_floats() == 30_688


@pytest.mark.parametrize(
    ("data", "images_per_class", "counts"),
    [
        (CIFAR10, 1, {8: 307, 16: 115, 32: 19}),
        (CIFAR10, 10, {32: 883, 64: 403, 128: 163, 256: 43}),
        (CIFAR10, 50, {64: 2323, 128: 1123, 256: 523, 512: 223, 1024: 73}),
        (CIFAR100, 1, {16: 184, 32: 88, 64: 40, 128: 16, 256: 4}),
        (CIFAR100, 10, {64: 472, 128: 232, 256: 112, 512: 52, 1024: 22}),
        (CIFAR100, 50, {256: 592, 512: 292, 1024: 142, 2048: 67}),
        (TINY, 1, {64: 176, 128: 80, 256: 32, 512: 8}),
        (TINY, 10, {256: 464, 512: 224, 1024: 104, 2048: 44}),
    ],
)
def test_images_per_class_by_number_of_bases(data, images_per_class, counts):
    found = {bases: storage(planned(data, images_per_class, bases=bases), images_per_class, 0) for bases in counts}
    assert {bases: stored.instances for bases, stored in found.items()} == counts


@settings(max_examples=50)
@given(
    classes=st.integers(1, 20),
    channels=st.integers(1, 3),
    side=st.sampled_from([4, 8, 12, 32]),
    bases=st.integers(1, 40),
    downsample=st.sampled_from([1, 2, 4]),
    instances=st.integers(1, 5),
)
def test_floats_are_those_of_the_parameters(classes, channels, side, bases, downsample, instances):
    data = dict(classes=classes, channels=channels, image_size=side)
    shape = LinbaShape(**data, bases=bases, downsample=downsample)
    floats = bases * channels * (side // downsample) ** 2 + classes * instances * bases
    with torch.device("meta"):
        assert LinearBases(shape, instances).storage_floats() == floats
    assert shape.shared_floats + classes * instances * shape.instance_floats == floats


# Settings left open


@pytest.mark.parametrize(
    ("data", "bases"),
    [
        (CIFAR10, {1: 16, 10: 128, 50: 1024}),
        (CIFAR100, {1: 32, 10: 256, 50: 1024}),
        (TINY, {1: 128, 10: 1024, 50: 4096}),
        (IMAGENET10, {1: 32, 10: 256, 50: 1024}),
        (DIGITS, {1: 4, 10: 16, 50: 32}),
        (dict(classes=10, channels=1, image_size=28), {1: 16, 10: 64, 50: 256}),  # of 1024, 18 images would fit in 50
        (dict(classes=5, channels=3, image_size=32), {1: 8}),  # 16 would take 0.8 of the budget
        (dict(classes=2, channels=3, image_size=32), {1: 4, 10: 32, 50: 128}),
    ],
)
def test_bases_are_those_of_the_nearest_row_or_fewer_on_smaller_budgets(data, bases):
    assert {ipc: planned(data, ipc).bases for ipc in bases} == bases
    for ipc in bases:
        stored = storage(planned(data, ipc), ipc, 0.1)
        budget = budget_floats(ipc, **data)
        assert budget - data["classes"] * stored.instance_floats < stored.stored_floats(data["classes"]) <= budget


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_row_is_as_it_is_for_the_data_that_it_was_made_for(row):
    data = {"classes": row.classes, "channels": row.channels, "image_size": row.image_size}
    assert planned(data, row.images_per_class).bases == row.bases


def test_bases_at_the_images_own_side_are_fewer():
    assert planned(CIFAR10, 1, downsample=1).bases == 4  # 16 would not fit where they were made for, either


def test_what_is_given_stays_and_too_many_bases_are_told_the_budget():
    assert planned(CIFAR10, 1, bases=7, downsample=4, pixel_space="unit") == LinbaShape(
        **CIFAR10, bases=7, downsample=4, pixel_space="unit"
    )
    with pytest.raises(ConfigError, match="over the budget of 30,720"):
        storage(planned(CIFAR10, 1, bases=64), 1, 0.0)


def test_the_downsampling_must_divide_the_side():
    with pytest.raises(ConfigError) as caught:
        planned(CIFAR10, 1, downsample=3)
    assert str(caught.value) == "container.downsample=3: must be a divisor of dataset.image_size=32"


def test_it_is_registered():
    assert KINDS["linba"].container is LinearBases
