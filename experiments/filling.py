"""What a table or figure shows: the measured values of its cells, and the published numbers beside them."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hmn.artifacts import CARD
from hmn.errors import ConfigError
from hmn.results import code_of, held_out_accuracy, precision_of, write
from hmn.sweeps import state
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import Planned, by_run
from hmn.sweeps.sweep import Sweep, of_arguments
from hmn.sweeps.table import Table, table_names

REPORTED = Path(__file__).resolve().parent / "reported.csv"
PAPER = "Zheng et al., ECCV 2024"  # whose number is shown if several sources report one
UNVERIFIED = "unverified"  # a note: the number was recalled, not looked up
MATCHED = ("method", "dataset", "ipc", "network")  # axes that are columns of reported.csv
NO_VALUE = "–"
SMOKE = "Smoke variant: digits and tiny settings for every cell; its accuracies mean nothing"
REENCODED = " (re-encoded as JPEG, not the original)"


@dataclass(frozen=True)
class Value:
    """A value that a table can show for a run."""

    title: str
    unit: str
    digits: int
    samples: Callable[[Mapping[str, Any]], list[float] | None]  # from one run's result; None if it has no such value
    better: Callable[..., Any] | None = None  # max or min: which of a column is best
    exact: bool = False  # a count: its spread is shown only if counts differ
    per_network: bool = False  # one sample per network
    of_machine: bool = False  # comparable only among runs of one machine


def _networks(result: Mapping[str, Any]) -> list[float]:
    """The last-epoch accuracy of every network, in percent."""
    return [100 * tests[-1] for tests in result["accuracy"]["by_network"]]


def _held_out(result: Mapping[str, Any]) -> list[float] | None:
    found = held_out_accuracy(result)
    return None if found is None else [100 * found]


def _of_curve(point: int) -> Callable[[Mapping[str, Any]], list[float] | None]:
    """Samples of held-out accuracy in percent at ``point`` of the learning curve, where the set is over budget."""

    def found(result: Mapping[str, Any]) -> list[float] | None:
        curve = result.get("curve")
        return [100 * curve[point]["held_out_accuracy"]] if curve else None

    return found


def _images_per_class(result: Mapping[str, Any]) -> list[float] | None:
    text = result["images_per_class"]  # "4193-12534" for real classes of unequal size
    return [float(text)] if text.isdecimal() else None


def _instance_floats(result: Mapping[str, Any]) -> list[float] | None:
    container = result["config"]["container"]
    if result["mode"] != "run" or container["name"] != "hmn":
        return None
    return [float(container["latent_side"] ** 2 * container["instance_channels"])]


def _stored_bytes(result: Mapping[str, Any]) -> list[float]:
    return [float(result.get("stored_bytes", 4 * result["stored_floats"]))]


def _condense_hours(result: Mapping[str, Any]) -> list[float] | None:
    """Hours of condensing and of the fit before it, without the bank or experts, which many runs share."""
    if "condense_seconds" not in result:
        return None
    fit = result.get("fit_seconds", result["wall_seconds"].get("fit", 0.0))
    return [(result["condense_seconds"] + fit) / 3600]


def _condense_peak(result: Mapping[str, Any]) -> list[float] | None:
    return [result["condense_peak_bytes"] / 2**30] if "condense_peak_bytes" in result else None


VALUES = {
    "accuracy": Value("test accuracy", "%", 2, _networks, max, per_network=True),
    "best_accuracy": Value("best of the tests", "%", 2, lambda result: [100 * result["accuracy"]["best_mean"]], max),
    "held_out": Value("held-out accuracy", "%", 2, _held_out, max),
    "held_out_start": Value("held-out accuracy before the first step", "%", 2, _of_curve(0), max),
    "held_out_end": Value("held-out accuracy after the last step", "%", 2, _of_curve(-1), max),
    "images_per_class": Value("images per class", "", 0, _images_per_class, exact=True),
    "stored_floats": Value("stored floats", "", 0, lambda result: [float(result["stored_floats"])], exact=True),
    "stored_bytes": Value("stored bytes", "", 0, _stored_bytes, exact=True),
    "instance_floats": Value("floats of an instance memory", "", 0, _instance_floats, exact=True),
    "peak_gib": Value("peak memory", "GiB", 2, lambda result: [result["peak_bytes"] / 2**30], min, of_machine=True),
    "condense_peak_gib": Value("peak memory of condensing", "GiB", 2, _condense_peak, min, of_machine=True),
    "condense_hours": Value("condensing time", "hours", 3, _condense_hours, min, of_machine=True),
    "wall_hours": Value("time of the whole run", "hours", 3, lambda result: [_hours(result)], min, of_machine=True),
}
# Factors from published units to those of measured values. GPU tools call 2^20 bytes an MB.
CONVERTED = {("MB", "GiB"): 1 / 1024, ("days", "hours"): 24.0}


def _hours(result: Mapping[str, Any]) -> float:
    return sum(result["wall_seconds"].values()) / 3600


@dataclass(frozen=True)
class Reported:
    """A published number, in the unit of the value that it is compared with."""

    number: float | None  # None: there is none, and ``note`` says why
    std: float | None
    text: str  # as published if the unit is the same
    source: str
    protocol: str
    note: str


@dataclass(frozen=True)
class Measured:
    """Mean and spread over condensations if there are several, else over the networks of one."""

    mean: float
    std: float | None  # ddof 1; None for one sample
    n: str  # condensations x networks


@dataclass(frozen=True)
class Gap:
    """A run that is not finished."""

    status: str
    told: str | None  # the error in one line, if it failed
    command: str


@dataclass(frozen=True)
class Entry:
    """One place in a table."""

    value: str
    row: tuple[str, ...]
    column: tuple[str, ...]
    measured: Measured | None
    run_ids: tuple[str, ...]
    reported: tuple[Reported, ...]  # the shown one comes first
    gaps: tuple[Gap, ...]
    reference: bool = False  # trained on all real images, so it does not compete
    best: bool = False

    @property
    def difference(self) -> float | None:
        if self.measured is None or not self.reported or self.reported[0].number is None:
            return None
        return self.measured.mean - self.reported[0].number


@dataclass(frozen=True)
class Filled:
    """A table with everything that is known of its runs."""

    table: Table
    command: str  # runs what is missing
    entries: tuple[Entry, ...]
    footer: tuple[str, ...]


def read_reported(path: Path = REPORTED) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def reported_for(
    rows: Sequence[Mapping[str, str]], table: str | None, labels: Mapping[str, str], unit: str
) -> tuple[Reported, ...]:
    """Published numbers of the cell with ``labels``: the paper's first, those that were not looked up last."""
    axes = [axis for axis in MATCHED if axis in labels]
    found = [row for row in rows if row["table"] == table and all(_same(row, axis, labels[axis]) for axis in axes)]
    found.sort(key=lambda row: (row["note"] == UNVERIFIED, row["source"] != PAPER))  # stable: then in file order
    return tuple(one for row in found if (one := _reported(row, unit)) is not None)


