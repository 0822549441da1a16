"""What has become of a run, by what lies in its folder: no clock and no process list is asked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmn import results
from hmn.checkpoint import held
from hmn.errors import Damaged
from hmn.sweeps.attempt import FAILURE, LOG
from hmn.tracking import METRICS_FILE

TAIL_BYTES = 1 << 16
BAR = re.compile(r"[\r\n]([^\r\n:]+): +\d+%\|[^|]*\| (\d+)/(\d+) \[[\d:]+<([\d:?]+),")  # as tqdm writes it
STAGES = ("fit", "condense", "curve", "prune", "redundancy", "evaluate")


@dataclass(frozen=True)
class State:
    status: str  # done, running, failed, interrupted, damaged (a result that cannot be read), waiting
    result: dict[str, Any] | None = None
    error: str | None = None  # one line
    command: str | None = None  # what repeats a failed run
    stage: str | None = None  # of one that runs, or was interrupted
    step: int | None = None
    steps_per_second: float | None = None
    bar: str | None = None  # of one that runs: what its last progress bar shows, a stage without records maybe

    def seconds_left(self, of_steps: int | None) -> float | None:
        """Of condensing, at the rate of its last steps."""
        if self.stage != "condense" or not of_steps or not self.steps_per_second:
            return None
        return (of_steps - self.step) / self.steps_per_second


def read(folder: Path | None) -> State:
    """The state of the run of ``folder``; one whose folder is not known yet waits.

    Raises ``ArtifactError`` for a result of another schema version, which nobody should lose.
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
    except (FileNotFoundError, ValueError):  # cut short by a full disk: the run is tried again anyway
        return None


def _bar(log: Path) -> str | None:
    """What is done, how much of it and how long it will take, by the last progress bar at the end of ``log``."""
    if not log.exists():
        return None
    found = BAR.findall(_end(log))
    return None if not found else "{} {} of {}, {} left".format(*found[-1])


def _end(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _progress(metrics: Path) -> dict[str, Any]:
    """Stage, step and rate by the last records, from the end of the file alone."""
    if not metrics.exists():
        return {}
    for line in reversed(_end(metrics).split("\n")[:-1]):  # the last may be half written
        try:
            record = json.loads(line)
        except ValueError:  # the first may have been cut
            return {}
        for stage in STAGES:
            for counter in ("step", "network", "candidate"):
                if (step := record.get(f"{stage}/{counter}")) is not None:
                    rate = record.get("condense/steps_per_second") if stage == "condense" else None
                    return {"stage": stage, "step": step, "steps_per_second": rate}
    return {}
