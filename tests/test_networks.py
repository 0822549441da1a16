"""Networks: exact parameter counts, forward passes against plain functions and torchvision, and initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hmn.compute import Compute
from hmn.config import NETWORK_NORMS, NetworkConfig
from hmn.data import vision
from hmn.errors import ConfigError
from hmn.networks import ARCHITECTURES, builder, full_name, has_batch_norm, initialise
from hmn.networks.classic import MLP
from hmn.networks.convnet import ConvNet, default_depth
from hmn.networks.densenet import DenseNet
from hmn.networks.layers import AveragePool2d, FanOutConv2d
from hmn.networks.resnet import Block, ResNet
from hmn.networks.together import Together
from hmn.networks.vgg import VGG
from hmn.objectives.gradient import FORMS


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


@pytest.mark.parametrize(
    ("setting", "size", "classes", "parameters", "features"),
    [
        # IDC (Kim et al., ICML 2022)
        ({"name": "resnet_ap10"}, 224, 10, 4_910_922, 512),
        ({"name": "resnet_ap10"}, 224, 100, 4_957_092, 512),
        ({"name": "resnet18", "norm": "batch"}, 224, 10, 11_181_642, 512),
        ({"name": "resnet10", "norm": "batch", "width": 32}, 32, 10, 1_228_970, 256),
        ({"name": "resnet10", "norm": "batch"}, 32, 10, 4_903_242, 512),
        ({"name": "densenet121", "norm": "batch", "width": 12}, 32, 10, 1_000_618, 384),
        ({"name": "densenet121", "norm": "batch"}, 32, 10, 6_956_298, 1024),
        # Zhao & Bilen (ICLR 2021)
        ({"name": "resnet18"}, 32, 10, 11_173_962, 512),
        ({"name": "resnet18", "norm": "batch"}, 32, 10, 11_173_962, 512),
        ({"name": "resnet18_ap"}, 32, 10, 11_250_762, 512 * 4 * 4),
        ({"name": "vgg11"}, 32, 10, 9_231_114, 512),
        ({"name": "vgg16", "norm": "batch"}, 32, 10, 14_728_266, 512),
        ({"name": "alexnet", "norm": "none"}, 32, 10, 1_872_202, 3072),
        ({"name": "lenet", "norm": "none"}, 32, 10, 62_006, 84),
        ({"name": "mlp", "norm": "none"}, 32, 10, 411_146, 128),
    ],
)
def test_other_networks_are_counted_to_the_digit(setting, size, classes, parameters, features):
    with torch.device("meta"):
        network = builder(NetworkConfig(**setting), channels=3, classes=classes, image_size=size)()
        assert network(torch.empty(2, 3, size, size)).shape == (2, classes)
    assert total(network) == parameters
    assert network.classifier.weight.shape == (classes, features)


def test_resnet_ap18_is_counted_to_the_digit():
    with torch.device("meta"):
        network = ResNet(3, 10, 224, blocks=(2, 2, 2, 2), average=True, norm="instance")
    assert total(network) == 11_181_642


def test_instance_norm_is_group_norm_with_affine_parameters_and_no_running_statistics():
    network = on_meta(3, 10, 32)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 3
    assert all((norm.num_groups, norm.num_channels, norm.eps) == (128, 128, 1e-5) for norm in norms)
    assert all(norm.weight.shape == norm.bias.shape == (128,) for norm in norms)
    assert list(network.buffers()) == []


class NormInputs(TorchDispatchMode):
    """Records the dtypes of the inputs of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.native_group_norm, torch.ops.aten.native_batch_norm):
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_statistics_are_of_fp32_under_autocast(norm):
    network, seen = ConvNet(3, 3, 8, width=4, depth=2, norm=norm), NormInputs()
    with torch.autocast("cpu", torch.bfloat16), seen:
        network(torch.rand(2, 3, 8, 8))
    assert seen.dtypes == [torch.float32] * 2


