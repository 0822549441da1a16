"""The Hierarchical Memory Network against an image-by-image decoder; initialisation, pruning, storage."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hmn.budget import budget_floats
from hmn.config import HmnConfig
from hmn.containers import storage
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape, Tangent, UpsamplingConv2d
from hmn.containers.presets import PRESETS
from hmn.errors import ConfigError
from hmn.prune import kept_images

TINY = HmnShape(
    classes=3,
    channels=3,
    image_size=16,
    latent_side=4,
    dataset_channels=3,
    feature_channels=2,
    feature_kernel=3,
    class_channels=2,
    instance_channels=2,
    decoder_width=6,
)
P1 = HmnShape(
    classes=10,
    channels=3,
    image_size=32,
    latent_side=4,
    dataset_channels=8,
    feature_channels=4,
    feature_kernel=1,
    class_channels=2,
    instance_channels=2,
    decoder_width=16,
)
VARIANTS = {
    "all tiers": {},
    "extractors of one pixel": {"feature_kernel": 1},
    "no extractors": {"feature_channels": 0},
    "no class memory": {"class_channels": 0},
    "instances only": {"feature_channels": 0, "class_channels": 0},
    "grey, one doubling": {"channels": 1, "image_size": 8},
    "three doublings": {"image_size": 32},
    "transposed": {"decoder": "transposed"},
    "normalised": {"decoder_norm": True},
    "linear output": {"output": "linear"},
    "transposed and normalised": {"decoder": "transposed", "decoder_norm": True},
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(shape: HmnShape = TINY, images_per_class: int = 4, seed: int = 0, scale: float = 1.0) -> HierarchicalMemory:
    container = HierarchicalMemory(shape, images_per_class)
    container.initialise(generator(seed), HmnConfig(name="hmn", instance_init_scale=scale), None)
    return container


def perturbed(shape: HmnShape, images_per_class: int = 4) -> HierarchicalMemory:
    """A float64 container with no parameter at its initial value, so that zero biases and unit norms hide nothing."""
    container = made(shape, images_per_class).double()
    stream = generator(1)
    with torch.no_grad():
        for parameter in container.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=stream, dtype=torch.float64))
    return container


@torch.no_grad()
def decoded(container: HierarchicalMemory, *index: int) -> Tensor:
    return container.decode(torch.tensor(index))


def everything(container: HierarchicalMemory) -> range:
    return range(container.classes * container.images_per_class)


# Decoding


def leaky(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 0.2 * values)


@torch.no_grad()
def plain_image(container: HierarchicalMemory, c: int, i: int) -> Tensor:
    """x_{c,i} = D([f_c(m_D), m_c, m_{c,i}]) for one image, one extractor and one stage at a time."""
    shape, parts = container.shape, []
    if shape.feature_channels:
        weight, bias = container.extractor_weight[c], container.extractor_bias[c]
        parts.append(leaky(F.conv2d(container.dataset[None], weight, bias, padding=shape.feature_kernel // 2)))
    if shape.class_channels:
        parts.append(container.class_memory[c][None])
    maps = torch.cat([*parts, container.instances[c, i][None]], dim=1)
    weights = iter(container.decoder.parameters())
    side = shape.latent_side
    while side < shape.image_size:
        if shape.decoder == "upsample":
            maps = F.conv2d(maps, next(weights), next(weights), padding=1)
        else:
            maps = F.conv_transpose2d(maps, next(weights), next(weights), stride=2, padding=1)
        if shape.decoder_norm:
            scale, offset = next(weights), next(weights)
            deviation = (maps.var(correction=0) + 1e-5).sqrt()
            maps = (maps - maps.mean()) / deviation * scale.view(-1, 1, 1) + offset.view(-1, 1, 1)
        maps = leaky(maps)
        if shape.decoder == "upsample":
            maps = maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        side *= 2
        assert maps.shape[-1] == side
    image = F.conv2d(maps, next(weights), next(weights), padding=1)
    image = 1 / (1 + torch.exp(-image)) if shape.output == "sigmoid" else 0.5 + 0.25 * image
    assert next(weights, None) is None
    return image[0]


@each_variant
def test_decoding_equals_the_equation_image_by_image(changes):
    shape = replace(TINY, **changes)
    container = perturbed(shape)
    images = decoded(container, *everything(container))
    assert images.shape == (12, shape.channels, shape.image_size, shape.image_size)
    for row, image in enumerate(images):
        expected = plain_image(container, row // 4, row % 4)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("inputs", "outputs", "height", "width"), [(3, 5, 4, 4), (4, 3, 1, 1), (2, 2, 3, 5)])
def test_a_convolution_that_upsamples_is_upsampling_and_then_the_convolution(inputs, outputs, height, width):
    layer = UpsamplingConv2d(inputs, outputs, 3, padding=1).double()
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1)).double()
    plain[1].load_state_dict(layer.state_dict())  # the same names, so earlier condensed sets still load
    x = torch.randn(2, inputs, height, width, generator=generator(), dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, outputs, 2 * height, 2 * width, generator=generator(1), dtype=torch.float64)
    found, expected = layer(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(found, [x, *layer.parameters()], direction)
    theirs = torch.autograd.grad(expected, [x, *plain.parameters()], direction)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_linear_output_is_the_sigmoids_tangent_at_grey():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for output in (nn.Sigmoid(), Tangent()):
        value = output(x)
        (slope,) = torch.autograd.grad(value, x)
        assert (value.item(), slope.item()) == (0.5, 0.25)


def test_any_instances_can_be_decoded_in_any_order():
    container = perturbed(TINY)
    images, order = decoded(container, *everything(container)), [11, 0, 5, 5, 2]
    torch.testing.assert_close(decoded(container, *order), images[order], rtol=0, atol=1e-12)


@each_variant
def test_no_image_depends_on_another_instance(changes):
    container = made(replace(TINY, **changes))
    before = decoded(container, *everything(container))[6]
    with torch.no_grad():
        mine = container.instances[1, 2].clone()
        container.instances.mul_(3).add_(1)
        container.instances[1, 2] = mine
    assert torch.equal(decoded(container, *everything(container))[6], before)


# Parameters


def test_the_shapes_are_those_of_the_tiers():
    container = made()
    assert container.dataset.shape == (3, 4, 4)
    assert container.extractor_weight.shape == (3, 2, 3, 3, 3) and container.extractor_bias.shape == (3, 2)
    assert container.class_memory.shape == (3, 2, 4, 4)
    assert container.instances.shape == (3, 4, 2, 4, 4)
    assert (container.classes, container.images_per_class) == (3, 4)


@pytest.mark.parametrize(
    ("changes", "tiers"),
    [
        ({"feature_channels": 0}, {"instances", "class", "decoder"}),
        ({"class_channels": 0}, {"instances", "dataset", "extractors", "decoder"}),
        ({"feature_channels": 0, "class_channels": 0}, {"instances", "decoder"}),
    ],
)
def test_a_tier_without_channels_is_neither_stored_nor_counted(changes, tiers):
    shape = replace(P1, **changes)
    container = HierarchicalMemory(shape, 78)
    assert set(container.tiers()) == tiers
    inputs = shape.feature_channels + shape.class_channels + 2
    decoder = (inputs * 16 * 9 + 16) + 2320 + 1160 + 219
    expected = decoder
    expected += 128 + 10 * 36 if "dataset" in tiers else 0
    expected += 10 * 32 if "class" in tiers else 0
    assert shape.shared_floats == expected
    assert container.storage_floats() == expected + 10 * 78 * 32


@pytest.mark.parametrize("decoder", ["upsample", "transposed"])
def test_decoder_norm_adds_two_numbers_per_hidden_channel(decoder):
    plain = replace(P1, decoder=decoder)
    assert replace(plain, decoder_norm=True).shared_floats == plain.shared_floats + 2 * (16 + 16 + 8)


# Initialisation


def statistics(container: HierarchicalMemory) -> tuple[float, float]:
    """Standard deviation of all pixels, and the mean standard deviation of a pixel over the images of a class."""
    images = decoded(container, *everything(container)).unflatten(0, (container.classes, -1))
    return float(images.std()), float(images.std(1).mean())


@pytest.mark.parametrize("decoder", ["upsample", "transposed"])
def test_images_start_with_the_deviation_of_natural_ones_and_differ_inside_a_class(decoder):
    found = torch.tensor([statistics(made(replace(P1, decoder=decoder), 20, seed)) for seed in range(5)])
    pixels, between = found.mean(0).tolist()
    assert 0.17 <= pixels <= 0.24  # 0.006 to 0.019 with PyTorch's default weights
    assert 0.06 <= between <= 0.10  # 0.002 to 0.007 with PyTorch's default weights
    assert found[:, 0].min() > 0.1


def test_the_instance_scale_multiplies_instances_alone_and_makes_images_differ_more():
    one, two = made(P1, 20), made(P1, 20, scale=2.0)
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(second, 2 * first if name == "instances" else first), name
    assert statistics(two)[1] > 1.4 * statistics(one)[1]


def test_memories_start_standard_normal():
    container = HierarchicalMemory(replace(TINY, classes=20, dataset_channels=64, class_channels=8), 40)
    container.initialise(generator(), HmnConfig(name="hmn"), None)
    for memory in (container.dataset, container.class_memory, container.instances):
        n = memory.numel()
        assert abs(memory.mean()) < 5 / math.sqrt(n)
        assert memory.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * n))
        assert memory.abs().max() > 2.5


@pytest.mark.parametrize("decoder", ["upsample", "transposed"])
def test_weights_start_kaiming_normal_for_the_leak_and_biases_zero(decoder):
    shape = replace(
        TINY, feature_channels=16, dataset_channels=16, decoder_width=64, decoder=decoder, decoder_norm=True
    )
    container = made(shape)
    gain = math.sqrt(2 / (1 + 0.2**2))
    inputs = 16 + 2 + 2
    taps = 9 if decoder == "upsample" else 4  # a transposed 4x4 kernel at stride 2 lays 4 taps on each output
    stages = [module for module in container.decoder if hasattr(module, "stride")]
    fans = [inputs * taps, 64 * taps, 32 * 9]
    for module, fan_in in zip(stages, fans, strict=True):
        weight = module.weight
        assert weight.std().item() == pytest.approx(gain / math.sqrt(fan_in), rel=5 / math.sqrt(2 * weight.numel()))
        assert not module.bias.any()
    extractors = container.extractor_weight
    spread = gain / math.sqrt(16 * 9)
    assert extractors.std().item() == pytest.approx(spread, rel=5 / math.sqrt(2 * extractors.numel()))
    assert not container.extractor_bias.any()
    norms = [module for module in container.decoder if isinstance(module, torch.nn.GroupNorm)]
    assert len(norms) == 2 and all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


def test_initialisation_depends_on_the_generator_alone():
    first, again, other = (made(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["instances"], other["instances"])


# Pruning

KEPT = [0, 2, 5, 7, 8, 11]  # two of the four images of each of three classes


@each_variant
def test_dropping_images_leaves_the_others_bit_equal(changes):
    # A CPU picks different convolutions for one image and for several, so equal numbers of images are compared.
    container = made(replace(TINY, **changes))
    together, alone = decoded(container, *KEPT), [decoded(container, i) for i in KEPT]
    container.keep(torch.tensor(KEPT))
    assert container.images_per_class == 2
    assert torch.equal(decoded(container, *everything(container)), together)
    assert all(torch.equal(decoded(container, i), image) for i, image in enumerate(alone))


def test_survivors_stay_in_order_whatever_the_order_asked_for():
    container, other = made(), made()
    container.keep(torch.tensor(KEPT))
    other.keep(torch.tensor(KEPT[::-1]))
    assert torch.equal(container.instances, other.instances)


def test_pruning_frees_exactly_the_instances():
    container = made()
    before, tiers = container.storage_floats(), container.tier_floats()
    container.keep(torch.tensor(KEPT))
    assert container.storage_floats() == before - 6 * TINY.instance_floats
    assert container.tier_floats() == tiers | {"instances": 6 * TINY.instance_floats}
    assert container.instances.requires_grad and container.instances.is_leaf


@pytest.mark.parametrize(
    "index",
    [
        [],
        [0, 4],  # class 2 would be empty
        [0, 1, 4, 5, 8],  # unequal
        [0, 0, 4, 5, 8, 9],  # an image twice is still one image
    ],
)
def test_unbalanced_or_empty_classes_are_refused_and_nothing_changes(index):
    container = made()
    before = container.instances.clone()
    with pytest.raises(ValueError, match="every class must keep the same number of images, at least one"):
        container.keep(torch.tensor(index, dtype=torch.int64))
    assert torch.equal(container.instances, before)


# Storage


@pytest.mark.parametrize("row", PRESETS.values(), ids=PRESETS.keys())
def test_shared_floats_are_every_parameter_but_the_instances(row):
    names = ("latent_side", "dataset_channels", "feature_channels", "feature_kernel", "class_channels")
    values = {name: getattr(row, name) for name in (*names, "instance_channels", "decoder_width")}
    shape = HmnShape(classes=row.classes, channels=3, image_size=row.image_size, **values)
    with torch.device("meta"):
        container = HierarchicalMemory(shape, 7)
    assert container.storage_floats() == shape.shared_floats + row.classes * 7 * shape.instance_floats
    assert sum(container.tier_floats().values()) == container.storage_floats()


@st.composite
def shapes(draw: st.DrawFn) -> HmnShape:
    side, doublings = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return HmnShape(
        classes=draw(st.integers(2, 6)),
        channels=draw(st.sampled_from([1, 3])),
        image_size=side * 2**doublings,
        latent_side=side,
        dataset_channels=draw(st.integers(1, 5)),
        feature_channels=draw(st.integers(0, 4)),
        feature_kernel=draw(st.sampled_from([1, 3])),
        class_channels=draw(st.integers(0, 4)),
        instance_channels=draw(st.integers(1, 5)),
        decoder_width=draw(st.sampled_from([2, 4, 6])),
        decoder=draw(st.sampled_from(["upsample", "transposed"])),
        decoder_norm=draw(st.booleans()),
        output=draw(st.sampled_from(["sigmoid", "linear"])),
    )


@settings(max_examples=60, derandomize=True)
@given(
    shape=shapes(),
    images_per_class=st.integers(1, 12),
    over_budget=st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.9]),
    beta=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape_budget_and_pruning_ends_within_the_budget_and_with_equal_classes(
    shape, images_per_class, over_budget, beta, seed
):
    budget = budget_floats(images_per_class, shape.classes, shape.channels, shape.image_size)
    one_more = shape.classes * shape.instance_floats
    try:
        stored = storage(shape, images_per_class, over_budget)
    except ConfigError:
        assert HierarchicalMemory(shape, 1).storage_floats() > budget
        return
    container = HierarchicalMemory(shape, stored.over_budget_images_per_class)
    condensed = container.storage_floats()
    assert condensed <= (1 + over_budget) * budget + 1e-6 < condensed + one_more
    with torch.no_grad():  # each instance holds its own number, which identifies it later
        numbers = torch.arange(shape.classes * container.images_per_class, dtype=torch.float32)
        container.instances.copy_(numbers.view(shape.classes, -1, 1, 1, 1))
    scores = torch.rand(shape.classes, container.images_per_class, generator=generator(seed))
    container.keep(kept_images(scores, stored.images_per_class, beta))
    assert container.storage_floats() == stored.stored_floats(shape.classes) <= budget
    assert container.storage_floats() + one_more > budget
    survivors = container.instances[:, :, 0, 0, 0]
    assert survivors.shape == (shape.classes, stored.images_per_class) and stored.images_per_class >= 1
    owners = survivors.long() // stored.over_budget_images_per_class
    assert (owners == torch.arange(shape.classes)[:, None]).all()
    assert (survivors.diff(dim=1) > 0).all()
