"""Double-end pruning (HMN): margins and AUM by hand, which instances go, and how beta is chosen."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hmn import prune
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.data.preprocess import Normalise
from hmn.data.splits import Split
from hmn.evaluate import Judge
from hmn.network_update import training_step
from hmn.networks.convnet import ConvNet
from hmn.prune import area_under_margin, candidates, hardest_count, kept_images, search_beta
from hmn.scores import margins
from hmn.seeding import derived_seed
from hmn.training import Recipe, Training, logits_of

NORMALISE = Normalise((0.5,), (0.25,))
RECIPE = Recipe(
    epochs=100,
    batch=4,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    strategy="color_crop",
    cutmix=0.5,
)


def build() -> ConvNet:
    return ConvNet(1, 3, 8, width=4, depth=1)


def judge(folder: Path, seed: int = 0, together: int = 1) -> Judge:
    return Judge(
        build=build,
        step=training_step(build(), Compute(torch.device("cpu"))),
        normalise=NORMALISE,
        recipe=RECIPE,
        seed=seed,
        checkpoints=Checkpoints(folder, 1e9),
        together=together,
    )


# Margins


def test_margins_of_four_images():
    """Right, wrong, a tie with the runner-up, and a tie of two others."""
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [5.0, 0.0, 5.0], [-1.0, -1.0, -4.0]])
    labels = torch.tensor([0, 1, 2, 2])
    assert margins(logits, labels).tolist() == [1.0, -2.0, 0.0, -3.0]


def test_a_margin_ignores_nothing_but_the_own_class():
    assert margins(torch.tensor([[-9.0, -8.0]]), torch.tensor([1])).tolist() == [1.0]


def test_margins_of_several_networks_are_those_of_each():
    logits, labels = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1, 2, 2])
    assert torch.equal(margins(logits, labels), torch.stack([margins(one, labels) for one in logits]))


# AUM


class Script(nn.Module):
    """A network with prescribed logits of four images for every epoch."""

    def __init__(self, by_epoch: Tensor) -> None:
        super().__init__()
        self.by_epoch = by_epoch
        self.epoch = 0

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.by_epoch[self.epoch - 1][: len(images)]


class ScriptedTraining:
    """A stand-in for a :class:`Training` whose network gives prescribed logits."""

    def __init__(self, by_epoch: Tensor, recipe: Recipe) -> None:
        self.network, self.recipe = Script(by_epoch), recipe

    @property
    def epoch(self) -> int:
        return self.network.epoch

    @property
    def finished(self) -> bool:
        return self.epoch == self.recipe.epochs

    def run_epoch(self) -> list[float]:
        self.network.epoch += 1
        return [0.0]

    def state_dict(self) -> dict[str, int]:
        return {}


# Two networks, two epochs, four images, two classes.
SCRIPTS = torch.tensor(
    [
        [[[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [3.0, 1.0]], [[4.0, 0.0], [0.0, 1.0], [0.0, 0.0], [5.0, 1.0]]],
        [[[1.0, 1.0], [2.0, 1.0], [0.0, 6.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 3.0], [0.0, 2.0], [1.0, 9.0]]],
    ]
)
LABELS = torch.tensor([0, 0, 1, 1])
MARGINS = [[[2, 1, 0, -2], [4, -1, 0, -4]], [[0, 1, 6, 0], [1, -3, 2, 8]]]  # by hand, network by epoch by image


def scripted(folder: Path) -> SimpleNamespace:
    asked = []

    def training(train: Split, recipe: Recipe, stream: str, networks: range) -> ScriptedTraining:
        asked.append((recipe, stream, networks))
        return ScriptedTraining(SCRIPTS[networks.start], recipe)

    judge = SimpleNamespace(
        recipe=RECIPE,
        normalise=lambda x: x,
        checkpoints=Checkpoints(folder, 1e9),
        training=training,
        asked=asked,
        seed=0,
        together=1,
    )
    judge.train = partial(Judge.train, judge)
    return judge


DECODED = Split(torch.zeros(4, 1, 2, 2), LABELS)


def test_logit_margins_are_averaged_over_epochs_and_networks(tmp_path: Path):
    found = area_under_margin(scripted(tmp_path), DECODED, "logit_margin", networks=2, epochs=2)
    expected = [sum(MARGINS[n][e][i] for n in range(2) for e in range(2)) / 4 for i in range(4)]
    assert found.tolist() == expected == [1.75, -0.5, 2.0, 0.5]


def test_softmax_margins_are_summed_over_epochs_and_averaged_over_networks(tmp_path: Path):
    found = area_under_margin(scripted(tmp_path), DECODED, "softmax_margin", networks=2, epochs=2)
    # With two classes, p_y - p_other = tanh(margin / 2). CCS sums probabilities over epochs.
    expected = [sum(math.tanh(MARGINS[n][e][i] / 2) for n in range(2) for e in range(2)) / 2 for i in range(4)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_scoring_trains_by_the_judges_recipe_for_its_own_epochs_and_without_cutmix(tmp_path: Path):
    stub = scripted(tmp_path)
    area_under_margin(stub, DECODED, "logit_margin", networks=2, epochs=2)
    recipe = dataclasses.replace(RECIPE, epochs=2, cutmix=0.0)
    assert stub.asked == [(recipe, "score", range(1)), (recipe, "score", range(1, 2))]


@pytest.mark.parametrize(("together", "groups"), [(1, [(0,), (1,), (2,)]), (2, [(0, 1), (2,)])])
def test_scores_are_those_of_networks_trained_on_the_decoded_images(tmp_path: Path, together, groups):
    """The whole path against a plain loop: margins of unaugmented images after every epoch."""
    stream = torch.Generator().manual_seed(3)
    decoded = Split(torch.rand(9, 1, 8, 8, generator=stream), torch.arange(9) % 3)
    found = area_under_margin(judge(tmp_path, together=together), decoded, "logit_margin", networks=3, epochs=3)
    expected = torch.zeros(9)
    for group in groups:
        seeded = [torch.Generator().manual_seed(derived_seed(0, "score", index)) for index in group]
        recipe = dataclasses.replace(RECIPE, epochs=3, cutmix=0.0)
        step = judge(tmp_path / "unused").step
        run = Training(build, decoded.images, decoded.labels, recipe, NORMALISE, step, *seeded)
        for _ in range(3):
            run.run_epoch()
            for logits in logits_of(run.network, decoded.images, NORMALISE).view(-1, 9, 3):
                for i, label in enumerate(decoded.labels.tolist()):
                    others = [float(logits[i, k]) for k in range(3) if k != label]
                    expected[i] += float(logits[i, label]) - max(others)
    torch.testing.assert_close(found, expected / 9, rtol=1e-5, atol=1e-6)


def test_random_scores_depend_on_the_seed_alone(tmp_path: Path):
    decoded = [Split(torch.full((6, 1, 8, 8), value), torch.arange(6) % 3) for value in (0.0, 1.0)]

    def scores(seed: int, images: Split) -> list[float]:
        return area_under_margin(judge(tmp_path, seed), images, "random", networks=1, epochs=1).tolist()

    assert scores(0, decoded[0]) == scores(0, decoded[1])
    assert len(set(scores(0, decoded[0]) + scores(1, decoded[0]))) == 12
    assert not list(tmp_path.iterdir())  # nothing was trained


# Which instances go


def test_of_24_the_7_hardest_and_17_easiest_go_at_beta_03():
    """HMN's P2: 231 images per class condensed, 207 kept, k = 24; floor(0.3 * 24) = 7."""
    scores = torch.randperm(231, generator=torch.Generator().manual_seed(0)).float()
    kept = kept_images(scores[None], 207, beta=0.3)
    assert len(kept) == 207
    assert sorted(scores[kept].tolist()) == list(range(7, 231 - 17))


