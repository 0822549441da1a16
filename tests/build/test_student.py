"""Condensing through a student: what the settings build, which are refused, and what a step costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hmn.build import Workshop, condensation, student
from hmn.config.containers import HabaConfig
from hmn.containers.haba import Haba, HabaShape
from hmn.errors import ConfigError
from hmn.experts import read
from hmn.networks import initialise
from hmn.objectives.unroll import Unrolled
from hmn.seeding import generator
from tests.command import TINY, configured, planned, run
from tests.small_matching import CLASSES, CPU, HABA, assert_same, build, clone_of, make_container, make_haba, workshop


def shop(folder: Path, *given: str) -> Workshop:
    small = [f"objective.experts.{key}" for key in ("count=1", "epochs=1", "batch=16")]
    small += ["objective.max_start_epoch=1", "objective.expert_epochs=1", "objective.student_steps=2"]
    return workshop(folder, "objective=trajectory_matching", *small, f"paths.cache_dir={folder}", *given)


def test_haba_has_its_adversary_and_trajectory_matching_its_experts(tmp_path: Path):
    given = ("container=haba", "container.adversary_lr=0.5", "container.adversary_momentum=0.3")
    work = condensation(shop(tmp_path, *given), make_haba())
    (group,) = work.adversary.optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.5, 0.3)
    assert work.adversary.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(work.run_step()[0]) == 2
    assert len(list(tmp_path.glob("experts/*/expert-0000.safetensors"))) == 1


def test_every_expert_starts_from_a_seed_of_its_own_which_is_not_that_of_the_run(tmp_path: Path):
    for seed in (0, 3):
        own = ("objective.experts.count=2", "objective.experts.seed=5", f"paths.cache_dir={tmp_path}/{seed}")
        for number, path in enumerate(student.experts(shop(tmp_path, f"seed={seed}", *own))):
            fresh = initialise(build().to(memory_format=torch.channels_last), generator(5, "experts", number))
            expected = {name: value.detach() for name, value in fresh.named_parameters()}
            assert_same(dict(read(path, 0, CPU.device)), expected)


def test_the_network_that_tells_styles_apart_starts_from_the_seed(tmp_path: Path):
    one, same, other = (
        clone_of(condensation(shop(tmp_path, "container=haba", f"seed={seed}"), make_haba()).adversary.network)
        for seed in (0, 0, 1)
    )
    assert_same(one, same)
    assert not any(torch.equal(value, other[name]) for name, value in one.items() if value.ndim > 1)


@pytest.mark.parametrize(("side", "depth"), [(4, 2), (7, 2), (8, 3), (32, 3)])
def test_the_network_that_tells_styles_apart_has_haba_s_depth_or_what_leaves_a_pixel(
    tmp_path, monkeypatch, side, depth
):
    monkeypatch.setattr("hmn.build.student.experts", lambda _: [])
    shape = HabaShape(classes=CLASSES, channels=3, image_size=side, base_channels=3, styles=2)
    container = Haba(shape, 2)
    container.initialise(generator(0), HabaConfig(name="haba", init="noise"), None)
    work = condensation(shop(tmp_path, "container=haba"), container)
    assert sum(isinstance(module, nn.Conv2d) for module in work.adversary.network.modules()) == depth


def test_a_student_is_trained_by_all_settings_of_its_objective(tmp_path: Path):
    given = ["student_momentum=0.9", "student_dampening=0.8", "segment=2", "student_batch=4", "student_lr=0.02"]
    given += ["student_lr_lr=0.5", "student_lr_momentum=0.25", "student_lr_min=0.005"]
    given += ["experts.epochs=3", "max_start_epoch=2", "expert_epochs=2"]
    work = condensation(shop(tmp_path, "container=haba", *(f"objective.{one}" for one in given)), make_haba())
    images, labels = torch.rand(5, 3, 8, 8, generator=generator(1)), torch.tensor([0, 1, 2, 0, 1])
    start = {name: value.detach() for name, value in initialise(build(), generator(2)).named_parameters()}
    ends = [
        one.train(start, lambda _: (images, labels), 3, torch.tensor(0.1)).end
        for one in (work.unrolled, Unrolled(build(), CPU, momentum=0.9, dampening=0.8))
    ]
    assert_same(*ends)
    assert work.unrolled.segment == 2
    (rate,) = work.rate.optimizer.param_groups
    assert (float(work.rate.value), work.rate.least) == (pytest.approx(0.02), 0.005)
    assert (rate["lr"], rate["momentum"]) == (0.5, 0.25)
    assert (work.goal.max_start, work.goal.length) == (2, 2)
    assert [len(index) for index in work.batches(3, generator(0))] == [4, 2, 4]  # six bases in one style
    assert len(work.adversary._pair()[1]) == 4


def test_bptt_has_all_settings_of_its_objective(tmp_path: Path):
    given = ["class_batch=2", "real_batch=5", "student_lr=0.3", "student_momentum=0.5"]
    settings = configured("objective=bptt", *(f"objective.{one}" for one in given))
    work = condensation(dataclasses.replace(shop(tmp_path), config=settings), make_container())
    assert [len(index) for index in work.batches(2, generator(0))] == [CLASSES * 2] * 2
    assert work.goal.real.batch == 5
    assert float(work.rate.value) == pytest.approx(0.3) and not work.rate.learned
    images, labels = torch.rand(5, 3, 8, 8, generator=generator(1)), torch.tensor([0, 1, 2, 0, 1])
    start = work.goal.begin(0)
    ends = [
        one.train(start, lambda _: (images, labels), 3, torch.tensor(0.1)).end
        for one in (work.unrolled, Unrolled(build(), CPU, momentum=0.5))
    ]
    assert_same(*ends)


def test_one_style_has_no_adversary_and_digits_no_mirror(tmp_path: Path):
    container = Haba(dataclasses.replace(HABA, styles=1), 2)
    container.initialise(generator(0), HabaConfig(name="haba", init="noise"), None)
    work = condensation(shop(tmp_path, "container=haba", "dataset.flip=false"), container)
    assert work.adversary is None
    assert work.strategy == "color_crop_cutout_scale_rotate"


def test_a_memory_limit_bounds_how_many_images_are_decoded_at_a_time(tmp_path: Path):
    free = condensation(shop(tmp_path), make_container())
    limited = condensation(shop(tmp_path, "compute.memory_limit=1000"), make_container())
    assert free.chunk == 128
    assert limited.chunk > 128
    with pytest.raises(ConfigError, match="compute.memory_limit=0.001: must be at least .*raise objective.segment"):
        condensation(shop(tmp_path, "compute.memory_limit=0.001"), make_container())


def test_hmn_under_trajectory_matching_from_a_command(tmp_path: Path):
    tiny = [argument for argument in TINY if argument != "debug=smoke"]
    given = ["debug=smoke_trajectory", "objective=mtt_hmn", "pruning=none", "objective.experts.count=1"]
    outcome = run(tmp_path, *tiny, *given)
    assert outcome.code == 0, outcome.err
    (path,) = tmp_path.glob("runs/*/result.json")
    result = json.loads(path.read_text())
    assert result["condense_steps"] == 2
    assert result["student_lr"] == pytest.approx(0.01, abs=1e-3)
    assert len(list(tmp_path.glob(".cache/experts/*/*.safetensors"))) == 1


# What is refused, and what it costs


@pytest.mark.parametrize("objective", ["trajectory_matching", "bptt"])
def test_several_processes_are_refused_with_the_reason(objective: str, monkeypatch):
    assert planned("mode=plan", f"objective={objective}", "container=image").storage
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"objective.name={objective}: .* under torchrun: a student's steps"):
        planned("mode=plan", f"objective={objective}", "container=image")


@pytest.mark.parametrize("mode", ["plan", "experts"])
def test_networks_that_look_across_a_batch_are_refused_before_experts_are_trained(mode: str):
    with pytest.raises(ConfigError, match="network.norm=batch: must be instance or none"):
        planned(f"mode={mode}", "objective=trajectory_matching", "container=image", "network.norm=batch")


REFUSED = {
    "objective.inner_steps=2": "objective.inner_steps=2: must be 1",
    "objective.student_steps=0": "objective.student_steps=0: must be at least 1",
    "objective.segment=0": "objective.segment=0: must be at least 1",
    "objective.student_dampening=1": "objective.student_dampening=1.0: must be in",
    "objective.max_start_epoch=50": "objective.max_start_epoch=50: must be at most 49: experts train for 50 epochs",
    "objective.student_lr_min=0.1": "objective.student_lr=0.01: must be at least objective.student_lr_min=0.1",
    "objective.experts.count=0": "objective.experts.count=0: must be at least 1",
}


@pytest.mark.parametrize("override", REFUSED)
def test_settings_out_of_range_are_refused_by_name(override: str):
    with pytest.raises(ConfigError, match=REFUSED[override]):
        configured("objective=trajectory_matching", override)


def test_how_many_steps_are_kept_is_not_part_of_the_run():
    plans = [planned("mode=plan", "objective=bptt", f"objective.segment={segment}") for segment in (1, 12)]
    assert plans[0].run_id == plans[1].run_id


def test_a_step_costs_its_student_forth_and_back():
    def step(*given: str):
        data = ["dataset=cifar10", "container=image", "memory=ipc10", "network.width=4", "pruning=none"]
        return planned("mode=plan", *data, "objective=trajectory_matching", *given)

    short, long = step("objective.student_steps=2"), step("objective.student_steps=6")
    assert long.step_flops.matching == 3 * short.step_flops.matching
    # All 100 images take a forward and a backward pass, and the gradients with respect to the images take them again.
    ratio = short.step_flops.matching / (2 * 100 * short.training_flops)
    assert 3 < ratio < 5
    batched = step("objective.student_steps=2", "objective.student_batch=25")
    assert 4 * batched.step_flops.matching == short.step_flops.matching
    # The backward pass recomputes all steps but one of each segment, forward only.
    again = step("objective.student_steps=6", "objective.segment=3").step_flops.matching
    assert again - long.step_flops.matching == pytest.approx(4 * 100 * short.training_flops, rel=1e-6)
    assert step().summary()["expert_training_flops"] == 100 * 50 * 45_000 * step().training_flops


def test_bptt_s_judgement_is_counted_apart():
    plan = planned("mode=plan", "container=image", "objective=bptt", "network.width=4")
    assert plan.step_flops.update == pytest.approx(10 * 64 * plan.training_flops, rel=1e-6)
