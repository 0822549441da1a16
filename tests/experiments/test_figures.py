"""Figures: what is drawn where, and that reported values never look measured."""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import figures, filling
from experiments.figures import draw, save
from experiments.filling import Entry, Filled, Measured, Reported, sweep_of
from experiments.panels import Line, Panel, Point, continual, instance_memory, panels_against, panels_of
from hmn.errors import ConfigError
from hmn.sweeps.table import Table
from tests.experiments.fabricated import noise, result, write_run

PAPER = (Reported(71.0, None, "71.0", "Zheng et al., ECCV 2024", "", ""),)


def filled(
    *entries: Entry,
    rows: Sequence[str] = ("ipc",),
    columns: Sequence[str] = ("beta",),
    shows: Sequence[str] = ("accuracy",),
) -> Filled:
    table = Table(
        name="made",
        title="A figure",
        reproduces="nothing",
        kind="figure",
        expects={},
        rows=tuple(rows),
        columns=tuple(columns),
        over=("seed",),
        shows=tuple(shows),
        reported=None,
        axes={},
        cells=(),
    )
    return Filled(table, "python sweep.py experiment=made", entries, ())


def entry(
    row: str, column: str, mean: float | None, std: float | None = None, value: str = "accuracy", reported: tuple = ()
) -> Entry:
    measured = None if mean is None else Measured(mean, std, "3 x 10")
    return Entry(value, tuple(row.split("/")), tuple(column.split("/")), measured, (), reported, ())


# What is drawn


def test_rows_are_lines_over_the_numbers_of_the_first_column():
    found = filled(entry("1", "0.5", 62, 0.4), entry("1", "0.1", 60, 0.3), entry("10", "0.1", 70, None, reported=PAPER))
    (panel,) = panels_of(found, "accuracy")
    assert panel.lines[0] == Line("IPC 1", (Point(0.1, 60, None, 0.3), Point(0.5, 62, None, 0.4)))
    assert panel.lines[1] == Line("IPC 10", (Point(0.1, 70),), (Point(0.1, 71.0),))
    assert (panel.y_title, panel.ticks, panel.title) == ("test accuracy, %", (), "")


SHARES = {
    "dropped": "easiest images left out of each class, %",
    "over_budget": "storage condensed beyond the budget, %",
}


@pytest.mark.parametrize("axis", SHARES)
def test_shares_are_drawn_in_percent(axis):
    (panel,) = panels_of(filled(entry("HMN", "0.3", 60), columns=(axis,)), "accuracy")
    assert panel.lines[0].points[0].x == pytest.approx(30)
    assert panel.x_title == SHARES[axis]


def test_words_stand_side_by_side_in_their_order():
    found = filled(entry("HMN", "none", 60), entry("HMN", "both ends", 62), columns=("pruning",))
    (panel,) = panels_of(found, "accuracy")
    assert (panel.ticks, [point.x for point in panel.lines[0].points]) == (("none", "both ends"), [0, 1])


def test_further_columns_have_panels_of_their_own():
    found = filled(entry("HMN", "0.1/SVHN", 60), entry("HMN", "0.1/CIFAR10", 50), columns=("beta", "dataset"))
    assert [(one.title, one.lines[0].points[0].y) for one in panels_of(found, "accuracy")] == [
        ("SVHN", 60),
        ("CIFAR10", 50),
    ]


def test_more_lines_than_colours_are_spread_over_panels():
    rows = [f"{steps}/{method}" for steps in ("5", "10") for method in "ABCD"]
    found = filled(*(entry(row, "20", 50) for row in rows), rows=("steps", "method"), columns=("classes",))
    panels = panels_of(found, "accuracy")
    assert [(one.title, [line.name for line in one.lines]) for one in panels] == [
        ("steps 5", ["A", "B", "C", "D"]),
        ("steps 10", ["A", "B", "C", "D"]),
    ]
    few = filled(*(entry(row, "20", 50) for row in rows[::2]), rows=("steps", "method"), columns=("classes",))
    (panel,) = panels_of(few, "accuracy")
    assert [line.name for line in panel.lines] == ["steps 5, A", "steps 5, C", "steps 10, A", "steps 10, C"]


def drawn(panel: Panel) -> tuple[list, list]:
    """Lines with a marker: those of measured values, and those of reported ones."""
    (axes,) = draw([panel], "A figure", "").axes
    lines = [line for line in axes.get_lines() if line.get_marker() not in ("", "None", "_", "|")]
    return [one for one in lines if one.get_linestyle() != "None"], [
        one for one in lines if one.get_linestyle() == "None"
    ]


