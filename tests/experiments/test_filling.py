"""Measured, published and missing values of a table, and that they stay apart."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest

from experiments import filling
from experiments.filling import VALUES, fill, measure
from experiments.tables import markdown
from hmn import results
from hmn.errors import ConfigError
from hmn.files import write_text
from hmn.sweeps import state
from hmn.sweeps.attempt import FAILURE
from hmn.sweeps.planning import Planned
from tests.experiments.small_table import AXES, COMMAND, HEAD, Runs, result, rows_of


def test_runs_are_told_apart_that_a_machine_without_bf16_computed_in_fp32(tmp_path):
    axes = {"dataset": {"A": []}, "ipc": {"1": []}, "method": {"Ours": []}, "seed": {"0": [], "1": [], "2": []}}
    runs = Runs(tmp_path, axes=axes)
    for seed in "012":
        runs.finish(f"A/1/Ours/{seed}", [0.6])
    assert "Precision" not in markdown(fill(runs))
    runs.finish("A/1/Ours/1", [0.6], precision="fp32")
    assert "- Precision: bf16 (2 of the runs), fp32 (1 of the runs)\n" in markdown(fill(runs))


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
    assert VALUES["condense_hours"].samples(halves) == [0.5]  # includes the fit
    older = result([0.5], wall_seconds={"condense": 900.0, "fit": 1800.0})  # the fit only as a stage
    assert VALUES["condense_hours"].samples(older) == [0.75]
    assert VALUES["held_out"].samples(result([0.5])) == [25.0]  # the end of the curve, as nothing was pruned


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
    assert best == [("accuracy", "X")]  # memory and time of two machines are not comparable


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


def test_results_on_images_that_were_changed_between_are_refused_unless_asked_for(tmp_path, reported):
    runs, settings = Runs(tmp_path), result([0.5])["config"]

    def finish(name: str, fingerprint: str, **dataset: object) -> None:
        data = {"name": "mine", "fingerprint": fingerprint * 64, "notes": []}
        runs.finish(name, [0.5], data=data, config={**settings, "dataset": {"kind": "folder", **dataset}})

    finish("A/1/Ours/0", "a", root="here")
    finish("B/1/Ours/0", "b", root="here", class_range=[0, 2])
    fill(runs)
    finish("A/1/Ours/1", "c", root="there")
    with pytest.raises(
        ConfigError, match="^small: results on different images of one name, aaaaaaaaaaaa, cccccccccccc: "
    ):
        fill(runs)
    assert "aaaaaaaaaaaa; mine, bbbbbbbbbbbb; mine, cccccccccccc" in markdown(fill(runs, mix=True))


def test_two_folders_without_a_name_of_their_own_are_two_datasets(tmp_path, reported):
    runs, settings = Runs(tmp_path), result([0.5])["config"]
    for cell, root in (("A/1/Ours/0", "here"), ("B/1/Ours/0", "there")):
        data = {"name": root, "fingerprint": root[0] * 64, "notes": []}
        runs.finish(cell, [0.5], data=data, config={**settings, "dataset": {"kind": "folder", "root": root}})
    fill(runs)


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
    runs.finish("A/1/Theirs/0", [0.75])  # measured again: this result now counts and is kept
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
    assert "| **1.50 (1)** [a] | 2.00 [1] | -0.50 |" in text  # equal values are both best
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


def test_a_figure_of_pictures_is_no_table(tmp_path, reported):
    with pytest.raises(ConfigError, match="shows=gallery: is not a number"):
        fill(Runs(tmp_path, shows=("gallery",)))


def test_an_unknown_table_is_answered_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr("hmn.sweeps.table.TABLES", tmp_path)
    (tmp_path / "tiny.yaml").touch()
    with pytest.raises(ConfigError, match="tinny: must be a file of experiments/tables: one of tiny"):
        filling.sweep_of("tinny", [])
