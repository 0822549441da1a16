"""The state of a run, read from the files in its folder alone, without a clock or a process list."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmn import results
from hmn.errors import Damaged
from hmn.files import held
from hmn.sweeps.attempt import FAILURE, LOG
from hmn.tracking import METRICS_FILE

TAIL_BYTES = 1 << 16
BAR = re.compile(r"[\r\n]([^\r\n:]+): +\d+%\|[^|]*\| (\d+)/(\d+) \[[\d:]+<([\d:?]+),")  # as tqdm writes it
STAGES = ("fit", "condense", "curve", "prune", "redundancy", "evaluate")


@dataclass(frozen=True)
class State:
    status: str  # done, running, failed, interrupted, damaged (its result cannot be read), waiting
    result: dict[str, Any] | None = None
    error: str | None = None  # one line
    command: str | None = None  # repeats a failed run
    stage: str | None = None  # of a running or interrupted run
    step: int | None = None
    steps_per_second: float | None = None
    bar: str | None = None  # of a running run: its last progress bar, which may be of a stage without records

    def seconds_left(self, of_steps: int | None) -> float | None:
        """The time that condensing still takes, at the rate of its last steps."""
        if self.stage != "condense" or not of_steps or not self.steps_per_second:
            return None
        return (of_steps - self.step) / self.steps_per_second


def read(folder: Path | None) -> State:
    """The state of the run in ``folder``; a run whose folder is not known yet is waiting.

    Raises ``ArtifactError`` for a result of another schema version, so that it is not overwritten.
    """
    if folder is None or not folder.exists():
        return State("waiting")
    try:
        result = results.read(folder)
    except Damaged as error:
        return State("damaged", error=str(error))
    if result is not None:
        return State("done", result)
    if held(folder):
        return State("running", **_progress(folder / METRICS_FILE), bar=_bar(folder / LOG))
    if (failure := _failure(folder / FAILURE)) is not None:
        return State("failed", error=failure["error"], command=failure["command"])
    if any((folder / "checkpoints").glob("*.pt")):
        return State("interrupted", **_progress(folder / METRICS_FILE))
    return State("waiting")


def _failure(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # truncated by a full disk: the run is tried again anyway
        return None


def _bar(log: Path) -> str | None:
    """Task, progress and remaining time, from the last progress bar at the end of ``log``."""
    if not log.exists():
        return None
    found = BAR.findall(_end(log))
    return None if not found else "{} {} of {}, {} left".format(*found[-1])


def _end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _progress(metrics: Path) -> dict[str, Any]:
    """Stage, step and rate from the last records; only the end of the file is read."""
    if not metrics.exists():
        return {}
    for line in reversed(_end(metrics).split("\n")[:-1]):  # the last line may be incomplete
        try:
            record = json.loads(line)
        except ValueError:  # the first line may have been cut off
            return {}
        for stage in STAGES:
            for counter in ("step", "network", "candidate"):
                if (step := record.get(f"{stage}/{counter}")) is not None:
                    rate = record.get("condense/steps_per_second") if stage == "condense" else None
                    return {"stage": stage, "step": step, "steps_per_second": rate}
    return {}