def _same(row: Mapping[str, str], axis: str, label: str) -> bool:
    return row[axis] == label or (axis == "ipc" and not row[axis])  # for any budget, or for one that is not stated


def _reported(row: Mapping[str, str], unit: str) -> Reported | None:
    """The published number of ``row`` in ``unit``; ``None`` if it is of something else, such as hours."""
    factor = 1.0 if row["unit"] == unit else CONVERTED.get((row["unit"], unit))
    if factor is None:
        return None
    number, std = (float(row[key]) * factor if row[key] else None for key in ("number", "std"))
    published = " ± ".join(row[key] for key in ("number", "std") if row[key])
    text = NO_VALUE if number is None else published if factor == 1.0 else f"{number:.2f}"
    return Reported(number, std, text, row["source"], row["protocol"], row["note"])


def shown(table: Table) -> list[Cell]:
    """The cells that have a place. On an axis that is no row, no column and not averaged over, the last label has."""
    placed = {*table.rows, *table.columns, *table.over}
    last = {axis: list(labels)[-1] for axis, labels in table.axes.items() if axis not in placed}
    return [cell for cell in table.cells if all(cell.labels.get(axis, one) == one for axis, one in last.items())]


def measure(value: Value, results: Sequence[Mapping[str, Any]]) -> Measured | None:
    """Mean and spread over ``results``, one per condensation; ``None`` if none of them has the value."""
    samples = [found for result in results if (found := value.samples(result)) is not None]
    if not samples:
        return None
    means = [statistics.fmean(one) for one in samples]
    spread = means if len(means) > 1 else samples[0]
    std = statistics.stdev(spread) if len(spread) > 1 else None
    n = str(len(means))
    if value.per_network:
        counts = {len(one) for one in samples}
        n += f" x {min(counts)}" + (f"-{max(counts)}" if len(counts) > 1 else "")
    return Measured(statistics.fmean(means), std, n)


