"""Tables out of finished runs: ``python -m experiments.tables NAME [KEY=VALUE ...] [--output DIR] [--mix]``.

NAME is a file of experiments/tables/, KEY=VALUE are settings over its cells' as of sweep.py, ``debug=smoke`` among
them. Prints Markdown, or writes DIR/NAME.md, NAME.tex (booktabs) and NAME.csv. Beside what was measured stands what
experiments/reported.csv says of the same cell; a cell that is not measured names the command that measures it.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import shlex
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hmn.checkpoint import write_text
from hmn.cli import in_one_line
from hmn.errors import ConfigError
from hmn.results import held_out_accuracy
from hmn.sweeps import state
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import Planned, by_run
from hmn.sweeps.sweep import Sweep, of_arguments
from hmn.sweeps.table import Table, table_file

REPORTED = Path(__file__).resolve().parent / "reported.csv"
PAPER = "Zheng et al., ECCV 2024"  # whose number is shown where several sources have one
UNVERIFIED = "unverified"  # a note: recalled, not looked up
MATCHED = ("method", "dataset", "ipc", "network")  # axes that are columns of reported.csv
NO_VALUE = "–"
SMOKE = "Smoke variant: digits and tiny settings for every cell; its accuracies mean nothing"
REENCODED = " (re-encoded as JPEG, not the original)"


@dataclass(frozen=True)
class Value:
    """What a table can show of a run."""

    title: str
    unit: str
    digits: int
    samples: Callable[[Mapping[str, Any]], list[float] | None]  # of one run's result; None: it has no such value
    better: Callable[..., Any] | None = None  # max or min of a column is its best
    exact: bool = False  # a count: equal ones have no spread worth showing
    per_network: bool = False  # one sample for every network


def _networks(result: Mapping[str, Any]) -> list[float]:
    """The last-epoch accuracy of every network, in percent."""
    return [100 * tests[-1] for tests in result["accuracy"]["by_network"]]


def _held_out(result: Mapping[str, Any]) -> list[float] | None:
    found = held_out_accuracy(result)
    return None if found is None else [100 * found]


def _images_per_class(result: Mapping[str, Any]) -> list[float] | None:
    text = result["images_per_class"]  # "4193-12534" for real classes of several sizes
    return [float(text)] if text.isdecimal() else None


def _instance_floats(result: Mapping[str, Any]) -> list[float] | None:
    container = result["config"]["container"]
    if result["mode"] != "run" or container["name"] != "hmn":
        return None
    return [float(container["latent_side"] ** 2 * container["instance_channels"])]


def _condense_hours(result: Mapping[str, Any]) -> list[float] | None:
    return [result["condense_seconds"] / 3600] if "condense_seconds" in result else None


VALUES = {
    "accuracy": Value("test accuracy", "%", 2, _networks, max, per_network=True),
    "best_accuracy": Value("best of the tests", "%", 2, lambda result: [100 * result["accuracy"]["best_mean"]], max),
    "held_out": Value("held-out accuracy", "%", 2, _held_out, max),
    "images_per_class": Value("images per class", "", 0, _images_per_class, exact=True),
    "stored_floats": Value("stored floats", "", 0, lambda result: [float(result["stored_floats"])], exact=True),
    "instance_floats": Value("floats of an instance memory", "", 0, _instance_floats, exact=True),
    "peak_gib": Value("peak memory", "GiB", 2, lambda result: [result["peak_bytes"] / 2**30], min),
    "condense_hours": Value("condensing time", "hours", 3, _condense_hours, min),
    "wall_hours": Value("time of the whole run", "hours", 3, lambda result: [_hours(result)], min),
}
# A published unit in that of the value it is compared with. GPU tools call 2^20 bytes an MB.
CONVERTED = {("MB", "GiB"): 1 / 1024, ("days", "hours"): 24.0}


def _hours(result: Mapping[str, Any]) -> float:
    return sum(result["wall_seconds"].values()) / 3600


@dataclass(frozen=True)
class Reported:
    """A published number, in the unit of the value that it is compared with."""

    number: float | None  # None: there is none, and ``note`` says why
    std: float | None
    text: str  # as published where the unit is the same
    source: str
    protocol: str
    note: str


@dataclass(frozen=True)
class Measured:
    """Over condensations where there are several, else over the networks of one."""

    mean: float
    std: float | None  # ddof 1; None: of one sample
    n: str  # condensations x networks


@dataclass(frozen=True)
class Gap:
    """A run that is not finished."""

    status: str
    told: str | None  # one line, where it failed
    command: str


@dataclass(frozen=True)
class Entry:
    """One place of a table."""

    value: str
    row: tuple[str, ...]
    column: tuple[str, ...]
    measured: Measured | None
    run_ids: tuple[str, ...]
    reported: tuple[Reported, ...]  # the one that is shown first
    gaps: tuple[Gap, ...]
    reference: bool = False  # trained on all real images: no competitor
    best: bool = False

    @property
    def difference(self) -> float | None:
        if self.measured is None or not self.reported or self.reported[0].number is None:
            return None
        return self.measured.mean - self.reported[0].number


@dataclass(frozen=True)
class Filled:
    """A table with all that is known of its runs."""

    table: Table
    command: str  # that makes what is missing
    entries: tuple[Entry, ...]
    footer: tuple[str, ...]


def read_reported(path: Path = REPORTED) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def reported_for(
    rows: Sequence[Mapping[str, str]], table: str | None, labels: Mapping[str, str], unit: str
) -> tuple[Reported, ...]:
    """What is published of the cell ``labels``: the paper's own first, what was not looked up last."""
    axes = [axis for axis in MATCHED if axis in labels]
    found = [row for row in rows if row["table"] == table and all(_same(row, axis, labels[axis]) for axis in axes)]
    found.sort(key=lambda row: (row["note"] == UNVERIFIED, row["source"] != PAPER))  # stable: then as in the file
    return tuple(one for row in found if (one := _reported(row, unit)) is not None)


