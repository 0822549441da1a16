"""Every augmentation against a plain implementation for one image, and the parameters drawn for it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hmn.data import augment, vision
from hmn.data.augment import Draw

EVERYTHING = "color_crop_cutout_flip_scale_rotate"
COLOURS = ("brightness", "saturation", "contrast")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, size: int, channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, channels, size, size, generator=generator(seed), dtype=dtype)


# The rules, one image (channels, H, W) at a time (IDC, DSA)


def naive_brightness(image: Tensor, u: float) -> Tensor:
    return image + (u - 0.5) * 1.0


def naive_saturation(image: Tensor, u: float) -> Tensor:
    result = torch.empty_like(image)
    for y, x in product(*map(range, image.shape[1:])):
        grey = sum(image[:, y, x].tolist()) / len(image)
        for channel, value in enumerate(image[:, y, x].tolist()):
            result[channel, y, x] = (value - grey) * (2.0 * u) + grey
    return result


def naive_contrast(image: Tensor, u: float) -> Tensor:
    mean = sum(image.flatten().tolist()) / image.numel()
    return (image - mean) * (u + 0.5) + mean


def naive_crop(image: Tensor, dy: int, dx: int) -> Tensor:
    size = image.shape[-1]
    margin = max(abs(dy), abs(dx))
    padded = F.pad(image, (margin,) * 4)
    return padded[:, margin + dy : margin + dy + size, margin + dx : margin + dx + size]


def naive_cutout(image: Tensor, cy: int, cx: int) -> Tensor:
    size = image.shape[-1]
    side = int(0.5 * size + 0.5)
    rows, columns = ([min(max(c - side // 2 + i, 0), size - 1) for i in range(side)] for c in (cy, cx))
    result = image.clone()
    for y, x in product(rows, columns):
        result[:, y, x] = 0
    return result


def naive_affine(image: Tensor, matrix: list[list[float]]) -> Tensor:
    theta = torch.tensor([[*row, 0.0] for row in matrix], dtype=image.dtype)[None]
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def naive_scale(image: Tensor, sx: float, sy: float) -> Tensor:
    return naive_affine(image, [[sx, 0.0], [0.0, sy]])


def naive_rotate(image: Tensor, angle: float) -> Tensor:
    return naive_affine(image, [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def naive(image: Tensor, drawn: Draw, i: int) -> Tensor:
    """IDC's rule for image ``i`` of a draw: flip, three colours, one geometric operator, cutout."""
    if drawn.flip is not None and drawn.flip[i]:
        image = torch.stack([image[..., -1 - x] for x in range(image.shape[-1])], dim=-1)
    for rule, name in zip((naive_brightness, naive_saturation, naive_contrast), COLOURS, strict=True):
        if getattr(drawn, name) is not None:
            image = rule(image, float(getattr(drawn, name)[i]))
    if drawn.alternatives:
        name = drawn.alternatives[int(drawn.chosen[i])]
        if name == "crop":
            image = naive_crop(image, *drawn.crop[i].tolist())
        elif name == "scale":
            image = naive_scale(image, *drawn.scale[i].tolist())
        else:
            image = naive_rotate(image, float(drawn.rotate[i]))
    if drawn.cutout is not None:
        image = naive_cutout(image, *drawn.cutout[i].tolist())
    return image


def close(found: Tensor, expected: Tensor) -> None:
    # cosines and sines of float32 angles limit the precision
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def each_image_follows_the_rule(images: Tensor, drawn: Draw) -> None:
    close(augment.apply(images, drawn), torch.stack([naive(image, drawn, i) for i, image in enumerate(images)]))


# One operator at a time

SHARES = [0.0, 0.1, 0.25, 0.5, 0.75, 0.999]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_operator_follows_its_formula(name, channels):
    images = noise(len(SHARES), 5, channels)
    drawn = Draw(alternatives=(), **{name: torch.tensor(SHARES, dtype=torch.float64)})
    rule = {"brightness": naive_brightness, "saturation": naive_saturation, "contrast": naive_contrast}[name]
    expected = torch.stack([rule(image, u) for image, u in zip(images, SHARES, strict=True)])
    torch.testing.assert_close(augment.apply(images, drawn), expected, rtol=0, atol=1e-12)


def test_colours_at_their_neutral_share_change_nothing():
    images, half = noise(3, 6), torch.full((3,), 0.5, dtype=torch.float64)
    drawn = Draw(alternatives=(), brightness=half, saturation=half, contrast=half)
    torch.testing.assert_close(augment.apply(images, drawn), images, rtol=0, atol=1e-12)


