"""What every condensation must satisfy, whatever its objective: learning rates, averages, and valid parameters."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from hmn.build import condensation
from hmn.condense import Condensation
from hmn.containers.base import Container
from hmn.containers.image import RawImages, RawShape
from hmn.seeding import generator
from tests.small_matching import CLASSES, TIERS, lr_at, make_container, workshop

STEPS = 4
OBJECTIVES = {
    "gradient_matching": ["inner_steps=1", "network_samples=0", "real_batch=6"],
    "trajectory_matching": ["student_steps=2", "max_start_epoch=1", "expert_epochs=1"],
    "bptt": ["student_steps=2", "class_batch=2", "real_batch=6"],
}
OBJECTIVES["trajectory_matching"] += ["experts.count=1", "experts.epochs=1", "experts.batch=16"]
SHARED = [f"outer_steps={STEPS}", "optimizer=adam", "average=0.25", "final_lr_fraction=0.2"]
SHARED += ["memory_lr=0.8", "weights_lr=0.16", "lr_scaling=idc"]
# For 10 images per class of 8 pixels IDC's factor is (8 / 32)^2.
PEAKS = {"instances": 0.05, "class": 0.05, "dataset": 0.05, "extractors": 0.01, "decoder": 0.03}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder that keeps the expert, so that it is trained once."""
    return tmp_path_factory.mktemp("cache")


def condensing(objective: str, folder: Path, container: Container | None = None) -> Condensation:
    settings = [f"objective.{setting}" for setting in OBJECTIVES[objective] + SHARED]
    given = [f"objective={objective}", "memory=ipc10", "+container.lr_scale.decoder=3", f"paths.cache_dir={folder}"]
    shop = workshop(folder / "checkpoints", *given, *settings)
    return condensation(shop, make_container() if container is None else container)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_step_has_the_rates_of_its_tiers_at_its_place_in_the_run(objective, folder):
    run = condensing(objective, folder)
    assert tuple(run.container.tiers()) == TIERS
    for step in range(STEPS):
        run.run_step()
        found = [group["lr"] for group in run.optimizer.inner.param_groups]
        assert found == pytest.approx([lr_at(step, STEPS, PEAKS[tier], final=0.2) for tier in TIERS]), step


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_kept_is_the_average_over_steps(objective, folder):
    run = condensing(objective, folder)
    expected = [parameter.detach().double() for parameter in run.container.parameters()]
    for step in range(1, STEPS + 1):
        run.run_step()
        kept = min(0.25, (1 + step) / (10 + step))
        now = [parameter.detach().double() for parameter in run.container.parameters()]
        expected = [kept * old + (1 - kept) * new for old, new in zip(expected, now, strict=True)]
    settled = copy.deepcopy(run.container)
    run.settle(settled)
    for found, value in zip(settled.parameters(), expected, strict=True):
        torch.testing.assert_close(found, value.float())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_starts_from_valid_pixels(objective, folder):
    container = RawImages(RawShape(classes=CLASSES, channels=3, image_size=8), 2)
    pixels = 3 * torch.rand(CLASSES * 2, 3, 8, 8, generator=generator(1)) - 1
    container.hold(pixels)
    run = condensing(objective, folder, container)
    for _ in range(2):
        container.hold(pixels)
        run.run_step()
        moved = container.instances.detach().flatten(0, 1) - pixels.clamp(0, 1)
        assert 0 < moved.abs().max() < 0.06  # Adam's step, which is about as long as its learning rate


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("idc", 2 * (8 / 32) ** 2)])
def test_idc_s_rates_follow_the_budget_and_the_side(tmp_path, scaling, factor):
    shop = workshop(tmp_path, "memory.images_per_class=20", f"objective.lr_scaling={scaling}")
    assert shop.rate_factor == pytest.approx(factor)