@pytest.mark.parametrize(("beta", "gone"), [(0.0, [5, 6, 7, 8, 9]), (1.0, [0, 1, 2, 3, 4]), (0.4, [0, 1, 7, 8, 9])])
def test_beta_0_cuts_only_easy_images_and_1_only_hard_ones(beta: float, gone: list[int]):
    kept = kept_images(torch.arange(10.0)[None], 5, beta)
    assert sorted(set(range(10)) - set(kept.tolist())) == gone


@pytest.mark.parametrize("cut", range(1, 121))
def test_the_hard_share_is_the_exact_floor_whatever_float_arithmetic_says(cut: int):
    """Integers decide: 0.3 * 10 and 0.7 * 10 are 3 and 7, and 0.7 * 90 is 63, though 62.99999999999999 in floats."""
    assert [hardest_count(beta, cut) for beta in prune.BETAS] == [tenths * cut // 10 for tenths in range(11)]


def test_float_error_would_be_off_by_one_without_the_guard():
    assert int((0.1 + 0.7) * 10) == 7  # 7.999999999999999
    assert hardest_count(0.1 + 0.7, 10) == 8
    assert int(0.29 * 100) == 28
    assert hardest_count(0.29, 100) == 29


def test_ties_go_by_index_the_same_in_every_class():
    # Equal scores sort by index: the hard end takes the first ones, the easy end the last ones.
    kept = kept_images(torch.zeros(3, 40), 30, beta=0.3)
    expected = [row * 40 + i for row in range(3) for i in range(3, 33)]
    assert kept.tolist() == expected


def test_each_class_is_cut_by_its_own_scores():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [40.0, 10.0, 30.0, 20.0]])
    assert kept_images(scores, 2, beta=0.5).tolist() == [1, 2, 4 + 2, 4 + 3]


