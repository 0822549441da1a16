"""Judging a set: when networks are tested, what is reported, and from which seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmn import evaluate as evaluation
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.config import EvaluationConfig
from hmn.data.preprocess import Normalise
from hmn.data.splits import Split
from hmn.errors import Interrupted
from hmn.evaluate import Accuracies, Judge, evaluate, quick_accuracy, recipe_of, tiny_rest
from hmn.network_update import training_step
from hmn.networks.convnet import ConvNet
from hmn.seeding import derived_seed
from hmn.stop import Stop
from hmn.training import Recipe, Training, accuracy

NORMALISE = Normalise((0.5,), (0.25,))
RECIPE = Recipe(
    epochs=4,
    batch=8,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    strategy="color_crop",
    cutmix=0.5,
)


def build() -> ConvNet:
    return ConvNet(1, 3, 8, width=4, depth=1)


def judge(folder: Path, *, seed: int = 0, stop: Stop | None = None, together: int = 1) -> Judge:
    return Judge(
        build=build,
        step=training_step(build(), Compute(torch.device("cpu"))),
        normalise=NORMALISE,
        recipe=RECIPE,
        seed=seed,
        checkpoints=Checkpoints(folder, 1e9, stop),
        together=together,
    )


def images(n: int, seed: int) -> Split:
    stream = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (n, 1, 8, 8), generator=stream, dtype=torch.uint8)
    return Split(pixels, torch.arange(n) % 3)


TRAIN, TEST = images(12, 1), images(90, 2)


# Test points


@pytest.mark.parametrize(
    ("epochs", "points", "tested"),
    [
        (1000, 4, [250, 500, 750, 1000]),  # IDC tests every quarter
        (10, 1, [10]),
        (10, 4, [2, 5, 8, 10]),
        (3, 4, [1, 2, 3]),
        (1, 4, [1]),
    ],
)
def test_networks_are_tested_at_evenly_spaced_epochs(epochs: int, points: int, tested: list[int]):
    assert evaluation.tested_epochs(epochs, points) == tested


@given(st.integers(1, 2000), st.integers(1, 50))
def test_the_last_epoch_is_always_tested_and_no_epoch_twice(epochs: int, points: int):
    tested = evaluation.tested_epochs(epochs, points)
    assert tested[-1] == epochs
    assert tested[0] >= 1
    assert len(tested) == min(epochs, points)
    assert tested == sorted(set(tested))


# What is reported


def test_the_result_is_the_last_epochs_mean_with_the_deviation_over_networks():
    found = Accuracies(by_network=[[0.3, 0.5], [0.9, 0.6], [0.2, 0.1]], test_epochs=[1, 2], seeds=[7, 8, 9])
    assert found.last == [0.5, 0.6, 0.1]
    assert found.mean == pytest.approx(0.4, rel=1e-12)
    assert found.std == pytest.approx(((0.1**2 + 0.2**2 + 0.3**2) / 2) ** 0.5, rel=1e-12)  # ddof 1
    assert found.best_mean == pytest.approx((0.5 + 0.9 + 0.2) / 3, rel=1e-12)


def test_one_network_has_no_deviation():
    assert Accuracies(by_network=[[0.3, 0.5]], test_epochs=[1, 2], seeds=[7]).std is None


def test_the_recipe_is_the_profiles():
    sgd = {"schedule": "multistep", "epochs": 7, "batch": 3, "even_batches": True, "lr": 0.3, "momentum": 0.3}
    config = EvaluationConfig(profile="mine", **sgd, weight_decay=0.1, strategy="flip", cutmix=0.1)
    recipe = recipe_of(config, flip=True)
    names = {field.name for field in dataclasses.fields(Recipe)} - {"rule"}
    assert all(getattr(recipe, name) == getattr(config, name) for name in names)
    assert recipe.rule == "idc"


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [("color_crop_flip_scale_rotate", "color_crop_scale_rotate"), ("flip", "none"), ("crop", "crop"), ("none", "none")],
)
def test_data_whose_classes_a_mirror_changes_are_never_flipped(strategy: str, kept: str):
    config = EvaluationConfig(profile="mine", schedule="cosine", strategy=strategy)
    assert recipe_of(config, flip=False).strategy == kept
    assert recipe_of(config, flip=True).strategy == strategy


@pytest.mark.parametrize(("images", "rest"), [(450, 2), (455, 7), (456, None), (448, None), (63, None), (65, 1)])
def test_a_tiny_last_batch_is_told_with_the_way_out_of_it(images: int, rest: int | None):
    recipe = dataclasses.replace(RECIPE, batch=64)
    told = tiny_rest(images, recipe)
    assert (told is None) == (rest is None)
    if told:
        assert told.startswith(f"{images} images: batches of 64 leave a last one of {rest}, ")
        assert "evaluation.even_batches=true" in told
    assert tiny_rest(images, dataclasses.replace(recipe, even_batches=True)) is None


# Evaluating


def by_hand(seed: int, stream: str, *networks: int, epochs: int = 4) -> list[list[float]]:
    """Test accuracies after every epoch, one list per network, of networks of one stream that are trained together."""
    generators = [torch.Generator().manual_seed(derived_seed(seed, stream, index)) for index in networks]
    recipe = dataclasses.replace(RECIPE, epochs=epochs)
    step = training_step(build(), Compute(torch.device("cpu")))
    run = Training(build, TRAIN.images, TRAIN.labels, recipe, NORMALISE, step, *generators)
    values = []
    while not run.finished:
        run.run_epoch()
        values.append(accuracy(run.network, TEST.images, TEST.labels, NORMALISE).view(-1))
    return torch.stack(values, 1).tolist()


def test_each_network_is_trained_from_its_own_recorded_seed_and_tested_on_the_way(tmp_path: Path):
    found = evaluate(judge(tmp_path), TRAIN, TEST, networks=2, points=2, stream="evaluate")
    assert found.test_epochs == [2, 4]
    assert found.seeds == [derived_seed(0, "evaluate", index) for index in range(2)]
    for index in range(2):
        (points,) = by_hand(0, "evaluate", index)
        assert found.by_network[index] == [points[1], points[3]]


def test_networks_trained_together_are_tested_each_for_itself(tmp_path: Path):
    found = evaluate(judge(tmp_path, together=2), TRAIN, TEST, networks=3, points=2, stream="evaluate")
    assert found.seeds == [derived_seed(0, "evaluate", index) for index in range(3)]
    expected = [*by_hand(0, "evaluate", 0, 1), *by_hand(0, "evaluate", 2)]
    assert found.by_network == [[points[1], points[3]] for points in expected]
    assert len(set(map(tuple, found.by_network))) == 3


def test_networks_differ_by_index_seed_and_stream_and_repeat_for_the_same(tmp_path: Path):
    names = [(0, "evaluate"), (0, "evaluate"), (1, "evaluate"), (0, "other")]
    found = []
    for position, (seed, stream) in enumerate(names):
        folder = tmp_path / str(position)
        found.append(evaluate(judge(folder, seed=seed), TRAIN, TEST, networks=3, points=4, stream=stream))
    assert found[0] == found[1]
    runs = [tuple(points) for one in (found[0], *found[2:]) for points in one.by_network]
    assert len(set(runs)) == 9
    assert len({seed for one in (found[0], *found[2:]) for seed in one.seeds}) == 9


@pytest.mark.parametrize("together", [1, 2])
def test_an_interrupted_evaluation_goes_on_to_the_same_accuracies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
):
    whole = judge(tmp_path / "whole", together=together)
    expected = evaluate(whole, TRAIN, TEST, networks=2, points=4, stream="evaluate")
    stop, run_epoch = Stop(), Training.run_epoch

    def run_and_stop(self: Training) -> list[float]:
        losses = run_epoch(self)
        stop.signum = 10 if self.epoch == 3 else None
        return losses

    monkeypatch.setattr(Training, "run_epoch", run_and_stop)
    sittings = 0
    while True:
        sittings += 1
        try:
            parts = judge(tmp_path / "parts", stop=stop, together=together)
            found = evaluate(parts, TRAIN, TEST, networks=2, points=4, stream="evaluate")
            break
        except Interrupted:
            continue
    assert sittings == 1 + 2 // together
    assert found == expected


def test_a_quick_accuracy_is_one_short_networks(tmp_path: Path):
    found = quick_accuracy(judge(tmp_path, together=3), TRAIN, TEST, 2, "curve_10")
    assert found == by_hand(0, "curve_10", 0, epochs=2)[0][-1]


def test_the_test_images_never_touch_the_training(tmp_path: Path):
    shown = []

    def step(parameters, buffers, batch, weights):
        shown.append(len(batch.inputs))
        return training_step(build(), Compute(torch.device("cpu")))(parameters, buffers, batch, weights)

    watched = dataclasses.replace(judge(tmp_path), step=step)
    evaluate(watched, TRAIN, TEST, networks=1, points=4, stream="evaluate")
    assert shown == [8, 8] * 4  # 12 images: one full and one padded batch in each epoch
