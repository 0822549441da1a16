"""A run as a whole: what the machine lacks, and what an earlier attempt has left."""

from __future__ import annotations

import pytest

from hmn import compute, experiment, results
from hmn.files import write_text
from hmn.sweeps import state
from hmn.sweeps.attempt import FAILURE
from hmn.tracking import LEFT_OPEN, Tracker
from tests.command import TINY, planned, run


@pytest.mark.parametrize(("has", "precision"), [(False, "fp32"), (True, "bf16")])
def test_a_machine_with_slow_bf16_says_so_and_keeps_what_it_computed_in(tmp_path, monkeypatch, capsys, has, precision):
    monkeypatch.setattr(compute, "bf16_pays", lambda device: has)
    own = (f"paths.runs_dir={tmp_path}/runs", f"paths.cache_dir={tmp_path}/cache")
    plan = planned(*TINY, "mode=random_subset", "compute.precision=bf16", *own)
    experiment.run(plan, command="")
    out = capsys.readouterr().out
    found = results.read(plan.folder)
    assert (found["precision"], found["config"]["compute"]["precision"]) == (precision, "bf16")
    line = "compute.precision=bf16: no faster than fp32 on this machine, so fp32 is used"
    assert out.splitlines().count(line) == (not has) and f", {precision}, " in out.splitlines()[0]


@pytest.mark.parametrize(("flops", "count"), [(0.0, 0), (1e20, 1)])
def test_a_long_run_that_cannot_compile_says_why(tmp_path, monkeypatch, capsys, flops, count):
    choose = compute.choose
    monkeypatch.setattr(compute, "lacking_to_compile", lambda on_gpu: "no C++ compiler was found")
    monkeypatch.setattr(compute, "choose", lambda config, _flops, classes: choose(config, flops, classes))
    own = (f"paths.runs_dir={tmp_path}/runs", f"paths.cache_dir={tmp_path}/cache")
    experiment.run(planned(*TINY, "mode=random_subset", "compute.matching=auto", *own), command="")
    line = "compute.matching=auto: not compiled, though the work is long, because no C++ compiler was found"
    assert capsys.readouterr().out.splitlines().count(line) == count


def test_a_failed_run_that_is_repeated_by_hand_has_not_failed_any_more(tmp_path):
    plan = planned(*TINY, "mode=random_subset")
    write_text(tmp_path / plan.folder / FAILURE, '{"error": "killed by SIGKILL", "command": "python run.py"}')
    assert state.read(tmp_path / plan.folder).status == "failed"
    assert run(tmp_path, *TINY, "mode=random_subset").code == 0
    assert not (tmp_path / plan.folder / FAILURE).exists()


def test_a_finished_run_whose_end_w_and_b_has_not_heard_tells_it(tmp_path, monkeypatch):
    """It was killed while W&B uploaded, after its result was written."""
    plan = planned(*TINY, "mode=random_subset", f"paths.runs_dir={tmp_path}/runs", f"paths.cache_dir={tmp_path}/cache")
    result = experiment.run(plan, command="")
    told = []

    class Heard(Tracker):
        def summary(self, values) -> None:
            told.append(values)

    monkeypatch.setattr(experiment.tracking, "start", lambda *_, **__: Heard(None))
    experiment.run(plan, command="")
    assert told == []
    (plan.folder / LEFT_OPEN).touch()
    experiment.run(plan, command="")
    assert told == [results.summary(result)]
