"""From stored pixels to what a network sees."""

from __future__ import annotations

import pytest
import torch

from hmn.data.preprocess import Normalise, unit_range


def test_bytes_become_shares_of_255():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = unit_range(values)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == [pytest.approx(i / 255, abs=1e-7) for i in range(256)]


def test_floats_are_in_the_unit_range_already_and_pass():
    images = torch.rand(2, 3, 4, 4)
    assert unit_range(images) is images


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_channel_loses_its_own_mean_and_is_divided_by_its_own_std(dtype):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    given = images if dtype == torch.uint8 else images.float() / 255
    found = Normalise(mean, std)(given)
    assert found.shape == (4, 3, 5, 5) and found.dtype == torch.float32
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=0, atol=1e-5)


def test_the_mean_colour_becomes_zero_so_that_zero_fill_is_the_mean_colour():
    image = torch.tensor([0.25, 0.5, 0.75]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert not Normalise([0.25, 0.5, 0.75], [0.1, 0.2, 0.3])(image).any()


def test_normalising_keeps_gradients():
    images = torch.rand(1, 2, 2, 2, requires_grad=True)
    Normalise([0.5, 0.5], [0.2, 0.25])(images).sum().backward()
    assert images.grad[0, :, 0, 0].tolist() == [pytest.approx(5.0), pytest.approx(4.0)]
