"""What the command reports about decoded images and about the steps that made them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from experiments.inside import logged, main, measures, of_real
from hmn.errors import ArtifactError, DataError
from tests.command import TINY, run


def of_classes(*classes: torch.Tensor) -> dict[str, float]:
    labels = torch.arange(len(classes)).repeat_interleave(len(classes[0]))
    return measures(torch.cat(classes), labels)


def test_copies_repeat_each_other_and_lie_where_their_class_does():
    dark, light = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    one = torch.cat([dark, light, dark, light])
    found = of_classes(one, one)
    assert found["spread"] == pytest.approx(0.5)
    assert found["repeats"] == found["apart"] == found["contrast"] == 0


def test_distances_are_relative_to_the_spread():
    """Two classes, each of two flat images 0.1 off 0.2 or 0.8: spread 0.1, neighbours 0.2, classes 0.3 apart."""
    classes = [torch.tensor([mean - 0.1, mean + 0.1]).view(2, 1, 1, 1).expand(2, 3, 4, 4) for mean in (0.2, 0.8)]
    found = of_classes(*classes)
    assert found["spread"] == pytest.approx(0.1)
    assert found["repeats"] == pytest.approx(2)
    assert found["apart"] == pytest.approx(3)


def test_detail_is_what_smooth_images_lack():
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    checkers = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().view(1, 1, 8, 8)
    assert of_classes(torch.cat([checkers, checkers]))["detail"] == pytest.approx(1)
    # Values differ by 0.5 from their pair's mean; the numbers 0 .. 7 have a variance of 63 / 12.
    assert of_classes(torch.cat([rows, rows]))["detail"] == pytest.approx(0.25 / (63 / 12))


def test_steps_are_told_by_their_first_and_last_quarter(tmp_path):
    rows = [{"condense/step": step, "condense/loss": float(step), "condense/loss_layer1": 1.0} for step in range(8)]
    other = {"curve/step": 3, "curve/held_out_accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, other]))
    assert logged(tmp_path) == {"loss": (0.5, 6.5), "loss_layer1": (1.0, 1.0)}


def test_real_images_are_spread_over_their_files_and_measured_in_the_unit_range(tmp_path):
    """The first and third of four flat images per class are used: 0 and 0.4 of one class, 1 and 0.6 of the other."""
    for name, values in (("a", (0, 51, 102, 153)), ("b", (255, 204, 153, 102))):
        (tmp_path / name).mkdir()
        for number, value in enumerate(values):
            Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / name / f"{number}.png")
    found = of_real(tmp_path, 2, 4, 3)
    assert (found["set"], found["images_per_class"]) == (f"real, {tmp_path}", 2)
    assert [found[name] for name in ("spread", "repeats", "apart")] == pytest.approx([0.2, 2, 1.5], rel=1e-5)
    assert found["contrast"] == pytest.approx(0, abs=1e-6)


def test_finished_runs_beside_real_images(tmp_path, capsys):
    assert run(tmp_path, *TINY).code == 0
    (folder,) = tmp_path.glob("runs/*")
    for name in ("a", "b"):
        (tmp_path / "real" / name).mkdir(parents=True)
        for number in range(9):
            Image.linear_gradient("L").resize((9, 9 + number)).convert("RGB").save(
                tmp_path / "real" / name / f"{number}.png"
            )
    main([str(folder), "--real", str(tmp_path / "real"), "--json", str(tmp_path / "made" / "rows.json")])
    kept, real = json.loads((tmp_path / "made" / "rows.json").read_text())
    assert kept["set"] == folder.name and kept["images_per_class"] == real["images_per_class"] == 7
    assert {"loss", "gradient_norm/decoder"} < kept["logged"].keys()
    assert real["contrast"] > 0
    shown = capsys.readouterr().out
    assert folder.name in shown and "gradient_norm/decoder" in shown
    with pytest.raises(DataError, match="has 9 images, fewer than the 10 that are compared"):
        of_real(tmp_path / "real", 10, 8, 3)


def test_an_unfinished_run_is_told(tmp_path):
    with pytest.raises(ArtifactError, match="no finished run there"):
        main([str(tmp_path)])