@pytest.mark.parametrize(
    ("size", "depth"),
    [(8, 2), (16, 2), (20, 3), (28, 3), (32, 3), (33, 4), (48, 4), (64, 4), (96, 5), (128, 5), (224, 6)],
)
def test_default_depth_is_the_smallest_that_leaves_at_most_4_by_4(size, depth):
    assert default_depth(size) == depth
    assert size / 2**depth <= 4 and (depth == 2 or size / 2 ** (depth - 1) > 4)


# Forward


def plain_forward(network: ConvNet, images: Tensor, depth: int) -> Tensor:
    """The same forward pass from the parameters alone, with norms written out."""
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
        for parameter in network.parameters():  # norms start with weight 1 and bias 0, which would hide errors
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator(1), dtype=torch.float64))
        images = torch.randn(4, channels, size, size, generator=generator(2), dtype=torch.float64)
        found = network(images)
        assert found.shape == (4, 5)
        torch.testing.assert_close(found, plain_forward(network, images, depth), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 6), (4, 12), (5, 4), (4, 7)])
def test_pooling_compiled_for_a_cpu_is_pytorchs_with_its_derivatives_and_layout(monkeypatch, height, width):
    images = torch.randn(3, 5, height, width, generator=generator(), dtype=torch.float64)
    images = images.to(memory_format=torch.channels_last)

    def measured(pool):
        x = images.clone(memory_format=torch.preserve_format).requires_grad_()
        pooled = pool(x)
        (first,) = torch.autograd.grad(pooled.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        return pooled, first, second

    expected = measured(lambda x: F.avg_pool2d(x, 2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = measured(AveragePool2d())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_pooling_is_compiled_without_pytorchs_operator():
    codes = []
    compiled = torch.compile(AveragePool2d(), backend=lambda graph, _: codes.append(graph.code) or graph.forward)
    assert compiled(torch.arange(16.0).view(1, 1, 4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert len(codes) == 1 and "avg_pool2d" not in codes[0]


@pytest.mark.parametrize("name", ["convnet", "vgg11", "alexnet", "lenet"])
def test_28_pixels_are_padded_to_32_by_the_first_convolution(name):
    images = torch.randn(2, 1, 28, 28, generator=generator())
    small, large = (initialise(tiny(name, 1, size=size), generator()) for size in (28, 32))
    assert total(small) == total(large)
    with torch.no_grad():
        torch.testing.assert_close(small(images), large(F.pad(images, (2, 2, 2, 2))))
    if name == "convnet":
        assert small.body[:4](images).shape == (2, 4, 16, 16)


# Every network


def tiny(name: str, channels: int = 3, *, size: int = 32, norm: str | None = None) -> nn.Module:
    """A network with four classes and few channels; ``norm`` defaults to the first that it supports."""
    width = None if ARCHITECTURES[name].width is None else 2 if name == "densenet121" else 4
    config = NetworkConfig(name=name, width=width, norm=norm or NETWORK_NORMS[name][0])
    return builder(config, channels=channels, classes=4, image_size=size)()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_do_not_influence_each_other(name):
    network = initialise(tiny(name), generator())
    images = torch.randn(3, 3, 32, 32, generator=generator())
    with torch.no_grad():
        before = network(images)[0]
        images[1:] *= 7
        torch.testing.assert_close(network(images)[0], before, rtol=0, atol=1e-6)
        assert network(images)[1].sub(before).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, norms in NETWORK_NORMS.items() for norm in norms])
def test_logits_are_the_classifier_of_the_features_and_every_parameter_has_a_gradient(name, norm):
    network = initialise(tiny(name, 1, norm=norm), generator())
    images = torch.randn(4, 1, 32, 32, generator=generator())
    features = network.features(images)
    assert features.shape == (4, network.classifier.in_features)
    assert has_batch_norm(network) == (norm == "batch")
    logits = network(images)
    assert torch.equal(logits, network.classifier(features))
    gradients = torch.autograd.grad(F.cross_entropy(logits, torch.arange(4)), list(network.parameters()))
    # Weights only: a bias before a norm changes nothing, and one of a thousand maps may be dead.
    weights = [g for g, p in zip(gradients, network.parameters(), strict=True) if p.ndim > 1]
    assert all(g.abs().max() > 0 for g in weights)


def test_together_have_the_batch_norm_of_one():
    assert has_batch_norm(Together([tiny("convnet", norm="batch")] * 2))
    assert not has_batch_norm(Together([tiny("convnet")] * 2))


LEAST = {name: least for name, entry in ARCHITECTURES.items() if (least := entry.least_size) > 1}


def tells_apart(network: nn.Module, size: int) -> bool:
    images = torch.randn(2, 3, size, size, generator=generator(), dtype=torch.float64)
    one, other = network.double().features(images)
    return bool((one - other).abs().max() > 1e-6)  # below that it is rounding


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", LEAST)
def test_images_have_at_least_the_side_at_which_a_network_tells_them_apart(name):
    least = LEAST[name]
    assert tells_apart(tiny(name, size=least), least)
    line = rf"^network\.name={name}: must be a network for {least - 1}-pixel images: this one needs at least {least}$"
    with pytest.raises(ConfigError, match=line):
        tiny(name, size=least - 1)
    options = {"width": 4, "norm": "instance"} if ARCHITECTURES[name].width else {}
    smaller = ARCHITECTURES[name].make(3, 4, least - 1, **options)
    try:
        assert not tells_apart(smaller, least - 1)
    except RuntimeError as error:
        assert "Output size is too small" in str(error)


@pytest.mark.parametrize("name", ["resnet_ap10", "vgg11"])
def test_gradients_can_be_matched_in_every_form_for_any_network(name):
    """One network has average pooling and shortcuts, the other max pooling; all are differentiated twice."""
    network, stream = initialise(tiny(name), generator()).double(), generator(1)
    parameters = {key: value.detach() for key, value in network.named_parameters()}
    real, synthetic = torch.randn(2, 2, 3, 32, 32, generator=stream, dtype=torch.float64)
    labels, found = torch.tensor([1, 1]), {}
    for form in ("loop", "compiled"):
        gradients, match = FORMS[form](network, "mse", Compute(torch.device("cpu")))
        found[form] = match(parameters, gradients(parameters, real, labels), synthetic, labels)
    for one, other in zip(found["loop"], found["compiled"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert found["loop"][1].abs().max() > 0


# Against torchvision and plain functions


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give both the same random parameters, in order. Norms are included: their initial 1 and 0 would hide errors."""
    stream = generator(1)
    with torch.no_grad():
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.shape == other.shape
            other.copy_(one.copy_(torch.randn(one.shape, generator=stream) / max(one[0].numel(), 4) ** 0.5))


def assert_equal_in_both_modes(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    for train in (True, False):  # training moves the running statistics that evaluation uses
        with torch.no_grad():
            found, expected = ours.train(train)(images), theirs.train(train)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 1e-3


def test_a_resnet_of_large_images_is_torchvisions():
    theirs = vision.torchvision().models.resnet.ResNet(
        vision.torchvision().models.resnet.BasicBlock, [1, 2, 1, 1], num_classes=5
    )
    ours = ResNet(3, 5, 130, blocks=(1, 2, 1, 1))
    same_weights(ours, theirs)
    assert_equal_in_both_modes(ours, theirs, torch.randn(2, 3, 130, 130, generator=generator()))


def test_vggs_convolutions_are_torchvisions():
    stages = [2, "M", 4, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M"]
    theirs = vision.torchvision().models.vgg.make_layers(stages, batch_norm=True)
    ours = VGG(3, 5, 32, convolutions=(1, 1, 2, 2, 2), width=2, norm="batch").body
    same_weights(ours, theirs)
    assert_equal_in_both_modes(ours, theirs, torch.randn(3, 3, 32, 32, generator=generator()))


def test_densenets_blocks_are_torchvisions():
    theirs = vision.torchvision().models.DenseNet(2, (2, 1, 2, 1), num_init_features=4, num_classes=5)
    features = theirs.features[4:]  # without the stem for large images
    ours = DenseNet(3, 5, growth=2, blocks=(2, 1, 2, 1))
    same_weights(ours.body[1:], features)
    images = torch.randn(3, 4, 16, 16, generator=generator())
    assert_equal_in_both_modes(ours.body[1:], nn.Sequential(features, nn.ReLU()), images)
    whole = torch.randn(2, 3, 16, 16, generator=generator())
    torch.testing.assert_close(ours.features(whole), ours.body(whole).mean((2, 3)))


def plain_norm(images: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    variance, mean = torch.var_mean(images, (2, 3), correction=0, keepdim=True)
    return (images - mean) / (variance + 1e-5).sqrt() * scale.view(-1, 1, 1) + offset.view(-1, 1, 1)


def test_a_resnet_ap_block_pools_where_resnet_strides():
    """IDC: convolution, norm, ReLU, pool, convolution, norm; the shortcut pools between convolution and norm."""
    block = Block(2, 3, halve=True, norm="instance", average=True, conv=FanOutConv2d)
    same_weights(block, block)
    images = torch.randn(4, 2, 8, 8, generator=generator())
    first, scale1, offset1, second, scale2, offset2, short, scale3, offset3 = block.parameters()
    x = plain_norm(F.conv2d(images, first, padding=1), scale1, offset1).clamp(min=0)
    x = plain_norm(F.conv2d(F.avg_pool2d(x, 2), second, padding=1), scale2, offset2)
    x = x + plain_norm(F.avg_pool2d(F.conv2d(images, short), 2), scale3, offset3)
    torch.testing.assert_close(block(images), x.clamp(min=0))


def test_a_block_that_keeps_its_shape_adds_its_input():
    block = Block(2, 2, halve=False, norm="instance", average=True, conv=nn.Conv2d)
    images = torch.rand(3, 2, 4, 4, generator=generator())
    assert len(list(block.parameters())) == 6
    with torch.no_grad():
        block.body[-1].weight.zero_()
    assert torch.equal(block(images), images)


@pytest.mark.parametrize(
    ("size", "average", "side", "kernel", "last"),
    [
        (64, False, 64, 3, 8),
        (65, False, 33, 3, 5),
        (128, False, 64, 3, 8),
        (129, False, 33, 7, 5),
        (224, False, 56, 7, 7),
        (64, True, 64, 3, 8),
        (66, True, 33, 3, 4),
        (128, True, 64, 3, 8),
        (132, True, 33, 7, 4),
        (224, True, 56, 7, 7),
    ],
)
def test_a_resnets_stem_follows_the_image(size, average, side, kernel, last):
    with torch.device("meta"):
        network = ResNet(1, 2, size, blocks=(1, 1, 1, 1), width=2, average=average, global_pool=False)
        images = torch.empty(2, 1, size, size)
        assert network.stem(images).shape == (2, 2, side, side)
        assert network(images).shape == (2, 2)
    assert network.stem[0].kernel_size == (kernel, kernel)
    assert network.classifier.in_features == 16 * last**2
    strided = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.stride != (1, 1)]
    assert bool(strided) != average


def test_an_mlp_is_two_hidden_layers():
    network = initialise(MLP(1, 3, 4, width=5), generator())
    w1, b1, w2, b2, w3, b3 = network.parameters()
    images = torch.randn(2, 1, 4, 4, generator=generator())
    hidden = ((images.flatten(1) @ w1.T + b1).relu() @ w2.T + b2).relu()
    torch.testing.assert_close(network(images), hidden @ w3.T + b3)


# The padding of every convolution, and whether max pooling follows it
CLASSIC = {
    "lenet": [(0, True), (0, True)],
    "alexnet": [(2, True), (2, True), (1, False), (1, False), (1, True)],
}


@pytest.mark.parametrize("name", CLASSIC)
def test_networks_without_norms_are_convolutions_relu_max_pooling_and_linear_layers(name):
    network = initialise(tiny(name, 1), generator())
    images = torch.randn(3, 1, 32, 32, generator=generator(1))
    parameters, x = iter(network.parameters()), images
    for padding, pooled in CLASSIC[name]:
        weight, bias = next(parameters), next(parameters)
        x = F.conv2d(x, weight, bias, padding=padding).clamp(min=0)
        x = F.max_pool2d(x, 2) if pooled else x
    *hidden, (weight, bias) = zip(parameters, parameters, strict=True)
    x = x.flatten(1)
    for hidden_weight, hidden_bias in hidden:
        x = (x @ hidden_weight.T + hidden_bias).clamp(min=0)
    torch.testing.assert_close(network(images), x @ weight.T + bias)


# Initialisation


def layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def test_initialise_draws_from_pytorchs_default_distribution():
    ours, theirs = initialise(ConvNet(3, 10, 16, width=64, depth=2), generator()), ConvNet(3, 10, 16, width=64, depth=2)
    for one, other in zip(layers(ours), layers(theirs), strict=True):
        fan_in = one.in_features if isinstance(one, nn.Linear) else one.in_channels * 9
        bound = 1 / math.sqrt(fan_in)
        for found, default in ((one.weight, other.weight), (one.bias, other.bias)):
            assert default.abs().max() <= bound * (1 + 1e-6)  # the assumption about PyTorch's default
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


ONE_OF_EACH_KIND = ["convnet", "resnet10", "vgg11", "densenet121", "lenet"]


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_initialise_depends_on_the_generator_alone(name):
    network = tiny(name, norm=NETWORK_NORMS[name][min(1, len(NETWORK_NORMS[name]) - 1)])

    def drawn(seed: int) -> Tensor:
        with torch.no_grad():
            for value in (*network.parameters(), *network.buffers()):
                value.fill_(7)
        before = torch.get_rng_state()
        assert initialise(network, generator(seed)) is network
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([value.double().flatten() for value in network.state_dict().values()])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert (drawn(0) != 7).all()


def test_running_statistics_start_anew():
    network = initialise(tiny("convnet", norm="batch"), generator())
    fresh = {name: value.clone() for name, value in network.state_dict().items()}
    network(torch.randn(4, 3, 32, 32))
    assert not torch.equal(network.body[1].running_mean, torch.zeros(4))
    found = initialise(network, generator()).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in found.items())
    assert torch.equal(network.body[1].running_var, torch.ones(4)) and network.body[1].num_batches_tracked == 0


def test_idcs_convolutions_are_normal_by_their_outputs():
    network = initialise(FanOutConv2d(8, 200, 3, bias=False), generator())
    values = network.weight.detach().flatten()
    assert values.std().item() == pytest.approx(math.sqrt(2 / (9 * 200)), rel=0.03)
    assert values.abs().max() > 3.5 * values.std()  # a uniform draw ends at 1.7


@pytest.mark.parametrize(
    ("name", "size", "fan_out"),
    [("resnet10", 32, True), ("resnet_ap10", 224, True), ("resnet18", 224, True), ("resnet18", 32, False)]
    + [(name, 32, False) for name in ("resnet18_ap", "vgg11", "densenet121", "convnet")],
)
def test_only_idcs_resnets_start_from_fan_out_normals(name, size, fan_out):
    with torch.device("meta"):
        network = tiny(name, size=size)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [isinstance(module, FanOutConv2d) for module in convolutions] == [fan_out] * len(convolutions)


def test_layers_without_a_bias_are_initialised_too():
    network = initialise(nn.Conv2d(2, 3, 3, bias=False), generator())
    assert network.weight.abs().max() <= 1 / math.sqrt(18)


@pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.Conv1d(2, 2, 1), nn.PReLU()])
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


def test_a_name_says_what_is_not_usual():
    def name(**setting: object) -> str:
        return full_name(NetworkConfig(**setting), 32)

    assert name(name="convnet", norm="batch") == "ConvNet-D3-W128-BN"
    assert name(name="vgg16", norm="none") == "VGG16-no-norm"
    assert name(name="resnet18") == name(name="resnet18", width=64) == "ResNet18"
    assert name(name="resnet18", width=8, norm="batch") == "ResNet18-W8-BN"
    assert name(name="mlp", norm="none") == "MLP"


def test_a_depth_that_leaves_no_pixel_is_refused():
    assert builder(NetworkConfig(name="convnet", depth=3, width=2), channels=1, classes=2, image_size=8)()
    with pytest.raises(ConfigError, match=r"^network\.depth=4: must be small enough.* 8-pixel image$"):
        builder(NetworkConfig(name="convnet", depth=4), channels=1, classes=2, image_size=8)
