"""Condensing as a stage of a run: what a point of the curve evaluates, and what is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hmn import build, condense, making
from hmn.condense import Condensation, Report
from hmn.containers import fit
from hmn.containers.base import decode_all
from hmn.errors import ArtifactError
from hmn.tracking import METRICS_FILE, read_metrics
from tests.command import TINY, planned, session_of

ORIGIN = {"data": "d", "device": "cpu", "code": "c1"}
AVERAGED = ("objective.average=0.5", "pruning=none")


def made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, points: int
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """The kept parameters, the averages at the end, and by name the images of each curve point and those kept."""
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
    """``hmn.build`` with ``condensation`` replaced."""

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


def test_a_report_is_recorded_under_the_names_of_its_numbers():
    rates = {"steps_per_second": 4.0, "images_per_second": 5.0, "peak_bytes": 6}
    norms, more = {"decoder": 3.0}, {"x": 9.0}
    told = Report(step=7, losses=[1.0, 2.0], gradient_norms=norms, learning_rate=8.0, measured=more, **rates)
    expected = {"loss": 3.0, "loss_layer1": 1.0, "loss_layer2": 2.0, "gradient_norm/decoder": 3.0, **rates}
    expected |= {"memory_lr": 8.0, "x": 9.0}
    assert making._metrics(told) == {f"condense/{name}": value for name, value in expected.items()}


def test_steps_are_recorded_as_often_as_asked_for(tmp_path):
    plan = planned(*TINY, "pruning=none", "tracking.log_every_steps=4")
    session_of(plan, tmp_path)._making().make(plan.container(plan.storage.over_budget_instances))
    recorded = [row["condense/step"] for row in read_metrics(tmp_path / METRICS_FILE) if "condense/loss" in row]
    assert recorded == [4, 6]


@pytest.mark.parametrize("slot", [fit.SLOT, condense.SLOT, making.TAKEN])
def test_a_stage_that_other_sources_began_otherwise_is_refused(tmp_path, slot: str):
    plan = planned(*TINY, "pruning=none", "container.init=fit_real", "container.fit_steps=2")
    session = session_of(plan, tmp_path)
    session.checkpoints.origin, session.checkpoints.codes = ORIGIN, ["c1"]
    session.checkpoints.save(slot, {"step": 1, "of": "other sources"})
    other = session_of(plan, tmp_path)
    other.checkpoints.origin, other.checkpoints.codes = ORIGIN, ["c1", "c2"]
    with pytest.raises(ArtifactError, match=r"of another code version \(c1\), which this one cannot continue"):
        other._making().make(plan.container(plan.storage.over_budget_instances))
