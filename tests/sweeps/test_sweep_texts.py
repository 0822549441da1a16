"""What sweep.py prints: the plan with its hours, the status, and the results."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hmn import results
from hmn.config.sweeps import LocalConfig
from hmn.errors import ConfigError
from hmn.files import exclusive
from hmn.sweeps import cli, pace, planning
from hmn.sweeps.attempt import FAILURE
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import Planned
from hmn.sweeps.sweep import accuracy_text, status_command
from hmn.tracking import METRICS_FILE
from tests.sweeps.launched import SETTINGS, THREE, described


def test_the_plan_lists_every_cell_and_what_is_left(sweep, here, monkeypatch):
    """Before any run is done, hours follow from a rate that is timed on the spot: here 1e9 operations per second."""
    monkeypatch.setattr(cli, "flops_per_second", lambda device: 1e9)
    ended = here(sweep, command="plan")
    assert (ended.code, ended.err) == (0, "")
    assert ended.lines[0].split() == ["cell", "run", "status", "images/class", "floats", "steps", "TFLOP", "hours"]
    (one, *_) = planning.plan_cells(described(*sweep.settings).cells)
    rows = [line.split() for line in ended.lines[2:5]]
    floats = [f"{one.stored_floats:,}", "of", f"{one.budget_floats:,}"]
    sizes = [f"{one.images_per_class}", *floats, f"{one.steps}"]
    assert [row[:-2] for row in rows] == [
        [f"{number}", f"seed={seed}", sweep.folders[seed].name, "waiting", *sizes]
        for number, seed in enumerate("012", start=1)
    ]
    for row in rows:
        assert number_of(row[-2]) == pytest.approx(one.flops / 1e12, rel=0.01)
        assert number_of(row[-1]) == pytest.approx(one.flops / 1e9 / 3600, rel=0.01)
    assert ended.lines[6] == "3 runs: 3 waiting"
    hours = number_of(ended.lines[7].removeprefix("left: about ").split()[0])
    assert hours == pytest.approx(3 * one.flops / 1e9 / 3600, rel=0.01)
    assert ended.lines[7].endswith(" hours of one slot, at 1.0 GFLOP/s, measured on one convolution")
    assert sweep.ledger() == []


def number_of(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_plan_expects_hours_by_the_runs_that_are_done(sweep, here):
    """Each stub reports that it took 2 seconds."""
    sweep.order({"1": {"fail": [0, "later", 2]}, "2": {"fail": [0, "later", 2]}})
    here(sweep)
    (one, *_) = planning.plan_cells(described(*sweep.settings).cells)
    ended = here(sweep, command="plan")
    rate = f"{one.flops / 2 / 1e9:,.1f} GFLOP/s"
    said = f"left: about <0.01 hours of one slot, at {rate}, measured on finished runs (1)"
    assert ended.lines[-2:] == ["3 runs: 1 done, 2 failed", said]


def run_of(folder: Path, name: str | None = None, **figures: Any) -> Planned:
    """A planned cell whose run is in ``folder``."""
    return Planned(Cell(name or folder.name, {}, ()), (), folder.name, folder, **figures)


RESULT = {"accuracy": {"mean": 0.5, "std": None}, "wall_seconds": {"evaluate": 500.0}}


def test_hours_are_of_runs_that_condense_once_and_make_no_bank(tmp_path):
    """Two of three runs that share a condensation are done: 10 and 2 TFLOP in 4,000 seconds; 2 TFLOP are left."""
    shared = {"flops": 10e12, "making_flops": 8e12, "condensation": "shared"}
    planned = [run_of(tmp_path / name, **shared) for name in "abc"]
    results.write(planned[0].folder, RESULT | {"wall_seconds": {"bank": 9e4, "condense": 3000.0, "evaluate": 500.0}})
    results.write(planned[1].folder, RESULT)
    said = "left: about 0.185 hours of one slot, at 3.0 GFLOP/s, measured on finished runs (2)"
    assert cli.plan_text(described(*SETTINGS, THREE), planned).splitlines()[-1] == said


def test_a_machine_is_as_fast_as_in_the_best_of_a_few_training_steps(monkeypatch):
    """The best takes 2 seconds, after a warm-up of 9 seconds; PyTorch counts the operations."""
    ticks = iter([0.0, 9.0, 10.0, 14.0, 20.0, 22.0, 30.0, 33.0])
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    with FlopCounterMode(display=False) as counter:
        rate = pace.flops_per_second(torch.device("cpu"))
    assert list(ticks) == []
    assert rate == counter.get_total_flops() / 4 / 2


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (None, "cuda")])
def test_what_is_timed_is_a_slot_s_device_with_a_slot_s_threads(monkeypatch, gpus, device):
    sweep, before, timed = described(*SETTINGS, THREE), torch.get_num_threads(), []
    sweep = dataclasses.replace(sweep, launcher=LocalConfig(gpus=gpus, threads=before + 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cli, "flops_per_second", lambda on: timed.append((on.type, torch.get_num_threads())) or 1e9)
    assert cli._rate(sweep, {}, {}) == (1e9, "measured on one convolution")
    assert (timed, torch.get_num_threads()) == ([(device, before + 1)], before)


def test_a_run_that_nobody_goes_on_with_has_no_time_left(tmp_path):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "condense.pt").touch()
    record = {"condense/step": 30, "condense/steps_per_second": 4.0}
    (tmp_path / "a" / METRICS_FILE).write_text(json.dumps(record) + "\n")
    cells = [run_of(tmp_path / "a", name, steps=110) for name in ("one", "other")]
    text = cli.status_text(cells).splitlines()
    assert text[2].split() == ["one", "(+1)", "interrupted", "condense", "30", "of", "110"]
    assert text[-1] == "1 runs: 1 interrupted"
    with exclusive(tmp_path / "a"):
        assert cli.status_text(cells).splitlines()[2].endswith("condense 30 of 110, 0:00:20 left")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tables", "--json"], "--json=given: must be left out except for results"),
        (["tables", "--every", "5"], "--every=5.0: must be left out except for status"),
        (["status", "--every", "0"], "--every=0.0: must be above 0 and at most 86400 seconds"),
        (["status", "--every", "nan"], "--every=nan: must be above 0 and at most 86400 seconds"),
    ],
)
def test_an_option_of_another_command_is_refused(arguments, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        cli.run(arguments)


def test_status_is_shown_again_until_every_run_is_done_or_has_failed(tmp_path, monkeypatch, capsys):
    failed, other = (run_of(tmp_path / name) for name in ("failed", "other"))
    failed.folder.mkdir()
    (failed.folder / FAILURE).write_text(json.dumps({"error": "a line", "command": "python run.py"}))
    slept = []

    def sleep(seconds: float) -> None:
        assert not slept
        slept.append(seconds)
        results.write(other.folder, RESULT)

    monkeypatch.setattr(cli.time, "sleep", sleep)
    assert cli._status(SimpleNamespace(plan=lambda: [failed, other]), 5.0) == 0
    assert slept == [5.0]
    assert capsys.readouterr().out.count("\x1b[H\x1b[J") == 2


def test_what_reads_the_set_of_a_failed_run_is_not_waited_for(tmp_path):
    failed, other = (run_of(tmp_path / name) for name in ("failed", "other"))
    failed.folder.mkdir()
    (failed.folder / FAILURE).write_text(json.dumps({"error": "a line", "command": "python run.py"}))

    def reader(of: Planned) -> Planned:
        return Planned(Cell("reader", {}, (), reads=(of.cell.name,)), (), None, None)

    assert not cli._may_change([failed, reader(failed)])
    assert cli._may_change([failed, other, reader(other)])
    results.write(other.folder, RESULT)
    assert cli._may_change([other, reader(other)])  # its run is known now and made next


def test_an_accuracy_is_percent_with_its_deviation_over_networks():
    assert accuracy_text({"accuracy": {"mean": 0.59602, "std": 0.00214}}) == "59.60 ± 0.21 %"
    assert accuracy_text({"accuracy": {"mean": 0.59602, "std": None}}) == "59.60 %"


@pytest.mark.parametrize("program", ["sweep.py", "run.py -m"])
def test_what_a_sweep_does_is_asked_of_sweep_py_however_it_was_started(program):
    sweep = dataclasses.replace(described(*SETTINGS, THREE), command=f"python {program} 'dataset.root=a b' seed=0,1")
    assert status_command(sweep) == "python sweep.py status 'dataset.root=a b' seed=0,1"


def test_status_shows_steps_and_what_is_left_of_runs_that_run(sweep, here):
    """A stub reports 2 steps per second; the plan counts the steps of the run that it stands for."""
    sweep.order({"0": {"hang": 2}, "1": {"hang": 1}, "2": {"hang": 1}})
    launcher = sweep.start()
    launcher.wait_for(sweep.hanging("0", "1"))
    ended = here(sweep, command="status")
    (one, *_) = planning.plan_cells(described(*sweep.settings).cells)
    seconds = (one.steps - 2) // 2
    left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    assert ended.lines[0].split() == ["cell", "status"]
    assert ended.lines[2].split() == ["seed=0", "running", "condense", "2", "of", f"{one.steps},", left, "left"]
    assert [line.split()[:2] for line in ended.lines[3:5]] == [["seed=1", "running"], ["seed=2", "waiting"]]
    assert ended.lines[-1] == "3 runs: 1 waiting, 2 running"
    os.kill(launcher.process.pid, signal.SIGTERM)
    launcher.finish()
    assert here(sweep, command="status").lines[-1] == "3 runs: 1 waiting, 2 interrupted"


def test_results_are_those_of_finished_cells(sweep, here):
    ended = here(sweep, command="results")
    assert (ended.code, len(ended.lines)) == (1, 2)
    sweep.order({"1": {"fail": [0, "later", 2]}})
    here(sweep)
    ended = here(sweep, command="results")
    assert ended.code == 0
    assert [line.split() for line in ended.lines[2:]] == [
        [f"seed={seed}", "1", "640", f"{100 * sweep.table()[seed][0]:.2f}", "%", sweep.folders[seed].name]
        for seed in "02"
    ]
    listed = json.loads(here(sweep, "--json", command="results").out)
    assert [(one["cell"], one["labels"], one["run_id"]) for one in listed] == [
        (f"seed={seed}", {"seed": seed}, sweep.folders[seed].name) for seed in "02"
    ]
