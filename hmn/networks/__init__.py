"""Network architectures by name; every builder takes channels, classes and image side.

torchvision's networks are not used: their stems and classifiers are for 224 pixels, and they have batch norm only.
Blocks of the same form are tested against torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hmn.config import NETWORK_NORMS, NetworkConfig, require
from hmn.networks.classic import MLP, AlexNet, LeNet
from hmn.networks.convnet import ConvNet, default_depth
from hmn.networks.densenet import DenseNet
from hmn.networks.layers import FanOutConv2d, padded
from hmn.networks.resnet import ResNet
from hmn.networks.vgg import VGG, VGG11, VGG16

Builder = Callable[[], nn.Module]


def _resnet18(channels: int, classes: int, size: int, **options: Any) -> ResNet:
    """Zhao & Bilen's up to 64 pixels, with PyTorch's default initialisation; IDC's above, with its own."""
    return ResNet(channels, classes, size, blocks=(2, 2, 2, 2), fan_out_init=size > 64, **options)


def _densenet121(channels: int, classes: int, size: int, *, width: int, norm: str) -> DenseNet:
    return DenseNet(channels, classes, growth=width, norm=norm)


@dataclass(frozen=True)
class _Architecture:
    title: str
    make: Callable[..., nn.Module]  # takes channels, classes, size and, by keyword, its configurable options
    width: int | None  # the paper's, the default; None: layers differ in width, and none can be set
    least_size: int = 1  # below, a layer would get no pixel, or a norm a map of one pixel, which it would set to zero


ARCHITECTURES = {
    "convnet": _Architecture("ConvNet", ConvNet, 128),
    # IDC's two; its ResNet10 for CIFAR has width 32
    "resnet10": _Architecture("ResNet10", partial(ResNet, blocks=(1, 1, 1, 1)), 64, least_size=9),
    "resnet_ap10": _Architecture("ResNetAP10", partial(ResNet, blocks=(1, 1, 1, 1), average=True), 64, least_size=16),
    "resnet18": _Architecture("ResNet18", _resnet18, 64, least_size=9),
    "resnet18_ap": _Architecture("ResNet18AP", partial(_resnet18, average=True, global_pool=False), 64, least_size=16),
    "vgg11": _Architecture("VGG11", partial(VGG, convolutions=VGG11), 64, least_size=32),
    "vgg16": _Architecture("VGG16", partial(VGG, convolutions=VGG16), 64, least_size=32),
    "densenet121": _Architecture("DenseNet121", _densenet121, 32, least_size=16),
    "alexnet": _Architecture("AlexNet", AlexNet, None, least_size=8),
    "lenet": _Architecture("LeNet", LeNet, None, least_size=16),
    "mlp": _Architecture("MLP", MLP, 128),
}


def builder(config: NetworkConfig, *, channels: int, classes: int, image_size: int) -> Builder:
    """A function that builds the configured network; its parameters are drawn later, by :func:`initialise`.

    Raises ``ConfigError`` if the image is too small for ``network.depth`` or ``network.name``.
    """
    architecture = ARCHITECTURES[config.name]
    options: dict[str, Any] = {}
    if architecture.width is not None:
        options["width"] = config.width or architecture.width
    if len(NETWORK_NORMS[config.name]) > 1:
        options["norm"] = config.norm
    if config.name == "convnet":
        options["depth"] = config.depth or default_depth(image_size)
        fits = padded(image_size) >> options["depth"] >= 1
        rule = f"small enough to leave at least one pixel of a {image_size}-pixel image"
        require("network.depth", fits, options["depth"], rule)
    fits = padded(image_size) >= architecture.least_size
    rule = f"a network for {image_size}-pixel images: this one needs at least {architecture.least_size}"
    require("network.name", fits, config.name, rule)
    return partial(architecture.make, channels, classes, image_size, **options)


def full_name(config: NetworkConfig, image_size: int) -> str:
    """The name in tables, for example ``ConvNet-D3-W128`` or ``ResNet18-BN``; instance norm is not named."""
    architecture = ARCHITECTURES[config.name]
    parts = [architecture.title]
    if config.name == "convnet":
        parts.append(f"D{config.depth or default_depth(image_size)}")
    width = config.width or architecture.width
    if config.name == "convnet" or width != architecture.width:
        parts.append(f"W{width}")
    if len(NETWORK_NORMS[config.name]) > 1:
        parts += {"instance": [], "batch": ["BN"], "none": ["no-norm"]}[config.norm]
    return "-".join(parts)


def has_batch_norm(network: nn.Module) -> bool:
    """Whether the network has batch norm: the images of a batch interact and running statistics are updated."""
    return any(name.endswith("running_mean") for name, _ in network.named_buffers())


def initialise(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw all parameters of ``network`` from ``generator``, as its paper does, and return it.

    That is PyTorch's default initialisation except for :class:`FanOutConv2d`. Running statistics are reset, too.
    """
    for module in network.modules():
        if isinstance(module, FanOutConv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            # kaiming_uniform with a = sqrt(5) is U(+-1/sqrt(fan_in)), PyTorch's default for weights and biases alike.
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"no initialisation is known for {type(module).__name__}")
    return network
