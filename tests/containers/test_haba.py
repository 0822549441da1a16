"""HaBa: every image's style against PyTorch's own layers, exact sizes, and settings that fit a budget."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hmn.budget import budget_floats
from hmn.config.containers import HabaConfig
from hmn.containers import Storage, rebuild, storage
from hmn.containers.haba import Haba, HabaShape, fill
from hmn.errors import ConfigError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
DATA = {
    "cifar10": {"classes": 10, "channels": 3, "image_size": 32},
    "cifar100": {"classes": 100, "channels": 3, "image_size": 32},
    "tiny_imagenet": {"classes": 200, "channels": 3, "image_size": 64},
    "imagenet10": {"classes": 10, "channels": 3, "image_size": 224},
}


def configured(**changes: object) -> HabaConfig:
    return HabaConfig(name="haba", **changes)


def shaped(**changes: object) -> HabaShape:
    values = dict(classes=2, channels=3, image_size=8, base_channels=3, styles=3)
    return HabaShape(**values | changes)


def made(instances: int = 2, seed: int = 0, **changes: object) -> Haba:
    container = Haba(shaped(**changes), instances)
    container.initialise(torch.Generator().manual_seed(seed), configured(init="noise"), None)
    with torch.no_grad():  # neither one nor zero, so that a wrong style shows
        for parameter in (container.hallucinators.scale, container.hallucinators.shift):
            parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return container


def everything(container: Haba) -> Tensor:
    return container.decode(torch.arange(container.classes * container.images_per_class))


@torch.no_grad()
def by_layers(container: Haba, label: int, base: int, style: int) -> Tensor:
    """Pixels (channels, H, W) from PyTorch's own layers with the parameters of ``style``."""
    shape, styles = container.shape, container.hallucinators
    encoder = nn.Conv2d(shape.base_channels, shape.channels, 3)
    decoder = nn.ConvTranspose2d(shape.channels, shape.channels, 3)
    encoder.load_state_dict({"weight": styles.encoder_weight[style], "bias": styles.encoder_bias[style]})
    decoder.load_state_dict({"weight": styles.decoder_weight[style], "bias": styles.decoder_bias[style]})
    inner = styles.scale[style] * encoder(container.instances[label, base][None]) + styles.shift[style]
    return decoder(inner)[0]


# Decoding


@pytest.mark.parametrize("base_channels", [1, 3])
@pytest.mark.parametrize("side", [4, 8, 13])
def test_image_g_is_base_g_over_s_in_style_g_modulo_s(base_channels, side):
    container = made(base_channels=base_channels, image_size=side)
    assert container.images_per_class == 6
    layers = [by_layers(container, c, base, style) for c in range(2) for base in range(2) for style in range(3)]
    images = everything(container)
    assert images.shape == (12, 3, side, side)
    torch.testing.assert_close(images, torch.stack(layers), rtol=0, atol=1e-5)


def test_normalised_pixels_become_images():
    container = made(pixel_space="normalised", mean=MEAN, std=STD)
    expected = by_layers(container, 1, 1, 2) * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(everything(container)[11], expected, rtol=0, atol=1e-5)


@given(index=st.lists(st.integers(0, 11), min_size=1, max_size=9), channels=st.sampled_from([(1, 1), (3, 1), (3, 3)]))
@settings(max_examples=25)
def test_an_image_depends_neither_on_its_neighbours_nor_on_its_place(index, channels):
    container = made(channels=channels[0], base_channels=channels[1])
    images = container.decode(torch.tensor(index))
    for place, image in enumerate(index):
        alone = container.decode(torch.tensor([image] * len(index)))
        assert torch.equal(alone[place], images[place])


def test_one_image_moves_its_base_and_its_style_alone():
    container = made()
    container.decode(torch.tensor([6 + 3 + 2])).square().sum().backward()  # class 1, base 1, style 2
    assert container.instances.grad.flatten(2).any(2).tolist() == [[False, False], [False, True]]
    for name, parameter in container.hallucinators.named_parameters():
        assert parameter.grad.flatten(1).any(1).tolist() == [False, False, True], name


# Size


