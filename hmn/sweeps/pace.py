"""The speed of this machine, to estimate hours before any run is finished."""

from __future__ import annotations

import time

import torch
from torch import nn

ROUNDS = 3


def flops_per_second(device: torch.device) -> float:
    """Measured operations per second of a 3 x 3 convolution's training steps at ConvNet's inner shapes, in fp32.

    Most of a run is such steps. A multiply-add counts as 2 operations, the backward pass as twice the forward pass. The
    rate is the best of a few rounds after a warm-up.
    """
    channels, side, images = 128, 16, 64
    layer = nn.Conv2d(channels, channels, 3, padding=1, device=device)
    pixels = torch.ones(images, channels, side, side, device=device, requires_grad=True)

    def step() -> float:
        begun = time.perf_counter()
        layer(pixels).sum().backward()
        float(layer.bias.grad[0])  # waits for the device
        return time.perf_counter() - begun

    step()
    forward = 2 * images * side**2 * channels**2 * 9
    return 3 * forward / min(step() for _ in range(ROUNDS))