def test_what_is_reported_is_hollow_grey_named_so_and_on_no_line():
    found = filled(*(entry("1", column, 60, 0.5, reported=PAPER) for column in ("0.1", "0.2")))
    (measured,), (reported,) = drawn(panels_of(found, "accuracy")[0])
    assert measured.get_ydata().tolist() == [60, 60]
    assert reported.get_ydata().tolist() == [71, 71]
    assert (reported.get_markerfacecolor(), reported.get_markeredgecolor()) == ("none", figures.GREY)
    assert reported.get_label() == "IPC 1, reported"
    assert "grey, hollow: reported by Zheng et al., ECCV 2024" in figures.note_of(found)


def test_no_line_leads_across_what_is_not_measured():
    points = (("0.1", 60), ("0.2", None), ("0.3", 61))
    found = filled(*(entry("1", column, mean) for column, mean in points))
    (measured,), _ = drawn(panels_of(found, "accuracy")[0])
    assert np.isnan(measured.get_ydata().astype(float)).tolist() == [False, True, False]
    assert "1 of 3 points not yet fully measured" in figures.note_of(found)


def test_only_reported_numbers_make_no_measured_line():
    found = filled(entry("1", "0.1", None, reported=PAPER))
    measured, reported = drawn(panels_of(found, "accuracy")[0])
    assert (measured, len(reported)) == ([], 1)


def test_error_bars_are_one_standard_deviation():
    (axes,) = draw([Panel("", "x", "y", (Line("a", (Point(1, 60, None, 2.5),)),))], "A figure", "").axes
    (bars,) = axes.containers[0].lines[2]
    assert bars.get_segments()[0].tolist() == [[1, 57.5], [1, 62.5]]


def test_a_row_looks_alike_in_every_panel_and_is_in_the_legend_once():
    both, one = (Line("a", (Point(1, 1),)), Line("b", (Point(1, 2),))), (Line("b", (Point(1, 3),)),)
    figure = draw([Panel("p", "x", "y", both), Panel("q", "x", "y", one)], "A figure", "")
    first, second = ([line for line in axes.get_lines() if line.get_marker() != "None"] for axes in figure.axes)
    looks = [(line.get_color(), line.get_marker()) for line in (first[1], second[0])]
    assert looks[0] == looks[1] != (first[0].get_color(), first[0].get_marker())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_one_value_is_drawn_against_another_of_the_same_runs():
    hours = {"1": 0.5, "10": 20.0}
    found = filled(
        *(entry("HMN", f"SVHN/{ipc}", 60 + hour, 0.5) for ipc, hour in hours.items()),
        *(entry("HMN", f"SVHN/{ipc}", hour, 0.1, "condense_hours") for ipc, hour in hours.items()),
        entry("HMN", "SVHN/50", 70),  # a subset of real images: nothing was condensed
        entry("HMN", "SVHN/50", None, value="condense_hours"),
        columns=("dataset", "ipc"),
        shows=("accuracy", "condense_hours"),
    )
    (panel,) = panels_against(found, "accuracy", "condense_hours")
    assert panel.lines[0].points == (Point(0.5, 60.5, 0.1, 0.5, "1"), Point(20.0, 80.0, 0.1, 0.5, "10"))
    assert (panel.title, panel.x_title, panel.log_x) == ("SVHN", "condensing time, hours", True)
    (axes,) = draw([panel], "A figure", "").axes
    assert axes.get_xscale() == "log" and [text.get_text() for text in axes.texts] == ["1", "10"]


def test_a_long_title_stays_on_the_paper():
    figure = draw([Panel("", "x", "y", (Line("a", (Point(1, 1),)),))], "mean accuracy of condensed sets " * 5, "")
    figure.draw_without_rendering()
    assert figure.get_suptitle().count("\n") >= 1
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1


def test_instance_memories_are_drawn_by_their_floats_images_above_accuracy():
    values = {"instance_floats": 32.0, "images_per_class": 78.0, "accuracy": 50.0}
    made = [entry("1", "2", number, None, value) for value, number in values.items()]
    panels = instance_memory(filled(*made, columns=("instance_channels",), shows=tuple(values)))
    assert [(one.y_title, one.lines[0].points[0].x, one.lines[0].points[0].y) for one in panels] == [
        ("images per class", 32.0, 78.0),
        ("test accuracy, %", 32.0, 50.0),
    ]
    above, below = draw(panels, "A figure", "", stacked=True).axes
    assert above.get_position().y0 > below.get_position().y0 and above.get_xlim() == below.get_xlim()


