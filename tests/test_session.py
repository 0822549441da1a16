"""The stages of a run, each by itself: what is judged, whose scores are read, what is recorded and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hmn import session
from hmn.artifacts import load_condensed
from hmn.data.splits import Split
from hmn.evaluate import Accuracies
from hmn.session import Session
from hmn.tracking import METRICS_FILE, read_metrics
from tests.command import TINY, planned, session_of


def session_with(folder: Path, *overrides: str) -> Session:
    return session_of(planned(*TINY, *overrides), folder)


@pytest.fixture
def judged(monkeypatch) -> list[Split]:
    """What networks were to be trained on; none is."""
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


SCORED = ("container=coreset", "container.method=herding", "dataset.mean=[0.3]", "dataset.std=[0.3]")


def scores_folder(folder: Path, *overrides: str) -> Path:
    return session_with(folder, *SCORED, *overrides)._scores_folder()


@pytest.mark.parametrize(
    "other",
    [
        *("seed=1", "network.width=8", "container.networks=2", "container.epochs=3", "compute.precision=bf16"),
        *("dataset.mean=[0.4]", "dataset.std=[0.4]", "evaluation.lr=0.5"),
        "dataset.held_out_fraction=0.2",  # and so of other images
    ],
)
def test_what_networks_say_of_real_images_is_not_read_where_they_would_say_something_else(tmp_path, other):
    assert scores_folder(tmp_path, other) != scores_folder(tmp_path)


@pytest.mark.parametrize("other", ["container.method=k_center", "memory=ipc10", "evaluation.networks=1"])
def test_coresets_of_other_methods_and_sizes_ask_the_same_networks(tmp_path, other):
    assert scores_folder(tmp_path, other) == scores_folder(tmp_path)


def test_an_evaluation_that_is_read_back_is_recorded_once(tmp_path, judged):
    """As where the disk was full when the set was to be kept."""
    made = session_with(tmp_path)
    for _ in range(2):
        made._evaluate(Split(torch.zeros(10, 1, 8, 8), torch.arange(10)))
    assert len(judged) == 2
    assert read_metrics(tmp_path / METRICS_FILE) == [
        {"evaluate/network": 0, "evaluate/accuracy": 0.25},
        {"evaluate/network": 1, "evaluate/accuracy": 0.75},
    ]


def test_the_picture_of_what_is_pruned_is_drawn_for_as_many_of_each_end_as_go(tmp_path, monkeypatch):
    """Of 10 that go, a beta of 0.3 takes the 3 hardest."""
    drawn = []

    def grid(_images, _scores, keep: int, hardest: int) -> Image.Image:
        drawn.append((keep, hardest))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(session.pictures, "pruning_grid", grid)
    made = session_with(tmp_path, "memory=ipc10")
    keep = made.plan.storage.images_per_class
    made._keep_pruning_picture(torch.zeros(10 * (keep + 10), 1, 8, 8), torch.zeros(10, keep + 10), 0.3)
    assert drawn == [(keep, 3)]
