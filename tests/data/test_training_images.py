"""Real training images for containers: random, first or typical ones of every class."""

from __future__ import annotations

import pytest
import torch

from hmn.data.training_images import TrainingImages

LABELS = torch.tensor([0] * 4 + [1] * 6)


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).float()


def source(seed: int = 0) -> TrainingImages:
    """Training images of which image i is grey i."""
    images = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    return TrainingImages(images, LABELS, ("a", "b"), torch.Generator().manual_seed(seed), pixels_of)


def greys(images: torch.Tensor) -> list[int]:
    assert images.dtype == torch.float32 and images.shape[1:] == (3, 2, 2)
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def test_the_first_are_those_of_the_data_set_class_after_class():
    assert greys(source().draw(2, "first")) == [0, 1, 4, 5]


@pytest.mark.parametrize("how", ["random", "first", "k_means", "k_means_of_pixels"])
def test_every_class_gives_as_many_of_its_own_and_different_ones(how):
    found = greys(source().draw(3, how))
    assert len(found) == len(set(found)) == 6
    assert [LABELS[index].item() for index in found] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("how", ["random", "first", "k_means", "k_means_of_pixels"])
def test_a_class_that_is_too_small_repeats_all_of_its_images(how):
    found = greys(source().draw(5, how))
    assert sorted(set(found[:5])) == [0, 1, 2, 3] and found[4] == found[0]


def test_random_ones_follow_the_generator():
    assert greys(source(1).draw(3)) == greys(source(1).draw(3))
    assert len({tuple(greys(source(seed).draw(3))) for seed in range(5)}) > 1


def test_the_typical_ones_of_two_heaps_are_one_of_each():
    values = torch.tensor([0, 1, 2, 100, 101, 102], dtype=torch.uint8)
    images = values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    labels, stream = torch.zeros(6, dtype=torch.int64), torch.Generator().manual_seed(0)
    odd_or_even = TrainingImages(images, labels, ("a",), stream, lambda images: pixels_of(images) % 2)
    chosen = {how: greys(odd_or_even.draw(2, how)) for how in ("k_means_of_pixels", "k_means")}
    assert sorted(chosen["k_means_of_pixels"]) == [1, 101]
    assert sorted(grey % 2 for grey in chosen["k_means"]) == [0, 1]  # by the features alone