def fill(
    sweep: Sweep, *, mix: bool = False, kept: Path | None = None, check: Callable[[Filled], None] = lambda filled: None
) -> Filled:
    """Fill the sweep's table, reading every run once.

    Results of finished runs are copied to ``kept``, as ``<run id>/result.json``, with the cards of sets that other
    cells read, unless ``check`` refuses the table. A result in ``kept`` stands in for a run whose folder is gone or on
    another machine.

    Raises ``ConfigError`` for a key of ``shows`` that is not in ``VALUES`` and, without ``mix``, for runs of several
    code versions or on images that changed between them.
    """
    table, planned = sweep.table, {one.cell.name: one for one in sweep.plan(kept)}
    if unknown := [key for key in table.shows if key not in VALUES]:
        raise ConfigError(
            f"shows={unknown[0]}: is not a number; draw {table.name} with python -m experiments.figures {table.name}"
        )
    states = {run_id: state.read(one.folder) for run_id, one in by_run([*planned.values()]).items()}
    here = {run_id: found.result for run_id, found in states.items() if found.result is not None}
    if kept is not None:
        states |= {run_id: _or_kept(found, kept / run_id) for run_id, found in states.items() if run_id not in here}
    results = {run_id: found.result for run_id, found in states.items() if found.result is not None}
    if not mix:
        _refuse_mixture(table.name, results)
    command = sweep.command
    smoke = any(override.startswith("debug=") for cell in table.cells for override in cell.overrides)
    reported = [] if smoke else read_reported()  # none is for digits, whatever the columns are called

    def entry(key: str, row: tuple[str, ...], column: tuple[str, ...], cells: Sequence[Cell]) -> Entry:
        runs = {one.run_id or one.cell.name: one for one in (planned[cell.name] for cell in cells)}
        done = {run_id: results[run_id] for run_id in runs if run_id in results}
        return Entry(
            value=key,
            row=row,
            column=column,
            measured=measure(VALUES[key], list(done.values())),
            run_ids=tuple(done),
            reported=reported_for(reported, table.reported, cells[0].labels, VALUES[key].unit),
            gaps=tuple(_gap(one, states, command) for run_id, one in runs.items() if run_id not in done),
            reference=any(result["mode"] == "full_data" for result in done.values()),
        )

    entries = [entry(key, *place, cells) for key in table.shows for place, cells in _places(table).items()]
    filled = Filled(
        table,
        command,
        tuple(_with_best(entries, machines=len({result["device"] for result in results.values()}))),
        tuple([*([SMOKE] if smoke else []), *_footer([*results.values()], command)]),
    )
    check(filled)
    if kept is not None:  # last, so that a refused table leaves ``kept`` unchanged
        for name in {name for cell in table.cells for name in cell.reads}:
            _keep_card(planned[name], kept)
        for run_id, result in here.items():
            _keep(kept / run_id, result)
    return filled


def _keep_card(one: Planned, kept: Path) -> None:
    if one.run_id is not None and (one.folder / CARD).exists():
        (kept / one.run_id).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one.folder / CARD, kept / one.run_id / CARD)


def _or_kept(found: state.State, folder: Path) -> state.State:
    return before if (before := state.read(folder)).result is not None else found


def _keep(folder: Path, result: Mapping[str, Any]) -> None:
    config = {name: values for name, values in result["config"].items() if name != "paths"}  # of this machine
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, {**result, "config": config})


