"""How redundant a saved set is: which images are left out, resuming a killed measurement, and its picture."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import redundancy
from hmn import artifacts, session
from hmn.config.containers import HabaConfig
from hmn.containers.base import Container, decode_all
from hmn.containers.haba import Haba, HabaShape
from hmn.containers.image import RawImages, RawShape
from hmn.errors import ArtifactError
from hmn.evaluate import Accuracies
from hmn.prune import kept_after
from hmn.tracking import METRICS_FILE, read_metrics
from tests.command import ROOT, TINY, Outcome, planned, run, session_of, start

SHAPE = {"classes": 3, "channels": 1, "image_size": 8}
MODE = (*TINY, "mode=redundancy", "pruning.score_epochs=2", "pruning.score_networks=1", "evaluation.networks=2")
KEPT_HERE = ROOT / "experiments" / "redundancy"


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
    """Two bases in three styles: six images of every class, none of which can be left out alone."""
    container = Haba(HabaShape(**SHAPE, base_channels=1, styles=3), 2)
    container.initialise(torch.Generator().manual_seed(0), HabaConfig(name="haba", init="noise"), None)
    return container


def keep(folder: Path, container: Container, toy: Path, names: tuple[str, ...] = ("0", "1", "2"), **card: Any) -> Path:
    dataset = {"kind": "arrays", "root": str(toy), "channels": 1, "flip": False, "mean": [0.5], "std": [0.25]}
    data = {"class_names": list(names), "channels": 1, "image_size": 8, "mean": [0.5], "std": [0.25]}
    data |= {"config": dataset, "fingerprint": "of other images"}
    artifacts.save(folder, container, {"budget": {"floats": 10**6}, "data": data, **card})
    return folder


def result_of(where: Path) -> dict[str, Any]:
    (path,) = where.glob("runs/*/result.json")
    return json.loads(path.read_text())


def row(outcome: Outcome, name: str) -> list[str]:
    """The cells of the printed table's row ``name``."""
    (line,) = [line for line in outcome.out.splitlines() if line.startswith(f"{name}  ")]
    return re.split(r"\s{2,}", line)


@pytest.mark.parametrize(
    ("count", "share", "left"), [(10, 0.0, 10), (10, 0.3, 7), (7, 0.5, 4), (1, 0.9, 1), (100, 0.29, 71)]
)
def test_a_share_is_dropped_so_that_rather_more_is_left(count, share, left):
    assert kept_after(count, share) == left


