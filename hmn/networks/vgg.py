"""VGG (Simonyan & Zisserman, ICLR 2015) for 32 pixels: its convolutions with norms, followed by one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hmn.networks.layers import norm_layer, padded

VGG11 = (1, 1, 2, 2, 2)
VGG16 = (2, 2, 3, 3, 3)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each with norm and ReLU, and 2x2 max pooling after every stage.

    ``convolutions`` gives the convolutions per stage; the stages have 1, 2, 4, 8 and 8 times ``width`` channels. The
    first convolution pads a 28-pixel input to 32. Input (n, channels, size, size), output (n, classes) logits.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: int,
        *,
        convolutions: Sequence[int],
        width: int = 64,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, padding = channels, 3 if size == 28 else 1
        for stage, count in enumerate(convolutions):
            after = width * min(2**stage, 8)
            for _ in range(count):
                layers += [nn.Conv2d(before, after, 3, padding=padding), norm_layer(norm, after), nn.ReLU()]
                before, padding = after, 1
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(before * (padded(size) >> len(convolutions)) ** 2, classes)

    def features(self, images: Tensor) -> Tensor:
        """The classifier's input, (n, f)."""
        return self.body(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