def _places(table: Table) -> dict[tuple[tuple[str, ...], tuple[str, ...]], list[Cell]]:
    """The shown cells by their row and column labels; cells of one place differ only in what is averaged over."""
    places: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Cell]] = {}
    for cell in shown(table):
        row, column = (tuple(cell.labels.get(axis, "") for axis in axes) for axes in (table.rows, table.columns))
        places.setdefault((row, column), []).append(cell)
    return places


def _gap(one: Planned, states: Mapping[str, state.State], command: str) -> Gap:
    if one.run_id is None:  # the sets that it reads are missing, too
        return Gap("waiting", None, command)
    found = states[one.run_id]
    return Gap(found.status, found.error, shlex.join(["python", "run.py", *one.overrides]))


def _refuse_mixture(name: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    codes = Counter(code_of(result) for result in results.values())
    if len(codes) > 1:
        listed = ", ".join(f"{code} ({count} runs)" for code, count in codes.most_common())
        raise ConfigError(f"{name}: results of {len(codes)} code versions, {listed}: --mix shows them in one table")
    images: dict[str, set[str]] = {}  # fingerprints by the settings that should give the same images
    for result in results.values():
        settings = result["config"].get("dataset", {})
        named = {key: settings[key] for key in sorted(settings) if key not in ("root", "download")}
        same = json.dumps([result["data"]["name"], named])  # folders without dataset.name are named by their root
        images.setdefault(same, set()).add(result["data"]["fingerprint"][:12])
    if differing := next((found for found in images.values() if len(found) > 1), None):
        listed = ", ".join(sorted(differing))
        raise ConfigError(f"{name}: results on different images of one name, {listed}: --mix shows them in one table")


def _with_best(entries: Sequence[Entry], machines: int) -> Iterator[Entry]:
    """Mark the best of every column with two or more to compare, except values of a machine if there are several."""
    best: dict[tuple[str, tuple[str, ...]], float] = {}
    for key in {(entry.value, entry.column) for entry in entries}:
        means = [e.measured.mean for e in entries if (e.value, e.column) == key and e.measured and not e.reference]
        value = VALUES[key[0]]
        better = None if value.of_machine and machines > 1 else value.better
        if better is not None and len(means) > 1:
            best[key] = better(means)
    for entry in entries:
        found = best.get((entry.value, entry.column))
        competes = found is not None and entry.measured is not None and not entry.reference
        yield replace(entry, best=competes and entry.measured.mean == found)


def _footer(results: Sequence[Mapping[str, Any]], command: str) -> Iterator[str]:
    if results:
        data = sorted({(result["data"]["name"], result["data"]["fingerprint"][:12]) for result in results})
        codes = sorted({code_of(result) for result in results})
        commits = sorted({_commit(result) for result in results})
        yield "Data: " + "; ".join(f"{name}{REENCODED if 'q75' in name else ''}, {digits}" for name, digits in data)
        yield "Device: " + "; ".join(sorted({result["device"] for result in results}))
        precisions = Counter(map(precision_of, results))
        if len(precisions) > 1:  # where bf16 does not pay, a run that asks for it uses fp32
            yield "Precision: " + ", ".join(f"{name} ({count} of the runs)" for name, count in precisions.most_common())
        yield f"Code: {', '.join(codes)}; commit {', '.join(commits)}"
        hours = sum(map(_hours, results))
        yield f"Runs: {len(results)}, together {f'{hours:.2f} hours' if hours >= 0.1 else f'{60 * hours:.1f} minutes'}"
    yield f"Command: `{command}`"


def _commit(result: Mapping[str, Any]) -> str:
    return (result["commit"] or "unknown")[:7] + (" with changes" if result["dirty"] else "")


def sweep_of(name: str, overrides: Sequence[str]) -> Sweep:
    """The sweep of a table file. Raises ``ConfigError``, naming all files, if there is none of this name."""
    if name not in (known := table_names()):
        raise ConfigError(f"{name}: must be a file of experiments/tables: one of {', '.join(known)}")
    arguments = [f"experiment={name}", *overrides]
    return of_arguments(arguments, shlex.join(["python", "sweep.py", *arguments]))
