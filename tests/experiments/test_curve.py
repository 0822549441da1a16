"""The plot of a run's curves: held-out accuracy and matching loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import curve
from tests.experiments.fabricated import result, write_run

POINTS = [{"step": 0, "held_out_accuracy": 0.25}, {"step": 4, "held_out_accuracy": 0.5}]


def drawn(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[tuple[list, list]]]:
    """The points of every line, for each of the axes."""
    kept = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: kept.append(figure))
    curve.draw(folder, folder / "curve.png")
    (figure,) = kept
    return [
        [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.get_lines()] for axes in figure.axes
    ]


def test_percents_are_drawn_above_the_losses_of_all_steps(tmp_path, monkeypatch, capsys):
    pruning = {"cut_per_class": 3, "held_out_accuracy": 0.75}
    write_run(tmp_path, result("a", [0.5], curve=POINTS, pruning=pruning), losses=4)
    above, below = drawn(monkeypatch, tmp_path)
    assert above == [([0, 4], [25, 50]), ([4], [75])]
    assert below == [([1, 2, 3, 4], [100, 50, pytest.approx(100 / 3), 25])]
    assert json.loads(capsys.readouterr().out) == {"steps": [0, 4], "held_out_percent": [25, 50]}


@pytest.mark.parametrize("pruning", [{"cut_per_class": 0, "held_out_accuracy": 0.75}, {"cut_per_class": 3}])
def test_what_was_not_pruned_or_not_judged_afterwards_has_no_such_point(tmp_path, monkeypatch, pruning):
    write_run(tmp_path, result("a", [0.5], curve=POINTS, pruning=pruning), losses=4)
    assert drawn(monkeypatch, tmp_path)[0] == [([0, 4], [25, 50])]


def test_a_run_without_a_curve_is_told_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"absent: no finished run with evaluation\.curve_points set$"):
        curve.draw(tmp_path / "absent", tmp_path / "curve.png")
    folder = write_run(tmp_path / "a", result("a", [0.5]))
    with pytest.raises(SystemExit, match="a: no finished run with"):
        curve.draw(folder, tmp_path / "curve.png")
