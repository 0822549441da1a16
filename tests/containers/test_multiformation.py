"""Multi-formation: images against a loop over tiles; counts, order, starting values, and what pruning leaves."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn.budget import budget_floats
from hmn.config.containers import MultiformationConfig
from hmn.containers import rebuild, storage
from hmn.containers.multiformation import BOUND, Multiformation, MultiformationShape, bound_forms, fill
from hmn.errors import ConfigError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def configured(**changes: object) -> MultiformationConfig:
    return MultiformationConfig(name="multiformation", **changes)


def made(instances: int = 2, side: int = 8, classes: int = 2, **changes: object) -> Multiformation:
    """A container of noise; ``changes`` go to the configuration."""
    config = fill(configured(init="noise", **changes))
    shape = MultiformationShape.of(config, classes=classes, channels=3, image_size=side)
    if config.pixel_space == "normalised":
        shape = dataclasses.replace(shape, mean=MEAN, std=STD)
    container = Multiformation(shape, instances)
    container.initialise(torch.Generator().manual_seed(0), config, None)
    return container


@torch.no_grad()
def everything(container: Multiformation) -> Tensor:
    return container.decode(torch.arange(container.classes * container.images_per_class))


@torch.no_grad()
def by_loop(stored: Tensor, factor: int, pad: float = 0.5) -> Tensor:
    """Images from one class's ``stored`` (N, channels, H, W): tile by tile, and for each tile image by image."""
    side = stored.shape[-1]
    missing = -side % factor
    padded = F.pad(stored, (0, missing, 0, missing), value=pad)
    tile, images = padded.shape[-1] // factor, []
    for row in range(factor):
        for column in range(factor):
            for image in padded:
                cut = image[None, :, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
                images.append(F.interpolate(cut, size=side, mode="bilinear", align_corners=False)[0])
    return torch.stack(images)


class Real:
    """Real images: image j of class c is (100 c + j) / 1000 everywhere. ``asked`` records the requests."""

    def __init__(self, side: int, classes: int = 2) -> None:
        self.side, self.classes, self.asked = side, classes, []

    def draw(self, count: int, how: str = "random") -> Tensor:
        self.asked.append((count, how))
        values = (100 * torch.arange(self.classes)[:, None] + torch.arange(count)).flatten() / 1000
        return values[:, None, None, None].expand(-1, 3, self.side, self.side)


# Decoding


@pytest.mark.parametrize(("side", "factor"), [(8, 1), (8, 2), (28, 3), (8, 3), (9, 3), (10, 4), (13, 5)])
def test_single_decoding_is_the_loop_over_tiles_of_every_class(side, factor):
    container = made(instances=2, side=side, factor=factor)
    assert container.images_per_class == 2 * factor**2
    expected = torch.cat([by_loop(stored, factor) for stored in container.instances])
    torch.testing.assert_close(everything(container), expected, rtol=0, atol=1e-6)


def test_224_by_3_gives_nine_tiles_of_75_from_a_padded_grid_of_225():
    container = made(instances=1, side=224, classes=1, factor=3)
    images = everything(container)
    assert images.shape == (9, 3, 224, 224)
    grid = F.pad(container.instances[0, 0], (0, 1, 0, 1), value=0.5)
    assert grid.shape == (3, 225, 225)
    corner = F.interpolate(grid[None, :, 150:, 150:], size=224, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(images[8], corner, rtol=0, atol=1e-6)
    assert torch.equal(images[8, :, -1, -1], torch.full((3,), 0.5))


def test_multi_decoding_is_every_factor_after_the_other():
    container = made(instances=2, side=9, factor=3, decode="multi")
    assert container.images_per_class == 2 * (1 + 4 + 9)
    expected = torch.cat([by_loop(stored, factor) for stored in container.instances for factor in (1, 2, 3)])
    torch.testing.assert_close(everything(container), expected, rtol=0, atol=1e-6)
    assert torch.equal(everything(container)[:2], container.instances[0])


def test_normalised_pixels_are_padded_with_the_mean_colour():
    container = made(instances=2, side=8, factor=3, pixel_space="normalised")
    loops = torch.cat([by_loop(stored, 3, pad=0.0) for stored in container.instances])
    expected = loops * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(everything(container), expected, rtol=0, atol=1e-6)


def test_images_beside_it_and_its_place_do_not_change_an_image():
    container = made(instances=3, side=9, factor=3, decode="multi")
    expected = container.decode(torch.tensor([40, 40, 40]))[0]
    assert torch.equal(container.decode(torch.tensor([40, 0, 83]))[0], expected)
    assert torch.equal(container.decode(torch.tensor([1, 40, 2]))[1], expected)


@given(side=st.integers(4, 14), factor=st.integers(1, 6), instances=st.integers(1, 3), data=st.data())
@settings(max_examples=40)
def test_any_side_factor_and_index(side, factor, instances, data):
    decode = data.draw(st.sampled_from(["single", "multi"]))
    try:
        container = made(instances=instances, side=side, factor=factor, decode=decode)
    except ConfigError:
        assume(False)
    factors = range(1, factor + 1) if decode == "multi" else [factor]
    expected = torch.cat([by_loop(stored, size) for stored in container.instances for size in factors])
    index = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=5))
    torch.testing.assert_close(container.decode(torch.tensor(index)), expected[index], rtol=0, atol=1e-6)
    assert container.storage_floats() == 2 * instances * 3 * side**2


