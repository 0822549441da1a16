"""A small training for tests of the trainer: three classes of 8 x 8 noise, a narrow network, a short recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hmn.compute import Compute
from hmn.data.preprocess import Normalise
from hmn.network_update import training_step
from hmn.networks import Builder
from hmn.networks.convnet import ConvNet
from hmn.training import Recipe, Training

CPU = Compute(torch.device("cpu"))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NORMALISE = Normalise(MEAN, STD)
RECIPE = Recipe(
    epochs=4,
    batch=8,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    strategy="color_crop_flip_scale_rotate",
    cutmix=0.5,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build() -> nn.Module:
    return ConvNet(3, 3, 8, width=4, depth=2)


def with_batch_norm() -> nn.Module:
    return ConvNet(3, 3, 8, width=4, depth=2, norm="batch")


def images_and_labels(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    stream = generator(seed)
    images = torch.randint(256, (n, 3, 8, 8), generator=stream, dtype=torch.uint8)
    return images, torch.randint(3, (n,), generator=stream)


def training(recipe: Recipe = RECIPE, n: int = 21, seeds: Sequence[int] = (0,), build: Builder = build) -> Training:
    """One network per seed on 21 images in batches of 8; the last batch is short, and padded without batch norm."""
    images, labels = images_and_labels(n)
    step = training_step(build(), CPU)
    return Training(build, images, labels, recipe, NORMALISE, step, *(generator(seed) for seed in seeds))


def state_of(run: Training) -> dict[str, Tensor]:
    """Parameters, buffers and momentum: everything that later epochs depend on, except the generator."""
    momentum = [state["momentum_buffer"] for state in run.update.optimizer.state.values()]
    return run.network.state_dict() | {f"momentum{index}": value for index, value in enumerate(momentum)}


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def in_float64() -> nn.Module:
    return build().double()


def normalised(images: Tensor) -> Tensor:
    return torch.stack([(images[:, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)
