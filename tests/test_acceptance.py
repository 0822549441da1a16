"""Published facts to check a reimplementation against first, by number; other tests cover the details."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hmn.compute import Compute
from hmn.config import NetworkConfig
from hmn.config.containers import SCHEMAS
from hmn.config.objectives import GradientMatchingConfig
from hmn.containers import KINDS, fred, storage
from hmn.data import augment
from hmn.evaluate import recipe_of
from hmn.networks import builder
from hmn.networks.convnet import ConvNet
from hmn.objectives.gradient import matching_step
from hmn.optimizer import ContainerOptimizer, idc_rate_factor
from hmn.prune import kept_images
from hmn.training import learning_rate
from tests.command import configured

CONFIGS = {schema.NAME: schema for schema in SCHEMAS}
CIFAR10 = {"classes": 10, "channels": 3, "image_size": 32}


def shape(name: str, data: dict[str, int] = CIFAR10, ipc: int = 1, **values: object):
    kind = KINDS[name]
    return kind.shape.of(kind.fill(CONFIGS[name](name=name, **values), images_per_class=ipc, **data), **data)


def stored(name: str, data: dict[str, int] = CIFAR10, ipc: int = 1, **values: object):
    return storage(shape(name, data, ipc, **values), ipc, 0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# 1


@pytest.mark.parametrize(
    ("config", "size", "classes", "parameters"),
    [
        ({"name": "convnet"}, 32, 10, 320_010),
        ({"name": "convnet"}, 32, 100, 504_420),
        ({"name": "convnet"}, 64, 200, 857_160),
        ({"name": "convnet"}, 128, 10, 615_690),
        ({"name": "convnet"}, 224, 10, 754_570),
        ({"name": "resnet_ap10", "norm": "instance"}, 224, 10, 4_910_922),
        ({"name": "resnet10", "width": 32, "norm": "batch"}, 32, 10, 1_228_970),
        ({"name": "densenet121", "width": 12, "norm": "batch"}, 32, 10, 1_000_618),
        ({"name": "resnet18", "norm": "batch"}, 32, 10, 11_173_962),
        ({"name": "vgg16", "norm": "batch"}, 32, 10, 14_728_266),
    ],
)
def test_1_networks_have_the_published_numbers_of_parameters(config, size, classes, parameters):
    with torch.device("meta"):
        network = builder(NetworkConfig(**config), channels=3, classes=classes, image_size=size)()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


# 2


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_2_multi_formation_takes_the_whole_budget_whatever_its_factor(factor, ipc):
    held = stored("multiformation", ipc=ipc, factor=factor)
    assert held.stored_floats(10) == held.budget_floats == ipc * 30_720
    assert held.images_per_class == ipc * factor**2


def test_2_linba_with_16_bases_leaves_115_images():
    held = stored("linba", bases=16, downsample=2)
    assert (held.stored_floats(10), held.images_per_class) == (30_688, 115)


def test_2_habas_own_setting_takes_nearly_twice_the_budget():
    nominal = shape("haba", base_channels=3, styles=5)
    assert nominal.shared_floats + 10 * nominal.instance_floats == 58_560


@pytest.mark.parametrize(
    ("data", "ipc", "images", "floats"),
    [
        ((10, 32), 1, 17, 29_872),
        ((10, 32), 10, 124, 306_960),
        ((10, 32), 50, 272, 1_532_400),
        ((100, 32), 1, 11, 305_040),
        ((100, 32), 10, 62, 3_035_760),
        ((100, 32), 50, 100, 15_297_360),
        ((200, 64), 1, 17, 2_437_312),
        ((200, 64), 10, 78, 24_440_512),
        ((10, 128), 1, 15, 482_880),
        ((10, 128), 10, 111, 4_898_496),
    ],
)
def test_2_speed_holds_as_many_images_as_its_paper(data, ipc, images, floats):
    classes, size = data
    held = stored("speed", {"classes": classes, "channels": 3, "image_size": size}, ipc)
    assert (held.images_per_class, held.stored_floats(classes)) == (images, floats)


def test_2_fred_with_64_coefficients_holds_16_images():
    assert stored("fred", coefficients=64).images_per_class == 16


@pytest.mark.parametrize(("ipc", "images", "floats"), [(1, 38, 30_283), (10, 207, 306_195), (50, 721, 1_534_755)])
def test_2_hmn_presets_fill_cifar10s_budgets(ipc, images, floats):
    held = stored("hmn", ipc=ipc)
    assert (held.images_per_class, held.stored_floats(10)) == (images, floats)


# 3


def test_3_multi_formation_cuts_224_pixels_into_nine_tiles_of_a_padded_225_grid_tile_by_tile():
    data = {"classes": 1, "channels": 3, "image_size": 224}
    container = KINDS["multiformation"].container(shape("multiformation", data, factor=3), 2)
    with torch.no_grad():
        container.instances.copy_(torch.rand(container.instances.shape, generator=generator()))
        images = container.decode(torch.arange(18))
        padded = F.pad(container.instances[0], (0, 1, 0, 1), value=0.5)
        tile, image = 5, 1  # row 1, column 2
        expected = F.interpolate(padded[[image], :, 75:150, 150:225], size=224, mode="bilinear", align_corners=False)
    assert images.shape == (18, 3, 224, 224)
    torch.testing.assert_close(images[tile * 2 + image], expected[0])


@pytest.mark.parametrize(("name", "values"), [("haba", {}), ("linba", {"bases": 16}), ("fred", {}), ("speed", {})])
def test_3_containers_decode_to_the_images_side(name, values):
    held = shape(name, **values)
    held = type(held)(**{**vars(held), "mean": (0.5,) * 3, "std": (0.2,) * 3})
    container = KINDS[name].container(held, 1)
    for parameter in container.parameters():
        nn.init.normal_(parameter, generator=generator())
    assert container.decode(torch.tensor([0])).shape == (1, 3, 32, 32)
    if name == "linba":
        assert container.bases.shape == (16, 3, 16, 16)


# 4


def test_4_a_siamese_draw_is_the_same_for_real_and_synthetic_images():
    drawn = augment.draw("color_crop_cutout", 1, 32, generator(), one_choice=False)
    image = torch.randn(1, 3, 32, 32, generator=generator(1))
    both = augment.apply(image.expand(7, -1, -1, -1), drawn.repeat(7))
    assert all(torch.equal(one, both[0]) for one in both)


def test_4_crops_move_by_at_most_4_pixels_and_cutout_hides_at_most_16_by_16():
    drawn = augment.draw("crop_cutout", 2000, 32, generator())
    assert drawn.crop.abs().max() == 4
    hidden = (augment.cutout(torch.ones(2000, 1, 32, 32), drawn.cutout) == 0).sum((1, 2, 3))
    assert hidden.max() == 256 and hidden.min() >= 64


def test_4_idcs_rule_has_one_geometric_operator():
    drawn = augment.draw("color_crop_scale_rotate", 500, 32, generator(), one_choice=False)
    assert set(drawn.chosen.tolist()) == {0, 1, 2}
    one = augment.draw("color_crop_scale_rotate", 500, 32, generator())
    assert len(one.chosen.unique()) == 1


# 5


def test_5_the_gradient_matching_loss_of_equal_batches_is_zero_and_has_a_part_for_each_convolution():
    network = ConvNet(3, 10, 32, width=8).double()
    images = torch.randn(1, 6, 3, 32, 32, generator=generator(), dtype=torch.float64)
    match = matching_step(network, "mse", Compute(torch.device("cpu")))
    losses, gradients = match(dict(network.named_parameters()), images, images, torch.tensor([3]))
    assert losses.shape == (3,) and losses.sum() < 1e-9
    assert gradients.abs().max() < 1e-9


# 6 is tested in tests/objectives/test_unroll.py


# 7


def test_7_of_24_images_to_cut_a_beta_of_0_3_takes_7_hardest_and_17_easiest():
    scores = torch.arange(40.0).expand(3, 40)  # hardest first
    kept = kept_images(scores, 16, 0.3).view(3, 16) - 40 * torch.arange(3)[:, None]
    assert kept.tolist() == [list(range(7, 23))] * 3


# 8


def test_8_idcs_rates_by_images_per_class_and_side():
    assert 5e-3 * idc_rate_factor(50, 32) == pytest.approx(2.5e-2)
    assert 3e-3 * idc_rate_factor(10, 224) == pytest.approx(3e-3)
    assert 5e-3 * idc_rate_factor(1, 64) == pytest.approx(2e-3)  # Tiny-ImageNet, as in DREAM
    settings = GradientMatchingConfig(name="gradient_matching", memory_lr=5e-3, optimizer="sgd", lr_scaling="idc")
    container = KINDS["image"].container(shape("image"), 1)
    factor = idc_rate_factor(50, 32)
    assert ContainerOptimizer(container, settings, 10, by_class=False, factor=factor).learning_rate == 2.5e-2


# 9


def test_9_multistep_drops_to_a_fifth_at_666_and_833_of_1000_epochs_and_cosine_ends_at_zero():
    multistep = recipe_of(configured("evaluation=idc_multistep").evaluation, flip=True)
    rates = [learning_rate(multistep, epoch) for epoch in range(1000)]
    drops = [epoch for epoch in range(1, 1000) if rates[epoch] != rates[epoch - 1]]
    assert drops == [666, 833]
    assert rates[666] == pytest.approx(0.01 * 0.2) and rates[833] == pytest.approx(0.01 * 0.04)
    cosine = recipe_of(configured("evaluation=hmn_cosine").evaluation, flip=True)
    assert learning_rate(cosine, 1000) == pytest.approx(0, abs=1e-12)
    assert learning_rate(cosine, 500) == pytest.approx(0.01 * (1 + math.cos(math.pi / 2)) / 2)


# 10


@pytest.mark.parametrize("orthonormal", [False, True])
def test_10_freds_transform_is_inverted_and_a_classs_mask_has_as_many_ones_as_coefficients(orthonormal):
    images = torch.randn(4, 3, 32, 32, generator=generator())
    spectrum = fred.dct(images, orthonormal)
    inverse = fred.inverse_dct_matrix(32, orthonormal)
    torch.testing.assert_close(inverse @ spectrum @ inverse.T, images, rtol=0, atol=1e-5)
    chosen = fred.most_varying(spectrum.unflatten(0, (2, 2)), 64)
    assert chosen.shape == (2, 64) and all(len(row.unique()) == 64 for row in chosen)