def test_every_pixel_gets_the_gradient_of_its_own_image_alone():
    container = made(instances=2, side=8, factor=2)
    container.decode(torch.tensor([8 + 2 * 2 + 1])).sum().backward()  # class 1, tile 2 (bottom left), stored image 1
    moved = container.instances.grad.ne(0)
    assert moved[1, 1, :, 4:, :4].all()
    assert moved.sum() == 3 * 4 * 4


# decode=bound: the images that condensing matches


@pytest.mark.parametrize(
    ("stored", "factor", "bound", "expected"),
    [
        (20, 3, 128, [(3, 0, 12), (2, 12, 3), (1, 15, 5)]),  # 108 + 12 + 5 images: 12 = (128 - 20) // 9
        (10, 3, 128, [(3, 0, 10)]),  # (128 - 10) // 9 = 13: all
        (50, 3, 128, [(3, 0, 8), (2, 8, 3), (1, 11, 39)]),
        (3, 2, 4, [(1, 0, 3)]),
        (9, 2, 4, [(1, 0, 9)]),  # more stored than the bound
        (5, 1, 128, [(1, 0, 5)]),
    ],
)
def test_bound_forms(stored, factor, bound, expected):
    assert bound_forms(stored, factor, bound) == expected


@given(stored=st.integers(1, 200), factor=st.integers(1, 6), bound=st.integers(1, 300))
def test_bound_forms_place_every_stored_image_once_within_the_bound(stored, factor, bound):
    forms = bound_forms(stored, factor, bound)
    placed = [image for form in forms for image in range(form.first, form.first + form.count)]
    assert placed == list(range(stored))
    assert sum(form.images for form in forms) <= max(bound, stored)
    assert [form.factor for form in forms] == sorted({form.factor for form in forms}, reverse=True)


def test_bound_matches_fewer_images_and_is_judged_by_all():
    bounded = made(instances=3, side=9, factor=3, decode="bound", bound=18)
    single = made(instances=3, side=9, factor=3)
    assert bounded.images_per_class == single.images_per_class == 27
    assert torch.equal(everything(bounded), everything(single))
    # (18 - 3) // 9 = 1 at factor 3; (18 - 9 - 2) // 4 = 1 at factor 2; one is left
    assert bounded.matched_per_class == 9 + 4 + 1
    forms = [by_loop(c[i : i + 1], size) for c in bounded.instances for i, size in enumerate((3, 2, 1))]
    found = bounded.decode_matched(torch.arange(28))
    torch.testing.assert_close(found, torch.cat(forms), rtol=0, atol=1e-6)
    assert single.matched_per_class == 27
    assert torch.equal(single.decode_matched(torch.arange(54)), everything(single))


