"""Comparing runs: which may share a row, and which may not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments import compare
from hmn import results

KEPT = Path(__file__).parents[2] / "experiments" / "q75" / "results"


def run_folder(folder: Path, seed: int, mean: float, **container: object) -> str:
    result = json.loads((KEPT / "cifar10-q75-ipc1-hmn-19fd6db6" / results.FILE).read_text())
    result["config"] |= {"seed": seed, "container": result["config"]["container"] | container}
    result["accuracy"]["mean"] = mean
    results.write(folder / str(seed), result)
    return str(folder / str(seed))


def compared(monkeypatch: pytest.MonkeyPatch, *folders: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *folders])
    compare.main()


def test_seeds_of_one_experiment_are_a_row(tmp_path, monkeypatch, capsys):
    compared(monkeypatch, run_folder(tmp_path, 0, 0.5), run_folder(tmp_path, 1, 0.52))
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert "| 51.00 ± 1.41 | 2 |" in row


def test_runs_of_two_machines_are_two_rows(tmp_path, monkeypatch, capsys):
    folders = [run_folder(tmp_path, seed, 0.5) for seed in range(2)]
    results.write(Path(folders[1]), results.read(Path(folders[1])) | {"device": "another"})
    compared(monkeypatch, *folders)
    assert len(capsys.readouterr().out.splitlines()[2:]) == 2


def test_accuracies_are_in_the_order_of_their_seeds(tmp_path):
    folders = [Path(run_folder(tmp_path, seed, mean)) for seed, mean in ((1, 0.52), (0, 0.5))]
    row = compare.row(folders, [results.read(folder) for folder in folders])
    assert (row["seeds"], row["accuracy"]) == ([0, 1], [50.0, 52.0])


def test_a_run_that_took_another_s_condensation_has_no_seconds_to_compare(tmp_path):
    folders = [Path(run_folder(tmp_path, seed, 0.5)) for seed in range(2)]
    (folders[0] / "metrics.jsonl").write_text(json.dumps({"curve/condense_seconds": 3.0}) + "\n")
    (folders[1] / "metrics.jsonl").write_text(json.dumps({"evaluate/accuracy": 0.5}) + "\n")
    assert compare.row(folders, [results.read(folder) for folder in folders])["curve_seconds"] == [3.0]


def test_the_precision_is_the_one_it_was_computed_in(tmp_path):
    folder = Path(run_folder(tmp_path, 0, 0.5))
    results.write(folder, results.read(folder) | {"precision": "fp32"})
    assert compare.row([folder], [results.read(folder)])["precision"] == "fp32"


def test_a_row_tells_medians_of_times_and_the_most_memory(tmp_path):
    folders = [Path(run_folder(tmp_path, seed, 0.5)) for seed in range(3)]
    seconds, judging, banks = (10.0, 50.0, 20.0), (1.0, 7.0, 2.0), (0.5, 90.0, 0.25)
    for seed, folder in enumerate(folders):
        curve = [{"step": 0, "held_out_accuracy": 0.1}, {"step": 5, "held_out_accuracy": 0.3 + 0.1 * seed}]
        changes = {"condense_seconds": seconds[seed], "wall_seconds": {"evaluate": judging[seed], "bank": banks[seed]}}
        changes |= {"curve": curve, "compile_seconds": [1.0, 2.5 + seed], "peak_bytes": (2**30, 3 * 2**30, 1)[seed]}
        results.write(folder, results.read(folder) | changes)
        points = [{"curve/step": 0, "curve/condense_seconds": 0.0}, {"curve/condense_seconds": seconds[seed]}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    row = compare.row(folders, [results.read(folder) for folder in folders])
    expected = {"condense_seconds": 20.0, "evaluate_seconds": 2.0, "bank_seconds": 90.0, "peak_gib": 3.0}
    expected |= {"compile_seconds": [3.5, 4.5, 5.5], "held_out_curve": [10.0, 40.0], "curve_seconds": [0.0, 20.0]}
    expected |= {"mean": 50.0, "std": 0.0, "networks": 3}
    assert {key: row[key] for key in expected} == expected
    shown = compare.table([row]).splitlines()[2]
    assert shown == "| bf16 | compiled | 10 x 20 | 2000 | cpu, 2 threads | 50.00 ± 0.00 | 3 | 20 | 90 | 2 | 3.00 |"


def test_settings_of_one_version_of_the_code_alone_are_no_difference(tmp_path, monkeypatch, capsys):
    folders = run_folder(tmp_path, 0, 0.5), run_folder(tmp_path, 1, 0.52, later=3)
    compared(monkeypatch, *folders)
    assert "| 51.00 ± 1.41 | 2 |" in capsys.readouterr().out


def test_seeds_of_other_images_are_refused(tmp_path, monkeypatch):
    folders = run_folder(tmp_path, 0, 0.5), run_folder(tmp_path, 1, 0.52)
    result = results.read(Path(folders[1]))
    results.write(Path(folders[1]), result | {"data": result["data"] | {"fingerprint": "0" * 64}})
    with pytest.raises(SystemExit, match="they differ in images$"):
        compared(monkeypatch, *folders)


def test_what_was_not_condensed_is_refused(tmp_path, monkeypatch):
    folder = Path(run_folder(tmp_path, 0, 0.5))
    results.write(folder, {key: value for key, value in results.read(folder).items() if key != "condense_steps"})
    with pytest.raises(SystemExit, match="no finished condensation"):
        compared(monkeypatch, str(folder))


@pytest.mark.parametrize(("key", "value"), [("decoder_width", 24), ("lr_scale", {"decoder": 0.1})])
def test_what_differs_in_more_than_the_seed_is_refused(tmp_path, monkeypatch, key: str, value: object):
    folders = run_folder(tmp_path, 0, 0.5), run_folder(tmp_path, 1, 0.5, **{key: value})
    with pytest.raises(SystemExit, match=f"1 and .*0: not seeds of one .* differ in container.{key}$"):
        compared(monkeypatch, *folders)


def test_a_result_without_a_commit_is_compared_with_one_that_has_it(tmp_path):
    folders = [Path(run_folder(tmp_path, seed, 0.5)) for seed in range(2)]
    results.write(folders[1], results.read(folders[1]) | {"commit": None})
    assert "unknown" in compare.row(folders, [results.read(folder) for folder in folders])["commits"]
