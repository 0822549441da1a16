"""ResNet (He et al., CVPR 2016) as used in condensation: stems for small images, any norm, optional average pooling.

At 224 pixels with batch norm it is torchvision's ResNet, which has no other stem and no average-pooling variant.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hmn.networks.layers import AveragePool2d, FanOutConv2d, norm_layer


class Block(nn.Module):
    """3x3 convolution, norm, ReLU, 3x3 convolution, norm; then the shortcut is added, and ReLU applied.

    Where the block halves the side, ResNet's first convolution and its shortcut have stride 2; ResNetAP's have stride 1
    and average pooling after them. A shortcut that keeps the shape has no layers.
    """

    def __init__(
        self, channels: int, width: int, *, halve: bool, norm: str, average: bool, conv: type[nn.Conv2d]
    ) -> None:
        super().__init__()
        stride = 2 if halve and not average else 1
        pooling = [AveragePool2d()] if halve and average else []
        self.body = nn.Sequential(
            conv(channels, width, 3, stride=stride, padding=1, bias=False),
            norm_layer(norm, width),
            nn.ReLU(),
            *pooling,
            conv(width, width, 3, padding=1, bias=False),
            norm_layer(norm, width),
        )
        self.shortcut = nn.Sequential()
        if halve or channels != width:
            self.shortcut = nn.Sequential(
                conv(channels, width, 1, stride=stride, bias=False), *pooling, norm_layer(norm, width)
            )

    def forward(self, images: Tensor) -> Tensor:
        return (self.body(images) + self.shortcut(images)).relu()


class ResNet(nn.Module):
    """A stem, four stages of :class:`Block` at widths 1, 2, 4 and 8 times ``width``, and one linear layer.

    ``blocks`` gives the blocks per stage; every stage but the first halves the side. ``average`` gives ResNetAP, which
    has no strided convolution (IDC; Kim et al., ICML 2022). With ``global_pool`` the last map is averaged, without it
    the classifier gets all of it. With ``fan_out_init`` convolutions are initialised as :class:`FanOutConv2d`, without
    it as PyTorch's. Input (n, channels, size, size), output (n, classes) logits.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: int,
        *,
        blocks: Sequence[int],
        width: int = 64,
        norm: str = "batch",
        average: bool = False,
        global_pool: bool = True,
        fan_out_init: bool = True,
    ) -> None:
        super().__init__()
        conv = FanOutConv2d if fan_out_init else nn.Conv2d
        self.stem = _stem(channels, width, size, norm=norm, average=average, conv=conv)
        layers: list[nn.Module] = []
        before = width
        for stage, count in enumerate(blocks):
            after = width << stage
            for index in range(count):
                halve = index == 0 and stage > 0
                layers.append(Block(before, after, halve=halve, norm=norm, average=average, conv=conv))
                before = after
        self.body = nn.Sequential(*layers)
        self.global_pool = global_pool
        side = 1 if global_pool else last_side(size, average=average)
        self.classifier = nn.Linear(before * side * side, classes)

    def features(self, images: Tensor) -> Tensor:
        """The classifier's input, (n, f)."""
        maps = self.body(self.stem(images))
        return maps.mean((2, 3)) if self.global_pool else maps.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def _stem(channels: int, width: int, size: int, *, norm: str, average: bool, conv: type[nn.Conv2d]) -> nn.Sequential:
    """IDC's three stems: they keep the side up to 64 pixels, halve it up to 128 and quarter it beyond."""
    if size <= 128:
        first = conv(channels, width, 3, padding=1, bias=False)
    else:
        first = conv(channels, width, 7, stride=1 if average else 2, padding=3, bias=False)
    layers = [first, norm_layer(norm, width), nn.ReLU()]
    if size > 64:
        pooling = AveragePool2d() if size <= 128 else nn.AvgPool2d(4)
        layers.append(pooling if average else nn.MaxPool2d(3, stride=2, padding=1))
    return nn.Sequential(*layers)


def last_side(size: int, *, average: bool) -> int:
    """The side of the map after the fourth stage: strides round halves up, pooling rounds them down."""
    halvings = 3 if size <= 64 else 4 if size <= 128 else 5
    return size >> halvings if average else -(-size >> halvings)
