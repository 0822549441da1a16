"""Whole runs of every objective that matches class by class: condense, evaluate, save."""

from __future__ import annotations

import json

import pytest

from hmn import experiment
from hmn.build import matching
from tests.command import TINY, planned, run

BASE = (*TINY[1:], "container=image", "pruning=none", "evaluation.networks=1", "evaluation.epochs=1")
SYNTHETIC = ("debug=smoke_synthetic", "objective.real_batch=16")
DISTRIBUTION = ("debug=smoke_distribution", "objective.real_batch=16")
RUNS = {
    "idc": ("debug=smoke", "objective=idc"),
    "dream": ("debug=smoke", "objective=dream", "objective.real_batch=16", "objective.k_means_interval=2"),
    "dc": (*SYNTHETIC, "objective=dc", "container.pixel_space=normalised", "container.init=noise"),
    "dsa": (*SYNTHETIC, "objective=dsa", "container=hmn", "network.width=2"),
    "distribution_matching": (*DISTRIBUTION, "objective=distribution_matching", "compute.memory_limit=4"),
    "idm": (
        *DISTRIBUTION,
        "objective=idm",
        "container=multiformation",
        "objective.pool_interval=2",
        "objective.pool_steps=2",
    ),
}
STEPS = {"idc": 6, "dream": 6, "dc": 4, "dsa": 4, "distribution_matching": 4, "idm": 4}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_condenses_evaluates_and_keeps(tmp_path, name):
    outcome = run(tmp_path, *BASE, *RUNS[name])
    assert outcome.code == 0, outcome.err
    (result,) = tmp_path.glob("runs/*/result.json")
    found = json.loads(result.read_text())
    assert found["condense_steps"] == STEPS[name]
    assert 0 <= found["accuracy"]["mean"] <= 1
    losses = [json.loads(line) for line in (result.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [row["condense/loss"] for row in losses if "condense/loss" in row]
    assert len(losses) == STEPS[name] and all(loss > 0 for loss in losses)


UNBIASED = (*BASE, "debug=smoke", "container.init=real", "memory=ipc10", "objective.unbiased=true")


@pytest.mark.parametrize(("shown", "share"), [(4, 0.4), (10, 1.0), (64, 1.0)])
@pytest.mark.parametrize("bank", [0, 1])
def test_what_a_step_shows_of_a_class_is_the_share_whose_bias_is_removed(tmp_path, shown, share, bank, monkeypatch):
    given = []
    for name in ("matching_step", "stored_step"):
        make = getattr(matching, name)
        spy = lambda *to, make=make, **kw: (given.append(kw["share"]), make(*to, **kw))[1]  # noqa: E731
        monkeypatch.setattr(matching, name, spy)
    settings = (*UNBIASED, f"objective.synthetic_batch={shown}", f"objective.bank.networks={bank}")
    plan = planned(*settings, f"paths.runs_dir={tmp_path}", f"paths.cache_dir={tmp_path}/cache")
    experiment.run(plan, command="")
    assert given == [share]
