"""A sweep: a set of run ids, those that are left to do, and the loop that does them.

The run folders alone record what is done. The sweep's own folder holds its description, a cached plan and a lock, and
can be lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
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
from hmn.checkpoint import clear, codes_of
from hmn.compute import device_of
from hmn.config import CONF, ComputeConfig, LauncherConfig, SweepConfig, require, sections
from hmn.config.identity import digest
from hmn.config.overrides import key_of, section_of
from hmn.config.sweeps import LocalConfig
from hmn.errors import Busy, ConfigError, Interrupted
from hmn.files import exclusive, write_json
from hmn.report import percent
from hmn.stop import handled_by
from hmn.sweeps import launchers, state
from hmn.sweeps.attempt import Outcome, Task
from hmn.sweeps.cells import Cell, grid
from hmn.sweeps.planning import Planned, by_run, composed, plan_cells
from hmn.sweeps.table import Table, load_table, table_file, table_names

FILE = "sweep.json"
PLANS = "plan.json"
OWN = ("launcher", "sweep")  # sections of the sweep, not of its runs
SHARED = ("paths", "compute", "tracking")  # sections of the runs that the sweep reads, too
WHOLE = ("experiment", "debug")  # files of settings, which may set these sections


@dataclass(frozen=True, kw_only=True)
class Sweep:
    name: str  # readable, with a hash of the settings
    cells: tuple[Cell, ...]
    settings: SweepConfig
    launcher: LauncherConfig
    compute: ComputeConfig
    runs_dir: Path
    group: str | None  # W&B group, if it is not to be the sweep's name
    table: Table | None = None
    command: str = field(default="", compare=False)  # continues the sweep

    @property
    def folder(self) -> Path:
        return self.runs_dir / "sweeps" / self.name

    @property
    def gives_gpus(self) -> bool:
        """Whether every run is given a GPU, or a share of one."""
        if isinstance(self.launcher, LocalConfig) and self.launcher.gpus is None:
            return torch.cuda.device_count() > 0  # allocates no memory on them
        return bool(getattr(self.launcher, "gpus", None))

    def plan(self, kept: Path | None = None) -> list[Planned]:
        return plan_cells(self.cells, self.folder / PLANS, kept)

    def check_device(self) -> None:
        """Raise ``ConfigError`` if runs are to be made on this machine and it lacks their device."""
        if isinstance(self.launcher, LocalConfig):  # other launchers leave this to the run
            device_of(self.compute)


def of_arguments(arguments: Sequence[str], command: str) -> Sweep:
    """The sweep of ``experiment=TABLE KEY=VALUE ...`` or ``KEY=V1,V2 ...``, without planning it.

    Raises ``ConfigError`` for invalid settings of the sweep itself.
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
    rule = f"a table: {', '.join(tables)}; or settings: {', '.join(settings)}{hint}"
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
        rule = "cuda, as every run gets a GPU of its own; CUDA_VISIBLE_DEVICES=1 chooses among them"
        require("compute.device", not device.startswith("cuda:"), device, rule)
        launcher = dataclasses.replace(launcher, gpus=0) if device == "cpu" else launcher
    return Sweep(
        name=f"{head}-{digest({'asked': sorted(asked)})}",
        cells=cells,
        settings=common["sweep"],
        launcher=launcher,
        compute=common["compute"],
        runs_dir=Path(common["paths"].runs_dir),
        group=common["tracking"].group,
        table=table,
        command=command,
    )


def _common(own: Sequence[str], asked: Sequence[str]) -> dict[str, Any]:
    """The sections that apply to the sweep as a whole: where it keeps its runs, on which device, and how it logs.

    They are composed from the settings that all cells share. No other section is checked, as cells add settings to it.
    """
    cells = grid([argument for argument in asked if section_of(argument) in (*SHARED, *WHOLE)])
    alike = [one for one in cells[0].overrides if all(one in cell.overrides for cell in cells)]
    return sections(composed([*own, *alike]), (*OWN, *SHARED))


def launch(sweep: Sweep, *, announce: bool = False) -> Counter[str]:
    """Make the runs that are left; returns the number of runs by status.

    With ``announce``, a line says how many they are and which command shows their progress.

    Raises ``ConfigError`` before anything runs if a cell cannot be composed, if this machine lacks the device, or if
    finished runs are from other code versions; ``Busy`` if another process works on this sweep; and ``Interrupted`` on
    a stop signal such as Ctrl-C, once all runs have saved their state.
    """
    try:
        with _stoppable():
            sweep.check_device()
            planned = sweep.plan()  # a sweep that cannot be composed leaves no folder
            with exclusive(sweep.folder, what="this sweep"):
                return _launch(sweep, planned, announce)
    except Busy as error:
        raise Busy(f"{error}; its progress: {status_command(sweep)}") from None
    except Interrupted as error:
        raise Interrupted(f"{error}; the same command resumes: {sweep.command}", error.exit_code - 128) from None


def status_command(sweep: Sweep) -> str:
    settings = shlex.split(sweep.command)[2:]
    return shlex.join(["python", "sweep.py", "status", *(one for one in settings if one != "-m")])


