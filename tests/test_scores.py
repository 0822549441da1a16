"""Scores of real images: margins and forgetting by hand, features of trained networks, and resuming after a stop."""

from __future__ import annotations

import dataclasses
import math
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hmn import coresets
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.config.containers import CoresetConfig
from hmn.coresets import choose
from hmn.data.preprocess import Normalise
from hmn.data.sampling import random_subset
from hmn.data.splits import Split
from hmn.errors import ArtifactError, DataError, Interrupted
from hmn.evaluate import Judge
from hmn.files import held
from hmn.network_update import training_step
from hmn.networks import Builder
from hmn.networks.convnet import ConvNet
from hmn.networks.resnet import ResNet
from hmn.scores import SLOT, cached, difficulty, features, networks_of, trained_weights
from hmn.seeding import generator
from hmn.stop import Stop
from hmn.training import Recipe, logits_of

NORMALISE = Normalise((0.5,), (0.25,))
RECIPE = Recipe(
    epochs=100,
    batch=4,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    strategy="color_crop",
    cutmix=0.5,
)
NAMES = ("a", "b", "c")
METHODS = ("random", "herding", "k_center", "k_means", "ccs", "aum", "forgetting")


def convnet() -> ConvNet:
    return ConvNet(1, 3, 8, width=4, depth=1)


def resnet() -> ResNet:
    return ResNet(1, 3, 9, blocks=(1, 1, 1, 1), width=2, norm="batch")


def judge(folder: Path, seed: int = 0, together: int = 1, stop: Stop | None = None, build: Builder = convnet) -> Judge:
    return Judge(
        build=build,
        step=training_step(build(), Compute(torch.device("cpu"))),
        normalise=NORMALISE,
        recipe=RECIPE,
        seed=seed,
        checkpoints=Checkpoints(folder, 1e9, stop),
        together=together,
    )


def images(per_class: int = 4, side: int = 8) -> Split:
    """Random uint8 images, ordered by class."""
    pixels = torch.randint(0, 256, (3 * per_class, 1, side, side), generator=generator(0, "images"), dtype=torch.uint8)
    return Split(pixels, torch.arange(3).repeat_interleave(per_class))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# By hand


class Script(nn.Module):
    """A network, or several together, with prescribed logits of all images for every epoch."""

    def __init__(self, by_epoch: Tensor) -> None:
        super().__init__()
        self.by_epoch, self.epoch = by_epoch, 0

    def forward(self, _images: Tensor) -> Tensor:
        assert not self.training
        return self.by_epoch[self.epoch - 1]


class ScriptedTraining:
    def __init__(self, by_epoch: Tensor, recipe: Recipe, networks: int) -> None:
        self.network, self.recipe, self.networks = Script(by_epoch), recipe, networks

    @property
    def epoch(self) -> int:
        return self.network.epoch

    @property
    def finished(self) -> bool:
        return self.epoch == self.recipe.epochs

    def run_epoch(self) -> list[float]:
        self.network.epoch += 1
        return [0.0] * self.networks

    def state_dict(self) -> dict[str, int]:
        return {}


# Logits of class 0 for four images of that class. Class 1 has 0, so above 0 is right. Networks by images by epochs.
OWN_LOGITS = torch.tensor(
    [
        # always right; forgotten once; forgotten twice; never right
        [[1, 1, 1, 1, 1], [-1, 1, -1, 1, 1], [1, -1, 1, -1, -1], [-1, -2, -3, -4, -5]],
        [[2, 2, 2, 2, 2], [1, 1, 1, 1, 1], [-1, -1, 1, -1, -1], [-1, -1, -1, -1, 1]],
    ]
).float()
EVENTS = [[0, 1, 2, 5], [0, 0, 1, 0]]  # an image that is never right has as many events as epochs


def scripted(folder: Path, together: int) -> SimpleNamespace:
    asked = []

    def training(_train: Split, recipe: Recipe, stream: str, networks: range) -> ScriptedTraining:
        asked.append((recipe, stream, networks))
        own = OWN_LOGITS[networks.start : networks.stop].movedim(2, 0)[..., None]  # (epochs, networks, images, 1)
        by_epoch = torch.cat([own, torch.zeros_like(own)], -1)
        return ScriptedTraining(by_epoch if len(networks) > 1 else by_epoch[:, 0], recipe, len(networks))

    judge = SimpleNamespace(
        recipe=RECIPE,
        normalise=lambda x: x,
        checkpoints=Checkpoints(folder, 1e9),
        training=training,
        together=together,
        asked=asked,
    )
    judge.train = partial(Judge.train, judge)
    return judge


