"""DenseNet-BC (Huang et al., CVPR 2017) for small images: a 3x3 stem, and no pooling before the first dense block.

Its blocks are those of torchvision's DenseNet, which has a stem for 224 pixels and batch norm only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hmn.networks.layers import AveragePool2d, norm_layer


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution to 4 ``growth`` channels, norm, ReLU, 3x3 to ``growth``; appended to the input."""

    def __init__(self, channels: int, growth: int, *, norm: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            norm_layer(norm, channels),
            nn.ReLU(),
            nn.Conv2d(channels, 4 * growth, 1, bias=False),
            norm_layer(norm, 4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images, self.body(images)], 1)


class DenseNet(nn.Module):
    """Four blocks of ``blocks`` dense layers; after each but the last, channels and side are halved.

    Every layer adds ``growth`` channels; the stem has twice as many. Input (n, channels, size, size), output
    (n, classes) logits.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        growth: int = 32,
        blocks: Sequence[int] = (6, 12, 24, 16),
        norm: str = "batch",
    ) -> None:
        super().__init__()
        width = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        for stage, count in enumerate(blocks):
            for _ in range(count):
                layers.append(DenseLayer(width, growth, norm=norm))
                width += growth
            layers += [norm_layer(norm, width), nn.ReLU()]
            if stage < len(blocks) - 1:
                layers += [nn.Conv2d(width, width // 2, 1, bias=False), AveragePool2d()]
                width //= 2
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """The classifier's input, (n, f)."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
