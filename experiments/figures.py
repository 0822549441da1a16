"""Draw figures of finished runs: ``python -m experiments.figures NAME ... --output DIR [KEY=VALUE ...]``.

NAME is a file of experiments/tables/ with ``kind: figure``. KEY=VALUE settings override those of its cells, as in
sweep.py. The figure is written to DIR/NAME.png and DIR/NAME.svg. The x axis is the first of ``columns``, y is the first
of ``shows``, and each row of the table is a line. Points are means; bars are the standard deviation that tables show.

- ``--against condense_hours`` (or another value of experiments/filling.py) draws the first value of any table against
  that one, as DIR/NAME-condense_hours.png and .svg.
- ``--bars held_out_end,held_out`` draws what the rows of a table with one column gain or lose against its first row,
  the best on top, as DIR/NAME-bars.png and .svg.

Reported numbers are hollow grey markers that no line joins. The same results give the same bytes of SVG. Needs the
extra ``figures``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from experiments.filling import VALUES, Filled, fill, shown, sweep_of
from experiments.panels import NAMES, Panel, continual, instance_memory, named, panels_against, panels_of, reports
from hmn import results
from hmn.config import one_of
from hmn.errors import ArtifactError, ConfigError
from hmn.explain import in_one_line
from hmn.files import atomic_write
from hmn.sweeps.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Okabe & Ito's palette, which the colour-blind can tell apart, without yellow, which is too light on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#7a7a7a"
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "errorbar.capsize": 2.5,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "hmn",  # otherwise ids are random
    "svg.fonttype": "path",
}
REPORTED = ", reported"  # suffix of a line's name


@contextlib.contextmanager
def styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def draw(panels: Sequence[Panel], title: str, note: str, *, stacked: bool = False) -> Figure:
    """Draw all panels alike: a row has the same colour and marker in each."""
    from matplotlib.figure import Figure

    down, across = (len(panels), 1) if stacked else (1, len(panels))
    with styled():
        figure = Figure(figsize=(1.6 + 4.2 * across, 0.9 + 2.9 * down))
        grid = figure.subplots(down, across, sharex=stacked, squeeze=False)
        names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
        for position, (axes, panel) in enumerate(zip(grid.flat, panels, strict=True)):
            _draw_panel(axes, panel, names)
            axes.set_title(panel.title)
            if not stacked or position == down - 1:
                axes.set_xlabel(panel.x_title)
            axes.set_ylabel(panel.y_title)
        _legend(figure, grid.flat)
        _head_and_foot(figure, title, note)
    return figure


def _draw_panel(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for line in panel.lines:
        index = names.index(line.name)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        if line.measured:
            ys, xs = ([getattr(point, f"{axis}_std") or 0.0 for point in line.points] for axis in "yx")
            axes.errorbar(
                [point.x for point in line.points],
                [point.y for point in line.points],
                yerr=ys if any(ys) else None,
                xerr=xs if any(xs) else None,
                color=colour,
                marker=marker,
                elinewidth=1.0,
                label=line.name,
            )
        for point in line.measured:
            if point.label:
                axes.annotate(point.label, (point.x, point.y), (5, 4), textcoords="offset points", size=7, color=colour)
        if line.reported:
            axes.plot(
                [point.x for point in line.reported],
                [point.y for point in line.reported],
                linestyle="none",
                marker=marker,
                markersize=7,
                markerfacecolor="none",
                markeredgecolor=GREY,
                label=f"{line.name}{REPORTED}",
            )
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, rotation=30 if len(panel.ticks) > 6 else 0)
    if panel.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _head_and_foot(figure: Figure, title: str, note: str) -> None:
    letters = int(figure.get_figwidth() / 0.1)  # that fit on a line of the title, at a tenth of an inch each
    figure.suptitle(textwrap.fill(title, letters), x=0.02, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(note, x=0.02, ha="left", fontsize=7, color=GREY)


def _legend(figure: Figure, every: Any) -> None:
    """Draw one legend for all panels, with reported numbers last."""
    known = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    labels = sorted(known, key=lambda label: label.endswith(REPORTED))  # stable
    figure.legend([known[label] for label in labels], labels, loc="outside right center")


def bars(filled: Filled, keys: Sequence[str], title: str) -> Figure:
    """Draw a bar for each row but the first: its difference from the first, averaged over ``keys``, and a mark per key.

    Raises ``ConfigError`` if the table has several columns, or if its first row is not measured.
    """
    from matplotlib.figure import Figure

    if len({entry.column for entry in filled.entries}) > 1:
        raise ConfigError(
            f"{filled.table.name}: --bars compares the rows of a single column; choose one with only.AXIS=LABEL"
        )
    (first, base), *others = _differences(filled, keys)
    if len(base) < len(keys):
        raise ConfigError(
            f"{filled.table.name}: {first}, which others are compared with, is not measured; run {filled.command}"
        )
    rows = sorted((row for row in others if row[1]), key=lambda row: statistics.fmean(row[1]))
    with styled():
        figure = Figure(figsize=(6.8, 1.4 + 0.24 * len(rows)))
        axes = figure.subplots()
        means = [statistics.fmean(values) for _, values in rows]
        axes.barh(
            range(len(rows)), means, color=[COLOURS[0] if mean >= 0 else COLOURS[1] for mean in means], height=0.6
        )
        for place, (_, values) in enumerate(rows):
            axes.plot(values, [place] * len(values), linestyle="none", marker="|", markersize=8, color=COLOURS[-1])
        axes.axvline(0, color=GREY, linewidth=1.0)
        axes.set_yticks(range(len(rows)), [row for row, _ in rows])
        axes.grid(False, axis="y")
        unit = "points" if VALUES[keys[0]].unit == "%" else VALUES[keys[0]].unit
        axes.set_xlabel(f"difference from: {first}, {unit}")
        names = " and ".join(VALUES[key].title for key in keys)
        note = f"marks: {names}; bars: their mean{_of_what(filled)}"
        if missing := sum(len(values) < len(keys) for _, values in others):
            note += f"\n{missing} of {len(others)} rows not yet fully measured"
        _head_and_foot(figure, title, note)
    return figure


def _differences(filled: Filled, keys: Sequence[str]) -> list[tuple[str, list[float]]]:
    """Each row's measured values of ``keys`` less the first row's, without the keys that either of the two lacks."""
    found: dict[str, dict[str, float]] = {}
    for entry in filled.entries:
        values = found.setdefault(named(filled.table.rows, entry.row), {})
        if entry.measured:
            values[entry.value] = entry.measured.mean
    first = next(iter(found.values()))
    return [
        (row, [values[key] - first[key] for key in keys if key in values and key in first])
        for row, values in found.items()
    ]


def galleries(sweep: Sweep) -> Figure:
    """The runs' pictures, laid out by rows and columns of the table. Raises ``ConfigError`` if there is none."""
    from matplotlib.figure import Figure

    table = sweep.table
    folders = {one.cell.name: one.folder for one in sweep.plan()}
    cells = {}
    for cell in shown(table):  # of cells that are averaged over, the first
        place = tuple(named(axes, [cell.labels.get(axis, "") for axis in axes]) for axes in (table.rows, table.columns))
        cells.setdefault(place, folders[cell.name])
    rows, columns = (list(dict.fromkeys(place[part] for place in cells)) for part in (0, 1))
    pictures = {place: picture for place, folder in cells.items() if (picture := _picture(folder)) is not None}
    if not pictures:
        raise ConfigError(f"{table.name}: none of its {len(cells)} runs is finished; run {sweep.command}")
    with styled():
        figure = Figure(figsize=(0.6 + 2.3 * len(columns), 0.8 + 2.3 * len(rows)))
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for place_row, row in enumerate(rows):
            for place_column, column in enumerate(columns):
                axes = grid[place_row, place_column]
                _draw_picture(axes, pictures.get((row, column)), (row, column) in cells)
                if place_row == 0:
                    axes.set_title(column)
                if place_column == 0:
                    axes.set_ylabel(row, fontweight="bold")
        missing = len(cells) - len(pictures)
        note = "a row per class: its first images" + (f"; {missing} not measured yet" if missing else "")
        _head_and_foot(figure, _title(sweep), note)
    return figure