@pytest.mark.parametrize(("together", "groups"), [(1, [range(0, 1), range(1, 2)]), (2, [range(0, 2)])])
def test_margins_and_forgetting_events_by_hand(tmp_path, together, groups):
    stub = scripted(tmp_path, together)
    train = Split(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64))
    found = difficulty(stub, train, networks=2, epochs=5)
    assert found["forgetting"].tolist() == [sum(events) / 2 for events in zip(*EVENTS, strict=True)]
    torch.testing.assert_close(found["logit_margin"], OWN_LOGITS.mean((0, 2)))
    # With two classes, p_y - p_other = tanh(margin / 2).
    by_hand = [sum(math.tanh(float(x) / 2) for x in OWN_LOGITS[:, i].flatten()) / 2 for i in range(4)]
    torch.testing.assert_close(found["softmax_margin"], torch.tensor(by_hand))
    recipe = dataclasses.replace(RECIPE, epochs=5, cutmix=0.0)
    assert stub.asked == [(recipe, SLOT, group) for group in groups]


# By training


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize(("build", "side", "width"), [(convnet, 8, 64), (resnet, 9, 16)])
def test_features_are_what_the_classifier_of_each_trained_network_sees(tmp_path, together, build, side, width):
    train = images(side=side)
    networks = networks_of(build, trained_weights(judge(tmp_path, together=together, build=build), train, 2, epochs=2))
    joined = features(networks, train.images, NORMALISE)
    assert joined.shape == (12, 2 * width)
    for network, own in zip(networks, joined.split(width, 1), strict=True):
        torch.testing.assert_close(network.classifier(own), logits_of(network, train.images, NORMALISE))
    assert not torch.equal(*joined.split(width, 1))


@pytest.mark.parametrize(("build", "side"), [(convnet, 8), (resnet, 9)])
def test_networks_whose_features_are_taken_have_been_trained_by_the_recipe_with_cutmix(tmp_path, build, side):
    """This includes the running statistics of batch norm."""
    train, work = images(side=side), judge(tmp_path, build=build)
    (network,) = networks_of(build, trained_weights(work, train, networks=1, epochs=2))
    training = work.training(train, dataclasses.replace(RECIPE, epochs=2), SLOT, range(1))
    while not training.finished:
        training.run_epoch()
    expected = training.network.state_dict()
    assert expected.keys() == network.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


