"""Coresets: every selection against a naive loop and by hand, and properties that hold for any data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn.coresets import ccs, herding, highest, k_center, stratified

HUNDRED = settings(max_examples=100, derandomize=True)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(seed: int, n: int, d: int = 3) -> Tensor:
    return torch.randn(n, d, generator=stream(seed), dtype=torch.float64)


# By features


def naive_herding(rows: list[list[float]], count: int) -> list[int]:
    """Choose each time the x with the least || (k + 1) * mu - sum of the chosen - x ||, number by number."""
    n, d = len(rows), len(rows[0])
    mu = [sum(row[j] for row in rows) / n for j in range(d)]
    chosen: list[int] = []
    for k in range(count):
        lengths = {}
        for i in range(n):
            if i not in chosen:
                rest = [(k + 1) * mu[j] - sum(rows[c][j] for c in chosen) - rows[i][j] for j in range(d)]
                lengths[i] = math.sqrt(sum(value**2 for value in rest))
        chosen.append(min(lengths, key=lengths.__getitem__))
    return chosen


def naive_k_center(rows: list[list[float]], count: int) -> list[int]:
    n, d = len(rows), len(rows[0])
    mu = [sum(row[j] for row in rows) / n for j in range(d)]
    chosen = [min(range(n), key=lambda i: math.dist(rows[i], mu))]
    while len(chosen) < count:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(math.dist(rows[i], rows[c]) for c in chosen)))
    return chosen


@pytest.mark.parametrize(("select", "naive"), [(herding, naive_herding), (k_center, naive_k_center)])
@HUNDRED
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), data=st.data())
def test_greedy_choices_are_those_of_a_naive_loop(select, naive, seed, n, data):
    count = data.draw(st.integers(1, n))
    rows = points(seed, n)
    assert select(rows, count).tolist() == naive(rows.tolist(), count)


def test_herding_keeps_the_mean_of_the_chosen_at_the_mean_of_all():
    """The mean is 3, so the target sums are 3, 6 and 9. By distance to the mean alone, 0 would come before 6.5."""
    rows = torch.tensor([[0.0], [2.0], [3.5], [6.5]])
    assert herding(rows, 3).tolist() == [2, 1, 3]  # 3.5; then the nearest to 2.5; then to 3.5: 6.5 and not 0
    assert herding(rows, 4).tolist() == [2, 1, 3, 0]


def test_k_center_starts_in_the_middle_and_goes_to_the_edges():
    rows = torch.tensor([[0.0], [4.0], [5.0], [10.0], [11.0]])  # mean 6
    assert k_center(rows, 3).tolist() == [2, 4, 0]


@pytest.mark.parametrize("select", [herding, k_center])
def test_copies_are_chosen_once_each(select):
    rows = torch.ones(5, 2)
    assert sorted(select(rows, 5).tolist()) == [0, 1, 2, 3, 4]


def test_features_are_not_normalised_to_length_one():
    """On the unit circle, the first image would be the nearest to the mean."""
    rows = torch.tensor([[10.0, 0.0], [10.0, 1.0], [0.5, -0.5], [-9.0, 0.0]])
    assert herding(torch.nn.functional.normalize(rows), 1).tolist() == [0]
    assert herding(rows, 1).tolist() == k_center(rows, 1).tolist() == [2]


# By scores


@HUNDRED
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(1, 9), min_size=2, max_size=4), data=st.data())
def test_the_highest_of_every_class(seed, counts, data):
    count = data.draw(st.integers(1, min(counts)))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=stream(seed))]
    scores = torch.randint(0, 4, (len(labels),), generator=stream(seed + 1)).float()  # ties, as in forgetting events
    chosen = highest(scores, labels, count, stream(seed))
    assert labels[chosen].tolist() == [label for label in range(len(counts)) for _ in range(count)]
    assert len(chosen.unique()) == len(chosen)
    for label in range(len(counts)):
        best = scores[labels == label].sort(descending=True).values[:count]
        assert torch.equal(scores[chosen[labels[chosen] == label]], best)


def test_ties_go_at_random_and_by_seed():
    scores, labels = torch.zeros(100), torch.zeros(100, dtype=torch.int64)
    drawn = [highest(scores, labels, 5, stream(seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != [0, 1, 2, 3, 4]


def budgets(sizes: list[int], count: int) -> list[int]:
    """CCS, algorithm 1: of the bins left, the smallest gives min(size, floor(images left to give / bins left))."""
    given, left = [0] * len(sizes), set(range(len(sizes)))
    while left:
        smallest = min(left, key=lambda b: (sizes[b], b))
        given[smallest] = min(sizes[smallest], (count - sum(given)) // len(left))
        left.remove(smallest)
    return given


def bins_of(scores: list[float], bins: int) -> list[int]:
    low, high = min(scores), max(scores)
    if low == high:
        return [bins - 1] * len(scores)
    return [max(b for b in range(bins) if s >= low + (high - low) * b / bins) for s in scores]


@HUNDRED
@given(
    scores=st.lists(st.integers(-30, 30), min_size=1, max_size=40),
    bins=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_bins_give_what_the_literal_algorithm_says(scores, bins, seed, data):
    count = data.draw(st.integers(1, len(scores)))
    chosen = stratified(torch.tensor(scores).float(), count, bins, stream(seed)).tolist()
    assert len(set(chosen)) == len(chosen) == count
    which = bins_of(scores, bins)
    sizes = [which.count(b) for b in range(bins)]
    found = [sum(which[i] == b for i in chosen) for b in range(bins)]
    # Bins of equal size may swap places, and their budgets with them.
    assert sorted(zip(sizes, found, strict=True)) == sorted(zip(sizes, budgets(sizes, count), strict=True))


def test_four_bins_by_hand():
    """7 images from bins of sizes 1, 6, 0 and 3: 0 of the 0; 1 of the 1, though 2 may go; 3 of the 3; 3 of the 6."""
    scores = torch.tensor([-8.0, -7, -7, -7, -6.5, -6.5, -6.5, -4.5, -4.25, -4.0])  # bins of width 1 from -8
    chosen = stratified(scores, 7, 4, stream())
    which = torch.tensor([0, 1, 1, 1, 1, 1, 1, 3, 3, 3])[chosen]
    assert torch.bincount(which, minlength=4).tolist() == [1, 3, 0, 3]


def test_the_largest_score_can_be_chosen_even_if_it_is_negative():
    """With an upper edge of 1.0001 * max, it would be outside of every bin."""
    assert sorted(stratified(torch.tensor([-3.0, -2.0, -1.0]), 3, 50, stream()).tolist()) == [0, 1, 2]


def test_images_of_a_bin_are_drawn_uniformly():
    scores = torch.zeros(4)
    drawn = [int(stratified(scores, 1, 50, stream(seed))) for seed in range(400)]
    counts = [drawn.count(i) for i in range(4)]
    assert all(70 < count < 130 for count in counts)


def slow_ccs_pool(scores: list[float], labels: list[int], count: int, cut: int) -> list[set[int]]:
    """What each class is sampled from: all but the ``cut`` hardest of the set, always with its ``count`` easiest."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    pools = []
    for label in sorted(set(labels)):
        members = [i for i in order if labels[i] == label]
        pools.append({i for i in members if i not in order[:cut]} | set(members[len(members) - count :]))
    return pools


