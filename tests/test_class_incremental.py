"""Classes condensed step by step: each set holds its step's classes, and all sets are evaluated as one."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hmn import artifacts
from hmn.containers.image import RawImages, RawShape
from hmn.errors import HmnError
from tests.command import TINY, Outcome, planned, run

STEPS = ("dataset.class_order=0", "memory=ipc10")  # RandomState(0).permutation(10) begins with 2 8 4 9
NAMES = ("2", "8", "4", "9")


def result_of(where: Path, outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    (folder,) = [line.split()[-1] for line in outcome.out.splitlines() if line.startswith("run folder: ")]
    return json.loads((where / folder / "result.json").read_text())


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> list[Path]:
    """The run folders of two steps that condense two digits each."""
    where = tmp_path_factory.mktemp("steps")

    def step(first: int) -> Path:
        outcome = run(where, *TINY, *STEPS, f"dataset.class_range=[{first},{first + 2}]")
        return where / "runs" / result_of(where, outcome)["run_id"]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(step, (0, 2)))


def typed(*paths: Path) -> str:
    return f"artifact=[{','.join(map(str, paths))}]"


# Steps that are condensed


def test_a_step_condenses_its_classes_in_their_own_budget(steps):
    for first, folder in zip((0, 2), steps, strict=True):
        kept = artifacts.load_condensed(folder)
        assert kept.card["data"]["class_names"] == list(NAMES[first : first + 2])
        assert kept.card["data"]["name"] == f"digits_classes{first}-{first + 1}"
        assert kept.card["budget"]["floats"] == 2 * 10 * 64 >= kept.container.storage_floats()
        assert set(kept.tensors()[1].tolist()) == {0, 1}
        result = json.loads((folder / "result.json").read_text())
        assert result["data"]["notes"] == [f"2 of 10 classes: {', '.join(NAMES[first : first + 2])}"]


def test_all_steps_so_far_are_evaluated_on_their_classes(steps, tmp_path):
    result = result_of(tmp_path, outcome := run(tmp_path, *TINY, "mode=evaluate", typed(*steps)))
    assert "bit for bit" not in outcome.out  # each set was condensed from exactly these images of its classes
    assert result["run_id"].startswith("digits_classes0-3-evaluate-")
    assert result["data"]["notes"] == [f"4 of 10 classes: {', '.join(NAMES)}"]
    cards = [json.loads((folder / "card.json").read_text()) for folder in steps]
    assert result["artifact_sha256"] == sorted(card["sha256"] for card in cards)
    assert result["stored_floats"] == sum(card["stored_floats"] for card in cards)
    assert result["images_per_class"] == str(cards[0]["container"]["images_per_class"])
    assert len(result["accuracy"]["by_network"]) == 2
    assert result["config"]["dataset"]["class_range"] == [0, 4]
    again = run(tmp_path, *TINY, "mode=evaluate", typed(*steps[::-1]))
    assert f"{result['run_id']} is finished" in again.out


def test_a_single_step_in_a_list_is_that_step(steps, tmp_path):
    alone = planned(*TINY, "mode=evaluate", f"artifact={steps[1]}")
    assert planned(*TINY, "mode=evaluate", typed(steps[1])).run_id == alone.run_id
    assert (alone.config.dataset.class_range, alone.data.classes) == ([2, 4], 2)
    outcome = run(tmp_path, *TINY, "mode=evaluate", typed(steps[1]))
    kept = json.loads((steps[1] / "result.json").read_text())
    result = result_of(tmp_path, outcome)
    assert result["accuracy"] == kept["accuracy"]
    assert result["artifact_sha256"] == kept["artifact_sha256"]


REFUSED = {
    "dataset.class_range=[0,6]": "its classes are not those of digits_classes0-5: only one of the two has 1, 6",
    "dataset.class_range=[0,3]": "its classes are not those of digits_classes0-2: only one of the two has 9",
    "dataset=digits": "its classes are not those of digits: only one of the two has 0, 1, 3, 5, 6, 7",
}


@pytest.mark.parametrize("override", REFUSED)
def test_data_of_other_classes_are_refused_in_one_line(steps, tmp_path, override):
    outcome = run(tmp_path, *TINY, "mode=evaluate", typed(*steps), override)
    assert outcome.code == 2
    assert outcome.complaint == f"artifact={steps[0]},{steps[1]}: {REFUSED[override]}"


# Sets that are made by hand


def toy(path: Path) -> Path:
    random = np.random.default_rng(0)
    patterns = random.integers(0, 200, (4, 8, 8))
    arrays = {}
    for split in ("train", "test"):
        labels = np.arange(4).repeat(20)
        arrays[f"x_{split}"] = (patterns[labels] + random.integers(0, 56, (len(labels), 8, 8))).astype(np.uint8)
        arrays[f"y_{split}"] = labels
    np.savez(path, **arrays)
    return path


def keep(folder: Path, images: torch.Tensor, names: list[str], root: Path, **changes: Any) -> Path:
    """Save ``images`` (len(names) * n, 1, 8, 8), ordered by class, as a set; ``changes`` alter its dataset settings."""
    container = RawImages(RawShape(classes=len(names), channels=1, image_size=8), len(images) // len(names))
    container.hold(images)
    dataset = {"kind": "arrays", "root": str(root), "channels": 1, "flip": False, "mean": [0.4], "std": [0.3]}
    data = {"class_names": names, "channels": 1, "image_size": 8, "mean": [0.4], "std": [0.3]}
    data |= {"fingerprint": "of other images", "config": dataset | changes}
    artifacts.save(folder, container, {"budget": {"floats": 10**6}, "data": data})
    return folder


@pytest.fixture
def images() -> torch.Tensor:
    """Random pixels (class, image, channel, height, width)."""
    return torch.rand(4, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_parts_are_worth_what_the_whole_is(tmp_path, images):
    """However they are split into sets, the same images train the same networks."""
    root = toy(tmp_path / "toy.npz")
    whole = keep(tmp_path / "whole", images.flatten(0, 1), list("0123"), root)
    odd = keep(tmp_path / "odd", images[[3, 1]].flatten(0, 1), ["3", "1"], root)
    even = keep(tmp_path / "even", images[[0, 2]].flatten(0, 1), ["0", "2"], root)
    results = []
    for number, artifact in enumerate((f"artifact={whole}", typed(odd, even))):
        where = tmp_path / str(number)
        where.mkdir()
        outcome = run(where, *TINY, "mode=evaluate", artifact, "evaluation.epochs=3")
        assert "toy is not bit for bit the data this set was condensed from" in outcome.out
        results.append(result_of(where, outcome))
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["stored_floats"] == results[1]["stored_floats"]
    assert results[0]["run_id"] != results[1]["run_id"]


def test_sets_may_hold_unequally_many_images(tmp_path, images):
    root = toy(tmp_path / "toy.npz")
    many = keep(tmp_path / "many", images[:2].flatten(0, 1), ["0", "1"], root)
    few = keep(tmp_path / "few", images[2:, :2].flatten(0, 1), ["2", "3"], root)
    result = result_of(tmp_path, run(tmp_path, *TINY, "mode=evaluate", typed(many, few)))
    assert (result["images_per_class"], result["stored_floats"]) == ("2-3", (6 + 4) * 64)


@pytest.mark.parametrize(
    ("spans", "whole"),
    [(([0, 2], [2, 4]), [0, 4]), (([2, 4], [0, 2]), [0, 4]), ((None, [0, 2]), None), ((None, None), None)],
)
def test_the_data_are_those_of_the_first_to_the_last_class(tmp_path, images, spans, whole):
    root = toy(tmp_path / "toy.npz")
    parts = [
        keep(tmp_path / name, images[:2].flatten(0, 1), [name, f"not {name}"], root, class_range=span)
        for name, span in zip("ab", spans, strict=True)
    ]
    assert planned("mode=evaluate", typed(*parts)).config.dataset.class_range == whole
    given = planned("mode=evaluate", typed(*parts), "dataset.class_range=[1,3]", "dataset.held_out_fraction=0.3")
    expected = {"class_range": [1, 3], "held_out_fraction": 0.3, "mean": [0.4]}
    assert {name: getattr(given.config.dataset, name) for name in expected} == expected


def complaint(*overrides: str) -> str:
    with pytest.raises(HmnError) as caught:
        planned("mode=evaluate", *overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_sets_that_do_not_go_together_are_refused_before_data_are_read(tmp_path, images):
    root = tmp_path / "toy.npz"  # does not exist
    pixels = images[:2].flatten(0, 1)
    first = keep(tmp_path / "a", pixels, ["0", "1"], root)
    other = keep(tmp_path / "b", pixels, ["2", "3"], root, class_order=1, mean=[0.1])
    said = complaint(typed(first, other))
    which = "dataset.class_order, dataset.mean must match"
    assert said == f"artifact={other}: {which} artifact={first}; or name the dataset with dataset=NAME"
    same = keep(tmp_path / "c", pixels, ["3", "1"], root)
    assert complaint(typed(first, same)).startswith(f"artifact={same}: has class 1, as does artifact={first};")
    assert complaint(typed(first, tmp_path)).startswith(f"artifact={tmp_path}: no condensed.safetensors there")
    toy(root)
    digits = ("dataset=digits", "dataset.image_size=16")
    assert complaint(typed(first, other), *digits) == f"dataset.image_size=16: must be 8, as in artifact={first}"
    assert planned("mode=evaluate", typed(first, other), "dataset=digits").config.dataset.kind == "digits"