def test_flip_mirrors_columns_of_the_drawn_images_only():
    images = noise(3, 5)
    found = augment.apply(images, Draw(alternatives=(), flip=torch.tensor([True, False, True])))
    assert torch.equal(found, torch.stack([images[0].flip(2), images[1], images[2].flip(2)]))


@pytest.mark.parametrize(("size", "reach"), [(32, 4), (7, 8)])
def test_shift_is_exact_for_every_offset_and_fills_with_zero(size, reach):
    offsets = torch.tensor(list(product(range(-reach, reach + 1), repeat=2)))
    images = noise(len(offsets), size, channels=2, dtype=torch.float32)
    expected = [naive_crop(image, *pair) for image, pair in zip(images, offsets.tolist(), strict=True)]
    assert torch.equal(augment.shift(images, offsets), torch.stack(expected))


def test_crop_moves_only_the_images_it_is_chosen_for():
    images, crop = noise(2, 8), torch.tensor([[1, -2], [1, -2]])
    drawn = Draw(alternatives=("crop", "rotate"), chosen=torch.tensor([0, 1]), crop=crop, rotate=torch.zeros(2))
    found = augment.apply(images, drawn)
    assert torch.equal(found[0], naive_crop(images[0], 1, -2))
    close(found[1], images[1])


@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_cutout_equals_the_rule_with_clamped_indices_at_every_centre(size):
    centres = torch.tensor(list(product(range(size + 1 - augment._cutout_side(size) % 2), repeat=2)))
    images = noise(len(centres), size, channels=2)
    expected = [naive_cutout(image, *pair) for image, pair in zip(images, centres.tolist(), strict=True)]
    assert torch.equal(augment.cutout(images, centres), torch.stack(expected))


def test_cutout_hides_at_most_16_by_16_of_32_pixels_and_a_quarter_of_that_in_a_corner():
    centres = torch.tensor(list(product(range(33), repeat=2)))
    hidden = augment.cutout(torch.ones(len(centres), 1, 32, 32), centres) == 0
    areas = hidden.sum((1, 2, 3)).view(33, 33)
    assert areas.max() == 16 * 16 and areas[16, 16] == 16 * 16
    assert areas.min() == areas[0, 0] == areas[32, 32] == 8 * 8
    assert (areas == 16 * 16).sum() == 17 * 17  # for centres 8 to 24, nothing is cut off


@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.9, 1.15), (1 / 1.2, 1.2)])
def test_scale_resamples_by_its_own_factors_in_x_and_y(factors):
    images = noise(1, 9)
    drawn = Draw(alternatives=("scale",), chosen=torch.zeros(1), scale=torch.tensor([factors]))
    close(augment.apply(images, drawn), naive_scale(images[0], *factors)[None])


def test_a_factor_below_one_zooms_in():
    images = torch.zeros(1, 1, 12, 12)
    images[..., 3:9, 3:9] = 1
    drawn = Draw(alternatives=("scale",), chosen=torch.zeros(1), scale=torch.tensor([[1 / 1.2, 1.0]]))
    found = augment.apply(images, drawn)[0, 0]
    assert found[6].sum() > 6.5  # wider along x
    assert found[:, 6].sum() == pytest.approx(6, abs=1e-4)  # as high as before


@pytest.mark.parametrize("degrees", [-15.0, 4.0, 15.0])
def test_rotate_resamples_by_its_own_angle(degrees):
    images = noise(1, 9)
    angle = math.radians(degrees)
    drawn = Draw(alternatives=("rotate",), chosen=torch.zeros(1), rotate=torch.tensor([angle]))
    close(augment.apply(images, drawn), naive_rotate(images[0], angle)[None])


# What is drawn


@pytest.mark.parametrize(("size", "reach"), [(8, 1), (28, 4), (32, 4), (64, 8), (224, 28)])
def test_crop_shifts_reach_an_eighth_of_the_side(size, reach):
    shifts = augment.draw("crop", 3000, size, generator()).crop
    for axis in (0, 1):
        assert sorted(set(shifts[:, axis].tolist())) == list(range(-reach, reach + 1))
    assert (shifts[:, 0] != shifts[:, 1]).any()