@pytest.mark.parametrize(
    ("side", "base_channels", "floats"),
    [
        (32, 3, 5_568),
        (64, 3, 23_232),
        (128, 3, 95_424),
        (224, 3, 295_872),
        (32, 1, 5_514),
        (64, 1, 23_178),
        (128, 1, 95_370),
        (224, 1, 295_818),
    ],
)
def test_one_style_has_these_parameters(side, base_channels, floats):
    shape = shaped(image_size=side, base_channels=base_channels, styles=1)
    assert shape.shared_floats == floats
    with torch.device("meta"):
        container = Haba(dataclasses.replace(shape, styles=5), 2)
    assert container.tier_floats() == {"instances": 2 * 2 * base_channels * side**2, "hallucinators": 5 * floats}
    assert container.storage_floats() == container.shape.shared_floats + 4 * container.shape.instance_floats


def test_bases_are_memories_and_styles_are_weights():
    container = made()
    assert container.memory_tiers() == {"instances"}
    (owned,) = container.class_parameters()
    assert owned is container.instances


def planned(data: str, images_per_class: int, **changes: object) -> tuple[HabaConfig, Storage]:
    config = fill(configured(**changes), images_per_class=images_per_class, **DATA[data])
    return config, storage(HabaShape.of(config, **DATA[data]), images_per_class, 0.0)


@pytest.mark.parametrize(
    ("data", "images_per_class", "changes", "bases", "styles", "base_channels"),
    [
        ("cifar10", 1, {}, 1, 3, 1),
        ("cifar10", 1, {"styles": 1}, 2, 1, 1),
        ("cifar10", 10, {}, 9, 5, 3),
        ("cifar10", 10, {"base_channels": 1}, 27, 5, 1),
        ("cifar10", 50, {}, 49, 5, 3),
        ("cifar10", 50, {"base_channels": 1}, 147, 5, 1),
        ("cifar100", 1, {}, 2, 5, 1),
        ("cifar100", 10, {}, 9, 5, 3),
        ("cifar100", 10, {"base_channels": 1}, 29, 5, 1),
        ("cifar100", 50, {}, 49, 5, 3),
        ("cifar100", 50, {"base_channels": 1}, 149, 5, 1),
        ("imagenet10", 1, {}, 1, 3, 1),
        ("imagenet10", 1, {"styles": 1}, 2, 1, 1),
    ],
)
def test_what_is_left_open_becomes_what_the_strict_budget_allows(
    data, images_per_class, changes, bases, styles, base_channels
):
    config, found = planned(data, images_per_class, **changes)
    assert (found.instances, config.styles, config.base_channels) == (bases, styles, base_channels)
    assert found.images_per_class == bases * styles


@pytest.mark.parametrize("images_per_class", [1, 10, 50])
@pytest.mark.parametrize("data", DATA)
def test_what_is_stored_never_exceeds_the_budget_and_one_more_base_would(data, images_per_class):
    config, found = planned(data, images_per_class)
    classes = DATA[data]["classes"]
    budget = budget_floats(images_per_class, **DATA[data])
    assert found.stored_floats(classes) <= budget < found.stored_floats(classes) + classes * found.instance_floats
    with torch.device("meta"):
        container = Haba(HabaShape.of(config, **DATA[data]), found.instances)
    assert container.storage_floats() == found.stored_floats(classes)


@given(
    classes=st.integers(2, 20), channels=st.sampled_from([1, 3]), image_size=st.integers(4, 40), ipc=st.integers(1, 12)
)
def test_no_other_number_of_styles_has_more_images(classes, channels, image_size, ipc):
    data = {"classes": classes, "channels": channels, "image_size": image_size}
    config = fill(configured(), images_per_class=ipc, **data)

    def images(styles: int) -> int:
        given = dataclasses.replace(config, styles=styles)
        try:
            return storage(HabaShape.of(given, **data), ipc, 0.0).images_per_class
        except ConfigError:
            return 0

    assert images(config.styles) == max(images(styles) for styles in range(1, 6))


def test_the_papers_nominal_setting_is_refused_at_its_true_size():
    with pytest.raises(ConfigError, match="over the budget of 30,720; the smallest budget that fits is 58,560"):
        planned("cifar10", 1, styles=5, base_channels=3)


