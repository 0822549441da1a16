"""Raw images: their starting values, and the clamping of those stored in [0, 1]."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hmn.config.containers import ImageConfig
from hmn.containers.image import RawImages, RawShape, fill
from tests.real_images import RandomImages

DATA = {"classes": 2, "channels": 3, "image_size": 8}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def made(init: str = "real", pixel_space: str = "unit", instances: int = 3, seed: int = 0):
    config = ImageConfig(name="image", init=init, pixel_space=pixel_space)
    shape = RawShape.of(fill(config, images_per_class=instances, **DATA), **DATA)
    if pixel_space == "normalised":
        shape = dataclasses.replace(shape, mean=MEAN, std=STD)
    container, real = RawImages(shape, instances), RandomImages(2, 3, 8)
    container.initialise(torch.Generator().manual_seed(seed), config, real)
    return container, real


def decoded(container: RawImages) -> torch.Tensor:
    with torch.no_grad():
        return container.decode(torch.arange(6))


@pytest.mark.parametrize("pixel_space", ["unit", "normalised"])
@pytest.mark.parametrize(("init", "how"), [("real", "random"), ("first", "first"), ("k_means", "k_means")])
def test_it_starts_as_the_real_images_that_it_asks_for_class_after_class(init, how, pixel_space):
    container, real = made(init, pixel_space)
    assert real.draws == [(3, how)]
    torch.testing.assert_close(decoded(container), real.draw(3), rtol=0, atol=1e-6)


def test_normalised_pixels_are_stored_as_such():
    container, real = made("real", "normalised")
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(container.instances.flatten(0, 1), (real.draw(3) - mean) / std)


def test_noise_is_dc_s_in_normalised_space_and_idc_s_in_the_unit_range():
    normalised, _ = made("noise", "normalised", instances=500)
    assert normalised.instances.mean().abs() < 0.02 and (normalised.instances.std() - 1).abs() < 0.02
    unit, _ = made("noise", "unit", instances=500)
    assert unit.instances.min() == 0 and unit.instances.max() == 1
    assert (unit.instances.mean() - 0.5).abs() < 0.01 and 0.2 < unit.instances.std() < 0.25
    again, other = made("noise", "unit", instances=500)[0], made("noise", "unit", instances=500, seed=1)[0]
    assert torch.equal(unit.instances, again.instances) and not torch.equal(unit.instances, other.instances)


def test_only_pixels_of_the_unit_range_are_clamped_to_it():
    for pixel_space in ("unit", "normalised"):
        container, _ = made(pixel_space=pixel_space)
        with torch.no_grad():
            container.instances[0, 0, 0, 0, :3] = torch.tensor([-0.5, 0.25, 1.5])
        container.project()
        expected = [0.0, 0.25, 1.0] if pixel_space == "unit" else [-0.5, 0.25, 1.5]
        assert container.instances[0, 0, 0, 0, :3].tolist() == expected


def test_an_image_takes_its_pixels_and_nothing_is_shared():
    shape = RawShape(classes=10, channels=3, image_size=32)
    assert (shape.instance_floats, shape.shared_floats, shape.images_per_instance) == (3072, 0, 1)
