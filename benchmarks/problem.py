"""What benchmarks compute: images, network, container, and the arithmetic that each job needs."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.config import DatasetConfig, GradientMatchingConfig, HmnConfig
from hmn.containers import presets, storage
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape
from hmn.data import datasets, folder
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.data.sampling import random_subset
from hmn.data.splits import Split
from hmn.errors import DataError
from hmn.networks import Builder, initialise
from hmn.networks.convnet import ConvNet
from hmn.seeding import generator

SIZE, CHANNELS = 32, 3
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, as in conf/dataset/cifar10.yaml
NOISE_PER_CLASS = 500
OVER_BUDGET = 0.1


@dataclass(frozen=True)
class Problem:
    """Real images on the device and how networks are made."""

    data: RealData
    device: torch.device
    width: int

    @property
    def classes(self) -> int:
        return len(self.data.class_names)

    @property
    def build(self) -> Builder:
        return partial(ConvNet, CHANNELS, self.classes, SIZE, width=self.width)

    @property
    def normalise(self) -> Normalise:
        return Normalise(self.data.mean, self.data.std, self.device)

    def network(self, *, channels_last: bool, name: str | int = 0) -> nn.Module:
        """A freshly initialised network, the same in either memory format."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        stream = generator(0, "network", name, device=self.device)
        return initialise(self.build().to(self.device), stream).to(memory_format=layout)

    def batches(self, per_class: int, name: str) -> Tensor:
        """Normalised images (classes, per_class, channels, H, W), contiguous."""
        stream = generator(0, name, device=self.device)
        data = self.data
        index = random_subset(data.train.labels, per_class, data.class_names, stream)
        return self.normalise(data.train.images[index]).unflatten(0, (self.classes, per_class))

    def container(self, images_per_class: int = 1) -> HierarchicalMemory:
        """HMN by the preset for this storage, newly initialised, with as many images as are condensed over budget."""
        data = {"classes": self.classes, "channels": CHANNELS, "image_size": SIZE}
        shape = HmnShape.of(presets.fill(HmnConfig(name="hmn"), images_per_class=images_per_class, **data), **data)
        count = storage(shape, images_per_class, OVER_BUDGET).over_budget_images_per_class
        container = HierarchicalMemory(shape, count).to(self.device)
        container.initialise(generator(0, "container", device=self.device), HmnConfig(name="hmn"), None)
        return container


def make(options: argparse.Namespace, device: torch.device) -> Problem:
    data = noise(options.classes) if options.data is None else class_folders(options.data)
    return Problem(data.to(device), device, options.width)


def matching_config(options: argparse.Namespace, **changes: object) -> GradientMatchingConfig:
    """IDC's objective as HMN's runs use it, with the benchmark's batch sizes."""
    config = GradientMatchingConfig(
        name="gradient_matching",
        real_batch=options.real,
        synthetic_batch=options.synthetic,
        network_samples=options.samples,
    )
    return dataclasses.replace(config, **changes)


def describe(options: argparse.Namespace) -> str:
    if options.data is None:
        return f"structured noise with CIFAR-10's mean and deviation, {NOISE_PER_CLASS} per class; no real images"
    return f"class folders of {options.data.name}, {SIZE} pixels"


def noise(classes: int, per_class: int = NOISE_PER_CLASS) -> RealData:
    """Smooth random images: coarse and fine noise in the proportions of photographs, and a pattern for each class.

    Timings depend on shapes alone, but zeros or constants would run faster, and white noise has gradients unlike any
    image's.
    """
    stream = generator(0, "noise")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
    pixels = []
    for _ in range(classes):  # one at a time, so that making images does not set the process's peak memory
        images = torch.zeros(per_class, CHANNELS, SIZE, SIZE)
        for side in (2, 4, 8, 16, 32):  # twice the frequency at half the amplitude: 1/f
            common = torch.randn(1, CHANNELS, side, side, generator=stream)
            own = torch.randn(per_class, CHANNELS, side, side, generator=stream)
            images += F.interpolate(0.5 * common + own, size=(SIZE, SIZE), mode="bilinear") * (2 / side)
        images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
        pixels.append(((images * std + mean).clamp(0, 1) * 255).round().byte())
    train = Split(torch.cat(pixels), torch.arange(classes).repeat_interleave(per_class))
    return of_noise(train, classes)


def of_noise(train: Split, classes: int) -> RealData:
    """``train`` as a dataset that is nothing but training images."""
    nothing = Split(train.images[:0], train.labels[:0])
    return RealData(
        name="noise",
        class_names=tuple(map(str, range(classes))),
        mean=MEAN,
        std=STD,
        train=train,
        held_out=nothing,
        test=nothing,
        notes=(),
        fingerprint="noise",
    )


def class_folders(root: Path) -> RealData:
    """Load a tree of class folders, with a test folder or without."""
    try:
        folder.find(root, None)
        share = None
    except DataError:
        share = 0.1
    config = DatasetConfig(kind="folder", root=str(root), image_size=SIZE, test_fraction=share, held_out_fraction=0.0)
    return datasets.load(config, Path("data"), generator(0, "split"))


@dataclass(frozen=True)
class Work:
    """FLOP per image that a job cannot do without, counting only convolutions and linear layers, a multiply-add as 2.

    The same number is divided by the time of every form, so a form that does more arithmetic than needed shows it.
    """

    forward: int
    first: int  # the first convolution's share of it
    convolutions: int

    @property
    def training(self) -> int:
        """Forward, weight gradients, and input gradients above the first convolution."""
        return 3 * self.forward - self.first

    @property
    def matched(self) -> int:
        """For a synthetic image: a forward and a backward pass with a tangent beside each (Pearlmutter, 1994).

        Four passes over the layers (forward, input gradients, their two tangents), of which those that would need the
        pixels' own tangent or gradient leave out the first, and three over the convolutions for the direction.
        """
        return 4 * self.forward + 3 * self.convolutions - 2 * self.first

    def matching_step(self, *, real: int, synthetic: int) -> int:
        return real * self.training + synthetic * self.matched


def work(build: Builder) -> Work:
    """Count the work of a network, without allocating it."""
    found: list[tuple[nn.Module, int]] = []

    def count(module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> None:
        found.append((module, 2 * output.numel() * module.weight[0].numel()))

    with torch.device("meta"):
        network = build()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        network(torch.empty(1, CHANNELS, SIZE, SIZE))
    convolutions = [flops for module, flops in found if isinstance(module, nn.Conv2d)]
    return Work(sum(flops for _, flops in found), convolutions[0], sum(convolutions))