def _same(row: Mapping[str, str], axis: str, label: str) -> bool:
    return row[axis] == label or (axis == "ipc" and not row[axis])  # of any budget, or it is not said of which


def _reported(row: Mapping[str, str], unit: str) -> Reported | None:
    """``None`` for a number of something else, hours say."""
    factor = 1.0 if row["unit"] == unit else CONVERTED.get((row["unit"], unit))
    if factor is None:
        return None
    number, std = (float(row[key]) * factor if row[key] else None for key in ("number", "std"))
    published = " ± ".join(row[key] for key in ("number", "std") if row[key])
    text = NO_VALUE if number is None else published if factor == 1.0 else f"{number:.2f}"
    return Reported(number, std, text, row["source"], row["protocol"], row["note"])


def shown(table: Table) -> list[Cell]:
    """The cells that have a place: of an axis that is neither a row, a column nor averaged over, the last label's."""
    placed = {*table.rows, *table.columns, *table.over}
    last = {axis: list(labels)[-1] for axis, labels in table.axes.items() if axis not in placed}
    return [cell for cell in table.cells if all(cell.labels.get(axis, one) == one for axis, one in last.items())]


def measure(value: Value, results: Sequence[Mapping[str, Any]]) -> Measured | None:
    """Mean and spread of ``results``, one for each condensation; ``None`` where none has such a value."""
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


def fill(sweep: Sweep, *, mix: bool = False) -> Filled:
    """Read every run of the sweep's table once. Raises ``ConfigError`` for runs of several code versions, or a key of
    ``shows`` that is none of ``VALUES``."""
    table, planned = sweep.table, {one.cell.name: one for one in sweep.plan()}
    if unknown := [key for key in table.shows if key not in VALUES]:
        raise ConfigError(
            f"shows={unknown[0]}: no number; {table.name} is drawn: python -m experiments.figures {table.name}"
        )
    states = {run_id: state.read(one.folder) for run_id, one in by_run([*planned.values()]).items()}
    results = {run_id: found.result for run_id, found in states.items() if found.result is not None}
    if not mix:
        _refuse_mixture(table.name, results)
    command = sweep.command
    smoke = any(override.startswith("debug=") for cell in table.cells for override in cell.overrides)
    reported = [] if smoke else read_reported()  # of digits nothing is, whatever the columns are called

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
    return Filled(
        table,
        command,
        tuple(_with_best(entries)),
        tuple([*([SMOKE] if smoke else []), *_footer([*results.values()], command)]),
    )


