"""Tables out of finished runs: what is measured, what is published, what is missing, and that they stay apart."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import filling, tables
from experiments.filling import VALUES, Entry, Filled, Gap, fill, measure
from experiments.tables import csv_text, escaped, latex, markdown
from hmn import results
from hmn.checkpoint import write_text
from hmn.errors import ConfigError
from hmn.sweeps import state
from hmn.sweeps.attempt import FAILURE
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import Planned
from hmn.sweeps.table import Table

COMMAND = "python sweep.py experiment=small"
AXES = {
    "dataset": {"A": [], "B": []},
    "ipc": {"1": [], "10": []},
    "method": {"Ours": [], "Theirs": []},
    "seed": {"0": [], "1": []},
}
HEAD = "table,method,dataset,ipc,network,number,std,unit,source,protocol,note"


def result(accuracies: list[float], **changes: object) -> dict[str, object]:
    """As a run writes it; ``accuracies`` of its networks."""
    return {
        "mode": "run",
        "accuracy": {"mean": statistics.fmean(accuracies), "std": None, "best_mean": 0.9}
        | {"by_network": [[0.0, value] for value in accuracies]},
        "images_per_class": "78",
        "stored_floats": 30635,
        "curve": [{"step": 0, "held_out_accuracy": 0.1}, {"step": 5, "held_out_accuracy": 0.25}],
        "condense_seconds": 900.0,
        "wall_seconds": {"condense": 1000.0, "evaluate": 800.0},
        "peak_bytes": 3 * 2**29,
        "device": "cpu, 2 threads",
        "precision": "bf16",
        "data": {"name": "cifar10-q75", "fingerprint": "c6c867f81b10" + 52 * "0", "notes": []},
        "config": {"container": {"name": "hmn", "latent_side": 4, "instance_channels": 2}},
        "commit": "0123456789abcdef",
        "dirty": False,
        "code": "feedfacecafe",
        **changes,
    }


class Runs:
    """A sweep over ``axes`` whose runs are folders that a test fills."""

    def __init__(self, folder: Path, *, shows: tuple[str, ...] = ("accuracy",), axes: dict = AXES, **changes) -> None:
        self.folder = folder
        layout = {"rows": ("method",), "columns": ("dataset", "ipc"), "over": ("seed",), "reported": "small"} | changes
        made = [{}]
        for axis, labels in axes.items():
            made = [{**one, axis: label} for one in made for label in labels]
        self.table = Table(
            name="small",
            title="A small table",
            reproduces="nothing",
            kind="table",
            expects={},
            shows=shows,
            axes=axes,
            cells=tuple(Cell("/".join(one.values()), one, tuple(f"{k}={v}" for k, v in one.items())) for one in made),
            **layout,
        )
        self.command = COMMAND

    def path(self, name: str) -> Path:
        return self.folder / name.replace("/", "-")

    def plan(self, kept: Path | None = None) -> list[Planned]:
        return [
            Planned(cell, cell.overrides, cell.name.replace("/", "-"), self.path(cell.name))
            for cell in self.table.cells
        ]

    def finish(self, name: str, accuracies: list[float], **changes: object) -> None:
        assert name in {cell.name for cell in self.table.cells}
        results.write(self.path(name), result(accuracies, **changes))


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """Writes the lines that stand for experiments/reported.csv."""

    def write(*lines: str) -> None:
        path = tmp_path / "reported.csv"
        path.write_text("\n".join([HEAD, *lines]) + "\n", encoding="utf-8")
        monkeypatch.setattr(filling, "read_reported", lambda: list(csv.DictReader(path.open(encoding="utf-8"))))

    write()
    return write


def rows_of(filled: Filled) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_text(filled))))


def test_a_table_is_rendered_in_full(tmp_path, reported):
    reported(
        'small,Ours,A,1,N,65.7,,%,"Zheng et al., ECCV 2024",their way,',
        "small,Theirs,A,1,N,50.0,0.4,%,Somebody,,unverified",
        "other,Theirs,A,10,N,12.0,,%,Somebody,,",
    )
    runs = Runs(tmp_path / "runs", axes={**AXES, "dataset": {"A": []}})
    runs.finish("A/1/Ours/0", [0.60, 0.62])
    runs.finish("A/1/Ours/1", [0.64, 0.66])
    runs.finish("A/1/Theirs/0", [0.50, 0.51, 0.52])
    failed = runs.path("A/10/Theirs/1")
    write_text(failed / FAILURE, json.dumps({"error": "out of memory", "command": "ignored"}))
    assert markdown(fill(runs)) == (
        "# A small table\n\n"
        "Reproduces: nothing.\n\n"
        "## Test accuracy, A, %\n\n"
        "| method | ipc 1, measured | ipc 1, reported | ipc 1, difference "
        "| ipc 10, measured | ipc 10, reported | ipc 10, difference |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| Ours | **63.00 ± 2.83 (2 x 2)** | 65.7 [1] | -2.70 | [a] |  |  |\n"
        "| Theirs | 51.00 ± 1.00 (1 x 3) [a] | 50.0 ± 0.4 [2] | +1.00 | [a] [b] |  |  |\n\n"
        "- Mean ± standard deviation (ddof 1) over condensations, of one condensation over its networks; "
        "(n): condensations x networks.\n"
        "- [a] not measured: `python sweep.py experiment=small`\n"
        "- [b] failed: out of memory: `python run.py dataset=A ipc=10 method=Theirs seed=1`\n"
        "- [1] reported by Zheng et al., ECCV 2024 (their way)\n"
        "- [2] reported by Somebody (unverified)\n"
        "- Data: cifar10-q75 (re-encoded as JPEG, not the original), c6c867f81b10\n"
        "- Device: cpu, 2 threads\n"
        "- Code: feedfacecafe; commit 0123456\n"
        "- Runs: 3, together 1.50 hours\n"
        "- Command: `python sweep.py experiment=small`\n"
    )


def test_latex_in_full(tmp_path, reported):
    reported("small,Ours,A,1,N,65.7,,%,A & B,,")
    runs = Runs(
        tmp_path, axes={"dataset": {"A": []}, "ipc": {"1": []}, "method": {"Ours": [], "K_2": []}, "seed": {"0": []}}
    )
    runs.finish("A/1/Ours/0", [0.60, 0.62])
    runs.finish("A/1/K_2/0", [0.40])
    lines = latex(fill(runs)).splitlines()
    assert lines[:13] == [
        r"\begin{table}",
        r"\centering",
        r"\caption{A small table}",
        r"\label{tab:small}",
        r"\par\medskip test accuracy, A, \%\par",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & ipc 1, measured & ipc 1, reported & ipc 1, difference \\",
        r"\midrule",
        r"Ours & \textbf{61.00 $\pm$ 1.41 (1 x 2)} & 65.7\,[1] & $-4.70$ \\",
        r"K\_2 & 40.00 (1 x 1) &  &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert r"\par\footnotesize [1] reported by A \& B" in lines
    assert lines[-1] == r"\end{table}"


def test_runs_are_told_apart_that_a_machine_without_bf16_computed_in_fp32(tmp_path):
    axes = {"dataset": {"A": []}, "ipc": {"1": []}, "method": {"Ours": []}, "seed": {"0": [], "1": [], "2": []}}
    runs = Runs(tmp_path, axes=axes)
    for seed in "012":
        runs.finish(f"A/1/Ours/{seed}", [0.6])
    assert "Precision" not in markdown(fill(runs))
    runs.finish("A/1/Ours/1", [0.6], precision="fp32")
    assert "- Precision: bf16 (2 of the runs), fp32 (1 of the runs)\n" in markdown(fill(runs))


def test_latex_escapes_what_is_special_in_it():
    assert escaped(r"5 & 6% $x_1 #2 {a} ~ ^ \ ± –") == (
        r"5 \& 6\% \$x\_1 \#2 \{a\} \textasciitilde{} \textasciicircum{} \textbackslash{} $\pm$ --"
    )


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40))
def test_no_special_character_of_latex_is_left_alone(text):
    known = r"\\(textbackslash|textasciitilde|textasciicircum|textasciigrave|textless|textgreater)\{\}|\\[&%$#_{}]"
    rest = re.sub(known, "", escaped(text))
    assert not set(rest) & set("\\&%$#_{}~^")


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_mean_and_spread_are_over_condensations_where_there_are_several(seeds):
    runs = [[0.5 + 0.01 * seed + 0.001 * seed * network for network in range(4)] for seed in range(1, seeds + 1)]
    found = measure(VALUES["accuracy"], [result(one) for one in runs])
    means = [100 * statistics.fmean(one) for one in runs]
    spread = means if seeds > 1 else [100 * value for value in runs[0]]
    assert found.mean == pytest.approx(statistics.fmean(means), abs=1e-12)
    assert found.std == pytest.approx(statistics.stdev(spread), abs=1e-12)
    assert found.n == f"{seeds} x 4"


def test_one_network_has_no_spread_and_unequal_ones_are_said():
    assert measure(VALUES["accuracy"], [result([0.5])]).std is None
    assert measure(VALUES["accuracy"], [result([0.5]), result([0.4, 0.5, 0.6])]).n == "2 x 1-3"


def test_every_value_of_a_result():
    one = result([0.5], pruning={"over_budget": 0.1, "held_out_accuracy": 0.5}, condense_peak_bytes=2**30)
    assert {key: value.samples(one) for key, value in VALUES.items()} == {
        "accuracy": [50.0],
        "best_accuracy": [90.0],
        "condense_peak_gib": [1.0],
        "held_out": [50.0],
        "held_out_start": [10.0],
        "held_out_end": [25.0],
        "images_per_class": [78.0],
        "stored_floats": [30635.0],
        "stored_bytes": [122540.0],
        "instance_floats": [32.0],
        "peak_gib": [1.5],
        "condense_hours": [0.25],
        "wall_hours": [0.5],
    }
    del one["condense_seconds"], one["pruning"], one["curve"]
    one |= {"mode": "full_data", "images_per_class": "4193-12534"}
    lacks = [key for key, value in VALUES.items() if value.samples(one) is None]
    assert lacks == [
        "held_out",
        "held_out_start",
        "held_out_end",
        "images_per_class",
        "instance_floats",
        "condense_hours",
    ]
    halves = result([0.5], stored_bytes=7, fit_seconds=900.0)
    assert VALUES["stored_bytes"].samples(halves) == [7.0]
    assert VALUES["condense_hours"].samples(halves) == [0.5]  # the fit is a part of it
    older = result([0.5], wall_seconds={"condense": 900.0, "fit": 1800.0})  # which tells it among its stages alone
    assert VALUES["condense_hours"].samples(older) == [0.75]
    assert VALUES["held_out"].samples(result([0.5])) == [25.0]  # the curve's end, where nothing was pruned


def test_accuracy_is_better_high_and_what_a_machine_takes_low_and_only_compared_on_one():
    high, low = ({key for key, value in VALUES.items() if value.better is better} for better in (max, min))
    assert high == {"accuracy", "best_accuracy", "held_out", "held_out_start", "held_out_end"}
    assert low == {"peak_gib", "condense_peak_gib", "condense_hours", "wall_hours"}
    assert low == {key for key, value in VALUES.items() if value.of_machine}


def test_the_least_memory_and_the_highest_accuracy_are_best_and_full_data_competes_with_none(tmp_path, reported):
    axes = {"method": {"X": [], "Y": [], "All": []}, "ipc": {"1": []}}
    runs = Runs(tmp_path, axes=axes, columns=("ipc",), over=(), shows=("accuracy", "peak_gib", "stored_floats"))
    runs.finish("X/1", [0.5], peak_bytes=2**30)
    runs.finish("Y/1", [0.4], peak_bytes=2**31)
    runs.finish("All/1", [0.9], peak_bytes=2**20, mode="full_data")
    best = [(row["value"], row["method"]) for row in rows_of(fill(runs)) if row["best"] == "1"]
    assert best == [("accuracy", "X"), ("peak_gib", "X")]
    runs.finish("Y/1", [0.4], peak_bytes=2**31, device="another, 2 threads")
    best = [(row["value"], row["method"]) for row in rows_of(fill(runs)) if row["best"] == "1"]
    assert best == [("accuracy", "X")]  # memory and time of two machines are no competition


def test_the_values_of_a_single_column_stand_side_by_side(tmp_path, reported):
    axes = {"method": {"X": [], "Y": []}, "ipc": {"1": []}}
    runs = Runs(tmp_path, axes=axes, columns=("ipc",), over=(), shows=("accuracy", "images_per_class"))
    runs.finish("X/1", [0.5])
    runs.finish("Y/1", [0.4], images_per_class="9")
    text = markdown(fill(runs))
    assert text.count("## ") == 1 and "## Ipc 1" in text
    assert "| method | test accuracy, % | images per class |" in text
    assert "| X | **50.00 (1 x 1)** | 78 |" in text and "| Y | 40.00 (1 x 1) | 9 |" in text
    assert latex(fill(runs)).count(r"\begin{tabular}") == 1


def test_a_line_of_csv_has_its_numbers_in_full_and_what_is_missing(tmp_path, reported):
    reported(
        'small,Ours,A,1,N,65.7,0.5,%,"Zheng et al., ECCV 2024",their way,',
        "small,Ours,A,1,N,60.0,,%,Somebody,,unverified",
    )
    axes = {"dataset": {"A": []}, "ipc": {"1": []}, "method": {"Ours": []}, "seed": {"0": [], "1": []}}
    runs = Runs(tmp_path, axes=axes)
    runs.finish("A/1/Ours/0", [0.5, 0.75])
    (row,) = rows_of(fill(runs))
    assert row == {"method": "Ours", "dataset": "A", "ipc": "1", "value": "accuracy", "unit": "%"} | {
        "mean": "62.5",
        "std": str(statistics.stdev([50.0, 75.0])),
        "n": "1 x 2",
        "best": "0",
        "runs": "A-1-Ours-0",
        "reported": "65.7",
        "reported_std": "0.5",
        "reported_source": filling.PAPER,
        "reported_protocol": "their way",
        "reported_note": "",
        "difference": str(62.5 - 65.7),
        "further_reported": "60.0 Somebody, unverified",
        "missing": "waiting",
        "commands": "python run.py dataset=A ipc=1 method=Ours seed=1",
    }


def test_after_the_alphabet_notes_have_more_letters():
    notes = tables.Notes(COMMAND)
    letters = [notes.letter(Gap("failed", f"reason {number}", "command")) for number in range(704)]
    assert (letters[0], letters[25:28], letters[51:54]) == ("a", ["z", "aa", "ab"], ["az", "ba", "bb"])
    assert letters[701:] == ["zz", "aaa", "aab"]
    assert notes.letter(Gap("failed", "reason 30", "command")) == letters[30]


def test_notes_of_one_cell_stand_in_their_order():
    notes = tables.Notes("")
    gaps = [Gap("failed", f"reason {number}", "command") for number in range(28)]
    assert [notes.letter(gap) for gap in gaps][25:] == ["z", "aa", "ab"]
    entry = Entry("accuracy", (), (), None, (), (), gaps=(gaps[26], gaps[1], gaps[25], gaps[1]))
    assert tables._cells(SimpleNamespace(compared=False), entry, notes, tables.MARKDOWN) == ["[b] [z] [aa]"]


def test_a_single_competitor_is_not_called_best(tmp_path, reported):
    runs = Runs(tmp_path)
    runs.finish("A/1/Ours/0", [0.6])
    assert "**" not in markdown(fill(runs))


def test_counts_are_shown_without_a_spread_unless_they_differ(tmp_path, reported):
    runs = Runs(tmp_path, shows=("stored_floats",))
    for name, floats in (("A/1/Ours/0", 30635), ("A/1/Ours/1", 30635), ("A/10/Ours/0", 1), ("A/10/Ours/1", 3)):
        runs.finish(name, [0.5], stored_floats=floats)
    assert "| Ours | 30,635 | 2 ± 1.4 (2) |" in markdown(fill(runs))


def test_results_of_several_code_versions_are_refused_unless_asked_for(tmp_path, reported):
    runs = Runs(tmp_path)
    runs.finish("A/1/Ours/0", [0.5])
    runs.finish("A/1/Ours/1", [0.5])
    old = result([0.5])
    del old["code"]
    results.write(runs.path("B/1/Ours/0"), old)
    with pytest.raises(ConfigError, match=r"2 code versions, feedfacecafe \(2 runs\), unknown \(1 runs\): --mix"):
        fill(runs)
    assert "Code: feedfacecafe, unknown; commit" in markdown(fill(runs, mix=True))


def test_cells_that_are_one_run_count_once(tmp_path, reported):
    runs = Runs(tmp_path)
    one = runs.path("A/1/Ours/0")
    runs.finish("A/1/Ours/0", [0.5, 0.7])
    runs.plan = lambda kept: [Planned(cell, cell.overrides, "same", one) for cell in runs.table.cells]
    assert {row["n"] for row in rows_of(fill(runs))} == {"1 x 2"}
    assert "Runs: 1, together 0.50 hours" in markdown(fill(runs))


def test_each_result_is_read_once(tmp_path, reported, monkeypatch):
    runs = Runs(tmp_path, shows=("accuracy", "peak_gib", "wall_hours"))
    for cell in runs.table.cells:
        runs.finish(cell.name, [0.5])
    asked = []
    read = state.read
    monkeypatch.setattr(filling, "state", SimpleNamespace(read=lambda folder: (asked.append(folder), read(folder))[1]))
    fill(runs)
    assert sorted(asked) == sorted(runs.path(cell.name) for cell in runs.table.cells)
    one, asked[:] = runs.path("A/1/Ours/0"), []
    runs.plan = lambda kept: [Planned(cell, cell.overrides, "same", one) for cell in runs.table.cells]
    fill(runs)
    assert asked == [one]


def test_kept_results_stand_in_for_runs_that_are_gone(tmp_path, reported):
    runs, kept = Runs(tmp_path / "runs"), tmp_path / "kept"
    runs.finish("A/1/Ours/0", [0.5, 0.7])
    settings = result([0.5])["config"]
    runs.finish("A/1/Theirs/0", [0.25], config={**settings, "paths": {"runs_dir": "/home/somebody"}})
    before = markdown(fill(runs, kept=kept))
    assert before == markdown(fill(runs))
    assert results.read(kept / "A-1-Theirs-0")["config"] == settings
    shutil.rmtree(runs.folder)
    write_text(runs.path("A/1/Theirs/0") / FAILURE, json.dumps({"error": "out of memory", "command": "ignored"}))
    assert markdown(fill(runs, kept=kept)) == before
    assert markdown(fill(runs)) != before
    runs.finish("A/1/Theirs/0", [0.75])  # measured anew: that is what counts, and what is kept from now on
    assert "75.00 (1 x 1)" in markdown(fill(runs, kept=kept))
    shutil.rmtree(runs.folder)
    assert "75.00 (1 x 1)" in markdown(fill(runs, kept=kept))


def test_a_table_that_is_refused_leaves_kept_results_as_they_were(tmp_path, reported):
    runs, kept = Runs(tmp_path / "runs"), tmp_path / "kept"
    for name in ("A/1/Ours/0", "A/1/Theirs/0"):
        runs.finish(name, [0.5], code="0123456789ab")
        (runs.path(name) / "card.json").write_text("before")
    runs.table = replace(
        runs.table, cells=(*runs.table.cells[:-1], replace(runs.table.cells[-1], reads=("A/1/Ours/0",)))
    )
    fill(runs, kept=kept)
    before = {path: path.read_text() for path in kept.rglob("*.json")}
    assert len(before) == 3
    runs.finish("A/1/Ours/0", [0.75], code="ba9876543210")
    (runs.path("A/1/Ours/0") / "card.json").write_text("after")
    with pytest.raises(ConfigError, match="2 code versions"):
        fill(runs, kept=kept)
    assert {path: path.read_text() for path in kept.rglob("*.json")} == before


def test_the_cards_of_sets_that_cells_read_are_kept(tmp_path, reported):
    runs, kept = Runs(tmp_path / "runs"), tmp_path / "kept"
    *others, reader = runs.table.cells
    runs.table = replace(runs.table, cells=(*others, replace(reader, reads=("A/1/Ours/0", "B/1/Ours/0"))))
    for name in ("A/1/Ours/0", "A/1/Ours/1"):
        runs.finish(name, [0.5])
        (runs.path(name) / "card.json").write_text(name)
    fill(runs)
    fill(runs, kept=kept)
    assert {path.parent.name: path.read_text() for path in kept.rglob("card.json")} == {"A-1-Ours-0": "A/1/Ours/0"}
    shutil.rmtree(runs.folder)
    fill(runs, kept=kept)
    assert (kept / "A-1-Ours-0/card.json").read_text() == "A/1/Ours/0"


def test_interrupted_and_damaged_runs_are_marked_as_such(tmp_path, reported):
    runs = Runs(tmp_path)
    write_text(runs.path("A/1/Ours/0") / "checkpoints" / "condense.pt", "")
    write_text(runs.path("A/1/Ours/1") / results.FILE, "{")
    text = markdown(fill(runs))
    assert "interrupted: `python run.py dataset=A ipc=1 method=Ours seed=0`" in text
    assert re.search(r"damaged: .*cut short or damaged.*: `python run.py dataset=A ipc=1 method=Ours seed=1`", text)
    missing = next(
        row for row in rows_of(fill(runs)) if (row["method"], row["dataset"], row["ipc"]) == ("Ours", "A", "1")
    )
    assert missing["missing"] == "interrupted; damaged"


def test_a_cell_whose_kept_sets_are_missing_names_the_sweep(tmp_path, reported):
    runs = Runs(tmp_path)
    runs.plan = lambda kept: [Planned(cell, cell.overrides, None, None) for cell in runs.table.cells]
    assert {row["commands"] for row in rows_of(fill(runs))} == {f"{COMMAND}; {COMMAND}"}


def test_the_papers_own_number_is_shown_first_and_a_recalled_one_last(reported):
    rows = [
        dict(zip(HEAD.split(","), line, strict=True))
        for line in (
            ["t", "M", "A", "1", "N", "1", "", "%", "recalled", "", "unverified"],
            ["t", "M", "A", "1", "N", "2", "", "%", "README", "", ""],
            ["t", "M", "A", "1", "N", "3", "", "%", filling.PAPER, "", ""],
            ["t", "M", "A", "", "N", "4", "", "%", "any budget", "", ""],
            ["t", "M", "A", "1", "N", "7", "", "%", filling.PAPER, "", "unverified"],
            ["t", "M", "A", "10", "N", "5", "", "%", "another budget", "", ""],
            ["t", "M", "A", "1", "N", "6", "", "MB", "another unit", "", ""],
        )
    ]
    found = filling.reported_for(rows, "t", {"method": "M", "dataset": "A", "ipc": "1", "seed": "0"}, "%")
    assert [one.number for one in found] == [3, 2, 4, 7, 1]


def test_published_units_are_converted_and_out_of_memory_is_no_number(tmp_path, reported):
    reported(
        "small,Ours,A,1,N,2048,,MB,S,,",
        "small,Theirs,A,1,N,,,MB,S,,out of memory on a card",
        "small,Ours,A,,N,2,,days,S,,",
    )
    runs = Runs(tmp_path, shows=("peak_gib", "condense_hours"), axes={**AXES, "dataset": {"A": []}, "ipc": {"1": []}})
    runs.finish("A/1/Ours/0", [0.5])
    runs.finish("A/1/Theirs/0", [0.5])
    text = markdown(fill(runs))
    assert "| **1.50 (1)** [a] | 2.00 [1] | -0.50 |" in text  # equal ones are both the best
    assert "| **1.50 (1)** [a] | – [2] |  |" in text
    assert "[2] reported by S (out of memory on a card)" in text
    assert "| **0.250 (1)** [a] | 48.00 [1] | -47.750 |" in text


def test_of_an_axis_without_a_place_the_last_label_is_shown(tmp_path, reported):
    axes = {"method": {"X": []}, "ipc": {"1": []}, "stage": {"condense": [], "evaluate": []}}
    runs = Runs(tmp_path, axes=axes, columns=("ipc",), over=())
    runs.finish("X/1/condense", [0.1])
    runs.finish("X/1/evaluate", [0.6])
    (row,) = rows_of(fill(runs))
    assert row["mean"] == "60.0" and row["runs"] == "X-1-evaluate"


def test_a_smoke_variant_says_so_and_is_compared_with_nothing(tmp_path, reported):
    reported("small,Ours,A,1,N,65.7,,%,S,,")
    runs = Runs(tmp_path)
    runs.finish("A/1/Ours/0", [0.6], wall_seconds={"condense": 90.0})
    assert "65.7" in markdown(fill(runs))
    smoked = tuple(replace(cell, overrides=(*cell.overrides, "debug=smoke")) for cell in runs.table.cells)
    runs.table = replace(runs.table, cells=smoked)
    text = markdown(fill(runs))
    assert "65.7" not in text and "- Smoke variant: digits" in text
    assert "Runs: 1, together 1.5 minutes" in text


def test_a_figure_of_pictures_is_no_table(tmp_path, reported):
    with pytest.raises(ConfigError, match="shows=gallery: no number"):
        fill(Runs(tmp_path, shows=("gallery",)))


CELLS = [f"{d}/{i}/{m}/{s}" for d in "AB" for i in ("1", "10") for m in ("Ours", "Theirs") for s in "01"]


@settings(max_examples=30)
@given(
    done=st.dictionaries(
        st.sampled_from(CELLS), st.lists(st.integers(0, 10_000).map(lambda n: n / 10_000), min_size=1, max_size=3)
    ),
    published=st.sets(st.sampled_from([name.rsplit("/", 1)[0] for name in CELLS])),
)
def test_a_reported_number_is_never_in_a_measured_column(tmp_path_factory, done, published):
    folder = tmp_path_factory.mktemp("runs")
    rows = []
    for place, name in enumerate(sorted(published)):
        dataset, ipc, method = name.split("/")
        row = ["small", method, dataset, ipc, "", str(1000 + place), "", "%", "S", "", ""]  # as no accuracy can be
        rows.append(dict(zip(HEAD.split(","), row, strict=True)))
    runs = Runs(folder)
    for name, accuracies in done.items():
        runs.finish(name, accuracies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "read_reported", lambda: rows)
        filled = fill(runs)
    for text, split in ((markdown(filled), "|"), (latex(filled), "&")):
        examined = 0
        for line in text.splitlines():
            columns = [part.strip() for part in line.strip("|").removesuffix(r"\\").split(split)]
            if len(columns) == 1 + 6 and columns[0] in ("Ours", "Theirs"):
                examined += 1
                for measured, published_cell in zip(columns[1::3], columns[2::3], strict=True):
                    assert not re.search(r"1\d\d\d", measured)
                    assert not published_cell or re.match(r"1\d\d\d\D", published_cell)
        assert examined or not published
    for row in rows_of(filled):
        mine = [done[n] for n in done if n.rsplit("/", 1)[0] == f"{row['dataset']}/{row['ipc']}/{row['method']}"]
        if not mine:
            assert row["mean"] == row["std"] == row["n"] == row["difference"] == ""
        else:  # to the last bit
            assert float(row["mean"]) == measure(VALUES["accuracy"], [result(one) for one in mine]).mean
            assert 0 <= float(row["mean"]) <= 100
        assert (row["reported"] != "") == (f"{row['dataset']}/{row['ipc']}/{row['method']}" in published)


TABLE_FILE = """
title: Digits
reproduces: nothing
kind: table
expects: {hours: 0}
rows: [method]
columns: [dataset, ipc]
over: [seed]
shows: [accuracy]
reported: null
axes:
  dataset: {digits: [dataset=digits]}
  ipc: {"1": [memory=ipc1]}
  method: {Random: [mode=random_subset], HMN: [container=hmn]}
  seed: {"0": [seed=0], "1": [seed=1]}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[Planned]:
    """The runs of the one table there is, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hmn.sweeps.table.TABLES", tmp_path)
    (tmp_path / "tiny.yaml").write_text(TABLE_FILE, encoding="utf-8")
    return filling.sweep_of("tiny", ["debug=smoke"]).plan()


def test_the_command_writes_all_three_files_and_names_the_sweep(tiny, tmp_path, capsys):
    assert [one.cell.name for one in tiny] == ["digits/1/Random/0", "digits/1/HMN/0"]
    results.write(tiny[0].folder, result([0.5, 0.6]))
    tables.main(["tiny", "debug=smoke", "--output", "made"])
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["tiny.csv", "tiny.md", "tiny.tex"]
    assert capsys.readouterr().out == ""
    tables.main(["tiny", "debug=smoke"])
    text = capsys.readouterr().out
    assert text == (tmp_path / "made" / "tiny.md").read_text(encoding="utf-8")
    assert "| Random | 55.00 ± 7.07 (1 x 2) |" in text
    assert "| HMN | [a] |" in text
    assert "[a] not measured: `python sweep.py experiment=tiny debug=smoke`" in text


def test_a_table_with_less_than_is_there_is_not_written_over_it(tiny, tmp_path):
    random, hmn = tiny
    results.write(random.folder, result([0.5, 0.6]))
    tables.main(["tiny", "debug=smoke", "--output", "made"])
    written = (tmp_path / "made" / "tiny.md").read_text(encoding="utf-8")
    results.write(hmn.folder, result([0.7, 0.8]))
    shutil.rmtree(random.folder)
    with pytest.raises(ConfigError, match="shows 1 measured values"):
        tables.main(["tiny", "debug=smoke", "--output", "made", "--results", "kept"])
    assert not (tmp_path / "kept").exists()
    with pytest.raises(ConfigError, match="tiny.csv: shows 1 measured values, Random, digits, 1, accuracy the first"):
        tables.main(["tiny", "debug=smoke", "--output", "made"])
    assert (tmp_path / "made" / "tiny.md").read_text(encoding="utf-8") == written
    results.write(random.folder, result([0.5, 0.7]))
    tables.main(["tiny", "debug=smoke", "--output", "made"])
    assert "75.00" in (tmp_path / "made" / "tiny.md").read_text(encoding="utf-8")


def test_a_table_of_fewer_runs_is_not_written_over_it(tiny, tmp_path):
    """A mean of two condensations does not silently become that of one."""
    random, _ = tiny
    results.write(random.folder, result([0.5, 0.6]))
    tables.main(["tiny", "debug=smoke", "--output", "made"])
    kept = tmp_path / "made" / "tiny.csv"
    text = kept.read_text(encoding="utf-8")
    assert text.count(random.run_id) == 1
    kept.write_text(text.replace(random.run_id, f"{random.run_id} another"), encoding="utf-8")
    with pytest.raises(ConfigError, match="tiny.csv: shows 1 measured values, Random, digits, 1, accuracy the first"):
        tables.main(["tiny", "debug=smoke", "--output", "made"])
    kept.write_text(text, encoding="utf-8")
    tables.main(["tiny", "debug=smoke", "--output", "made"])


def test_an_unknown_table_is_answered_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr("hmn.sweeps.table.TABLES", tmp_path)
    (tmp_path / "tiny.yaml").touch()
    with pytest.raises(ConfigError, match="tinny: no file of experiments/tables; there are tiny"):
        filling.sweep_of("tinny", [])
