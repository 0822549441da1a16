"""``container=coreset``: chosen real images are saved and evaluated like condensed ones, and a kill changes nothing."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hmn
from hmn.config.containers import CORESET_METHODS
from hmn.data import datasets
from hmn.data.preprocess import unit_range
from hmn.errors import ConfigError
from hmn.plan import make_plan
from hmn.seeding import generator
from tests.command import TINY, Outcome, configured, planned, run, start

SCORED = ("container.epochs=2", "evaluation.networks=2")
KEPT = {"card.json", "config.yaml", "metrics.jsonl", "result.json"}  # beside the tensors and their picture
CONDENSING = ("objective.inner_steps=9", "pruning.over_budget=0.2", "evaluation.curve_points=5")
TRAINED = [method for method in CORESET_METHODS if method != "random"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    """Overrides for three classes of grey noise with 30 training images each."""
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("test", 10)):
        arrays[f"x_{split}"] = draw.integers(0, 256, (3 * count, 8, 8), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(3).repeat(count)
    np.savez(path, **arrays)
    shape = ("dataset=arrays", "dataset.channels=1", f"dataset.root={path}", "memory.images_per_class=4")
    return (*TINY, *shape, "container=coreset")


def folder_of(where: Path, *arguments: str) -> Path:
    return where / planned(*arguments).folder


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def finish(where: Path, *arguments: str) -> Outcome:
    outcome = run(where, *arguments)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, data) -> dict[str, Path]:
    """The run folder of every method but random; they share what they learn from the full training set."""
    where = tmp_path_factory.mktemp("methods")
    for method in TRAINED:
        finish(where, *data, *SCORED, f"container.method={method}")
    return {method: folder_of(where, *data, *SCORED, f"container.method={method}") for method in TRAINED}


@pytest.fixture(scope="module")
def at_random(tmp_path_factory, data) -> Path:
    where = tmp_path_factory.mktemp("random")
    finish(where, *data)
    return folder_of(where, *data)


@pytest.mark.parametrize("method", TRAINED)
def test_a_coreset_is_kept_with_the_real_images_that_its_card_names(chosen, data, method):
    config = configured(*data)
    real = datasets.load(config.dataset, Path(config.paths.data_dir), generator(0, "split"))
    kept = hmn.load_condensed(chosen[method])
    images, labels = kept.tensors()
    card = kept.card["coreset"]
    assert (card["method"], card["networks"], card["epochs"]) == (method, 1, 2)
    assert (card["hard_cut"], card["bins"]) == ((0.3, 50) if method == "ccs" else (None, None))
    assert kept.card["data"]["fingerprint"] == real.fingerprint
    assert torch.equal(images, unit_range(real.train.images[card["index"]]))
    assert labels.tolist() == real.train.labels[card["index"]].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(card["index"])) == 12
    assert not {"objective", "pruning"} & set(kept.card)


@pytest.mark.parametrize("method", TRAINED)
def test_its_result_is_that_of_a_container_that_fills_the_budget(chosen, method):
    result = read(chosen[method], "result")
    assert result["stored_floats"] == result["budget_floats"] == 4 * 3 * 8 * 8
    assert (result["mode"], result["images_per_class"]) == ("run", "4")
    assert len(result["accuracy"]["by_network"]) == 2
    assert set(result["wall_seconds"]) == {"choose", "evaluate"}
    names = {path.name for path in chosen[method].iterdir() if path.name[0] != "."}
    assert names == {f"condensed.{end}" for end in ("safetensors", "png")} | KEPT


def test_methods_choose_different_images(chosen):
    found = {tuple(sorted(read(folder, "card")["coreset"]["index"])) for folder in chosen.values()}
    assert len(found) == len(TRAINED)


def test_methods_that_learn_the_same_from_the_full_set_learn_it_once(chosen):
    """Features come from networks trained with CutMix, margins from networks trained without it."""
    (folder,) = (chosen["herding"].parents[1] / ".cache" / "coresets").iterdir()
    assert {path.name for path in folder.glob("*.safetensors")} == {"difficulty.safetensors", "weights.safetensors"}


def test_random_images_and_their_accuracy_are_those_of_the_reference(at_random, data, tmp_path):
    outcome = finish(tmp_path, *data, "mode=random_subset")
    assert "random real subset" in outcome.out
    reference = folder_of(tmp_path, *data, "mode=random_subset")
    assert read(at_random, "result")["accuracy"] == read(reference, "result")["accuracy"]
    assert (at_random / "condensed.png").read_bytes() == (reference / "condensed.png").read_bytes()


def test_a_choice_that_was_killed_while_networks_trained_goes_on(chosen, data, tmp_path):
    arguments = (*data, *SCORED, "container.method=forgetting", "compute.checkpoint_every_seconds=0")
    arguments += ("evaluation.epochs=60",)  # so that enough are left when the evaluation is seen to have begun
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(whole, *arguments)
    folder = folder_of(tmp_path, *arguments)
    for slot in ("coreset", "evaluate"):
        command = start(tmp_path, *arguments)
        command.wait_for((folder / "checkpoints" / f"{slot}.pt").exists)
        command.process.kill()
        assert command.finish().code == 128 + signal.SIGKILL
        assert not (folder / "result.json").exists()
    finish(tmp_path, *arguments)
    for name in ("condensed.safetensors", "condensed.png"):
        assert (folder / name).read_bytes() == (chosen["forgetting"] / name).read_bytes()
    for key in ("coreset", "evaluation"):
        assert read(folder, "card")[key] == read(folder_of(whole, *arguments), "card")[key]
    assert not (folder / "checkpoints").exists()


# Plans


def test_what_a_coreset_does_not_use_is_named_by_the_plan_and_stays_out_of_its_id(data):
    plan = planned(*data, "mode=plan")
    summary = plan.summary()
    assert summary["stored_floats"] == summary["budget_floats"]
    assert (summary["images_per_class"], summary["over_budget_images_per_class"]) == (4, 4)
    assert summary["not_used"] == "objective, pruning, evaluation.curve_points"
    assert not {"matching_steps", "matching_step_flops", "network_update_flops"} & set(summary)
    assert planned(*data, *CONDENSING).run_id == plan.run_id
    config = plan.config
    for section, change in (
        ("container", {"method": "herding"}),
        ("network", {"width": 5}),
        ("evaluation", {"epochs": 3}),
    ):
        changed = replace(config, **{section: replace(getattr(config, section), **change)})
        assert make_plan(changed).run_id != plan.run_id


def test_nothing_need_be_held_out_where_nothing_is_selected(data):
    """The pruning share and the curve of a condensation are judged on held-out images."""
    assert planned(*data, "dataset.held_out_fraction=0", "evaluation.curve_points=3").storage.instances == 4


def test_a_condensation_still_depends_on_what_a_coreset_does_not_use():
    assert len({planned(*TINY, *used).run_id for used in ((), *([one] for one in CONDENSING))}) == 1 + len(CONDENSING)


def test_what_a_method_does_not_use_is_filled_in_for_the_others_only(data):
    config = configured(*data)

    def filled(method: str) -> tuple[Any, ...]:
        container = make_plan(replace(config, container=replace(config.container, method=method))).config.container
        return (container.networks, container.epochs, container.hard_cut, container.bins)

    assert filled("random") == (None, None, None, None)
    assert filled("ccs") == (1, 200, 0.3, 50)
    for method in set(CORESET_METHODS) - {"random", "ccs"}:
        assert filled(method) == (1, 200, None, None)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("container.networks=3", "container.networks=3: must be null: container.method=random trains no network"),
        ("container.epochs=3", "container.epochs=3: must be null: container.method=random trains no network"),
        ("container.bins=9", "container.bins=9: must be null: only container.method=ccs uses it"),
        ("container.method=best", f"container.method=best: must be one of {', '.join(CORESET_METHODS)}"),
        (
            "+container.lr_scale.instances=2",
            "container.lr_scale={'instances': 2.0}: must be empty: nothing is condensed",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(data, override, line):
    with pytest.raises(ConfigError) as caught:
        configured(*data, override)
    assert str(caught.value) == line


def test_choosing_counts_for_whether_compiling_pays(data):
    """Before any image is read, the plan assumes 5,000 images per class, a tenth of them held out."""
    without, chosen = (planned(*data, f"container.method={method}") for method in ("random", "herding"))
    assert chosen.expected_flops - without.expected_flops == 200 * 3 * 4500 * chosen.training_flops
