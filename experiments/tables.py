"""Make tables of finished runs.

``python -m experiments.tables NAME [KEY=VALUE ...] [--output DIR] [--results DIR] [--mix]``

NAME is a file of experiments/tables/. KEY=VALUE settings override those of its cells, as in sweep.py; ``debug=smoke``
is one of them. The table is printed as Markdown, or written to DIR/NAME.md, NAME.tex (booktabs) and NAME.csv. Measured
values stand beside the numbers that experiments/reported.csv has for the same cell. A cell that is not measured names
the command that measures it.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.filling import NO_VALUE, VALUES, Entry, Filled, Gap, Measured, Reported, Value, fill, sweep_of
from hmn.errors import ConfigError
from hmn.explain import in_one_line
from hmn.files import write_text


@dataclass(frozen=True)
class Block:
    """A part of a table that is printed by itself: one value, for one label of each column axis but the last. A table
    with a single column has all its values side by side instead."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    heads: Mapping[str, str]  # what is printed above each column, by its key in ``entries``
    entries: Mapping[tuple[tuple[str, ...], str], Entry]

    @property
    def compared(self) -> bool:
        return any(entry.reported for entry in self.entries.values())


def blocks(filled: Filled) -> Iterator[Block]:
    """Yield the blocks, in the order of ``shows``, then of the cells."""
    columns = dict.fromkeys(entry.column for entry in filled.entries)
    if len(columns) == 1 and len(filled.table.shows) > 1:
        axes = zip(filled.table.columns, next(iter(columns)), strict=True)
        title = ", ".join(f"{axis} {label}" for axis, label in axes)
        yield _block(title, {(entry.row, entry.value): entry for entry in filled.entries}, _named)
        return
    last = filled.table.columns[-1]
    grouped: dict[tuple[str, tuple[str, ...]], list[Entry]] = {}
    for entry in filled.entries:
        grouped.setdefault((entry.value, entry.column[:-1]), []).append(entry)
    for (key, head), entries in grouped.items():
        named = {(entry.row, entry.column[-1]): entry for entry in entries}
        yield _block(_named(key, *head), named, lambda label: f"{last} {label}")


def _named(key: str, *more: str) -> str:
    value = VALUES[key]
    return ", ".join(part for part in (value.title, *more, value.unit) if part)


def _block(title: str, entries: Mapping[tuple[tuple[str, ...], str], Entry], head: Callable[[str], str]) -> Block:
    rows = tuple(dict.fromkeys(row for row, _ in entries))
    return Block(title, rows, {column: head(column) for _, column in entries}, entries)


