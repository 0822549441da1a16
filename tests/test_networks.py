"""ConvNet to the digit, its forward pass against plain functions, and its initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.config import NetworkConfig
from hmn.errors import ConfigError
from hmn.networks import builder, full_name, initialise
from hmn.networks.convnet import ConvNet, default_depth


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_meta(channels: int, classes: int, size: int, **shape: int) -> ConvNet:
    with torch.device("meta"):
        return ConvNet(channels, classes, size, **shape)


def total(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def convolution_weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.ndim == 4)


# Parameter counts


@pytest.mark.parametrize(
    ("depth", "size", "classes", "parameters", "weights", "features"),
    [
        (3, 32, 10, 320_010, 298_368, 2048),
        (3, 32, 100, 504_420, 298_368, 2048),
        (4, 64, 200, 857_160, 445_824, 2048),
        (3, 64, 200, 1_938_120, 298_368, 8192),
        (5, 128, 10, 615_690, 593_280, 2048),
        (5, 224, 10, 657_930, 593_280, 6272),
        (6, 224, 10, 754_570, 740_736, 1152),
        (1, 32, 10, 331_530, 3_456, 32_768),
        (2, 32, 10, 233_610, 150_912, 8192),
        (4, 32, 10, 452_490, 445_824, 512),
    ],
)
def test_parameters_are_counted_to_the_digit(depth, size, classes, parameters, weights, features):
    network = on_meta(3, classes, size, depth=depth)
    assert total(network) == parameters
    assert convolution_weights(network) == weights
    assert total(network.body) == weights + 3 * 128 * depth  # bias, norm weight and norm bias of every block
    assert network.classifier.weight.shape == (classes, features)


def test_width_128_and_depth_3_are_the_default():
    assert total(on_meta(3, 10, 32)) == 320_010


def test_instance_norm_is_group_norm_with_affine_parameters_and_no_running_statistics():
    network = on_meta(3, 10, 32)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 3
    assert all((norm.num_groups, norm.num_channels, norm.eps) == (128, 128, 1e-5) for norm in norms)
    assert all(norm.weight.shape == norm.bias.shape == (128,) for norm in norms)
    assert list(network.buffers()) == []


@pytest.mark.parametrize(
    ("size", "depth"),
    [(8, 2), (16, 2), (20, 3), (28, 3), (32, 3), (33, 4), (48, 4), (64, 4), (96, 5), (128, 5), (224, 6)],
)
def test_default_depth_is_the_smallest_that_leaves_at_most_4_by_4(size, depth):
    assert default_depth(size) == depth
    assert size / 2**depth <= 4 and (depth == 2 or size / 2 ** (depth - 1) > 4)


# Forward


def plain_forward(network: ConvNet, images: Tensor, depth: int) -> Tensor:
    """The same network from its parameters alone, norms written out."""
    values = list(network.parameters())
    for block in range(depth):
        weight, bias, scale, offset = values[4 * block : 4 * block + 4]
        images = F.conv2d(images, weight, bias, padding=1)
        mean = images.mean((2, 3), keepdim=True)
        variance = (images - mean).square().mean((2, 3), keepdim=True)
        images = (images - mean) / (variance + 1e-5).sqrt() * scale.view(-1, 1, 1) + offset.view(-1, 1, 1)
        images = images.clamp(min=0)
        half = images.shape[-1] // 2
        images = images.unflatten(3, (half, 2)).unflatten(2, (half, 2)).mean((3, 5))
    weight, bias = values[-2:]
    return images.flatten(1) @ weight.T + bias


@pytest.mark.parametrize(("channels", "size", "depth"), [(3, 16, 2), (1, 8, 1), (3, 32, 3)])
def test_a_block_is_convolution_instance_norm_relu_average_pooling(channels, size, depth):
    network = initialise(ConvNet(channels, 5, size, width=6, depth=depth), generator()).double()
    with torch.no_grad():
        for parameter in network.parameters():  # norms leave weight 1 and bias 0, which would hide them
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(1), dtype=torch.float64))
        images = torch.randn(4, channels, size, size, generator=generator(2), dtype=torch.float64)
        found = network(images)
        assert found.shape == (4, 5)
        torch.testing.assert_close(found, plain_forward(network, images, depth), rtol=0, atol=1e-9)


def test_28_pixels_are_padded_to_32_by_the_first_convolution():
    images = torch.randn(2, 1, 28, 28, generator=generator())
    small, large = (initialise(ConvNet(1, 10, size, width=4), generator()) for size in (28, 32))
    assert total(small) == total(large)
    with torch.no_grad():
        torch.testing.assert_close(small(images), large(F.pad(images, (2, 2, 2, 2))))
    assert small.body[:4](images).shape == (2, 4, 16, 16)


def test_images_do_not_influence_each_other():
    network = initialise(ConvNet(3, 4, 8, width=4, depth=2), generator())
    images = torch.randn(3, 3, 8, 8, generator=generator())
    with torch.no_grad():
        before = network(images)[0]
        images[1:] *= 7
        assert torch.equal(network(images)[0], before)


# Initialisation


def layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def test_initialise_draws_from_pytorchs_default_distribution():
    ours, theirs = initialise(ConvNet(3, 10, 16, width=64, depth=2), generator()), ConvNet(3, 10, 16, width=64, depth=2)
    for one, other in zip(layers(ours), layers(theirs), strict=True):
        fan_in = one.in_features if isinstance(one, nn.Linear) else one.in_channels * 9
        bound = 1 / math.sqrt(fan_in)
        for found, default in ((one.weight, other.weight), (one.bias, other.bias)):
            assert default.abs().max() <= bound * (1 + 1e-6)  # what is assumed of PyTorch
            assert found.abs().max() <= bound
        values = one.weight.detach().flatten()
        n = len(values)
        assert values.abs().max() > 0.99 * bound
        assert abs(values.mean()) < 5 * bound / math.sqrt(3 * n)
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(n))
        assert values.std().item() == pytest.approx(other.weight.std().item(), rel=10 / math.sqrt(n))
        if one.bias.numel() >= 64:
            assert one.bias.abs().max() > 0.8 * bound and one.bias.min() < 0 < one.bias.max()
    for module in ours.modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_initialise_depends_on_the_generator_alone():
    def drawn(seed: int) -> Tensor:
        network = ConvNet(3, 4, 8, width=4, depth=2)  # made from torch's global state, which moves on
        return nn.utils.parameters_to_vector(initialise(network, generator(seed)).parameters())

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_initialise_draws_every_parameter_anew():
    network = ConvNet(3, 4, 8, width=4, depth=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7)
    assert initialise(network, generator()) is network
    assert all((parameter != 7).all() for parameter in network.parameters())


def test_layers_without_a_bias_are_initialised_too():
    network = initialise(nn.Conv2d(2, 3, 3, bias=False), generator())
    assert network.weight.abs().max() <= 1 / math.sqrt(18)


@pytest.mark.parametrize("module", [nn.BatchNorm2d(3), nn.Conv1d(2, 2, 1), nn.PReLU()])
def test_a_module_whose_default_is_not_known_is_refused(module):
    with pytest.raises(TypeError, match=type(module).__name__):
        initialise(nn.Sequential(nn.Conv2d(3, 3, 3), module), generator())


# By configuration


def test_a_builder_makes_the_configured_network_each_time_anew():
    build = builder(NetworkConfig(name="convnet", width=4, depth=2), channels=1, classes=7, image_size=16)
    first, second = build(), build()
    assert first is not second and first.body[0].weight is not second.body[0].weight
    assert first.body[0].weight.shape == (4, 1, 3, 3) and first.classifier.weight.shape == (7, 4 * 4 * 4)


def test_depth_follows_the_image_where_none_is_given():
    config = NetworkConfig(name="convnet", width=2)
    assert len(builder(config, channels=3, classes=2, image_size=64)().body) == 4 * 4
    assert full_name(config, 64) == "ConvNet-D4-W2"
    assert full_name(NetworkConfig(name="convnet"), 32) == "ConvNet-D3-W128"
    assert full_name(NetworkConfig(name="convnet", depth=5), 32) == "ConvNet-D5-W128"


def test_a_depth_that_leaves_no_pixel_is_refused():
    assert builder(NetworkConfig(name="convnet", depth=3, width=2), channels=1, classes=2, image_size=8)()
    with pytest.raises(ConfigError, match=r"^network\.depth=4: must be small enough.* 8-pixel image$"):
        builder(NetworkConfig(name="convnet", depth=4), channels=1, classes=2, image_size=8)
