"""The Hierarchical Memory Network (Zheng et al., ECCV 2024): memories in three tiers, decoded to images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.config.containers import HmnConfig
from hmn.containers.base import Container, ContainerShape, RealImages, parameter_floats

LEAK = 0.2  # negative slope of every LeakyReLU; initialisation and layers must agree on it


@dataclass(frozen=True, kw_only=True)
class HmnShape(ContainerShape):
    """All numbers that fix the parameter shapes, except the number of images."""

    latent_side: int  # s
    dataset_channels: int  # C_D
    feature_channels: int  # C_F; 0 leaves out dataset memory and extractors
    feature_kernel: int  # k_f
    class_channels: int  # C_C; 0 leaves out class memories
    instance_channels: int  # C_I
    decoder_width: int  # W
    decoder: str = "upsample"
    decoder_norm: bool = False
    output: str = "sigmoid"

    @property
    def doublings(self) -> int:
        """How many times the side doubles: L with s * 2^L = image side."""
        return round(math.log2(self.image_size / self.latent_side))

    @property
    def instance_floats(self) -> int:
        return self.instance_channels * self.latent_side**2

    @property
    def shared_floats(self) -> int:
        """The floats of all but the instances, F."""
        return parameter_floats(lambda: HierarchicalMemory(self, 0))


class HierarchicalMemory(Container):
    """x_{c,i} = D([f_c(m_D), m_c, m_{c,i}]), joined along channels: one m_D for the dataset, one m_c and one extractor
    f_c per class, one m_{c,i} per image, one decoder D for all.

    Shapes: ``dataset`` (C_D, s, s), ``class_memory`` (C, C_C, s, s), ``instances`` (C, G, C_I, s, s). No two images
    share an instance memory and nothing normalises over the batch: dropping one leaves the others as they were.
    """

    NAME = "hmn"

    def __init__(self, shape: HmnShape, instances: int) -> None:
        super().__init__()
        side = shape.latent_side
        self.shape = shape
        self.instances = nn.Parameter(torch.empty(shape.classes, instances, shape.instance_channels, side, side))
        if shape.class_channels:
            self.class_memory = nn.Parameter(torch.empty(shape.classes, shape.class_channels, side, side))
        if shape.feature_channels:
            self.dataset = nn.Parameter(torch.empty(shape.dataset_channels, side, side))
            kernel = shape.feature_kernel
            # All extractors read the same memory, so stacked along output channels they are one convolution.
            self.extractor_weight = nn.Parameter(
                torch.empty(shape.classes, shape.feature_channels, shape.dataset_channels, kernel, kernel)
            )
            self.extractor_bias = nn.Parameter(torch.empty(shape.classes, shape.feature_channels))
        self.decoder = make_decoder(shape)

    def decode(self, index: Tensor) -> Tensor:
        """Images (n, channels, H, W) of instances ``index`` (n,): i is the image i % G of class i // G.

        Pixels are in [0, 1] unless the output is linear.
        """
        label = index // self.images_per_class
        parts = [self.instances.flatten(0, 1)[index]]
        if self.shape.class_channels:
            parts.insert(0, self.class_memory[label])
        if self.shape.feature_channels:
            parts.insert(0, self._features()[label])
        # In the channels-last layout a CPU decodes in three fifths of the time.
        return self.decoder(torch.cat(parts, dim=1).contiguous(memory_format=torch.channels_last))

    def _features(self) -> Tensor:
        """f_c(m_D) of every class, (C, C_F, s, s)."""
        padding = self.shape.feature_kernel // 2
        stacked = F.conv2d(
            self.dataset[None], self.extractor_weight.flatten(0, 1), self.extractor_bias.flatten(), padding=padding
        )
        return F.leaky_relu(stacked, LEAK).unflatten(1, (self.classes, -1))[0]

    def initialise(self, generator: torch.Generator, config: HmnConfig, real: RealImages) -> None:
        """Memories N(0, 1), instances times ``instance_init_scale``; weights kaiming normal with the leak, biases zero.

        PyTorch's default weights would decode to flat grey (pixel deviation about 0.01); these decode to about
        the deviation of natural images (0.2), which the first gradients need.
        """
        for name, parameter in self.named_parameters():
            if name in ("dataset", "class_memory", "instances"):
                nn.init.normal_(parameter, generator=generator)
            elif name == "extractor_weight":
                nn.init.kaiming_normal_(parameter.flatten(0, 1), a=LEAK, generator=generator)
            elif parameter.ndim == 4:
                # A transposed convolution's weight has inputs first; at stride 2 a quarter of its taps reach an output.
                transposed = self.shape.decoder == "transposed" and parameter.shape[-1] == 4
                fan_in = parameter.shape[0] * 4 if transposed else parameter[0].numel()
                nn.init.normal_(parameter, std=math.sqrt(2 / (1 + LEAK**2) / fan_in), generator=generator)
            elif name.endswith("weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.instances *= config.instance_init_scale

    def tiers(self) -> dict[str, list[nn.Parameter]]:
        tiers = {"instances": [self.instances]}
        if self.shape.class_channels:
            tiers["class"] = [self.class_memory]
        if self.shape.feature_channels:
            tiers["dataset"] = [self.dataset]
            tiers["extractors"] = [self.extractor_weight, self.extractor_bias]
        return tiers | {"decoder": list(self.decoder.parameters())}

    def memory_tiers(self) -> frozenset[str]:
        return frozenset({"dataset", "class", "instances"})

    def class_parameters(self) -> list[nn.Parameter]:
        owned = ("instances", "class_memory", "extractor_weight", "extractor_bias")
        return [parameter for name, parameter in self.named_parameters() if name in owned]


def make_decoder(shape: HmnShape) -> nn.Sequential:
    """L stages that each double the side, W channels wide and W/2 in the last, then a 3x3 head and the output.

    ``upsample``: 3x3 convolution, leaky ReLU, nearest x2. ``transposed``: 4x4 transposed convolution of stride 2.
    """
    width, stages = shape.decoder_width, shape.doublings
    inputs = shape.feature_channels + shape.class_channels + shape.instance_channels
    layers: list[nn.Module] = []
    convolution = nn.Conv2d
    for stage in range(stages):
        outputs = width if stage < stages - 1 else width // 2
        if shape.decoder == "upsample":
            layers.append(convolution(inputs, outputs, 3, padding=1))
        else:
            layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
        if shape.decoder_norm:
            layers.append(nn.GroupNorm(1, outputs))  # one group: per image, never over the batch
        layers.append(nn.LeakyReLU(LEAK))
        if shape.decoder == "upsample":
            # The next convolution upsamples. A layer of its own once did; kept sets name their tensors by its position.
            layers.append(nn.Identity())
            convolution = UpsamplingConv2d
        inputs = outputs
    output = nn.Sigmoid() if shape.output == "sigmoid" else Tangent()
    return nn.Sequential(*layers, convolution(inputs, shape.channels, 3, padding=1), output)


class UpsamplingConv2d(nn.Conv2d):
    """Nearest x2, then a 3x3 convolution of padding 1, (n, c, h, w) to (n, k, 2h, 2w), without building the large map.

    Of three neighbours on the large map, two are copies of one pixel of the small map. Output pixel (2i + a, 2j + b) is
    therefore a 2x2 convolution around pixel (i, j), whose taps are sums of the weight's taps that differ by phase
    (a, b). All four phases together are one 3x3 convolution of the small map with 4k outputs. Nothing large is copied.
    With k = 3, as in the last layer, it takes a third of the time: a CPU computes 16 outputs no slower than 3.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # rows[p, a, i]: whether tap p of an output pixel of phase a falls on the small map's row i - 1, i or i + 1
        rows = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 1]]])
        taps = torch.einsum("pai,qbj->pqabij", rows, rows)
        self.register_buffer("taps", taps.reshape(9, 36), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        k, c = self.weight.shape[:2]
        phases = (self.weight.flatten(2) @ self.taps).view(k, c, 4, 3, 3).transpose(1, 2).reshape(4 * k, c, 3, 3)
        return F.pixel_shuffle(F.conv2d(x, phases, self.bias.repeat_interleave(4), padding=1), 2)


class Tangent(nn.Module):
    """The sigmoid's tangent at 0: the same pixels around grey, without bounds."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 + x / 4