class Notes:
    """Footnotes: a letter for each thing missing, a number for each source; equal ones share theirs."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.missing: dict[str, str] = {}
        self.sources: dict[str, str] = {}

    def letter(self, gap: Gap) -> str:
        if gap.status in ("waiting", "running"):  # the sweep takes care of it
            return self._letter(f"{'not measured' if gap.status == 'waiting' else gap.status}: `{self.command}`")
        return self._letter(f"{gap.status}{f': {gap.told}' if gap.told else ''}: `{gap.command}`")

    def _letter(self, text: str) -> str:
        return self.missing.setdefault(text, letters(len(self.missing)))

    def number(self, reported: Reported) -> str:
        parts = [part for part in (reported.protocol, reported.note) if part]
        text = f"{reported.source} ({'; '.join(parts)})" if parts else reported.source
        return self.sources.setdefault(text, str(len(self.sources) + 1))


def letters(number: int) -> str:
    """The footnote letter of ``number``: a to z, then aa to az, and so on."""
    before, last = divmod(number, 26)
    return (letters(before - 1) if before else "") + string.ascii_lowercase[last]


def number(value: Value, measured: Measured) -> str:
    text = f"{measured.mean:,.{value.digits}f}" if value.exact else f"{measured.mean:.{value.digits}f}"
    if value.exact and not measured.std:
        return text
    spread = "" if measured.std is None else f" ± {measured.std:.{max(value.digits, 1)}f}"
    return f"{text}{spread} ({measured.n})"


def _cells(block: Block, entry: Entry | None, notes: Notes, style: Style) -> list[str]:
    """The measured cell and, if the block compares, the reported number and the difference."""
    if entry is None:
        return [""] * (3 if block.compared else 1)
    measured = style.text(number(VALUES[entry.value], entry.measured)) if entry.measured else ""
    measured = style.bold(measured) if entry.best else measured
    marks = sorted({notes.letter(gap) for gap in entry.gaps}, key=lambda mark: (len(mark), mark))
    if not entry.measured and not marks:
        measured = style.text(NO_VALUE)  # finished, and has no such value
    cells = [" ".join([*([measured] if measured else []), *map(style.mark, marks)])]
    if block.compared:
        first = entry.reported[0] if entry.reported else None
        cells.append(style.text(first.text) + style.source(notes.number(first)) if first else "")
        cells.append(
            "" if entry.difference is None else style.math(f"{entry.difference:+.{VALUES[entry.value].digits}f}")
        )
    return cells


@dataclass(frozen=True)
class Style:
    text: Callable[[str], str]
    bold: Callable[[str], str]
    math: Callable[[str], str]
    mark: Callable[[str], str]
    source: Callable[[str], str]


def escaped(text: str) -> str:
    """Escape ``text`` for LaTeX."""
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
    kinds = ("measured", "reported", "difference") if block.compared else ("measured",)
    heads = [f"{head}, {kind}" if block.compared else head for head in block.heads.values() for kind in kinds]
    return [", ".join(filled.table.rows), *heads]


def _lines(filled: Filled, block: Block, notes: Notes, style: Style) -> list[list[str]]:
    lines = [[style.text(head) for head in _heads(filled, block)]]
    for row in block.rows:
        found = [_cells(block, block.entries.get((row, column)), notes, style) for column in block.heads]
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
    """The table in LaTeX, with a tabular for every block. Needs booktabs."""
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
    """The table as CSV: a line for every place, with numbers in full and the commands of runs that are missing."""
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


def _refuse_loss(path: Path, filled: Filled) -> None:
    """Raise ``ConfigError`` if the table at ``path`` shows measured values of more runs than there are here."""
    if not path.exists():
        return
    named = [*filled.table.rows, *filled.table.columns, "value"]

    def runs(text: str) -> dict[tuple[str, ...], int]:
        """The number of runs behind each measured value."""
        lines = csv.DictReader(io.StringIO(text), restval="")
        if missing := {*named, "mean", "runs"} - {*(lines.fieldnames or ())}:
            told = f"has no column {', '.join(sorted(missing))}, so it is another table's"
            raise ConfigError(f"{path}: {told}: name another --output, or remove it")
        return {tuple(line[name] for name in named): len(line["runs"].split()) for line in lines if line["mean"]}

    here = runs(csv_text(filled))
    there = runs(path.read_text(encoding="utf-8"))
    if lost := sorted(place for place, count in there.items() if count > here.get(place, 0)):
        raise ConfigError(
            f"{path}: shows {len(lost)} measured values of runs that are not here, the first {', '.join(lost[0])}: "
            "name another --output, name --results that has theirs, or remove it"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a file of experiments/tables, without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that override the cells'")
    parser.add_argument("--output", type=Path, help="the folder to write NAME.md, NAME.tex and NAME.csv to")
    parser.add_argument(
        "--results", type=Path, help="a folder to keep results in, and to read those of runs unfinished here"
    )
    parser.add_argument("--mix", action="store_true", help="show results of several code versions in one table")
    given = parser.parse_intermixed_args(arguments)

    def check(filled: Filled) -> None:
        if given.output is not None:
            _refuse_loss(given.output / f"{given.name}.csv", filled)

    filled = fill(sweep_of(given.name, given.overrides), mix=given.mix, kept=given.results, check=check)
    if given.output is None:
        print(markdown(filled), end="")
        return
    given.output.mkdir(parents=True, exist_ok=True)
    for suffix, render in RENDERED.items():
        write_text(given.output / f"{given.name}.{suffix}", render(filled))


if __name__ == "__main__":
    in_one_line(main)