@pytest.mark.parametrize(("size", "last"), [(32, 32), (8, 8), (6, 5), (5, 4), (7, 7)])
def test_cutout_centres_are_zero_to_the_side_less_one_when_the_square_is_odd(size, last):
    centres = augment.draw("cutout", 3000, size, generator()).cutout
    for axis in (0, 1):
        assert sorted(set(centres[:, axis].tolist())) == list(range(last + 1))


def test_scale_factors_are_independent_and_uniform_between_five_sixths_and_six_fifths():
    factors = augment.draw("scale", 20_000, 32, generator()).scale
    assert factors.min() >= 1 / 1.2 and factors.max() <= 1.2
    assert factors.min() < 1 / 1.2 + 1e-3 and factors.max() > 1.2 - 1e-3
    assert torch.allclose(factors.mean(0), torch.tensor((1 / 1.2 + 1.2) / 2), atol=4e-3)
    assert factors.std().item() == pytest.approx((1.2 - 1 / 1.2) / math.sqrt(12), rel=0.02)
    assert abs(torch.corrcoef(factors.T)[0, 1]) < 0.03


def test_angles_are_uniform_within_15_degrees():
    degrees = augment.draw("rotate", 20_000, 32, generator()).rotate.rad2deg()
    assert 14.95 < degrees.max() <= 15.0001 and -15.0001 <= degrees.min() < -14.95
    assert abs(degrees.mean()) < 0.3
    assert degrees.std().item() == pytest.approx(30 / math.sqrt(12), rel=0.02)


def test_colour_shares_are_independent_and_uniform_and_half_of_the_images_flip():
    drawn = augment.draw("color_flip", 20_000, 32, generator())
    shares = torch.stack([getattr(drawn, name) for name in COLOURS])
    assert shares.min() >= 0 and shares.max() < 1
    assert torch.allclose(shares.mean(1), torch.tensor(0.5), atol=0.01)
    assert torch.allclose(shares.std(1), torch.tensor(1 / math.sqrt(12)), rtol=0.02)
    assert (torch.corrcoef(shares) - torch.eye(3)).abs().max() < 0.03
    assert drawn.flip.float().mean().item() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("name", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_a_strategy_draws_nothing_for_operators_it_does_not_list(name):
    drawn = augment.draw(name, 3, 8, generator())
    filled = {item.name for item in fields(Draw) if torch.is_tensor(getattr(drawn, item.name))}
    expected = set(COLOURS) if name == "color" else {name}
    assert filled == expected | ({"chosen"} if augment.alternatives_of(name, "idc") else set())
    assert all(len(getattr(drawn, key)) == 3 for key in filled)


def test_a_draw_depends_on_the_generator_alone():
    first, again, other = (augment.draw(EVERYTHING, 6, 16, generator(seed)) for seed in (0, 0, 1))
    images = noise(6, 16)
    results = [augment.apply(images, drawn) for drawn in (first, again, other)]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


# The composition (IDC's rule)


@pytest.mark.parametrize("one_choice", [True, False])
@pytest.mark.parametrize("strategy", [EVERYTHING, "color_crop_cutout", "color_crop", "color_crop_flip_scale_rotate"])
def test_the_order_is_flip_colours_one_geometric_operator_cutout(strategy, one_choice):
    for seed in range(4):
        drawn = augment.draw(strategy, 8, 12, generator(seed), one_choice=one_choice)
        each_image_follows_the_rule(noise(8, 12, seed=seed), drawn)


def test_each_image_gets_exactly_one_geometric_operator():
    drawn = augment.draw("crop_scale_rotate", 3000, 8, generator(), one_choice=False)
    counts = Counter(drawn.chosen.tolist())
    assert sorted(counts) == [0, 1, 2] and all(abs(count - 1000) < 130 for count in counts.values())
    images = noise(40, 8)
    few = augment.draw("crop_scale_rotate", 40, 8, generator(), one_choice=False)
    assert set(few.chosen.tolist()) == {0, 1, 2}
    each_image_follows_the_rule(images, few)


def test_with_one_choice_a_batch_shares_its_operator_but_not_its_parameters():
    operators = set()
    for seed in range(30):
        drawn = augment.draw("crop_scale_rotate", 50, 32, generator(seed))
        assert len(set(drawn.chosen.tolist())) == 1
        assert len(drawn.scale.unique(dim=0)) == len(drawn.rotate.unique()) == 50
        operators.add(drawn.alternatives[int(drawn.chosen[0])])
    assert operators == {"crop", "scale", "rotate"}


def test_every_batch_shares_an_operator_of_its_own():
    drawn = augment.draw(EVERYTHING, 60, 32, generator(), batches=20)
    choices = drawn.chosen.view(20, 3)
    assert (choices == choices[:, :1]).all() and set(choices[:, 0].tolist()) == {0, 1, 2}
    for name in ("scale", "rotate", *COLOURS):
        assert len(getattr(drawn, name).unique(dim=0)) == 60


def test_the_order_of_names_in_a_strategy_does_not_matter():
    images, backwards = noise(5, 8), "_".join(reversed(EVERYTHING.split("_")))
    one, other = (augment.apply(images, augment.draw(name, 5, 8, generator())) for name in (EVERYTHING, backwards))
    assert torch.equal(one, other)


def test_strategy_none_leaves_images_and_generator_as_they_were():
    images, stream = noise(4, 8), generator()
    before = stream.get_state()
    assert torch.equal(augment.apply(images, augment.draw("none", 4, 8, stream)), images)
    assert torch.equal(stream.get_state(), before)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (EVERYTHING, "color_crop_cutout_scale_rotate"),
        ("color_crop", "color_crop"),
        ("flip", "none"),
        ("none", "none"),
    ],
)
def test_where_a_mirror_is_not_allowed_flip_alone_goes(strategy, expected):
    assert augment.usable(strategy, False) == expected
    assert augment.usable(strategy, True) == strategy


