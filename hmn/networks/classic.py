"""AlexNet, LeNet and an MLP, all without norms, as in the code of Zhao & Bilen (ICLR 2021)."""

from __future__ import annotations

from torch import Tensor, nn

from hmn.networks.layers import padded


class AlexNet(nn.Module):
    """Five convolutions with ReLU, three max-pooling and one linear layer (after Krizhevsky et al., NeurIPS 2012).

    A 28-pixel input is padded to 32 by the first convolution. Input (n, channels, size, size), output (n, classes)
    logits.
    """

    def __init__(self, channels: int, classes: int, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 128, 5, padding=4 if size == 28 else 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 192, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(192, 192, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Linear(192 * (padded(size) // 8) ** 2, classes)

    def features(self, images: Tensor) -> Tensor:
        """The classifier's input, (n, f)."""
        return self.body(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al., Proceedings of the IEEE 1998) with ReLU and max pooling.

    A 28-pixel input is padded to 32 by the first convolution. Input (n, channels, size, size), output (n, classes)
    logits.
    """

    def __init__(self, channels: int, classes: int, size: int) -> None:
        super().__init__()
        side = ((padded(size) - 4) // 2 - 4) // 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2 if size == 28 else 0),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(84, classes)

    def features(self, images: Tensor) -> Tensor:
        """The classifier's input, (n, 84)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


class MLP(nn.Module):
    """Two hidden layers of ``width`` with ReLU. Input (n, channels, size, size), output (n, classes) logits."""

    def __init__(self, channels: int, classes: int, size: int, *, width: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * size * size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.classifier = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """The classifier's input, (n, width)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
