"""ConvNet-D{depth}-W{width}, the usual network in dataset condensation (Zhao & Bilen, ICLR 2021)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from hmn.networks.layers import AveragePool2d, norm_layer, padded


class ConvNet(nn.Module):
    """``depth`` blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, then one linear layer.

    A 28-pixel input is padded to 32 by the first convolution. Input (n, channels, size, size), output (n, classes)
    logits.
    """

    def __init__(
        self, channels: int, classes: int, size: int, *, width: int = 128, depth: int = 3, norm: str = "instance"
    ) -> None:
        super().__init__()
        self.norm = norm
        blocks: list[nn.Module] = []
        for index in range(depth):
            first = index == 0
            blocks += [
                nn.Conv2d(channels if first else width, width, 3, padding=3 if first and size == 28 else 1),
                norm_layer(norm, width),
                nn.ReLU(),
                AveragePool2d(),
            ]
        side = padded(size) >> depth
        if side < 1:
            raise ValueError(f"depth {depth} leaves no pixel of the image")
        self.body = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * side * side, classes)

    def features(self, images: Tensor) -> Tensor:
        """The classifier's input, (n, f)."""
        return self.body(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def default_depth(size: int) -> int:
    """At least 2, and enough blocks for a map of at most 4 x 4: D3 at 28 and 32, D4 at 64, D5 at 128, D6 at 224."""
    return max(2, math.ceil(math.log2(size / 4)))