def test_bound_is_idcs_128_unless_given():
    assert fill(configured(decode="bound")).bound == BOUND == 128
    assert fill(configured(decode="bound", bound=7)).bound == 7
    with pytest.raises(ConfigError, match=r"container\.bound=7: .*only container\.decode=bound"):
        configured(bound=7)


# Starting values


@pytest.mark.parametrize(
    ("side", "factor", "sides"),
    [(8, 2, [4, 4]), (28, 3, [10, 9, 9]), (224, 3, [75, 75, 74]), (11, 4, [3, 3, 3, 2]), (8, 1, [8])],
)
@pytest.mark.parametrize(("init", "how"), [("mix", "first"), ("random", "random"), ("k_means", "k_means")])
def test_real_images_shrink_to_tiles_in_the_order_of_the_images(side, factor, sides, init, how):
    container = made(instances=2, side=side, factor=factor)
    real = Real(side)
    container.initialise(torch.Generator(), configured(init=init, factor=factor), real)
    assert real.asked == [(2 * factor**2, how)]
    for label in range(2):
        for image in range(2):
            for tile in range(factor**2):
                row, column = divmod(tile, factor)
                top, left = sum(sides[:row]), sum(sides[:column])
                cut = container.instances[label, image, :, top : top + sides[row], left : left + sides[column]]
                assert cut.shape == (3, sides[row], sides[column])
                grey = torch.full_like(cut, (100 * label + tile * 2 + image) / 1000)
                torch.testing.assert_close(cut, grey, rtol=1e-6, atol=0)


def test_random_images_are_averaged_as_they_shrink():
    container = made(instances=1, side=8, classes=1, factor=2)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    real = Real(8)
    real.draw = lambda _count, _how: images
    container.initialise(torch.Generator(), configured(init="random"), real)
    averaged = images.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1))  # halving bilinearly takes the mean of 2 x 2
    rows = [torch.cat([averaged[2 * row], averaged[2 * row + 1]], -1) for row in range(2)]
    torch.testing.assert_close(container.instances[0, 0].detach(), torch.cat(rows, -2))


