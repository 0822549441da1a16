"""The state of a run, read from its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hmn import results
from hmn.errors import ArtifactError
from hmn.files import LOCK, exclusive
from hmn.sweeps import cli, state
from hmn.sweeps.attempt import FAILURE, LOG
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import Planned
from hmn.tracking import METRICS_FILE

RESULT = {"accuracy": {"mean": 0.5, "std": None}}
FAILED = {"error": "a line", "command": "python run.py seed=1"}


def records(folder: Path, *metrics: dict) -> None:
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in metrics))


def checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "condense.pt").touch()


def failure(folder: Path) -> None:
    (folder / FAILURE).write_text(json.dumps(FAILED))


def test_a_run_without_a_folder_waits(tmp_path):
    assert state.read(None) == state.read(tmp_path / "none") == state.State("waiting")


def test_a_run_that_left_nothing_but_its_lock_waits(tmp_path):
    """Such a run was stopped before its first checkpoint."""
    with exclusive(tmp_path):
        pass
    records(tmp_path)
    assert state.read(tmp_path) == state.State("waiting")


def test_a_result_is_all_that_counts(tmp_path):
    """A killed launcher may have left files of an earlier attempt beside the result; they do not matter."""
    failure(tmp_path)
    checkpoint(tmp_path)
    result = results.write(tmp_path, RESULT)
    with exclusive(tmp_path):
        assert state.read(tmp_path) == state.State("done", result)


def test_a_result_of_another_schema_version_is_neither_lost_nor_read(tmp_path):
    (tmp_path / "result.json").write_text('{"schema_version": 2}')
    with pytest.raises(ArtifactError, match="schema version 2"):
        state.read(tmp_path)
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1, "accuracy"', "\0" * 64, "[]"])
def test_a_result_that_cannot_be_read_is_damaged(tmp_path, text):
    (tmp_path / results.FILE).write_text(text)
    found = state.read(tmp_path)
    assert (found.status, found.result) == ("damaged", None)
    assert found.error.startswith(f"{tmp_path / results.FILE}: ")


def test_a_run_that_is_held_runs_whatever_the_last_one_left(tmp_path):
    failure(tmp_path)
    checkpoint(tmp_path)
    records(tmp_path, {"condense/step": 30, "condense/steps_per_second": 4.0, "condense/loss": 1.5})
    with exclusive(tmp_path):
        found = state.read(tmp_path)
    assert (found.status, found.stage, found.step) == ("running", "condense", 30)
    assert found.seconds_left(110) == 20.0
    assert found.seconds_left(None) is None
    assert state.read(tmp_path).status == "failed"


def test_looking_at_a_run_does_not_make_it_busy(tmp_path):
    """Reading the state must not lock the folder that a run is about to lock."""
    (tmp_path / LOCK).touch()
    before = len(os.listdir("/proc/self/fd"))
    state.read(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    with exclusive(tmp_path):
        assert state.read(tmp_path).status == "running"


def test_a_failed_run_says_why_and_how_to_repeat_it(tmp_path):
    failure(tmp_path)
    checkpoint(tmp_path)
    found = state.read(tmp_path)
    assert (found.status, found.error, found.command) == ("failed", FAILED["error"], FAILED["command"])


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_a_failure_that_was_cut_short_is_none(tmp_path, kept):
    (tmp_path / FAILURE).write_text(json.dumps(FAILED)[:kept])
    assert state.read(tmp_path).status == "waiting"
    checkpoint(tmp_path)
    assert state.read(tmp_path).status == "interrupted"


STAGES = {
    "fit": ({"fit/step": 7}, 7),
    "condense": ({"condense/step": 3, "condense/loss": 1.0}, 3),
    "curve": ({"curve/step": 20, "curve/held_out_accuracy": 0.5}, 20),
    "prune": ({"prune/candidate": 2, "prune/beta": 0.5}, 2),
    "redundancy": ({"redundancy/step": 1, "redundancy/accuracy": 0.5}, 1),
    "evaluate": ({"evaluate/network": 4, "evaluate/accuracy": 0.5}, 4),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_record_of_a_stage_tells_where_it_is(tmp_path, stage):
    checkpoint(tmp_path)
    record, step = STAGES[stage]
    records(tmp_path, {"condense/step": 1}, record, {"something/else": 1})
    found = state.read(tmp_path)
    assert (found.status, found.stage, found.step, found.steps_per_second) == ("interrupted", stage, step, None)
    assert found.seconds_left(100) is None


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    checkpoint(tmp_path)
    records(tmp_path, {"condense/step": 1})
    with (tmp_path / METRICS_FILE).open("a") as metrics:
        metrics.write('{"condense/step": 2')
    assert state.read(tmp_path).step == 1


def test_of_long_metrics_only_the_end_is_read(tmp_path):
    """The file is sparse: a terabyte in length, it takes no room on the disk."""
    checkpoint(tmp_path)
    with (tmp_path / METRICS_FILE).open("ab") as metrics:
        metrics.truncate(1 << 40)
    with (tmp_path / METRICS_FILE).open("ab") as metrics:
        metrics.write(b'\n{"condense/step": 998}\n{"condense/step": 999}\n')
    assert state.read(tmp_path).step == 999


def test_an_end_that_cuts_its_only_line_tells_nothing(tmp_path, monkeypatch):
    checkpoint(tmp_path)
    records(tmp_path, {"prune/aum": "x" * 200})
    monkeypatch.setattr(state, "TAIL_BYTES", 100)
    assert state.read(tmp_path) == state.State("interrupted")


BANK = "snapshot bank:  30%|███       | 3/10 [10:46<24:40, 211.49s/network]"


@pytest.mark.parametrize(
    ("log", "bar"),
    [
        (f"fit real images\n\r  \r{BANK}", "snapshot bank 3 of 10, 24:40 left"),
        (f"\r{BANK}\nfit real images:   0%|          | 0/4000 [00:00<?, ?step/s]", "fit real images 0 of 4000, ? left"),
        (
            f"\rcondense:   2%|▏         | 9/600 [00:07<05:12,  1.89step/s, loss=3]\r{BANK[:40]}",
            "condense 9 of 600, 05:12 left",
        ),
        ("W&B: http://server/run-1\n", None),
    ],
)
def test_what_runs_shows_its_last_bar(tmp_path, log, bar):
    (tmp_path / LOG).write_text(log)
    assert state.read(tmp_path).bar is None  # no process works on it
    with exclusive(tmp_path):
        assert state.read(tmp_path) == state.State("running", bar=bar)


def test_status_shows_the_bar_of_a_stage_that_records_nothing(tmp_path):
    one = Planned(Cell("a", {}, ()), (), "a", tmp_path)
    shown = [
        cli._detail(state.State("running", bar=bar, stage="condense", step=3), one)
        for bar in ("b 1 of 2", "condense 4")
    ]
    assert shown == ["b 1 of 2", "condense 3"]