def test_continual_learning_tells_its_average_only_once_all_steps_are_measured():
    steps = {"20": 60.0, "40": 50.0, "60": 43.0}
    made = [entry("HMN", step, number) for step, number in steps.items()]
    made += [entry("DM", step, None if step == "60" else number) for step, number in steps.items()]
    (panel,) = continual(filled(*made, rows=("method",), columns=("classes",)))
    assert [line.name for line in panel.lines] == ["HMN (51.0 on average)", "DM"]
    assert math.isnan(panel.lines[1].points[2].y)


def test_averages_over_several_panels_leave_a_method_one_name():
    def of(method: str, head: str, steps: dict[str, float]) -> list[Entry]:
        made = [entry(method, step, number) for step, number in steps.items()]
        return [dataclasses.replace(one, column=(*one.column, head)) for one in made]

    made = of("HMN", "5", {"50": 60.0, "100": 40.0}) + of("HMN", "10", {"50": 50.0, "100": 30.0})
    made += of("DM", "5", {"50": 20.0, "100": 10.0}) + of("DM", "10", {"50": 20.0, "100": None})
    panels = continual(filled(*made, rows=("method",), columns=("classes", "steps")))
    assert [[line.name for line in panel.lines] for panel in panels] == [["HMN (50.0, 40.0 on average)", "DM"]] * 2


# Files


def test_the_same_figure_is_the_same_bytes_and_holds_no_date(tmp_path):
    panel = Panel("p", "x", "y", (Line("a", (Point(1, 60, None, 2), Point(2, 61))),))
    pairs = [save(draw([panel], "A figure", "note"), tmp_path / name, "of what") for name in ("a", "b")]
    for first, second in zip(*pairs, strict=True):
        assert first.read_bytes() == second.read_bytes()
    png, svg = pairs[0]
    assert round(Image.open(png).info["dpi"][0]) == 150
    text = svg.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "of what" in text and "<dc:date>" not in text


# From table files and run folders


TABLE = """
title: Made for a test
reproduces: nothing
kind: {kind}
expects: {{}}
rows: [method]
columns: [beta]
over: [seed]
shows: [{shows}]
reported: test
base: [dataset=digits, memory=ipc1, container=image, tracking=disabled]
axes:
  method: {{A: [container=image], B: [container=hmn]}}
  beta: {{"0": [pruning.beta=0], "0.5": [pruning.beta=0.5]}}
  seed: {{"0": [seed=0], "1": [seed=1]}}
"""