def test_where_nothing_fits_the_smallest_container_is_refused():
    data = {"classes": 10, "channels": 1, "image_size": 8}
    config = fill(configured(), images_per_class=1, **data)
    assert (config.styles, config.base_channels) == (1, 1)
    with pytest.raises(ConfigError, match="the smallest budget that fits is 732"):  # 640 for ten bases, and 92
        storage(HabaShape.of(config, **data), 1, 0.0)


def test_bases_of_two_channels_are_refused():
    with pytest.raises(ConfigError, match=r"container\.base_channels=2: must be 1 or the image's channels, 3"):
        planned("cifar10", 10, base_channels=2)


# Starting values


class Real:
    def __init__(self, images: Tensor) -> None:
        self.images, self.asked = images, []

    def draw(self, count: int, how: str = "random") -> Tensor:
        self.asked.append((count, how))
        return self.images


@pytest.mark.parametrize("base_channels", [1, 3])
def test_real_bases_are_random_images_or_their_mean_over_channels(base_channels):
    real = Real(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    shape = shaped(base_channels=base_channels, pixel_space="normalised", mean=MEAN, std=STD)
    container = Haba(shape, 2)
    container.initialise(torch.Generator(), configured(init="real"), real)
    assert real.asked == [(2, "random")]
    expected = (real.images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    if base_channels == 1:
        expected = (expected[:, 0:1] + expected[:, 1:2] + expected[:, 2:3]) / 3
    torch.testing.assert_close(container.instances.flatten(0, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["noise", "fit_real"])
def test_noise_bases_come_from_the_generator(init):
    found = []
    for seed in (0, 0, 1):
        container = Haba(shaped(pixel_space="normalised", image_size=32), 20)
        container.initialise(torch.Generator().manual_seed(seed), configured(init=init), None)
        found.append(torch.cat([parameter.flatten() for parameter in container.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    bases = container.instances.detach()
    assert abs(float(bases.mean())) < 0.02 and abs(float(bases.std()) - 1) < 0.02


@pytest.mark.parametrize("base_channels", [1, 3])
def test_styles_start_as_pytorchs_layers_do(base_channels):
    container = Haba(shaped(base_channels=base_channels, styles=500), 1)
    container.initialise(torch.Generator().manual_seed(0), configured(init="noise"), None)
    styles = container.hallucinators
    assert styles.scale.eq(1).all() and styles.shift.eq(0).all()
    layers = {"encoder": nn.Conv2d(base_channels, 3, 3), "decoder": nn.ConvTranspose2d(3, 3, 3)}
    for name, layer in layers.items():
        fan_in = nn.init._calculate_fan_in_and_fan_out(layer.weight)[0]
        for kind in ("weight", "bias"):
            values, bound = getattr(styles, f"{name}_{kind}").detach(), 1 / math.sqrt(fan_in)
            assert values.abs().max() <= bound and values.max() > 0.97 * bound and values.min() < -0.97 * bound
            assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_unit_bases_are_kept_in_their_range():
    container = made()
    with torch.no_grad():
        container.instances.mul_(3).sub_(1)
    container.project()
    assert (container.instances.min(), container.instances.max()) == (0, 1)
    free = made(pixel_space="normalised", mean=MEAN, std=STD)
    before = free.instances.clone()
    free.project()
    assert torch.equal(free.instances, before)


# Pruning


def test_images_of_one_base_are_tied_and_known_to_be_from_the_shape():
    container = made()
    assert "dropping a base drops the images of all 3 styles" in container.tied
    assert container.tied == container.shape.tied
    with pytest.raises(ValueError, match="haba: dropping a base"):
        container.keep(torch.tensor([0, 1, 2, 6, 7, 8]))


def test_with_one_style_every_image_has_a_base_of_its_own():
    container = made(instances=3, styles=1)
    assert container.tied is None
    kept = torch.tensor([0, 2, 3, 4])
    expected = container.decode(kept)
    container.keep(kept)
    assert torch.equal(everything(container), expected)


def test_the_specification_rebuilds_it():
    container = made(pixel_space="normalised", mean=MEAN, std=STD, base_channels=1)
    again = rebuild(json.loads(json.dumps(container.specification())))
    assert again.specification() == container.specification()
    again.load_state_dict(container.state_dict())
    assert torch.equal(everything(again), everything(container))
