"""The released sets: they load, keep to their budgets, and teach a network what real classes look like."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hmn
from hmn.compute import Compute
from hmn.data.preprocess import Normalise
from hmn.network_update import training_step
from hmn.networks.convnet import ConvNet
from hmn.training import Recipe, Training, accuracy
from tests.command import ROOT

RELEASE = ROOT / "experiments" / "release"
RELEASES = sorted(path.parent for path in RELEASE.glob("*/card.json"))
HMN, FRED = RELEASE / "hmn-cifar10-q75-ipc1", RELEASE / "fred-cifar10-q75-ipc1"
REAL = ROOT / "data" / "cifar10-q75" / "test"
PER_CLASS = 20  # real test images per class


@functools.cache
def trained() -> tuple[torch.nn.Module, Normalise]:
    """A small network after a few epochs on one released set."""
    condensed = hmn.load_condensed(HMN)
    torch.manual_seed(0)
    images, labels = condensed.tensors()
    data, compute = condensed.card["data"], Compute(torch.device("cpu"))
    normalise = Normalise(data["mean"], data["std"], compute.device)

    def build() -> torch.nn.Module:
        return ConvNet(data["channels"], len(data["class_names"]), data["image_size"], width=16)

    recipe = Recipe(
        epochs=30,
        batch=32,
        lr=0.02,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="cosine",
        strategy="color_crop_flip_scale_rotate",
        cutmix=0.0,
    )
    stream = torch.Generator().manual_seed(0)
    training = Training(build, images, labels, recipe, normalise, training_step(build(), compute), stream)
    while not training.finished:
        training.run_epoch()
    return training.network, normalise


def test_all_of_them_are_found():
    assert {HMN, FRED} <= set(RELEASES)


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_a_released_set_loads_in_one_line_and_keeps_to_its_budget(folder: Path):
    condensed = hmn.load_condensed(folder)
    card = condensed.card
    assert condensed.container.storage_floats() == card["stored_floats"] <= card["budget"]["floats"]
    kept = sum(path.stat().st_size for path in folder.iterdir())
    assert kept < 5 * card["budget"]["floats"] * 4  # numbers, a card and a picture
    images, labels = condensed.tensors()
    assert images.isfinite().all() and labels.bincount().unique().numel() == 1


def test_what_one_teaches_holds_for_images_of_another():
    """The sets were made separately, by different containers from different images; what they share is the classes."""
    network, normalise = trained()
    images, labels = hmn.load_condensed(FRED).tensors()
    assert float(accuracy(network, images.clamp(0, 1), labels, normalise)) > 0.35  # chance is 0.1


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL.relative_to(ROOT)} is not there: real images are no part of this")
def test_a_small_network_recognises_real_images_far_above_chance():
    network, normalise = trained()
    names = hmn.load_condensed(HMN).card["data"]["class_names"]
    files = [path for name in names for path in sorted((REAL / name).iterdir())[:PER_CLASS]]
    images = torch.from_numpy(np.stack([np.array(Image.open(path).convert("RGB")) for path in files]))
    images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(len(names)).repeat_interleave(PER_CLASS)
    assert float(accuracy(network, images, labels, normalise)) > 0.25
