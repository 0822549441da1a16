"""A container of 15 images, 39 real ones and a two-layer network: matching small enough to check by numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmn.build import Workshop
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.config import GradientMatchingConfig, HmnConfig
from hmn.config.containers import HabaConfig
from hmn.containers.base import Container
from hmn.containers.haba import Haba, HabaShape
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.data.splits import Split
from hmn.matching import ClassMatching
from hmn.network_update import training_step
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.gradient import matching_step
from hmn.realside import LiveSide
from hmn.seeding import generator
from tests.command import configured

CPU = Compute(torch.device("cpu"))
CLASSES, PER_CLASS, SEED = 3, 5, 4  # 5 images per class in the container, 12 + 13 + 14 real ones
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SHAPE = HmnShape(
    classes=CLASSES,
    channels=3,
    image_size=8,
    latent_side=4,
    dataset_channels=2,
    feature_channels=2,
    feature_kernel=3,
    class_channels=1,
    instance_channels=1,
    decoder_width=4,
)
HABA = HabaShape(classes=CLASSES, channels=3, image_size=8, base_channels=3, styles=3)
MEMORIES = ("instances", "class", "dataset")
TIERS = ("instances", "class", "dataset", "extractors", "decoder")
OWNED = ("instances", "class_memory", "extractor_weight", "extractor_bias")


def make_container(seed: int = 0) -> HierarchicalMemory:
    container = HierarchicalMemory(SHAPE, PER_CLASS)
    container.initialise(torch.Generator().manual_seed(seed), HmnConfig(name="hmn"), None)
    return container


def make_haba(seed: int = 0) -> Haba:
    container = Haba(HABA, 2)
    container.initialise(torch.Generator().manual_seed(seed), HabaConfig(name="haba", init="noise"), None)
    return container


def make_real() -> RealData:
    """Real images of noise around a brightness of their class."""
    stream = torch.Generator().manual_seed(9)
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor([12, 13, 14]))
    noise = torch.randint(-40, 41, (len(labels), 3, 8, 8), generator=stream)
    images = (70 + 60 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8)
    train = Split(images, labels)
    return RealData(
        name="tiny",
        class_names=("a", "b", "c"),
        mean=MEAN,
        std=STD,
        train=train,
        held_out=Split(images[:0], labels[:0]),
        test=Split(images[:0], labels[:0]),  # empty, so that training on it would fail
        notes=(),
        fingerprint="f" * 64,
    )


REAL = make_real()


def workshop(folder: Path, *overrides: str, compute: Compute = CPU) -> Workshop:
    """The workshop of a run with these overrides, on these images and networks."""
    return Workshop(
        config=configured(*overrides),
        data=REAL.to(compute.device),
        build=build,
        compute=compute,
        train_step=training_step(build().to(compute.device), compute),
        normalise=Normalise(MEAN, STD, compute.device),
        checkpoints=Checkpoints(folder, 60),
    )


def config(**changes: Any) -> GradientMatchingConfig:
    values = {"outer_steps": 2, "inner_steps": 2, "real_batch": 6, "network_samples": 16, "network_batch": 8}
    return GradientMatchingConfig(name="gradient_matching", **{**values, **changes})


def build() -> nn.Module:
    return ConvNet(3, CLASSES, 8, width=4, depth=2)


def make_run(
    settings: GradientMatchingConfig,
    *,
    container_seed: int = 0,
    container: Container | None = None,
    flip: bool = True,
    **parts: Any,
) -> ClassMatching:
    compute = Compute(torch.device(parts.pop("device", "cpu")))
    parts = {"match": matching_step(build().to(compute.device), settings.metric, compute), **parts}
    side = live_side(settings, flip=flip, compute=compute)
    container = (make_container(container_seed) if container is None else container).to(compute.device)
    shared = {"normalise": side.normalise, "compute": compute, "seed": SEED}
    return ClassMatching(container, side, settings, **shared, **parts)


def live_side(
    settings: GradientMatchingConfig, *, flip: bool = True, seed: int = SEED, compute: Compute = CPU
) -> LiveSide:
    train, real = training_step(build().to(compute.device), compute), REAL.to(compute.device)
    return LiveSide(real, settings, build=build, train=train, compute=compute, seed=seed, flip=flip)


def fresh_network(outer: int) -> nn.Module:
    network = build().to(memory_format=torch.channels_last)
    return initialise(network, generator(SEED, "condense", "matched_network", outer))


def clone_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def assert_same(one: Any, other: Any, at: str = "state") -> None:
    """Check equality bit for bit, through lists and dictionaries, except for seconds and memory, which vary."""
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one.keys() - {"seconds", "peak_bytes"}:
            assert_same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{at}[{index}]")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), at
    else:
        assert one == other, at


def lr_at(done: int, total: int, peak: float, final: float) -> float:
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done / total)) / 2)