def test_mix_takes_the_nearest_pixel_and_stores_it_in_the_containers_space():
    container = made(instances=1, side=8, classes=1, factor=2, pixel_space="normalised")
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    real = Real(8)
    real.draw = lambda _count, _how: images
    container.initialise(torch.Generator(), configured(pixel_space="normalised"), real)
    nearest = images[:, :, ::2, ::2]
    stored = container.instances[0, 0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(stored[:, 4:, :4], nearest[2], rtol=0, atol=1e-6)


def test_noise_is_drawn_from_the_generator_and_the_pixels_of_the_unit_range_are_kept_in_it():
    container, again = made(), made()
    assert torch.equal(container.instances, again.instances)
    assert container.instances.min() >= 0 and container.instances.max() <= 1
    with torch.no_grad():
        container.instances.mul_(3).sub_(1)
    container.project()
    assert (container.instances.min(), container.instances.max()) == (0, 1)
    free = made(pixel_space="normalised")
    before = free.instances.clone()
    free.project()
    assert torch.equal(free.instances, before) and before.min() < 0


# Pruning


SURVIVORS = torch.tensor([0, 3, 5, 8, 9, 15])


@pytest.mark.parametrize("decode", ["single", "bound"])
def test_survivors_are_stored_as_tiles_and_decode_bit_equal(decode):
    container = made(instances=2, side=8, factor=2, decode=decode)
    expected, alone = everything(container)[SURVIVORS], container.decode(SURVIVORS[:1])
    expected_batch = container.decode(SURVIVORS)
    container.keep(SURVIVORS.flip(0))
    assert container.instances.shape == (2, 3, 3, 4, 4)
    assert container.storage_floats() == len(SURVIVORS) * 3 * 4 * 4
    assert container.images_per_class == container.matched_per_class == 3
    assert torch.equal(everything(container), expected_batch)
    torch.testing.assert_close(everything(container), expected, rtol=0, atol=1e-6)
    assert torch.equal(container.decode(torch.tensor([0])), alone)
    assert torch.equal(container.decode_matched(torch.arange(6)), everything(container))
    shape = container.shape
    assert (shape.instance_floats, shape.images_per_instance, shape.tiles) == (48, 1, True)


def test_tiles_can_be_pruned_again_and_rebuilt():
    container = made(instances=2, side=8, factor=2, pixel_space="normalised")
    container.keep(SURVIVORS)
    expected = container.decode(torch.tensor([1, 2, 3, 5]))
    container.keep(torch.tensor([1, 2, 3, 5]))
    assert torch.equal(everything(container), expected)
    again = rebuild(json.loads(json.dumps(container.specification())))
    assert again.specification() == container.specification()
    again.load_state_dict(container.state_dict())
    assert torch.equal(everything(again), expected)
    assert again.instances.shape == (2, 2, 3, 4, 4)


def test_nothing_changes_when_classes_would_keep_unequal_numbers():
    container = made(instances=2, side=8, factor=2)
    before, shape = container.instances, container.shape
    with pytest.raises(ValueError, match="every class"):
        container.keep(torch.tensor([0, 1, 8]))
    assert container.instances is before and container.shape is shape


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"side": 28, "factor": 3}, "factor 3 does not divide the image side 28"),
        ({"side": 9, "factor": 3, "decode": "multi"}, "decode=multi shows every pixel at several factors"),
        ({"side": 8, "factor": 3, "decode": "bound"}, "factor 3 does not divide the image side 8"),
    ],
)
def test_tied_images_are_known_from_the_shape_and_cannot_be_dropped(changes, reason):
    container = made(**changes)
    assert reason in container.shape.tied
    assert container.tied == container.shape.tied
    with pytest.raises(ValueError, match=f"multiformation: .*{reason}"):
        container.keep(torch.arange(0, container.classes * container.images_per_class, 2))


@pytest.mark.parametrize("changes", [{"factor": 2}, {"factor": 1, "decode": "multi"}, {"factor": 4, "decode": "bound"}])
def test_other_images_are_not_tied(changes):
    assert made(side=8, **changes).tied is None


# Storage and checks


@given(st.sampled_from([(10, 32), (100, 32), (200, 64), (10, 224)]), st.sampled_from([1, 10, 50]), st.integers(1, 5))
@settings(max_examples=20)
def test_any_factor_stores_exactly_the_budget(data, images_per_class, factor):
    (classes, side), decode = data, "multi" if factor == 3 else "single"
    config = fill(configured(factor=factor, decode=decode))
    shape = MultiformationShape.of(config, classes=classes, channels=3, image_size=side)
    found = storage(shape, images_per_class, 0.0)
    assert found.stored_floats(classes) == budget_floats(images_per_class, classes, 3, side)
    assert found.instances == images_per_class
    assert found.images_per_class == images_per_class * (14 if decode == "multi" else factor**2)


@pytest.mark.parametrize(("factor", "decode"), [(6, "single"), (9, "single"), (8, "multi"), (8, "bound")])
def test_a_factor_that_makes_tiles_of_padding_alone_is_refused(factor, decode):
    # 6 cuts 8 pixels into six tiles of two, the last two outside; 8 fits, but multi and bound also use 5 and 6.
    with pytest.raises(ConfigError, match=rf"container\.factor={factor}: .*decode={decode}.*dataset\.image_size=8"):
        MultiformationShape.of(fill(configured(factor=factor, decode=decode)), classes=2, channels=3, image_size=8)


def test_the_specification_of_a_whole_container_rebuilds_it():
    container = made(instances=2, side=9, factor=3, decode="bound")
    assert container.shape == MultiformationShape(
        classes=2, channels=3, image_size=9, factor=3, decode="bound", bound=128
    )
    again = rebuild(json.loads(json.dumps(container.specification())))
    assert again.shape == container.shape and again.instances.shape == container.instances.shape