@HUNDRED
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(2, 12), min_size=2, max_size=4),
    percent=st.integers(0, 99),
    bins=st.integers(1, 6),
    data=st.data(),
)
def test_ccs_samples_every_class_from_what_the_cut_of_the_whole_set_leaves(seed, counts, percent, bins, data):
    count = data.draw(st.integers(1, min(counts)))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    scores = torch.randint(-9, 9, (len(labels),), generator=stream(seed)).float()
    options = {"hard_cut": percent / 100, "bins": bins}
    chosen = ccs(scores, labels, count, **options, generator=stream(seed))
    assert torch.equal(chosen, ccs(scores, labels, count, **options, generator=stream(seed)))
    assert labels[chosen].tolist() == [label for label in range(len(counts)) for _ in range(count)]
    assert len(chosen.unique()) == len(chosen)
    pools = slow_ccs_pool(scores.tolist(), labels.tolist(), count, percent * len(labels) // 100)
    for label, pool in enumerate(pools):
        own = chosen[labels[chosen] == label].tolist()
        assert set(own) <= pool
        ordered = sorted(pool)
        which = dict(zip(ordered, bins_of([float(scores[i]) for i in ordered], bins), strict=True))
        sizes = [sum(b == bin_ for b in which.values()) for bin_ in range(bins)]
        found = [sum(which[i] == bin_ for i in own) for bin_ in range(bins)]
        assert sorted(zip(sizes, found, strict=True)) == sorted(zip(sizes, budgets(sizes, count), strict=True))


def test_the_cut_is_of_the_whole_set_and_not_of_each_class():
    """Class 0 has all the hard images and loses half of its own; class 1 loses none."""
    labels = torch.tensor([0] * 4 + [1] * 4)
    scores = torch.tensor([-4.0, -3, -2, -1, 1, 2, 3, 4])
    kept = set()
    for seed in range(40):
        kept |= set(ccs(scores, labels, 1, hard_cut=0.25, bins=1, generator=stream(seed)).tolist())
    assert kept == {2, 3, 4, 5, 6, 7}


def test_the_cut_is_not_lost_to_rounding():
    """In floating point, 0.29 * 100 is 28.999999999999996."""
    scores, labels = torch.arange(100.0), torch.zeros(100, dtype=torch.int64)
    chosen = ccs(scores, labels, 71, hard_cut=0.29, bins=1, generator=stream())
    assert sorted(chosen.tolist()) == list(range(29, 100))
