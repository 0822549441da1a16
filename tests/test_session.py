"""The stages of a run, each by itself: what is evaluated, whose scores are read, what is recorded and drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hmn import build, session
from hmn.artifacts import load_condensed
from hmn.build import student
from hmn.data.splits import Split
from hmn.evaluate import Accuracies
from hmn.session import Session
from hmn.tracking import METRICS_FILE, read_metrics
from tests.command import TINY, planned, session_of


def session_with(folder: Path, *overrides: str) -> Session:
    return session_of(planned(*TINY, *overrides), folder)


@pytest.fixture
def judged(monkeypatch) -> list[Split]:
    """The images that networks were to be trained on; none is trained."""
    seen = []

    def evaluate(_judge, train: Split, *_: Any) -> Accuracies:
        seen.append(train)
        return Accuracies(by_network=[[0.5, 0.25], [0.5, 0.75]], test_epochs=[1, 2], seeds=[0, 1])

    monkeypatch.setattr(session, "evaluate", evaluate)
    return seen


def test_a_condensed_set_is_judged_in_the_numbers_that_are_kept(tmp_path, monkeypatch, judged):
    def make(_making, container) -> dict[str, Any]:
        container.hold(torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        return {}

    monkeypatch.setattr(session.Making, "make", make)
    session_with(tmp_path, "container=image", "pruning=none", "memory.number=float16").condense_and_evaluate()
    assert torch.equal(judged[0].images, load_condensed(tmp_path).tensors()[0])


def test_a_coreset_is_judged_in_the_numbers_that_are_kept(tmp_path, judged):
    session_with(tmp_path, "container=coreset", "memory.number=float16").choose_and_evaluate()
    assert torch.equal(judged[0].images, load_condensed(tmp_path).tensors()[0])


def test_every_process_keeps_what_the_first_one_chose(tmp_path, monkeypatch, judged):
    def of_the_first(tensors) -> None:
        for tensor in tensors:
            tensor.copy_(10 * torch.arange(10))

    monkeypatch.setattr(session.distributed, "copy_first_", of_the_first)
    session_with(tmp_path, "container=coreset").choose_and_evaluate()
    assert load_condensed(tmp_path).card["coreset"]["index"] == list(range(0, 100, 10))


SCORED = ("container=coreset", "container.method=herding", "dataset.mean=[0.3]", "dataset.std=[0.3]")


def scores_folder(folder: Path, *overrides: str) -> Path:
    return session_with(folder, *SCORED, *overrides)._scores_folder()


@pytest.mark.parametrize(
    "other",
    [
        *("seed=1", "network.width=8", "container.networks=2", "container.epochs=3"),
        *("dataset.mean=[0.4]", "dataset.std=[0.4]", "evaluation.lr=0.5"),
        "dataset.held_out_fraction=0.2",  # trains on other images
    ],
)
def test_what_networks_say_of_real_images_is_not_read_where_they_would_say_something_else(tmp_path, other):
    assert scores_folder(tmp_path, other) != scores_folder(tmp_path)


def test_nor_where_they_were_computed_otherwise(tmp_path):
    """The precision in use counts and not the one asked for: where bf16 does not pay, it is fp32."""
    made = session_with(tmp_path, *SCORED)
    made.compute = dataclasses.replace(made.compute, precision="bf16")
    assert made._scores_folder() != scores_folder(tmp_path) == scores_folder(tmp_path, "compute.precision=bf16")


@pytest.mark.parametrize("other", ["container.method=k_center", "memory=ipc10", "evaluation.networks=1"])
def test_coresets_of_other_methods_and_sizes_ask_the_same_networks(tmp_path, other):
    assert scores_folder(tmp_path, other) == scores_folder(tmp_path)


def test_an_evaluation_that_is_read_back_is_recorded_once(tmp_path, judged):
    """This happens, for example, where the disk was full when the set was to be saved."""
    made = session_with(tmp_path)
    for _ in range(2):
        made._evaluate(Split(torch.zeros(10, 1, 8, 8), torch.arange(10)))
    assert len(judged) == 2
    assert read_metrics(tmp_path / METRICS_FILE) == [
        {"evaluate/network": 0, "evaluate/accuracy": 0.25},
        {"evaluate/network": 1, "evaluate/accuracy": 0.75},
    ]


def test_the_picture_of_what_is_pruned_is_drawn_for_as_many_of_each_end_as_go(tmp_path, monkeypatch):
    """Of 10 pruned images, a beta of 0.3 takes the 3 hardest."""
    drawn = []

    def grid(_images, _scores, keep: int, hardest: int) -> Image.Image:
        drawn.append((keep, hardest))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(session.pictures, "pruning_grid", grid)
    made = session_with(tmp_path, "memory=ipc10")
    keep = made.plan.storage.images_per_class
    made._keep_pruning_picture(torch.zeros(10 * (keep + 10), 1, 8, 8), torch.zeros(10, keep + 10), 0.3)
    assert drawn == [(keep, 3)]


# What the stages are given

TRAJECTORY = ("debug=smoke_trajectory", "objective=trajectory_matching")
STAGES = (
    *("container=image", "memory=ipc10", "pruning.over_budget=0.5", "pruning.score=softmax_margin"),
    *("pruning.score_networks=2", "pruning.score_epochs=3", "pruning.search_epochs=5"),
    *("evaluation.curve_points=2", "evaluation.curve_epochs=7", "evaluation.networks=4", "evaluation.test_points=6"),
)


@pytest.fixture
def given(monkeypatch) -> dict[str, tuple[Any, ...]]:
    """The arguments of every stage of a run, by the stage's name; each is called once and computes nothing."""
    seen: dict[str, tuple[Any, ...]] = {}

    def stage(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        def called(_judge, *arguments: Any) -> Any:
            assert name not in seen
            seen[name] = arguments
            return found(*arguments)

        return called

    def make(_making, container) -> dict[str, Any]:
        container.hold(torch.rand(150, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        return {}

    accuracies = Accuracies(by_network=[[0.5]], test_epochs=[1], seeds=[0])
    monkeypatch.setattr(session.Making, "make", make)
    monkeypatch.setattr(session.prune, "area_under_margin", stage("score", lambda split, *_: -split.labels.float()))
    monkeypatch.setattr(session.prune, "search_beta", stage("search", lambda *_: (0.25, {0.25: 0.5})))
    monkeypatch.setattr(session, "quick_accuracy", stage("quick", lambda *_: 0.75))
    monkeypatch.setattr(session, "evaluate", stage("evaluate", lambda *_: accuracies))
    return seen


def test_held_out_images_choose_and_test_images_judge(tmp_path, given):
    made = session_with(tmp_path, *STAGES)
    result = made.condense_and_evaluate()
    over_budget, _, count, held_out, epochs = given["search"]
    assert held_out is made.data.held_out and (count, epochs) == (10, 5)
    assert given["score"][0] is over_budget and len(over_budget.labels) == 150
    assert given["score"][1:] == ("softmax_margin", 2, 3)
    pruned, held_out, epochs, _ = given["quick"]
    assert held_out is made.data.held_out and epochs == 7
    train, test, networks, points, _ = given["evaluate"]
    assert test is made.data.test and (networks, points) == (4, 6)
    kept, labels = load_condensed(tmp_path).tensors()
    assert len(kept) == 100
    for judged in (pruned, train):
        assert torch.equal(judged.images, kept) and torch.equal(judged.labels, labels)
    assert (result["pruning"]["held_out_accuracy"], result["pruning"]["beta"]) == (0.75, 0.25)


@pytest.mark.parametrize("mode", ["full_data", "random_subset"])
def test_references_are_judged_on_test_images(tmp_path, given, mode):
    made = session_with(tmp_path, f"mode={mode}")
    getattr(made, mode)()
    assert given["evaluate"][1] is made.data.test
    assert len(given["evaluate"][0].labels) == {"full_data": len(made.data.train.labels), "random_subset": 10}[mode]


def test_experts_are_judged_on_test_images_after_their_last_epoch(tmp_path, monkeypatch):
    seen, read = [], []
    state = session_with(tmp_path).plan.build().state_dict()
    monkeypatch.setattr(session.build, "experts", lambda _: ["kept"])
    monkeypatch.setattr(session.experts, "read", lambda path, epoch, _device: read.append((path, epoch)) or state)
    monkeypatch.setattr(session, "accuracy", lambda _network, images, *_: seen.append(images) or torch.tensor(0.5))
    made = session_with(tmp_path, "mode=experts", *TRAJECTORY)
    made.experts()
    assert seen[0] is made.data.test.images
    assert read == [("kept", made.config.objective.experts.epochs)]


def test_the_full_training_set_has_its_own_epochs(tmp_path):
    longer = ("evaluation.epochs=3", "evaluation.full_data_epochs=7")
    assert session_with(tmp_path, *longer, "mode=full_data").judge.recipe.epochs == 7
    assert session_with(tmp_path, *longer).judge.recipe.epochs == 3


@pytest.mark.parametrize("flip", [True, False])
def test_nothing_is_mirrored_where_a_mirror_changes_the_class(tmp_path, monkeypatch, flip):
    """This holds for evaluation, for condensing, and for the networks and experts of condensing."""
    used = []
    mirrors = [f"{key}=flip_crop" for key in ("evaluation.strategy", "objective.strategy")]
    made = session_with(tmp_path, f"dataset.flip={flip}", *mirrors, "objective.network_strategy=flip_crop")
    used.append(made.judge.recipe.strategy)
    side = build.condensation(made.workshop, made.plan.container(1)).side
    used += [side.strategy, side.updates.recipe.strategy]
    monkeypatch.setattr(student.expert_training, "recipe_of", lambda _, strategy: used.append(strategy))
    monkeypatch.setattr(student.expert_training, "build", lambda *_, **__: [])
    mirrors = ["objective.experts.strategy=flip_crop", "objective.strategy=flip_crop"]
    made = session_with(tmp_path, f"dataset.flip={flip}", *TRAJECTORY, *mirrors)
    student.experts(made.workshop)
    used.append(made.workshop.strategy)
    assert used == ["flip_crop" if flip else "crop"] * 5


def test_every_stage_draws_by_the_seed_of_the_run(tmp_path, judged):
    starts = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = session_with(folder, f"seed={seed}", "mode=random_subset")
        assert made.judge.seed == seed
        made.random_subset()
        made = session_with(folder, f"seed={seed}")
        container = made.plan.container(1)
        build.start(made.workshop, container)
        starts.append(container.instances.detach())
    assert not torch.equal(judged[0].images, judged[1].images)
    assert not torch.equal(*starts)