def test_nothing_goes_where_nothing_must():
    assert kept_images(torch.rand(2, 5), 5, beta=0.3).tolist() == list(range(10))


def naive_kept(scores: list[list[float]], keep: int, tenths: int) -> list[int]:
    kept = []
    for label, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda i: (row[i], i))
        cut = len(row) - keep
        for _ in range(tenths * cut // 10):
            order.pop(0)
        while len(order) > keep:
            order.pop()
        kept += [label * len(row) + i for i in sorted(order)]
    return kept


@given(st.data())
def test_kept_instances_are_sorted_class_balanced_and_those_of_a_naive_loop(data: st.DataObject):
    classes, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    keep, tenths = data.draw(st.integers(1, count)), data.draw(st.integers(0, 10))
    value = st.integers(-3, 3).map(float)  # few values: many ties
    scores = data.draw(st.lists(st.lists(value, min_size=count, max_size=count), min_size=classes, max_size=classes))
    kept = kept_images(torch.tensor(scores), keep, prune.BETAS[tenths])
    assert torch.bincount(kept // count, minlength=classes).tolist() == [keep] * classes
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert kept.tolist() == naive_kept(scores, keep, tenths)


# The search for beta


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (1, [0.0, 1.0]),
        (2, [0.0, 0.5, 1.0]),
        (4, [0.0, 0.3, 0.5, 0.8, 1.0]),
        (9, [0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        (10, list(prune.BETAS)),
        (24, list(prune.BETAS)),
    ],
)
def test_only_betas_that_cut_differently_are_tried(cut: int, expected: list[float]):
    assert candidates(cut) == expected


def test_the_grid_has_eleven_clean_tenths():
    assert [str(beta) for beta in prune.BETAS] == [f"{tenths / 10}" for tenths in range(11)]
    assert all(len(str(beta)) == 3 for beta in prune.BETAS)


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ({0.0: 0.2, 0.3: 0.5, 0.5: 0.4, 0.8: 0.3, 1.0: 0.1}, 0.3),
        ({0.0: 0.2, 0.3: 0.1, 0.5: 0.4, 0.8: 0.3, 1.0: 0.4}, 0.5),  # a tie: the smaller
        ({0.0: 0.2, 0.3: 0.2, 0.5: 0.2, 0.8: 0.2, 1.0: 0.2}, 0.0),
        ({0.0: 0.2, 0.3: 0.1, 0.5: 0.4, 0.8: 0.3, 1.0: 0.7}, 1.0),
    ],
)
def test_the_best_beta_on_held_out_images_wins_and_ties_go_to_the_smaller(
    monkeypatch: pytest.MonkeyPatch, accuracies: dict[float, float], best: float
):
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    decoded = Split(torch.arange(12.0), torch.arange(12) // 6)  # one number stands for an image
    asked: dict[str, Split] = {}

    def quick_accuracy(judge: str, train: Split, held_out: str, epochs: int, stream: str, slot: str) -> float:
        assert (judge, held_out, epochs, stream) == ("judge", "held out", 30, "search_beta")
        asked[slot] = train
        return accuracies[float(slot.removeprefix("search_beta_"))]

    monkeypatch.setattr(prune, "quick_accuracy", quick_accuracy)
    found, searched = search_beta("judge", decoded, scores, 2, "held out", 30)
    assert found == best
    assert searched == accuracies
    for beta, stream in zip(accuracies, asked, strict=True):
        kept = kept_images(scores, 2, beta)
        assert asked[stream].images.tolist() == kept.tolist()
        assert asked[stream].labels.tolist() == (kept // 6).tolist()


def test_the_search_trains_every_candidate_once(tmp_path: Path):
    """Nothing is replaced: each candidate's subset trains one short network, which is tested on held-out images."""
    stream = torch.Generator().manual_seed(0)
    decoded = Split(torch.rand(12, 1, 8, 8, generator=stream), torch.arange(12) // 4)
    held_out = Split(torch.rand(30, 1, 8, 8, generator=stream), torch.arange(30) % 3)
    scores = torch.rand(3, 4, generator=stream)
    beta, searched = search_beta(judge(tmp_path), decoded, scores, 2, held_out, epochs=2)
    assert list(searched) == [0.0, 0.5, 1.0]
    assert searched[beta] == max(searched.values())
    assert all(value * 30 == pytest.approx(round(value * 30), abs=1e-4) for value in searched.values())
    assert search_beta(judge(tmp_path / "again"), decoded, scores, 2, held_out, epochs=2) == (beta, searched)
