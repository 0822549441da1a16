"""Condensing as a stage of a run: what a point of the curve judges, and what is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hmn import build, making
from hmn.artifacts import decode_all
from hmn.condense import Condensation
from tests.command import TINY, planned, session_of

AVERAGED = ("objective.average=0.5", "pruning=none")


def made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, points: int
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Parameters of what is kept, the averages that the run ends with, and the images that its curve judges by name."""
    plan = planned(*TINY, *AVERAGED, f"evaluation.curve_points={points}")
    works: list[Condensation] = []
    judged: dict[str, Tensor] = {}

    def condensation(shop, container) -> Condensation:
        works.append(build.condensation(shop, container))
        return works[-1]

    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(making, "build", _Spied(condensation))
        stage = dataclasses.replace(
            session_of(plan, folder)._making(), judged=lambda images, name: judged.update({name: images.images}) or 0.0
        )
        container = plan.container(plan.storage.over_budget_instances)
        stage.make(container)
    (work,) = works
    kept = [parameter.detach().clone() for parameter in container.parameters()]
    return kept, work.averages, judged | {"kept": decode_all(container)[0]}


class _Spied:
    """``hmn.build`` with another ``condensation``."""

    def __init__(self, condensation) -> None:
        self.condensation = condensation

    def __getattr__(self, name: str):
        return getattr(build, name)


def test_the_average_is_kept_and_judged_and_judging_it_changes_nothing(tmp_path, monkeypatch):
    kept, averages, judged = made(tmp_path / "two", monkeypatch, points=2)
    assert all(map(torch.equal, kept, averages))
    first, last = judged["curve_0"], judged["curve_6"]
    assert torch.equal(last, judged["kept"]) and not torch.equal(first, last)
    again, _, more = made(tmp_path / "four", monkeypatch, points=4)
    assert list(more) == ["curve_0", "curve_2", "curve_4", "curve_6", "kept"]
    assert all(map(torch.equal, kept, again))
