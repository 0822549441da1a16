"""Turn filled tables into what figures show, before anything is drawn: panels of lines and points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from experiments.filling import VALUES, Entry, Filled, Value

# Title of the axis, and the factor that its numbers are multiplied by.
AXES = {
    "beta": ("β: share of the cut taken from the hardest images", 1.0),
    "classes": ("classes seen so far", 1.0),
    "dropped": ("easiest images left out of each class, %", 100.0),
    "ipc": ("storage in images per class", 1.0),
    "over_budget": ("storage condensed beyond the budget, %", 100.0),
}
NAMES = {"ipc": "IPC"}
MOST_LINES = 7  # in a panel, as many as figures.py has colours


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    x_std: float | None = None
    y_std: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Line:
    name: str
    points: tuple[Point, ...]  # y is NaN where nothing is measured, so that no line crosses the gap
    reported: tuple[Point, ...] = ()

    @property
    def measured(self) -> list[Point]:
        return [point for point in self.points if not math.isnan(point.y)]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    ticks: tuple[str, ...] = ()  # the labels at 0, 1, ... of an x axis of words
    log_x: bool = False


def numbers(labels: Sequence[str]) -> list[float] | None:
    """The labels as numbers, or ``None`` if one is a word."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return None


def labelled(value: Value) -> str:
    return f"{value.title}, {value.unit}" if value.unit else value.title


def panels_of(filled: Filled, key: str) -> tuple[Panel, ...]:
    """The value ``key`` over the first column axis, with a panel for each label of further column axes.

    Labels of the first row axis have panels of their own, too, if one panel had more lines than there are colours.
    """
    entries = [entry for entry in filled.entries if entry.value == key]
    axis = filled.table.columns[0]
    labels = list(dict.fromkeys(entry.column[0] for entry in entries))
    values = numbers(labels)
    title, factor = AXES.get(axis, (axis.replace("_", " "), 1.0))
    places = list(map(float, range(len(labels)))) if values is None else [factor * value for value in values]
    at = dict(zip(labels, places, strict=True))

    def line(name: str, own: Sequence[Entry]) -> Line:
        measured = [
            Point(at[one.column[0]], one.measured.mean, None, one.measured.std)
            if one.measured
            else Point(at[one.column[0]], math.nan)
            for one in own
        ]
        reported = [Point(at[one.column[0]], one.reported[0].number) for one in own if reports(one)]
        return Line(name, *(tuple(sorted(found, key=lambda point: point.x)) for found in (measured, reported)))

    rows = filled.table.rows
    apart = int(len(rows) > 1 and len({entry.row for entry in entries}) > MOST_LINES)
    heads, ticks = (*rows[:apart], *filled.table.columns[1:]), tuple(labels) if values is None else ()
    return tuple(
        Panel(named(heads, head), title, labelled(VALUES[key]), _lines(rows[apart:], own, line), ticks)
        for head, own in _grouped(entries, lambda entry: (*entry.row[:apart], *entry.column[1:]))
    )


def panels_against(filled: Filled, key: str, against: str) -> tuple[Panel, ...]:
    """The value ``key`` against the value ``against`` of the same runs, a point per label of the last column axis."""
    xs = {(entry.row, entry.column): entry.measured for entry in filled.entries if entry.value == against}
    entries = [entry for entry in filled.entries if entry.value == key]

    def line(name: str, own: Sequence[Entry]) -> Line:
        points = [
            Point(x.mean, entry.measured.mean, x.std, entry.measured.std, entry.column[-1])
            for entry in own
            if entry.measured and (x := xs[entry.row, entry.column])
        ]
        return Line(name, tuple(points))

    heads = filled.table.columns[:-1]
    panels = tuple(
        Panel(
            named(heads, rest), labelled(VALUES[against]), labelled(VALUES[key]), _lines(filled.table.rows, own, line)
        )
        for rest, own in _grouped(entries, lambda entry: entry.column[:-1])
    )
    found = [point.x for panel in panels for one in panel.lines for point in one.points]
    spread = bool(found) and min(found) > 0 and max(found) > 10 * min(found)
    return tuple(replace(panel, log_x=spread) for panel in panels)


def instance_memory(filled: Filled) -> tuple[Panel, ...]:
    """Images per class and accuracy, one above the other, against the floats of an instance memory."""
    return tuple(
        panel for key in ("images_per_class", "accuracy") for panel in panels_against(filled, key, "instance_floats")
    )


def continual(filled: Filled) -> tuple[Panel, ...]:
    """Accuracy over the classes seen. The legend tells its averages over all steps if every panel has all of them."""
    panels = panels_of(filled, filled.table.shows[0])
    averages: dict[str, list[str]] = {}
    for line in (line for panel in panels for line in panel.lines):
        if len(line.measured) == len(line.points):
            averages.setdefault(line.name, []).append(f"{statistics.fmean(point.y for point in line.measured):.1f}")

    def with_average(line: Line) -> Line:
        own = averages.get(line.name, [])
        return line if len(own) < len(panels) else replace(line, name=f"{line.name} ({', '.join(own)} on average)")

    return tuple(replace(panel, lines=tuple(map(with_average, panel.lines))) for panel in panels)


def named(axes: Sequence[str], labels: Sequence[str]) -> str:
    """The labels as text, numbers with their axis before them, as they would mean nothing by themselves."""
    return ", ".join(
        label if numbers([label]) is None else f"{NAMES.get(axis, axis.replace('_', ' '))} {label}"
        for axis, label in zip(axes, labels, strict=True)
        if label
    )


def _lines(
    axes: Sequence[str], entries: Sequence[Entry], line: Callable[[str, Sequence[Entry]], Line]
) -> tuple[Line, ...]:
    """A line for each row, named by its labels of ``axes``, which are the last of the row axes."""
    rows = _grouped(entries, lambda entry: entry.row[-len(axes) :])
    return tuple(line(named(axes, row), own) for row, own in rows)


def _grouped(
    entries: Sequence[Entry], key: Callable[[Entry], tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[Entry]]]:
    """Group entries by ``key``, in the order in which keys first appear."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return list(found.items())


def reports(entry: Entry) -> bool:
    return bool(entry.reported) and entry.reported[0].number is not None