@pytest.mark.parametrize(("make", "counts"), [(raw, [5, 4, 1]), (haba, [6, 5, 2])])
def test_a_set_is_measured_share_by_share(tmp_path, toy, make, counts):
    kept = keep(tmp_path / "kept", make(), toy)
    where = tmp_path / "where"
    where.mkdir()
    outcome = run(where, *MODE, f"artifact={kept}", "redundancy.drop=[0,0.2,0.8]")
    assert outcome.code == 0, outcome.err
    result = result_of(where)
    assert result["run_id"].startswith("toy-redundancy-")
    assert [found["dropped"] for found in result["rows"]] == [0.0, 0.2, 0.8]
    assert [found["images_per_class"] for found in result["rows"]] == counts
    for found, name in zip(result["rows"], ("without 0 %", "without 20 %", "without 80 %"), strict=True):
        assert len(found["by_network"]) == 2
        assert found["mean"] == pytest.approx(np.mean(found["by_network"]))
        assert found["std"] == pytest.approx(np.std(found["by_network"], ddof=1))
        accuracy = f"{100 * found['mean']:.2f} ± {100 * found['std']:.2f}"
        assert row(outcome, name)[1:4] == [str(found["images_per_class"]), f"{result['stored_floats']:,}", accuracy]
    whole = result["accuracy"]
    assert [whole["mean"], whole["std"], [points[-1] for points in whole["by_network"]]] == [
        result["rows"][0][key] for key in ("mean", "std", "by_network")
    ]
    assert (result["mode"], result["set"], result["images_per_class"]) == ("redundancy", make().NAME, str(counts[0]))
    assert result["artifact_sha256"] == artifacts.sha256(kept / artifacts.TENSORS)
    assert result["stored_floats"] == make().storage_floats()
    assert set(result["wall_seconds"]) == {"score", "evaluate"}
    (folder,) = (where / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {".lock", "config.yaml", "metrics.jsonl", "result.json"}


def test_the_easiest_images_of_every_class_are_dropped(tmp_path, toy, monkeypatch):
    container = raw()
    images, _ = decode_all(container)
    scores = torch.tensor([[5.0, 1, 4, 2, 3], [1, 2, 3, 4, 5], [-1, -2, -3, -5, -4]])
    monkeypatch.setattr(session.prune, "area_under_margin", lambda *_: scores.flatten())
    seen = []

    def evaluate(judge, train, _test, networks, _points, stream):
        seen.append((train, stream, judge.normalise.mean.item(), judge.normalise.std.item()))
        return Accuracies(by_network=[[0.5]] * networks, test_epochs=[1], seeds=[0] * networks)

    monkeypatch.setattr(session, "evaluate", evaluate)
    kept = keep(tmp_path / "kept", container, toy, coreset={"method": "herding"})
    plan = planned(*MODE, f"artifact={kept}", "redundancy.drop=[0.4,0]", "dataset.mean=[0.25]", "dataset.std=[0.5]")
    (tmp_path / "run").mkdir()
    found = session_of(plan, tmp_path / "run").redundancy()
    (dropped, first, *normalised), (whole, second, *_) = seen
    expected = [1, 3, 4, 5, 6, 7, 12, 13, 14]  # without the two highest scores of each class
    assert torch.equal(dropped.images, images[expected])
    assert dropped.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert torch.equal(whole.images, images)
    assert first != second  # otherwise the second would be read from the first one's checkpoint
    assert normalised == [0.5, 0.25]  # the card's: the set was condensed for it
    assert (found["images_per_class"], found["set"]) == ("3", "coreset herding")


def without_time(where: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    result = result_of(where)
    for name in ("wall_seconds", "peak_bytes", "commit", "dirty"):
        result.pop(name)
    (folder,) = (where / "runs").iterdir()
    return result, read_metrics(folder / METRICS_FILE)


def test_a_measurement_that_was_killed_in_every_stage_ends_as_if_it_had_not_been(tmp_path, toy):
    kept = keep(tmp_path / "kept", raw(), toy)
    settings = ("evaluation.epochs=12", "pruning.score_epochs=12", "compute.checkpoint_every_seconds=0")
    given = (*MODE, *settings, f"artifact={kept}", "redundancy.drop=[0,0.6]")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for where in (undisturbed, killed):
        where.mkdir()
    assert run(undisturbed, *given).code == 0
    for slot in ("score", "keep_5", "keep_2"):
        command = start(killed, *given)
        command.wait_for(lambda slot=slot: any(killed.glob(f"runs/*/checkpoints/{slot}.pt")))
        command.process.kill()
        assert command.finish().code == 128 + signal.SIGKILL
    assert run(killed, *given).code == 0
    assert without_time(killed) == without_time(undisturbed)
    steps = [record["redundancy/step"] for record in without_time(killed)[1] if "redundancy/step" in record]
    assert steps == [0, 1]


def test_classes_of_other_data_are_refused(tmp_path, toy):
    kept = keep(tmp_path / "kept", raw(), toy, names=("cat", "dog", "2"))
    outcome = run(tmp_path, *MODE, f"artifact={kept}")
    assert outcome.code == 2
    told = "its classes are not those of toy: only one of the two has 0, 1, cat, dog"
    assert outcome.complaint == f"artifact={kept}: {told}"


# The picture


def test_runs_and_older_files_are_drawn_together(tmp_path):
    older = KEPT_HERE / "hmn_ipc1" / "redundancy.json"
    folder = tmp_path / "run"
    folder.mkdir()
    measured = json.loads(older.read_text())
    rows = [found | {"mean": found["mean"] / 2} for found in measured["rows"]]
    (folder / "result.json").write_text(json.dumps(measured | {"schema_version": 1, "set": "another", "rows": rows}))
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    redundancy.main([str(one), str(older)])
    redundancy.main([str(two), str(older), str(folder)])
    assert one.read_bytes() != two.read_bytes()
    with Image.open(two) as picture:
        assert picture.width > 300


def test_percents_of_accuracy_are_drawn_over_percents_left_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    rows = [{"dropped": 0.0, "mean": 0.5, "std": 0.02}, {"dropped": 0.3, "mean": 0.25, "std": None}]
    rows = [found | {"images_per_class": count} for found, count in zip(rows, (7, 5), strict=True)]
    redundancy.draw([{"set": "hmn", "rows": rows, "data": {"name": "digits"}, "network": "N"}], tmp_path / "a.png")
    ((line, _, (whiskers,)),) = drawn[0].containers
    assert line.get_xdata().tolist() == pytest.approx([0, 30]) and line.get_ydata().tolist() == pytest.approx([50, 25])
    assert whiskers.get_segments()[0][:, 1].tolist() == pytest.approx([48, 52])
    assert drawn[0].containers[0].get_label() == "hmn, 7 images per class"


@pytest.mark.parametrize("other", [{"data": {"name": "cifar10"}}, {"network": "VGG16"}])
def test_what_was_measured_on_others_is_not_drawn_under_the_same_title(tmp_path, other):
    rows = [{"dropped": 0.0, "mean": 0.5, "std": 0.02, "images_per_class": 7}]
    one = {"set": "hmn", "rows": rows, "data": {"name": "digits"}, "network": "N"}
    with pytest.raises(ArtifactError, match=r"^idc: measured on .*, not digits, N: draw it separately$"):
        redundancy.draw([one, one | {"set": "idc"} | other], tmp_path / "a.png")


def test_what_was_not_measured_so_cannot_be_drawn(tmp_path):
    for name, text, reason in (("a", "{", "not JSON"), ("b", '{"mode": "run"}', "has no rows"), ("c", "[]", "no rows")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ArtifactError, match=reason) as caught:
            redundancy.main([str(tmp_path / "x.png"), str(tmp_path / name)])
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ArtifactError, match="result.json: does not exist"):
        redundancy.main([str(tmp_path / "x.png"), str(tmp_path)])