# The composition (one operator of all, as DSA)


def naive_one_of_all(image: Tensor, drawn: Draw, i: int) -> Tensor:
    """DSA's rule for image ``i`` of a draw: only the chosen operator, which may be all three colours."""
    name = drawn.alternatives[int(drawn.chosen[i])]
    if name == "color":
        colours = {colour: getattr(drawn, colour)[i : i + 1] for colour in COLOURS}
        return naive(image, Draw(alternatives=(), **colours), 0)
    if name == "flip":
        return image.flip(-1) if drawn.flip[i] else image
    if name == "crop":
        return naive_crop(image, *drawn.crop[i].tolist())
    if name == "scale":
        return naive_scale(image, *drawn.scale[i].tolist())
    return naive_rotate(image, float(drawn.rotate[i])) if name == "rotate" else naive_cutout(image, *drawn.cutout[i])


@pytest.mark.parametrize("strategy", [EVERYTHING, "color_crop_cutout_scale_rotate", "flip_rotate", "cutout"])
def test_of_all_listed_an_image_gets_one_operator(strategy):
    images = noise(40, 7)
    drawn = augment.draw(strategy, 40, 7, generator(), rule="vico", one_choice=False)
    assert set(drawn.chosen.tolist()) == set(range(len(strategy.split("_"))))
    expected = torch.stack([naive_one_of_all(image, drawn, i) for i, image in enumerate(images)])
    close(augment.apply(images, drawn), expected)


def test_all_listed_are_chosen_equally_often():
    drawn = augment.draw(EVERYTHING, 6000, 8, generator(), rule="vico", one_choice=False)
    counts = Counter(drawn.alternatives[position] for position in drawn.chosen.tolist())
    assert sorted(counts) == sorted(EVERYTHING.split("_")) and all(abs(count - 1000) < 130 for count in counts.values())


def test_a_batch_that_a_network_trains_on_shares_the_operator_but_not_its_parameters():
    operators = set()
    for seed in range(40):
        drawn = augment.draw(EVERYTHING, 20, 32, generator(seed), rule="vico")
        assert len(set(drawn.chosen.tolist())) == 1
        operators.add(drawn.alternatives[int(drawn.chosen[0])])
        for name in ("scale", "rotate", *COLOURS):
            assert len(getattr(drawn, name).unique(dim=0)) == 20
    assert operators == set(EVERYTHING.split("_"))


def test_one_operator_of_all_is_siamese_by_repetition_and_comes_back_from_its_tensors():
    drawn = augment.draw(EVERYTHING, 5, 8, generator(), rule="vico", one_choice=False)
    again = augment.draw_of(EVERYTHING, drawn.tensors(), "vico")
    images = noise(5, 8)
    expected = torch.stack([naive_one_of_all(image, drawn, i) for i, image in enumerate(images)])
    close(augment.apply(images.repeat_interleave(3, 0), again.repeat(3)), expected.repeat_interleave(3, 0))