def _picture(folder: Path | None) -> Image.Image | None:
    """The top of a finished run's picture: a square, or half of its height if that is more."""
    try:
        if folder is None or results.read(folder) is None:
            return None
        with Image.open(folder / "condensed.png") as opened:
            picture = opened.convert("RGB")
    except (ArtifactError, OSError):  # another command reports damaged runs
        return None
    return picture.crop((0, 0, picture.width, min(picture.height, max(picture.width, picture.height // 2))))


def _draw_picture(axes: Axes, picture: Image.Image | None, expected: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if picture is not None:
        axes.imshow(picture)
        axes.set_anchor("NW")
    elif expected:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=axes.transAxes)


# From a table file to its PNG and SVG

SPECIAL: Mapping[str, Callable[[Filled], tuple[Panel, ...]]] = {
    "instance_memory": instance_memory,
    "continual": continual,
    "q75_continual": continual,
}


def figure_of(
    sweep: Sweep,
    *,
    against: str | None = None,
    compared: Sequence[str] = (),
    mix: bool = False,
    kept: Path | None = None,
) -> tuple[Figure, str]:
    """The figure of a sweep's table, and a description of what it shows; ``compared`` are the values of ``--bars``.

    Raises ``ConfigError`` if the table is not a figure, or if nothing of it is measured.
    """
    table = sweep.table
    if compared:
        for value in compared:
            one_of("--bars", value, tuple(VALUES))
        if len({VALUES[value].unit for value in compared}) > 1:
            raise ConfigError(f"--bars={','.join(compared)}: must be values of one unit, as it draws their mean")
        sweep = replace(sweep, table=replace(table, shows=tuple(compared)))
    elif against is not None:
        one_of("--against", against, tuple(VALUES))
        sweep = replace(sweep, table=replace(table, shows=(table.shows[0], against)))
    elif table.kind != "figure":
        raise ConfigError(
            f"{table.name}: is a table; run python -m experiments.tables {table.name}, or add --against condense_hours"
        )
    elif table.shows[0] == "gallery":
        if kept is not None or mix:
            option = "--mix" if kept is None else "--results"
            raise ConfigError(f"{option}: applies to numbers, and a gallery is drawn from the sets in run folders")
        return galleries(sweep), sweep.command
    filled = fill(sweep, mix=mix, kept=kept)
    if not any(entry.measured for entry in filled.entries):
        raise ConfigError(f"{table.name}: nothing is measured yet; run {sweep.command}")
    if compared:
        return bars(filled, compared, _title(sweep)), "\n".join(filled.footer)
    if against is not None:
        panels = panels_against(filled, *sweep.table.shows)
    else:
        panels = SPECIAL.get(table.name, lambda found: panels_of(found, table.shows[0]))(filled)
    stacked = against is None and table.name == "instance_memory"
    labelled_by = table.columns[-1] if stacked or against else ""
    return draw(panels, _title(sweep), note_of(filled, labelled_by), stacked=stacked), "\n".join(filled.footer)


def _of_what(filled: Filled) -> str:
    counts = sorted({entry.measured.n for entry in filled.entries if entry.measured and " x " in entry.measured.n})
    return f", condensations x networks: {', '.join(counts)}" if counts else ""


def note_of(filled: Filled, labelled_by: str = "") -> str:
    """The note below a figure: runs behind a point, number of missing points, sources of reported numbers."""
    parts = [f"mean ± standard deviation{_of_what(filled)}"]
    first = [entry for entry in filled.entries if entry.value == filled.table.shows[0]]
    if missing := sum(entry.measured is None or bool(entry.gaps) for entry in first):
        parts.append(f"{missing} of {len(first)} points not yet fully measured")
    if labelled_by:
        parts.append(f"points are labelled by {NAMES.get(labelled_by, labelled_by.replace('_', ' '))}")
    if sources := sorted({entry.reported[0].source for entry in first if reports(entry)}):
        parts.append(f"grey, hollow: reported by {' · '.join(sources)}")
    return "\n".join(parts)


def _title(sweep: Sweep) -> str:
    smoke = any(override.startswith("debug=smoke") for cell in sweep.cells for override in cell.overrides)
    return f"{sweep.table.title} (smoke variant: its numbers mean nothing)" if smoke else sweep.table.title


def save(figure: Figure, stem: Path, description: str) -> list[Path]:
    """Write the figure as PNG and SVG, neither of which holds a date, and return their paths."""
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        stream = io.BytesIO()
        with styled():
            figure.savefig(stream, format=kind, dpi=DPI, metadata={**metadata, "Description": description})
        with atomic_write(paths[-1]) as temporary:
            temporary.write_bytes(stream.getvalue())
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME|KEY=VALUE", help="files of experiments/tables, and settings")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--against", metavar="VALUE", help="the value on the x axis, of experiments/filling.py")
    parser.add_argument(
        "--bars", metavar="VALUE[,VALUE]", help="compare rows with the first by values of experiments/filling.py"
    )
    parser.add_argument(
        "--results", type=Path, help="a folder to keep results in, and to read those of runs unfinished here"
    )
    parser.add_argument("--mix", action="store_true", help="draw results of several code versions together")
    given = parser.parse_intermixed_args(arguments)
    if given.against is not None and given.bars is not None:
        raise ConfigError("--against and --bars: cannot be combined; draw one after the other")
    compared = given.bars.split(",") if given.bars is not None else ()
    overrides = [name for name in given.names if "=" in name]
    names = [name for name in given.names if "=" not in name]
    if not names:
        raise ConfigError(f"{' '.join(overrides)}: no table is named; add a file of experiments/tables, without .yaml")
    for name in names:
        figure, description = figure_of(
            sweep_of(name, overrides), against=given.against, compared=compared, mix=given.mix, kept=given.results
        )
        stem = f"{name}-bars" if compared else name if given.against is None else f"{name}-{given.against}"
        for path in save(figure, given.output / stem, description):
            print(path)


if __name__ == "__main__":
    in_one_line(main)
