"""A sweep: a set of run ids, what is left to do of it, and the loop that does it.

The run folders alone say what is done. A sweep's own folder holds what was asked for and a lock; it could be lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import shlex
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra.core.override_parser.types import Quote, QuotedString
from tqdm import tqdm

from hmn import results
from hmn.checkpoint import clear, codes_of, exclusive, write_text
from hmn.compute import device_of
from hmn.config import CONF, LauncherConfig, SweepConfig, require, sections
from hmn.config.identity import digest
from hmn.config.overrides import key_of, section_of
from hmn.config.sweeps import LocalConfig
from hmn.errors import STOP_SIGNALS, Busy, ConfigError, Interrupted
from hmn.report import percent
from hmn.sweeps import launchers, state
from hmn.sweeps.attempt import Outcome, Task
from hmn.sweeps.cells import Cell, grid
from hmn.sweeps.planning import Planned, by_run, composed, plan_cells
from hmn.sweeps.table import Table, load_table, table_file, table_names

FILE = "sweep.json"
PLANS = "plan.json"
OWN = ("launcher", "sweep")  # sections of the sweep, not of its runs
SHARED = ("paths", "compute", "tracking")  # of the runs, that the sweep reads too
WHOLE = ("experiment", "debug")  # files of settings, which may be of these sections


@dataclass(frozen=True, kw_only=True)
class Sweep:
    name: str  # readable, with a hash of what was asked for
    cells: tuple[Cell, ...]
    settings: SweepConfig
    launcher: LauncherConfig
    runs_dir: Path
    group: str | None  # of W&B, where another than the sweep's name is wanted
    table: Table | None = None
    command: str = field(default="", compare=False)  # that goes on with it

    @property
    def folder(self) -> Path:
        return self.runs_dir / "sweeps" / self.name

    @property
    def gives_gpus(self) -> bool:
        """Whether every run is given a GPU, or a part of one."""
        if isinstance(self.launcher, LocalConfig) and self.launcher.gpus is None:
            return torch.cuda.device_count() > 0  # without taking any memory on them
        return bool(getattr(self.launcher, "gpus", None))

    def plan(self, kept: Path | None = None) -> list[Planned]:
        return plan_cells(self.cells, self.folder / PLANS, kept)


def of_arguments(arguments: Sequence[str], command: str) -> Sweep:
    """The sweep of ``experiment=TABLE KEY=VALUE ...`` or of ``KEY=V1,V2 ...``, without planning it.

    Raises ``ConfigError`` for settings of the sweep itself that cannot be used.
    """
    own = [argument for argument in arguments if section_of(argument) in OWN]
    asked = [argument for argument in arguments if argument not in own]
    named = next((a.partition("=")[2] for a in asked if a.startswith("experiment=")), None)
    if named is not None:
        _check_experiment(named)
    if named is None or not table_file(named).exists():
        return _sweep("sweep", grid(asked), own, asked, command)
    added = [argument for argument in asked if not argument.startswith("experiment=")]
    table = load_table(table_file(named), added)
    return _sweep(named, table.cells, own, added, command, table)


def _check_experiment(named: str) -> None:
    tables, settings = table_names(), sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    near = difflib.get_close_matches(named, tables + settings, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    rule = f"a table, {', '.join(tables)}, or settings, {', '.join(settings)}{hint}"
    require("experiment", set(named.split(",")) <= {*tables, *settings}, named, rule)


def _sweep(
    head: str,
    cells: tuple[Cell, ...],
    own: Sequence[str],
    asked: Sequence[str],
    command: str,
    table: Table | None = None,
) -> Sweep:
    common = _common(own, asked)
    launcher, device = common["launcher"], common["compute"].device
    if isinstance(launcher, LocalConfig):
        rule = "cuda, of which every run gets its own; CUDA_VISIBLE_DEVICES=1 chooses which there are"
        require("compute.device", not device.startswith("cuda:"), device, rule)
        device_of(common["compute"])  # elsewhere a run asks for itself
        launcher = dataclasses.replace(launcher, gpus=0) if device == "cpu" else launcher
    return Sweep(
        name=f"{head}-{digest({'asked': sorted(asked)})}",
        cells=cells,
        settings=common["sweep"],
        launcher=launcher,
        runs_dir=Path(common["paths"].runs_dir),
        group=common["tracking"].group,
        table=table,
        command=command,
    )


def _common(own: Sequence[str], asked: Sequence[str]) -> dict[str, Any]:
    """The sections that hold for the sweep as a whole: where it keeps its runs, on what it computes, what it logs.

    Of what is asked for, that is what all cells have alike. No other section is looked at: a cell has more settings.
    """
    cells = grid([argument for argument in asked if section_of(argument) in (*SHARED, *WHOLE)])
    alike = [one for one in cells[0].overrides if all(one in cell.overrides for cell in cells)]
    return sections(composed([*own, *alike]), (*OWN, *SHARED))


def launch(sweep: Sweep) -> Counter[str]:
    """Do what is left to do; returns how many runs are done, failed and left.

    Raises ``ConfigError`` before anything runs if a cell cannot be composed, or if finished runs are of other sources;
    ``Busy`` if another process has this sweep; ``Interrupted`` on Ctrl-C, once what ran has saved its state.
    """
    try:
        with _stoppable():
            planned = sweep.plan()  # what cannot be composed leaves no folder
            with exclusive(sweep.folder, what="this sweep"):
                return _launch(sweep, planned)
    except Busy as error:
        raise Busy(f"{error}; what it does: {status_command(sweep)}") from None
    except Interrupted as error:
        raise Interrupted(f"{error}; the same command goes on: {sweep.command}", error.exit_code - 128) from None


def status_command(sweep: Sweep) -> str:
    settings = shlex.split(sweep.command)[2:]
    return shlex.join(["python", "sweep.py", "status", *(one for one in settings if one != "-m")])


def _launch(sweep: Sweep, planned: Sequence[Planned]) -> Counter[str]:
    if _set_aside_others(sweep, planned):
        planned = sweep.plan()  # cells that read them wait now
    for text in varied_not_read(planned):
        print(f"not read, though it varies: {text}")
    tried: set[str] = set()
    while True:
        write_text(sweep.folder / FILE, json.dumps(description(sweep, planned), indent=2) + "\n")
        left = [one for run_id, one in by_run(planned).items() if run_id not in tried and not _done(one)]
        if not left or not _run(sweep, left, counts(planned)):
            return counts(planned)
        tried |= {one.run_id for one in left}
        planned = sweep.plan()  # kept sets that cells wait for may be there now


def _done(one: Planned) -> bool:
    """A result that was cut short is set aside, as if it had not been there."""
    found = state.read(one.folder)
    if found.status == "damaged":
        (one.folder / results.FILE).rename(one.folder / f"{results.FILE}.damaged")
    return found.status == "done"


def _run(sweep: Sweep, left: Sequence[Planned], so_far: Counter[str]) -> bool:
    """Make the runs ``left``; false if the sweep ends with a failure of one."""
    names = {one.run_id: one.cell.name for one in left}
    folders = {one.run_id: one.folder for one in left}
    launched = _closing(launchers.launch([_task(sweep, one) for one in left], sweep.launcher))
    progress = tqdm(desc=sweep.name, unit="run", total=so_far.total(), initial=so_far["done"], disable=None)
    with launched as outcomes, progress as bar:
        for outcome in outcomes:
            outcome = _checked(outcome, folders[outcome.run_id])
            if outcome.status == "done" and sweep.settings.other_code != "keep":
                _check_sources(names[outcome.run_id], folders[outcome.run_id])
            bar.update(outcome.status == "done")
            bar.write(_line(names[outcome.run_id], outcome, folders[outcome.run_id]))
            if outcome.status == "failed" and sweep.settings.on_failure == "stop":
                return False
    return True


@contextlib.contextmanager
def _closing(launched: launchers.Launched) -> Iterator[launchers.Launched]:
    """Within the block it launches; a signal waits until what ran has saved its state."""
    try:
        yield launched
    finally:
        with launchers.uninterrupted():
            launched.close()


def _task(sweep: Sweep, one: Planned) -> Task:
    added = [f"tracking.group={sweep.name}"] if sweep.group is None else []
    if one.cell.labels:
        added.append(labelled(one.cell.labels))
    if sweep.gives_gpus and not {"compute", "compute.device"} & set(map(key_of, one.overrides)):
        added.append("compute.device=cuda")  # or a GPU that broke meanwhile would leave days of steps to the CPU
    return Task(
        run_id=one.run_id,
        folder=str(one.folder),
        arguments=(*one.overrides, *added),
        directory=os.getcwd(),
        max_retries=sweep.settings.max_retries,
    )


def labelled(labels: Mapping[str, str]) -> str:
    """The override that hands the labels of a cell to W&B, as they are."""
    pairs = []
    for name, text in labels.items():
        key = re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", name)  # which Hydra does not take in quotes
        pairs.append(f"{key}:{QuotedString(text, Quote.single).with_quotes()}")
    return f"++tracking.labels={{{','.join(pairs)}}}"


def _checked(outcome: Outcome, folder: Path) -> Outcome:
    if outcome.status == "done" and state.read(folder).status != "done":
        error = f"it ended well but left no result in {folder}: was the program edited meanwhile?"
        return dataclasses.replace(outcome, status="failed", error=error)
    return outcome


def _check_sources(name: str, folder: Path) -> None:
    """Refuse to go on where sources changed while the sweep ran."""
    code = results.read(folder).get("code", results.code_version())  # that finished it
    if code != results.code_version():
        raise ConfigError(
            f"{name}: the sources changed while the sweep ran (now {code}, {results.code_version()} when it began): "
            "sweep.other_code=keep leaves results of both, sweep.other_code=repeat measures all anew"
        )


def _line(name: str, outcome: Outcome, folder: Path) -> str:
    if outcome.status == "failed":
        return f"failed   {name}: {outcome.error}"
    return f"{outcome.status:8} {name}" + (f": {accuracy(results.read(folder))}" if outcome.status == "done" else "")


def accuracy(result: dict[str, Any]) -> str:
    """Of the test split in percent, ± over networks."""
    return f"{percent(result['accuracy'])} %"


def _set_aside_others(sweep: Sweep, planned: Sequence[Planned]) -> bool:
    """Results of other sources than today's: refused, kept or set aside, by ``sweep.other_code``; whether any were.

    What is to be measured anew does not go on from what other sources began, either.
    """
    others, now = {}, results.code_version()
    for run_id, one in by_run(planned).items():
        found = state.read(one.folder)
        if found.result is not None and (code := results.code_of(found.result)) != now:
            others[run_id] = (code, one.folder)
        elif sweep.settings.other_code == "repeat" and set(codes_of(one.folder / "checkpoints")) - {now}:
            with exclusive(one.folder):
                clear(one.folder / "checkpoints")
    if not others or sweep.settings.other_code == "keep":
        return False
    if sweep.settings.other_code == "repeat":
        for code, folder in others.values():
            with exclusive(folder):  # a run that has just written its result clears them, too
                clear(folder / "checkpoints")  # of one that was killed after its result: they would give it again
                (folder / results.FILE).rename(folder / f"result-{code}.json")
        return True
    codes = ", ".join(sorted({code for code, _ in others.values()}))
    raise ConfigError(
        f"{len(others)} finished runs are of other sources ({codes}, now {results.code_version()}): "
        "sweep.other_code=keep leaves them beside the new ones, sweep.other_code=repeat measures them anew"
    )


class _Asked(BaseException):
    """A signal to stop, by its number; an ``Exception`` would be taken for an error of what it happens to interrupt."""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """The first signal to stop ends the block, which closes the launcher, and is ``Interrupted`` after it.

    Further ones change nothing: what runs has been asked to save its state, and is waited for.
    """
    asked = False

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise _Asked(signum)

    previous = {signum: signal.signal(signum, interrupt) for signum in STOP_SIGNALS}
    try:
        yield
    except _Asked as stop:
        (signum,) = stop.args
        raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum) from None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def counts(planned: Sequence[Planned]) -> Counter[str]:
    """Runs by their status; those that read kept sets which are not there yet count as waiting."""
    found = Counter(state.read(one.folder).status for one in by_run(planned).values())
    found["waiting"] += sum(one.run_id is None for one in planned)
    return +found


def varied_not_read(planned: Sequence[Planned]) -> list[str]:
    """The settings in which alone runs differ that do not read them, each with the reason: they are alike."""
    values: dict[tuple[str, frozenset[str]], set[str]] = {}
    for one in planned:
        for text in one.not_read:
            own = {override for override in one.overrides if key_of(override) == text.split(" (")[0]}
            values.setdefault((text, frozenset(one.overrides) - own), set()).update(own)
    return list(dict.fromkeys(text for (text, _), found in values.items() if len(found) > 1))


def description(sweep: Sweep, planned: Sequence[Planned]) -> dict[str, Any]:
    """What the sweep's folder says of it, as plain values; folders relative to where it was started."""
    return {
        "schema_version": 1,
        "name": sweep.name,
        "title": sweep.table.title if sweep.table else sweep.name,
        "command": sweep.command,
        "code": results.code_version(),
        "cells": [
            {
                "name": one.cell.name,
                "labels": one.cell.labels,
                "overrides": list(one.overrides),
                "run_id": one.run_id,
                "folder": None if one.folder is None else str(one.folder),
            }
            for one in planned
        ],
    }