def _launch(sweep: Sweep, planned: Sequence[Planned], announce: bool) -> Counter[str]:
    if _set_aside_others(sweep, planned):
        planned = sweep.plan()  # cells that read their sets wait now
    for text in varied_not_read(planned):
        print(f"varies but is not read: {text}")
    so_far = counts(planned)
    if announce and (count := so_far.total() - so_far["done"]):
        print(f"runs left: {count} of {so_far.total()}; their progress: {status_command(sweep)}", flush=True)
    tried: set[str] = set()
    while True:
        write_json(sweep.folder / FILE, description(sweep, planned))
        left = [one for run_id, one in by_run(planned).items() if run_id not in tried and not _done(one)]
        if not left or not _run(sweep, left, counts(planned)):
            return counts(planned)
        tried |= {one.run_id for one in left}
        planned = sweep.plan()  # kept sets that cells wait for may exist now


def _done(one: Planned) -> bool:
    """Whether the run is done. A damaged result is renamed, so that the run is made again."""
    found = state.read(one.folder)
    if found.status == "damaged":
        (one.folder / results.FILE).rename(one.folder / f"{results.FILE}.damaged")
    return found.status == "done"


def _run(sweep: Sweep, left: Sequence[Planned], so_far: Counter[str]) -> bool:
    """Make the runs ``left``; returns false if one failed and ``sweep.on_failure=stop``."""
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
    """Close ``launched`` after the block; stop signals are delayed until running runs have saved their state."""
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
        added.append("compute.device=cuda")  # otherwise, if the GPU broke, the run would compute for days on the CPU
    return Task(
        run_id=one.run_id,
        folder=str(one.folder),
        arguments=(*one.overrides, *added),
        directory=os.getcwd(),
        max_retries=sweep.settings.max_retries,
    )


def labelled(labels: Mapping[str, str]) -> str:
    """The override that passes the labels of a cell to W&B, unchanged."""
    pairs = []
    for name, text in labels.items():
        key = re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", name)  # escaped, as Hydra accepts no quotes here
        pairs.append(f"{key}:{QuotedString(text, Quote.single).with_quotes()}")
    return f"++tracking.labels={{{','.join(pairs)}}}"


def _checked(outcome: Outcome, folder: Path) -> Outcome:
    if outcome.status == "done" and state.read(folder).status != "done":
        error = f"it ended without an error but left no result in {folder}: was the code edited meanwhile?"
        return dataclasses.replace(outcome, status="failed", error=error)
    return outcome


def _check_sources(name: str, folder: Path) -> None:
    """Refuse to continue if the sources changed while the sweep ran."""
    code = results.read(folder).get("code", results.code_version())  # of the process that finished it
    if code != results.code_version():
        raise ConfigError(
            f"{name}: the sources changed while the sweep ran (now {code}, {results.code_version()} when it began): "
            "sweep.other_code=keep keeps results of both, sweep.other_code=repeat measures all again"
        )


def _line(name: str, outcome: Outcome, folder: Path) -> str:
    if outcome.status == "failed":
        return f"failed   {name}: {outcome.error}"
    told = f": {accuracy_text(results.read(folder))}" if outcome.status == "done" else ""
    return f"{outcome.status:8} {name}{told}"


def accuracy_text(result: dict[str, Any]) -> str:
    """Test accuracy in percent, ± its standard deviation over networks."""
    return f"{percent(result['accuracy'])} %"


def _set_aside_others(sweep: Sweep, planned: Sequence[Planned]) -> bool:
    """Refuse, keep or set aside results of other code versions; returns whether any were set aside.

    ``sweep.other_code`` decides. With ``repeat``, checkpoints of other code versions are removed, too, so that no run
    continues from them.
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
                clear(folder / "checkpoints")  # left by a run killed after its result, which they would restore
                (folder / results.FILE).rename(folder / f"result-{code}.json")
        return True
    codes = ", ".join(sorted({code for code, _ in others.values()}))
    raise ConfigError(
        f"finished runs are from other code versions ({len(others)} from {codes}, now {results.code_version()}): "
        "sweep.other_code=keep keeps them beside new ones, sweep.other_code=repeat measures them again"
    )


class _Asked(BaseException):
    """A stop signal, by its number. No ``Exception``, which the interrupted code might catch as an error of its own."""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """The first stop signal ends the block, which closes the launcher, and then raises ``Interrupted``.

    Further signals have no effect: the runs have already been asked to save their state, and are waited for.
    """
    asked = False

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            raise _Asked(signum)

    with handled_by(interrupt):
        try:
            yield
        except _Asked as stop:
            (signum,) = stop.args
            raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum) from None


def counts(planned: Sequence[Planned]) -> Counter[str]:
    """The number of runs by status; runs that read kept sets which do not exist yet count as waiting."""
    found = Counter(state.read(one.folder).status for one in by_run(planned).values())
    found["waiting"] += sum(one.run_id is None for one in planned)
    return +found


def varied_not_read(planned: Sequence[Planned]) -> list[str]:
    """Settings, each with the reason, that are not read by runs which differ in nothing else and so are identical."""
    values: dict[tuple[str, frozenset[str]], set[str]] = {}
    for one in planned:
        for text in one.not_read:
            own = {override for override in one.overrides if key_of(override) == text.split(" (")[0]}
            values.setdefault((text, frozenset(one.overrides) - own), set()).update(own)
    return list(dict.fromkeys(text for (text, _), found in values.items() if len(found) > 1))


def description(sweep: Sweep, planned: Sequence[Planned]) -> dict[str, Any]:
    """The description in the sweep's folder, as plain values; folders are relative to where the sweep was started."""
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
