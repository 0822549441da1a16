"""Architectures by name; every builder takes channels, classes and image side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from hmn.config import NetworkConfig, require
from hmn.networks.convnet import ConvNet, default_depth

Builder = Callable[[], nn.Module]


def builder(config: NetworkConfig, *, channels: int, classes: int, image_size: int) -> Builder:
    """A function that makes the configured network; its parameters are drawn by :func:`initialise`, not here.

    Raises ``ConfigError`` if ``network.depth`` halves the image to nothing.
    """
    depth = config.depth or default_depth(image_size)
    fits = image_size >> depth >= 1
    require("network.depth", fits, depth, f"small enough to leave a pixel of a {image_size}-pixel image")
    return partial(ConvNet, channels, classes, image_size, width=config.width, depth=depth)


def full_name(config: NetworkConfig, image_size: int) -> str:
    """The name that tables show, for example ``ConvNet-D3-W128``."""
    return f"ConvNet-D{config.depth or default_depth(image_size)}-W{config.width}"


def initialise(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw all parameters anew as PyTorch's defaults do, but from ``generator``; returns ``network``."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # kaiming_uniform with a = sqrt(5) is U(+-1/sqrt(fan_in)), PyTorch's default for weights and biases alike.
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"no initialisation is known for {type(module).__name__}")
    return network