class StopAfter(Stop):
    """Asks to stop after ``epochs`` epochs."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.left = epochs

    @property
    def signum(self) -> int | None:
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None

    @signum.setter
    def signum(self, value: int | None) -> None:
        pass


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_an_interrupted_pass_goes_on_as_if_it_had_not_been(tmp_path, epochs):
    train = images()
    uninterrupted = difficulty(judge(tmp_path / "whole"), train, networks=2, epochs=3)
    with pytest.raises(Interrupted):
        difficulty(judge(tmp_path / "halves", stop=StopAfter(epochs)), train, networks=2, epochs=3)
    assert (tmp_path / "halves" / f"{SLOT}.pt").exists()
    assert same(difficulty(judge(tmp_path / "halves"), train, networks=2, epochs=3), uninterrupted)


# Keeping


def test_what_was_made_once_is_read_the_next_time(tmp_path):
    made = {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor([3, 4])}
    path, calls = tmp_path / "cache" / "made.safetensors", []

    def make() -> dict[str, Tensor]:
        calls.append(held(path.with_suffix("")))  # other runs wait for the lock
        return made

    for _ in range(2):
        found = cached(path, make, torch.device("cpu"), Stop())
        assert found.keys() == made.keys()
        assert all(torch.equal(found[name], made[name]) for name in made)
    assert calls == [True]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "made.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtifactError, match="made.safetensors: not a safetensors file .*; remove it"):
        cached(tmp_path / "made.safetensors", dict, torch.device("cpu"), Stop())


# Choosing


def coreset(method: str) -> CoresetConfig:
    trains = {} if method == "random" else {"networks": 1, "epochs": 2}
    cuts = {"hard_cut": 0.3, "bins": 5} if method == "ccs" else {}
    return CoresetConfig(name="coreset", method=method, **trains, **cuts)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_as_many_of_each_class_and_repeats_itself(tmp_path, method):
    train = images()
    chosen = choose(judge(tmp_path / "1"), train, NAMES, 2, coreset(method), tmp_path / "cache 1")
    assert chosen.shape == (6,) and len(chosen.unique()) == 6
    assert train.labels[chosen].tolist() == [0, 0, 1, 1, 2, 2]
    for other in ("cache 1", "cache 2"):
        again = choose(judge(tmp_path / other / "run"), train, NAMES, 2, coreset(method), tmp_path / other)
        assert torch.equal(chosen, again)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_with_too_few_images_is_named_before_anything_is_trained(tmp_path, method):
    train = images()
    fewer = Split(train.images[:-1], train.labels[:-1])
    with pytest.raises(DataError, match="memory.images_per_class=4: class c has only 3 training images"):
        choose(judge(tmp_path), fewer, NAMES, 4, coreset(method), tmp_path)
    assert not list(tmp_path.iterdir())


def test_random_images_are_those_of_the_reference(tmp_path):
    train = images(20)
    expected = random_subset(train.labels, 5, NAMES, generator(7, "random_subset"))
    assert torch.equal(choose(judge(tmp_path, seed=7), train, NAMES, 5, coreset("random"), tmp_path), expected)


@pytest.mark.parametrize(("method", "expected"), [("herding", [2, 3]), ("k_center", [0, 3]), ("k_means", [1, 4])])
def test_each_method_that_looks_at_features_makes_its_own_choice(tmp_path, monkeypatch, method, expected):
    """The mean is 6.5; the clusters are {0, 1, 2} and {10, 11, 15} with centres 1 and 12, whatever the seeds.

    Herding takes 10 and then 2, the nearest to 13 - 10; k-center takes 10 and then 0, the farthest from it.
    """
    monkeypatch.setattr("hmn.coresets.cached", lambda *_: {})
    monkeypatch.setattr("hmn.coresets.features", lambda _networks, images, _normalise: images.flatten(1))
    own = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 15.0])
    train = Split(torch.cat([own, own + 100]).view(-1, 1, 1, 1), torch.arange(2).repeat_interleave(6))
    chosen = choose(judge(tmp_path), train, ("a", "b"), 2, coreset(method), tmp_path).tolist()
    assert sorted(chosen[:2]) == expected
    assert sorted(chosen[2:]) == [6 + index for index in expected]


@pytest.mark.parametrize(("method", "expected"), [("aum", [0, 2]), ("forgetting", [1, 2]), ("ccs", [0, 3])])
def test_the_hardest_images_are_kept_but_ccs_cuts_them_by_another_score(tmp_path, monkeypatch, method, expected):
    scores = {
        "logit_margin": torch.tensor([-1.0, 1.0, 3.0, 4.0]),
        "softmax_margin": torch.tensor([9.0, -9.0, -9.0, 9.0]),
        "forgetting": torch.tensor([0.0, 2.0, 5.0, 1.0]),
    }
    monkeypatch.setattr("hmn.coresets.difficulty", lambda *_: scores)
    train = Split(torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 1, 1]))
    assert choose(judge(tmp_path), train, ("a", "b"), 1, coreset(method), tmp_path).tolist() == expected


@pytest.mark.parametrize(("method", "learn"), [("herding", "trained_weights"), ("aum", "difficulty")])
def test_as_many_networks_learn_for_as_long_as_was_asked_for(tmp_path, monkeypatch, method, learn):
    real, asked = getattr(coresets, learn), []
    monkeypatch.setattr(coresets, learn, lambda *given: asked.append(given[2:4]) or real(*given))
    settings = dataclasses.replace(coreset(method), networks=2, epochs=1)
    choose(judge(tmp_path), images(), NAMES, 2, settings, tmp_path)
    assert asked == [(2, 1)]


def test_ccs_cuts_and_bins_as_configured(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(coresets, "cached", lambda *_: {"softmax_margin": torch.zeros(12)})
    monkeypatch.setattr(coresets, "ccs", lambda *_, hard_cut, bins, generator: seen.append((hard_cut, bins)))
    choose(judge(tmp_path), images(), NAMES, 2, dataclasses.replace(coreset("ccs"), hard_cut=0.4, bins=7), tmp_path)
    assert seen == [(0.4, 7)]