def _places(table: Table) -> dict[tuple[tuple[str, ...], tuple[str, ...]], list[Cell]]:
    """The shown cells by their labels of rows and of columns: those of one place differ in what is averaged over."""
    places: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Cell]] = {}
    for cell in shown(table):
        row, column = (tuple(cell.labels.get(axis, "") for axis in axes) for axes in (table.rows, table.columns))
        places.setdefault((row, column), []).append(cell)
    return places


def _gap(one: Planned, states: Mapping[str, state.State], command: str) -> Gap:
    if one.run_id is None:  # what it reads is missing, too
        return Gap("waiting", None, command)
    found = states[one.run_id]
    return Gap(found.status, found.error, shlex.join(["python", "run.py", *one.overrides]))


def _refuse_mixture(name: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    codes = Counter(result.get("code", "unknown") for result in results.values())
    if len(codes) > 1:
        listed = ", ".join(f"{code} ({count} runs)" for code, count in codes.most_common())
        raise ConfigError(f"{name}: results of {len(codes)} code versions, {listed}: --mix shows them in one table")


def _with_best(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Mark the best of every column that has at least two to compare."""
    best: dict[tuple[str, tuple[str, ...]], float] = {}
    for key in {(entry.value, entry.column) for entry in entries}:
        means = [e.measured.mean for e in entries if (e.value, e.column) == key and e.measured and not e.reference]
        better = VALUES[key[0]].better
        if better is not None and len(means) > 1:
            best[key] = better(means)
    for entry in entries:
        found = best.get((entry.value, entry.column))
        competes = found is not None and entry.measured is not None and not entry.reference
        yield replace(entry, best=competes and entry.measured.mean == found)


def _footer(results: Sequence[Mapping[str, Any]], command: str) -> Iterator[str]:
    if results:
        data = sorted({(result["data"]["name"], result["data"]["fingerprint"][:12]) for result in results})
        codes = sorted({result.get("code", "unknown") for result in results})
        commits = sorted({_commit(result) for result in results})
        yield "Data: " + "; ".join(f"{name}{REENCODED if 'q75' in name else ''}, {digits}" for name, digits in data)
        yield "Device: " + "; ".join(sorted({result["device"] for result in results}))
        yield f"Code: {', '.join(codes)}; commit {', '.join(commits)}"
        hours = sum(map(_hours, results))
        yield f"Runs: {len(results)}, together {f'{hours:.2f} hours' if hours >= 0.1 else f'{60 * hours:.1f} minutes'}"
    yield f"Command: `{command}`"


def _commit(result: Mapping[str, Any]) -> str:
    return (result["commit"] or "unknown")[:7] + (" with changes" if result["dirty"] else "")


# Rendering


@dataclass(frozen=True)
class Block:
    """Part of a table that is printed as one: a value, under all but the last axis of the columns."""

    title: str
    value: Value
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]  # labels of the last axis
    entries: Mapping[tuple[tuple[str, ...], str], Entry]

    @property
    def compared(self) -> bool:
        return any(entry.reported for entry in self.entries.values())


def blocks(filled: Filled) -> Iterator[Block]:
    """In the order of ``shows``, then of the cells."""
    grouped: dict[tuple[str, tuple[str, ...]], list[Entry]] = {}
    for entry in filled.entries:
        grouped.setdefault((entry.value, entry.column[:-1]), []).append(entry)
    for (key, head), entries in grouped.items():
        value = VALUES[key]
        named = ", ".join(part for part in (value.title, *head) if part)
        yield Block(
            title=named + (f", {value.unit}" if value.unit else ""),
            value=value,
            rows=tuple(dict.fromkeys(entry.row for entry in entries)),
            columns=tuple(dict.fromkeys(entry.column[-1] for entry in entries)),
            entries={(entry.row, entry.column[-1]): entry for entry in entries},
        )


class Notes:
    """Footnotes of what is missing, a letter each, and numbers of sources; equal ones share theirs."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.missing: dict[str, str] = {}
        self.sources: dict[str, str] = {}

    def letter(self, gap: Gap) -> str:
        if gap.status in ("waiting", "running"):  # the sweep's business
            return self._letter(f"{'not measured' if gap.status == 'waiting' else gap.status}: `{self.command}`")
        return self._letter(f"{gap.status}{f': {gap.told}' if gap.told else ''}: `{gap.command}`")

    def _letter(self, text: str) -> str:
        if text not in self.missing:
            number, letters = len(self.missing), string.ascii_lowercase
            self.missing[text] = letters[number] if number < 26 else letters[number // 26 - 1] + letters[number % 26]
        return self.missing[text]

    def number(self, reported: Reported) -> str:
        parts = [part for part in (reported.protocol, reported.note) if part]
        text = f"{reported.source} ({'; '.join(parts)})" if parts else reported.source
        return self.sources.setdefault(text, str(len(self.sources) + 1))


def number(value: Value, measured: Measured) -> str:
    text = f"{measured.mean:,.{value.digits}f}" if value.exact else f"{measured.mean:.{value.digits}f}"
    if value.exact and not measured.std:
        return text
    spread = "" if measured.std is None else f" ± {measured.std:.{max(value.digits, 1)}f}"
    return f"{text}{spread} ({measured.n})"


def _cells(block: Block, entry: Entry | None, notes: Notes, style: Style) -> list[str]:
    """Measured, and where the block compares, reported and difference."""
    if entry is None:
        return [""] * (3 if block.compared else 1)
    measured = style.text(number(block.value, entry.measured)) if entry.measured else ""
    measured = style.bold(measured) if entry.best else measured
    marks = dict.fromkeys(notes.letter(gap) for gap in entry.gaps)
    if not entry.measured and not marks:
        measured = style.text(NO_VALUE)  # finished, and has no such value
    cells = [" ".join([*([measured] if measured else []), *map(style.mark, marks)])]
    if block.compared:
        first = entry.reported[0] if entry.reported else None
        cells.append(style.text(first.text) + style.source(notes.number(first)) if first else "")
        cells.append("" if entry.difference is None else style.math(f"{entry.difference:+.{block.value.digits}f}"))
    return cells


@dataclass(frozen=True)
class Style:
    text: Callable[[str], str]
    bold: Callable[[str], str]
    math: Callable[[str], str]
    mark: Callable[[str], str]
    source: Callable[[str], str]


def escaped(text: str) -> str:
    """For LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    special |= {"–": "--", "`": r"\textasciigrave{}", "<": r"\textless{}", ">": r"\textgreater{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)


MARKDOWN = Style(
    text=lambda text: text.replace("|", "\\|").replace("\n", " "),
    bold=lambda text: f"**{text}**",
    math=str,
    mark=lambda letter: f"[{letter}]",
    source=lambda key: f" [{key}]",
)
LATEX = Style(
    text=escaped,
    bold=lambda text: rf"\textbf{{{text}}}",
    math=lambda text: f"${text}$",
    mark=lambda letter: rf"\textsuperscript{{{letter}}}",
    source=lambda key: rf"\,[{key}]",
)


def _heads(filled: Filled, block: Block) -> list[str]:
    last = filled.table.columns[-1]
    kinds = ("measured", "reported", "difference") if block.compared else ("measured",)
    heads = [
        f"{last} {label}, {kind}" if block.compared else f"{last} {label}" for label in block.columns for kind in kinds
    ]
    return [", ".join(filled.table.rows), *heads]


def _lines(filled: Filled, block: Block, notes: Notes, style: Style) -> list[list[str]]:
    lines = [[style.text(head) for head in _heads(filled, block)]]
    for row in block.rows:
        found = [_cells(block, block.entries.get((row, column)), notes, style) for column in block.columns]
        lines.append([style.text(", ".join(label for label in row if label)), *itertools.chain(*found)])
    return lines


def _legend(filled: Filled, notes: Notes) -> Iterator[str]:
    table = filled.table
    n = "condensations x networks"
    yield f"Mean ± standard deviation (ddof 1) over condensations, of one condensation over its networks; (n): {n}."
    yield from (f"[{letter}] {text}" for text, letter in notes.missing.items())
    yield from (f"[{key}] reported by {text}" for text, key in notes.sources.items())
    if any(len(entry.reported) > 1 for entry in filled.entries):
        yield f"Further reported numbers of the same cells: {table.name}.csv"
    yield from filled.footer


def markdown(filled: Filled) -> str:
    table, notes = filled.table, Notes(filled.command)
    parts = [f"# {table.title}", f"Reproduces: {table.reproduces}."]
    for block in blocks(filled):
        head, *rows = _lines(filled, block, notes, MARKDOWN)
        lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
        parts += [f"## {block.title[0].upper()}{block.title[1:]}", "\n".join(lines)]
    parts.append("\n".join(f"- {MARKDOWN.text(line)}" for line in _legend(filled, notes)))
    return "\n\n".join(parts) + "\n"


def latex(filled: Filled) -> str:
    """Needs booktabs; one table with a tabular for every block."""
    table, notes = filled.table, Notes(filled.command)
    parts = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(table.title)}}}", rf"\label{{tab:{table.name}}}"]
    for block in blocks(filled):
        head, *rows = _lines(filled, block, notes, LATEX)
        lines = [" & ".join(line) + r" \\" for line in (head, *rows)]
        parts += [rf"\par\medskip {escaped(block.title)}\par", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"]
        parts += [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    parts += [rf"\par\footnotesize {escaped(line)}" for line in _legend(filled, notes)]
    return "\n".join([*parts, r"\end{table}"]) + "\n"


def csv_text(filled: Filled) -> str:
    """A line for every place, numbers in full, and the command of every run that is missing there."""
    table = filled.table
    axes = [*table.rows, *table.columns]
    fields = ["value", "unit", "mean", "std", "n", "best", "runs", "reported", "reported_std", "reported_source"]
    fields += ["reported_protocol", "reported_note", "difference", "further_reported", "missing", "commands"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*axes, *fields])
    for entry in filled.entries:
        measured = entry.measured
        made = [measured.mean, measured.std, measured.n, int(entry.best)] if measured else ["", "", "", ""]
        first, *others = entry.reported or (None,)
        published = ["", "", "", "", ""]
        if first is not None:
            published = [first.number, first.std, first.source, first.protocol, first.note]
        further = "; ".join(f"{one.text} {one.source}" + (f", {one.note}" if one.note else "") for one in others)
        gaps = ["; ".join(gap.status for gap in entry.gaps), "; ".join(gap.command for gap in entry.gaps)]
        own = [entry.value, VALUES[entry.value].unit, *made, " ".join(entry.run_ids)]
        writer.writerow([*entry.row, *entry.column, *own, *published, entry.difference, further, *gaps])
    return file.getvalue()


RENDERED = {"md": markdown, "tex": latex, "csv": csv_text}


def sweep_of(name: str, overrides: Sequence[str]) -> Sweep:
    """The sweep of a table file. Raises ``ConfigError`` that names all files where there is none of this name."""
    if not table_file(name).exists():
        known = ", ".join(sorted(path.stem for path in table_file(name).parent.glob("*.yaml")))
        raise ConfigError(f"{name}: no file of experiments/tables; there are {known}")
    arguments = [f"experiment={name}", *overrides]
    return of_arguments(arguments, shlex.join(["python", "sweep.py", *arguments]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a file of experiments/tables, without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over the cells', as of sweep.py")
    parser.add_argument("--output", type=Path, help="the folder to write NAME.md, NAME.tex and NAME.csv to")
    parser.add_argument("--mix", action="store_true", help="show results of several code versions in one table")
    given = parser.parse_intermixed_args(arguments)
    filled = fill(sweep_of(given.name, given.overrides), mix=given.mix)
    if given.output is None:
        print(markdown(filled), end="")
        return
    given.output.mkdir(parents=True, exist_ok=True)
    for suffix, render in RENDERED.items():
        write_text(given.output / f"{given.name}.{suffix}", render(filled))


if __name__ == "__main__":
    in_one_line(main)
