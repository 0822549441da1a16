"""A run that is killed, stopped or started twice ends like an uninterrupted one, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command import TINY, Command, Outcome, run, start

# Every stage that has a state: fitting, condensing with its curve, scoring, the search, evaluation. Saved at each step.
STAGES = (
    *("container.init=fit_real", "container.fit_steps=8", "evaluation.curve_points=3", "evaluation.curve_epochs=2"),
    *("tracking.log_every_steps=4", "pruning.score_epochs=6", "evaluation.networks=3", "evaluation.epochs=8"),
    *("compute.checkpoint_every_seconds=0", "objective.real_batch=16"),
)
NOT_REPEATABLE = (
    *("condense/steps_per_second", "condense/images_per_second", "condense/peak_bytes"),
    "curve/condense_seconds",
)


def toy(path: Path) -> str:
    """Save three classes of grey noise and return the override that names them."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("test", 10)):
        arrays[f"x_{split}"] = generator.integers(0, 256, (3 * count, 8, 8), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(3).repeat(count)
    np.savez(path, **arrays)
    return f"dataset.root={path}"


@dataclass
class Ended:
    """What a finished run left, without the parts that differ between any two runs."""

    tensors: bytes
    card: dict[str, Any]
    records: list[dict[str, Any]]
    result: dict[str, Any]
    files: set[str]


def ended(folder: Path) -> Ended:
    card, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("card", "result"))
    card.pop("provenance")
    wall_seconds = result.pop("wall_seconds")
    assert set(wall_seconds) == {"fit", "condense", "score", "search_beta", "evaluate"}
    assert result["fit_seconds"] == wall_seconds["fit"]
    for name in ("condense_seconds", "condense_peak_bytes", "fit_seconds", "peak_bytes", "commit", "dirty"):
        result.pop(name)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name in NOT_REPEATABLE:
            record.pop(name, None)
    tensors = (folder / "condensed.safetensors").read_bytes()
    # A kill during a write leaves a hidden file, named like its target.
    return Ended(tensors, card, records, result, {path.name for path in folder.iterdir() if path.name[0] != "."})


@dataclass
class Task:
    """One command in a folder of its own, started as often as needed."""

    where: Path
    arguments: tuple[str, ...]

    @property
    def folder(self) -> Path:
        (folder,) = (self.where / "runs").iterdir()
        return folder

    def start(self) -> Command:
        return start(self.where, *self.arguments)

    def start_until(self, seen: Callable[[], bool]) -> Command:
        command = self.start()
        command.wait_for(seen)
        return command

    def state(self, slot: str) -> bool:
        return any(self.where.glob(f"runs/*/checkpoints/{slot}.pt"))

    def finish(self) -> Outcome:
        outcome = run(self.where, *self.arguments)
        assert outcome.code == 0, outcome.err
        return outcome


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return toy(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture
def task(tmp_path, data) -> Task:
    return Task(tmp_path, (*TINY, "dataset=arrays", "dataset.channels=1", data, "memory=ipc10", *STAGES))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data) -> Ended:
    where = tmp_path_factory.mktemp("uninterrupted")
    task = Task(where, (*TINY, "dataset=arrays", "dataset.channels=1", data, "memory=ipc10", *STAGES))
    task.finish()
    return ended(task.folder)


def test_a_run_that_was_killed_in_every_stage_ends_as_if_it_had_not_been(task, uninterrupted):
    for slot in ("fit", "curve_0", "condense", "score", "search_beta_*", "evaluate"):
        command = task.start_until(lambda slot=slot: task.state(slot))
        command.process.kill()
        assert command.finish().code == 128 + signal.SIGKILL
        assert task.state(slot)
        assert not (task.folder / "result.json").exists()
    outcome = task.finish()
    assert "continuing at step 6 of 6" in outcome.out
    assert ended(task.folder) == uninterrupted


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(task, uninterrupted):
    """Each kill comes after another random number of saved states."""
    generator = random.Random(0)

    def saved() -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_ino) for path in task.where.glob("runs/*/checkpoints/*.pt")}

    kills = 0
    while kills < 5:
        before, new, wanted = saved(), set(), generator.randint(2, 12)

        def enough(before: set = before, new: set = new, wanted: int = wanted) -> bool:
            with contextlib.suppress(FileNotFoundError):  # a listed file may be gone again
                new |= saved() - before
            return len(new) >= wanted

        command = task.start_until(enough)
        command.process.kill()
        if command.finish().code == 0:
            break
        kills += 1
    assert kills >= 2
    task.finish()
    assert ended(task.folder) == uninterrupted


def test_a_run_that_was_asked_to_stop_says_so_and_goes_on_with_the_same_command(task, uninterrupted):
    stops = ((signal.SIGTERM, "fit"), (signal.SIGUSR1, "condense"), (signal.SIGINT, "score"))
    for signum, slot in stops:
        command = task.start_until(lambda slot=slot: task.state(slot))
        os.kill(command.process.pid, signum)
        outcome = command.finish()
        assert outcome.code == 128 + signum
        assert outcome.err.splitlines()[-1] == f"stopped by {signum.name}; the same command resumes from here"
        assert "Traceback" not in outcome.err
        assert task.state(slot)
    task.finish()
    assert ended(task.folder) == uninterrupted
    assert not (task.folder / "checkpoints").exists()


def test_a_second_process_is_refused_and_harms_nothing(task, uninterrupted):
    command = task.start_until(lambda: task.state("condense"))
    os.kill(command.process.pid, signal.SIGSTOP)  # otherwise it might finish before the second one asks
    second = run(task.where, *task.arguments)
    os.kill(command.process.pid, signal.SIGCONT)
    assert second.code == 75
    reason = "another process is working on this run; wait for it or stop it"
    assert second.complaint == f"{task.folder.relative_to(task.where)}: {reason}"
    assert command.finish().code == 0
    assert ended(task.folder) == uninterrupted


def test_a_checkpoint_of_other_images_is_not_continued(task, tmp_path):
    own = toy(tmp_path / "own.npz")
    task.arguments = (*task.arguments, own)
    command = task.start_until(lambda: task.state("condense"))
    command.process.kill()
    command.finish()
    arrays = dict(np.load(tmp_path / "own.npz"))
    arrays["x_train"][0] ^= 1
    np.savez(tmp_path / "own.npz", **arrays)
    again = run(task.where, *task.arguments)
    assert (again.code, "its checkpoint was made from other images" in again.complaint) == (2, True)
    assert task.state("condense")
