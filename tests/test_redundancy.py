"""How redundant a kept set is: which images are dropped, and what a small set of real digits gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import redundancy
from hmn import artifacts
from hmn.config.containers import HabaConfig
from hmn.containers.base import Container
from hmn.containers.haba import Haba, HabaShape
from hmn.containers.image import RawImages, RawShape
from hmn.errors import DataError
from hmn.evaluate import Accuracies

SHAPE = {"classes": 3, "channels": 1, "image_size": 8}
TINY = (
    *("network.width=4", "pruning.score_epochs=1", "pruning.score_networks=1", "evaluation.epochs=1"),
    *("evaluation.networks=2", "compute.threads=1", "compute.device=cpu"),
)


@pytest.fixture(autouse=True)
def the_mode_of_the_process_stays():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("test", 6)):
        arrays[f"x_{split}"] = draw.integers(0, 256, (3 * count, 8, 8), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(3).repeat(count)
    np.savez(path, **arrays)
    return path


def raw(count: int = 5) -> RawImages:
    container = RawImages(RawShape(**SHAPE), count)
    container.hold(torch.rand(3 * count, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    return container


def haba() -> Haba:
    """Two bases in three styles: six images of every class, none of which can go alone."""
    container = Haba(HabaShape(**SHAPE, base_channels=1, styles=3), 2)
    container.initialise(torch.Generator().manual_seed(0), HabaConfig(name="haba", init="noise"), None)
    return container


def keep(folder: Path, container: Container, toy: Path, names: tuple[str, ...] = ("0", "1", "2")) -> Path:
    dataset = {"kind": "arrays", "root": str(toy), "channels": 1, "flip": False, "mean": [0.5], "std": [0.25]}
    data = {"class_names": list(names), "channels": 1, "image_size": 8, "mean": [0.5], "std": [0.25], "config": dataset}
    artifacts.save(folder, container, {"budget": {"floats": 10**6}, "data": data})
    return folder


@pytest.mark.parametrize(
    ("count", "share", "left"), [(10, 0.0, 10), (10, 0.3, 7), (7, 0.5, 4), (1, 0.9, 1), (100, 0.29, 71)]
)
def test_a_share_is_dropped_so_that_rather_more_is_left(count, share, left):
    assert redundancy.kept_after(count, share) == left


@pytest.mark.parametrize(("make", "counts"), [(raw, [5, 4, 1]), (haba, [6, 5, 2])])
def test_a_set_is_measured_drawn_and_leaves_no_checkpoints(tmp_path, toy, make, counts):
    kept = keep(tmp_path / "kept", make(), toy)
    output = tmp_path / "out"
    redundancy.main([str(kept), str(output), "--drop", "0,0.2,0.8", *TINY])
    drawn = (output / "redundancy.png").read_bytes()
    measured = json.loads((output / redundancy.FILE).read_text())
    assert [row["images_per_class"] for row in measured["rows"]] == counts
    for row in measured["rows"]:
        assert row["mean"] == pytest.approx(np.mean(row["by_network"]))
        assert row["std"] == pytest.approx(np.std(row["by_network"], ddof=1))
    assert measured["set"] == make().NAME
    assert measured["score"] == {"score": "logit_margin", "score_networks": 1, "score_epochs": 1}
    assert set(measured["wall_seconds"]) == {"score", "evaluate"}
    assert {path.name for path in output.iterdir()} == {".lock", redundancy.FILE, "redundancy.png"}
    with Image.open(output / "redundancy.png") as picture:
        assert picture.width > 300
    redundancy.draw([measured, measured | {"set": "another"}], output / "redundancy.png")
    assert (output / "redundancy.png").read_bytes() != drawn


def test_a_measurement_is_drawn_beside_others(tmp_path, toy, monkeypatch):
    other = tmp_path / "other.json"
    other.write_text('{"set": "other"}')
    monkeypatch.setattr(redundancy, "measure", lambda *_: {"set": "own"})
    drawn = []
    monkeypatch.setattr(redundancy, "draw", lambda measured, _: drawn.extend(measured))
    redundancy.main([str(keep(tmp_path / "kept", raw(), toy)), str(tmp_path), "--beside", str(other), *TINY])
    assert drawn == [{"set": "own"}, {"set": "other"}]


def test_the_easiest_images_of_every_class_are_dropped(tmp_path, toy, monkeypatch):
    container = raw()
    images, _ = artifacts.decode_all(container)
    scores = torch.tensor([[5.0, 1, 4, 2, 3], [1, 2, 3, 4, 5], [-1, -2, -3, -5, -4]])
    monkeypatch.setattr(redundancy, "area_under_margin", lambda *_: scores.flatten())
    seen = []

    def evaluate(_judge, train, _test, networks, _points, stream):
        seen.append((train, stream))
        return Accuracies(by_network=[[0.5]] * networks, test_epochs=[1], seeds=[0] * networks)

    monkeypatch.setattr(redundancy, "evaluate", evaluate)
    redundancy.main([str(keep(tmp_path / "kept", container, toy)), str(tmp_path / "out"), "--drop", "0.4,0", *TINY])
    (dropped, first), (whole, second) = seen
    expected = [1, 3, 4, 5, 6, 7, 12, 13, 14]  # the two highest of each class are gone
    assert torch.equal(dropped.images, images[expected])
    assert dropped.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert torch.equal(whole.images, images)
    assert first != second  # or the second would be read back from the first one's checkpoint


def test_classes_of_other_data_are_refused(tmp_path, toy):
    kept = keep(tmp_path / "kept", raw(), toy, names=("cat", "dog", "cow"))
    with pytest.raises(DataError, match="its classes are not those of toy"):
        redundancy.main([str(kept), str(tmp_path / "out"), *TINY])


@pytest.mark.parametrize("text", ["1", "0,-0.1", "half"])
def test_a_share_that_leaves_nothing_is_refused(tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        redundancy.main([str(tmp_path), str(tmp_path / "out"), f"--drop={text}"])
    assert "--drop" in capsys.readouterr().err