def test_no_operator_has_another_parameter_by_the_other_rule():
    """Both rules draw the choice at the same point, here from equally many operators, so all parameters agree."""
    one, other = (augment.draw("crop_scale_rotate", 6, 32, generator(), rule=rule) for rule in ("idc", "vico"))
    assert one.tensors().keys() == other.tensors().keys()
    assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())


def test_one_operator_of_all_has_the_right_gradient():
    drawn = augment.draw(EVERYTHING, 12, 4, generator(1), rule="vico", one_choice=False)
    assert len(set(drawn.chosen.tolist())) == 6
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, drawn), noise(12, 4, channels=1).requires_grad_())


# Siamese


def test_a_siamese_draw_gives_real_and_synthetic_images_of_a_group_the_same_parameters():
    groups, real, synthetic = 5, 4, 3
    drawn = augment.draw(EVERYTHING, groups, 8, generator(), one_choice=False)
    one_per_group = noise(groups, 8)
    expected = torch.stack([naive(image, drawn, i) for i, image in enumerate(one_per_group)])
    for count in (real, synthetic):
        found = augment.apply(one_per_group.repeat_interleave(count, 0), drawn.repeat(count))
        close(found, expected.repeat_interleave(count, 0))


def test_every_group_repeats_its_own_parameters():
    drawn = augment.draw("color_crop_cutout_flip", 3, 8, generator(), one_choice=False)
    grown = drawn.repeat(2)
    assert grown.alternatives == ("crop",)
    for name in ("flip", *COLOURS, "chosen", "crop", "cutout"):
        values = getattr(drawn, name).tolist()
        assert getattr(grown, name).tolist() == [values[i] for i in (0, 0, 1, 1, 2, 2)]
    assert grown.scale is None and grown.rotate is None


# Launches


class Launches(TorchDispatchMode):
    """Counts the operators that compute; views and empty tensors launch nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and "empty" not in function.name()
        return function(*args, **(kwargs or {}))


def test_all_classes_are_augmented_in_as_many_launches_as_one():
    """Augmenting class by class, as IDC's code does, would multiply the launches by the number of classes."""
    counts = []
    for classes in (1, 10):
        images, stream = noise(classes * 6, 32), generator()
        with Launches() as launches:
            drawn = augment.draw("color_crop_cutout_flip_scale_rotate", classes, 32, stream, one_choice=False)
            augment.apply(images, drawn.repeat(6))
        counts.append(launches.count)
    assert counts[0] == counts[1] < 100


# Gradients


@pytest.mark.parametrize("offset", [(0, 0), (1, -2), (-3, 4), (9, 0)])
def test_shift_has_the_right_gradient(offset):
    images = noise(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment.shift(x, torch.tensor([offset, (0, 1)])), images)


@pytest.mark.parametrize("centre", [(0, 0), (2, 3), (4, 4)])
def test_cutout_has_the_right_gradient(centre):
    images = noise(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment.cutout(x, torch.tensor([centre, (1, 1)])), images)


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_strategy_has_the_right_gradient(seed):
    drawn = augment.draw(EVERYTHING, 3, 5, generator(seed), one_choice=False)
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, drawn), noise(3, 5).requires_grad_())


# Against torchvision


@pytest.mark.parametrize("degrees", [-15.0, -4.0, 7.5, 15.0])
def test_rotating_is_torchvisions(degrees):
    images = noise(3, 32)
    turned = {"chosen": torch.zeros(3, dtype=torch.int64), "rotate": torch.full((3,), math.radians(degrees))}
    found = augment.apply(images, augment.draw_of("rotate", turned))
    torch.testing.assert_close(found, torchvision_affine(images, angle=-degrees, scale=1.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [1 / 1.2, 0.95, 1.2])
def test_scaling_both_axes_alike_is_torchvisions(factor):
    images = noise(3, 32)
    scaled = {"chosen": torch.zeros(3, dtype=torch.int64), "scale": torch.full((3, 2), factor)}
    found = augment.apply(images, augment.draw_of("scale", scaled))
    torch.testing.assert_close(found, torchvision_affine(images, angle=0.0, scale=1 / factor), rtol=0, atol=1e-4)


def torchvision_affine(images: Tensor, *, angle: float, scale: float) -> Tensor:
    functional = vision.torchvision().transforms.functional
    bilinear = functional.InterpolationMode.BILINEAR
    # In float32, in which torchvision makes its grid.
    return functional.affine(images.float(), angle, [0, 0], scale, [0.0], interpolation=bilinear).double()