@pytest.fixture
def table_files(tmp_path, monkeypatch) -> Path:
    """A folder with the tables ``lines``, ``numbers`` and ``galleries``, and nothing measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hmn.sweeps.table.TABLES", tmp_path / "tables")
    published = {"table": "test", "method": "A", "number": "71", "std": "", "unit": "%", "source": "Someone"}
    published |= {"protocol": "", "note": "", "dataset": "", "ipc": "", "network": ""}
    monkeypatch.setattr(filling, "read_reported", lambda: [published])
    (tmp_path / "tables").mkdir()
    for name, kind, shows in (("lines", "figure", "accuracy"), ("numbers", "table", "accuracy")):
        (tmp_path / "tables" / f"{name}.yaml").write_text(TABLE.format(kind=kind, shows=shows))
    (tmp_path / "tables" / "galleries.yaml").write_text(TABLE.format(kind="figure", shows="gallery"))
    return tmp_path


def finish(name: str, accuracies: dict[tuple[str, str, str], list[float]]) -> None:
    """Write the results of the cells with these labels (method, beta, seed)."""
    for one in sweep_of(name, []).plan():
        if (labels := tuple(one.cell.labels.values())) in accuracies:
            made = result(one.run_id, accuracies[labels], condense_seconds=1800.0 * (1 + int(labels[2])))
            write_run(one.folder, made)
            noise(40, seed=int(labels[2])).save(one.folder / "condensed.png")


def test_a_table_file_becomes_a_figure_of_its_finished_runs(table_files, capsys):
    finish("lines", {("A", "0", "0"): [0.5, 0.6], ("A", "0", "1"): [0.7, 0.8], ("A", "0.5", "0"): [0.4, 0.5]})
    figure, description = figures.figure_of(sweep_of("lines", []))
    (axes,) = figure.axes
    measured, *_, reported = axes.get_lines()
    assert measured.get_xdata().tolist() == [0, 0.5]
    assert measured.get_ydata().tolist() == pytest.approx([65, 45])
    assert reported.get_ydata().tolist() == [71, 71] and reported.get_label() == "A, reported"
    segments = axes.containers[0].lines[2][0].get_segments()
    spans = [float(upper[1] - lower[1]) / 2 for lower, upper in segments]
    assert spans == pytest.approx([np.std([55, 75], ddof=1), np.std([40, 50], ddof=1)])
    assert "digits" in description and "0123456789ab" in description
    figures.main(["lines", "--output", "out"])
    assert capsys.readouterr().out.split() == ["out/lines.png", "out/lines.svg"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["lines.png", "lines.svg"]


def test_any_table_is_drawn_against_time(table_files):
    finish("numbers", {("A", "0", "0"): [0.5], ("A", "0", "1"): [0.5]})
    figures.main(["numbers", "--output", "out", "--against", "condense_hours"])
    figure, _ = figures.figure_of(sweep_of("numbers", []), against="condense_hours")
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [0.75]
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "numbers-condense_hours.png",
        "numbers-condense_hours.svg",
    ]


def test_bars_are_differences_from_the_first_row_the_best_on_top():
    names = {
        "held_out_end": {"preset": 46, "worse": 42, "better": 47},
        "held_out": {"preset": 47, "worse": 45, "better": 47},
    }
    found = [entry(row, "0", mean, value=key) for key, means in names.items() for row, mean in means.items()]
    figure = figures.bars(
        filled(*found, entry("open", "0", None, value="held_out")), ("held_out_end", "held_out"), "A title"
    )
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches] == [-3, 0.5]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["worse", "better"]
    marks = [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() == "|"]
    assert marks == [[-4, -2], [1, 0]]
    assert axes.get_xlabel() == "difference from: preset, points"


def test_bars_need_one_column_and_their_first_row(table_files):
    finish("numbers", {("A", "0", "0"): [0.5]})
    figures.main(["numbers", "--output", "out", "--bars", "accuracy", "only.beta=0"])
    assert sorted(path.name for path in Path("out").iterdir()) == ["numbers-bars.png", "numbers-bars.svg"]
    several = filled(entry("A", "0", 60), entry("A", "0.5", 61))
    with pytest.raises(ConfigError, match="rows of a single column"):
        figures.bars(several, ("accuracy",), "")
    with pytest.raises(ConfigError, match="A, which others are compared with, is not measured; run python sweep.py"):
        figures.bars(filled(entry("A", "0", None), entry("B", "0", 60)), ("accuracy",), "")


def test_galleries_show_what_is_finished_and_say_what_is_not(table_files):
    finish("galleries", {("A", "0", "0"): [0.5], ("A", "0.5", "0"): [0.5], ("B", "0", "0"): [0.5]})
    figure, _ = figures.figure_of(sweep_of("galleries", []))
    pictures = [axes.get_images() for axes in figure.axes]
    assert [len(found) for found in pictures] == [1, 1, 1, 0]
    assert (np.asarray(pictures[0][0].get_array()) == np.asarray(noise(40))).all()
    assert [text.get_text() for text in figure.axes[3].texts] == ["not measured"]
    first, second = (save(figure, table_files / name, "")[1].read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize("name", ["lines", "galleries"])
def test_of_what_nothing_is_measured_nothing_is_drawn(table_files, name):
    with pytest.raises(ConfigError, match=f"python sweep.py experiment={name}"):
        figures.main([name, "--output", "out"])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["numbers"], "python -m experiments.tables numbers, or add --against"),
        (["lines", "--bars", "beauty"], "--bars=beauty: must be one of"),
        (["lines", "--bars", "accuracy,condense_hours"], "--bars=accuracy,condense_hours: must be values of one unit"),
        (
            ["lines", "--bars", "accuracy", "--against", "condense_hours"],
            "--against and --bars: cannot be combined",
        ),
        (["lines", "--against", "beauty"], "--against=beauty: must be one of"),
        (["unheard_of"], "galleries, lines, numbers"),
        (["only.seed=0"], "only.seed=0: no table is named"),
        (["galleries", "--results", "kept"], "--results: applies to numbers"),
        (["galleries", "--mix"], "--mix: applies to numbers"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(table_files, arguments, told):
    with pytest.raises(ConfigError) as caught:
        figures.main([*arguments, "--output", "out"])
    assert told in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_smoke_variants_say_that_they_mean_nothing(table_files):
    sweep = sweep_of("lines", ["debug=smoke"])
    assert figures._title(sweep) == "Made for a test (smoke variant: its numbers mean nothing)"
