"""Batches without replacement: what a pass is, which group is shuffled, and that a stored sampler resumes exactly."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from itertools import permutations as all_orders

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn.data.sampling import GroupSampler, per_class, permutations, random_subset, repeated_subset, whole_split
from hmn.errors import DataError

NAMES = ("cat", "dog", "owl")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(*counts: int) -> torch.Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def all_groups(sampler: GroupSampler) -> torch.Tensor:
    return sampler.draw(torch.arange(len(sampler.sizes)))


@st.composite
def draws(draw: st.DrawFn) -> tuple[list[int], int, list[list[int]], int]:
    """Sizes of the groups, a batch that fits the smallest, the groups of successive draws, and a seed."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    batch = draw(st.integers(1, min(sizes)))
    some = st.lists(st.integers(0, len(sizes) - 1), min_size=1, unique=True)
    return sizes, batch, draw(st.lists(some, min_size=1, max_size=12)), draw(st.integers(0, 1000))


@settings(max_examples=150, derandomize=True)
@given(draws())
def test_a_group_gives_no_image_twice_before_its_pass_ends(case):
    sizes, batch, asked, seed = case
    sampler = GroupSampler(torch.tensor(sizes), batch, generator(seed))
    starts = [sum(sizes[:g]) for g in range(len(sizes))]
    seen: list[set[int]] = [set() for _ in sizes]
    for groups in asked:
        found = sampler.draw(torch.tensor(groups))
        assert found.shape == (len(groups), batch)
        for group, row in zip(groups, found.tolist(), strict=True):
            if len(seen[group]) + batch > sizes[group]:  # the rest of the pass is dropped
                seen[group] = set()
            assert all(starts[group] <= index < starts[group] + sizes[group] for index in row)
            assert len(set(row)) == batch and not seen[group] & set(row)
            seen[group] |= set(row)


def test_a_pass_over_a_group_that_the_batch_divides_gives_every_image_once():
    sampler = GroupSampler(torch.tensor([6, 12]), 3, generator())
    for _ in range(3):
        passes = [sampler.draw(torch.tensor([1])).flatten() for _ in range(4)]
        assert sorted(torch.cat(passes).tolist()) == list(range(6, 18))


def test_the_rest_of_a_pass_that_is_smaller_than_the_batch_is_dropped():
    sampler = GroupSampler(torch.tensor([7]), 3, generator())
    orders = set()
    for _ in range(40):
        whole_pass = torch.cat([all_groups(sampler).flatten() for _ in range(2)]).tolist()
        assert len(set(whole_pass)) == 6
        orders.add(tuple(whole_pass))
    assert len(orders) == 40  # every pass is shuffled again
    assert len({order[-1] for order in orders}) == 7  # no image is always the one left out


def test_only_a_group_that_runs_short_is_shuffled():
    sampler = GroupSampler(torch.tensor([4, 9, 5]), 2, generator())
    before = sampler.order.clone()
    for _ in range(2):
        all_groups(sampler)
    assert torch.equal(sampler.order, before)
    sampler.draw(torch.tensor([0, 1]))  # group 0 has used all its 4, group 1 only 4 of 9; group 2 is not drawn from
    assert torch.equal(sampler.order[4:], before[4:])
    assert sorted(sampler.order[:4].tolist()) == [0, 1, 2, 3]
    assert sampler.cursors.tolist() == [2, 6, 4]


def test_large_and_small_classes_go_round_at_their_own_pace():
    sampler = GroupSampler(torch.tensor([2, 50]), 2, generator())
    rows = [all_groups(sampler) for _ in range(25)]
    assert all(sorted(row[0].tolist()) == [0, 1] for row in rows)
    assert sorted(torch.cat([row[1] for row in rows]).tolist()) == list(range(2, 52))


def test_one_group_is_the_whole_split():
    sampler = GroupSampler(torch.tensor([10]), 5, generator())
    whole = torch.zeros(1, dtype=torch.int64)
    assert sorted(torch.cat([sampler.draw(whole), sampler.draw(whole)]).flatten().tolist()) == list(range(10))


def test_a_stored_sampler_goes_on_identically():
    sampler = GroupSampler(torch.tensor([5, 8]), 2, generator(3))
    for _ in range(3):
        all_groups(sampler)
    state = {name: value.clone() for name, value in sampler.state_dict().items()}
    expected = [all_groups(sampler) for _ in range(9)]
    other = GroupSampler(torch.tensor([5, 8]), 2, generator(99))
    other.load_state_dict(state)
    assert torch.equal(torch.stack([all_groups(other) for _ in range(9)]), torch.stack(expected))


def test_going_on_does_not_change_a_state_that_was_taken():
    sampler = GroupSampler(torch.tensor([4]), 2, generator())
    state = sampler.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    for _ in range(5):
        all_groups(sampler)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_permutations_of_several_groups_are_drawn_apart_and_uniformly():
    orders = permutations((700, 2), 3, generator())
    assert orders.shape == (700, 2, 3)
    for position in range(2):
        counts = Counter(map(tuple, orders[:, position].tolist()))
        assert set(counts) == set(all_orders(range(3)))
        assert all(abs(count - 700 / 6) < 50 for count in counts.values())
    same = (orders[:, 0] == orders[:, 1]).all(1).float().mean()
    assert same == pytest.approx(1 / 6, abs=0.06)


def test_one_permutation_is_torchs_own():
    assert torch.equal(permutations((), 50, generator(4)), torch.randperm(50, generator=generator(4)))


def test_batches_per_class_are_of_one_class_each():
    stored = labels(4, 9, 6)
    rows = all_groups(per_class(stored, NAMES, 4, generator()))
    assert stored[rows].tolist() == [[c] * 4 for c in range(3)]


def test_a_class_smaller_than_the_batch_is_named():
    with pytest.raises(DataError) as caught:
        per_class(labels(5, 3, 2), NAMES, 4, generator())
    assert str(caught.value) == ("objective.real_batch=4: class dog has only 3 training images; set it to at most 2")
    with pytest.raises(DataError, match="class owl has only 0 training images"):
        per_class(labels(5, 5), NAMES, 4, generator())  # the last class has no image at all


def test_a_random_subset_is_ordered_by_class_and_distinct():
    stored = labels(5, 40, 7)
    found = random_subset(stored, 5, NAMES, generator())
    assert stored[found].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert len(set(found.tolist())) == 15


def test_every_subset_is_equally_likely():
    stream, tries = generator(), 2000
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(tries):
        found = random_subset(labels(5, 3), 2, NAMES[:2], stream).tolist()
        counts[tuple(sorted(found[:2]))] += 1
    assert set(counts) == set(combinations(range(5), 2))
    margin = 5 * math.sqrt(tries * 0.1 * 0.9)
    assert all(abs(count - tries / 10) < margin for count in counts.values())


@given(images=st.integers(1, 12), batch=st.integers(1, 12), counts=st.lists(st.integers(1, 9), max_size=4))
def test_batches_of_the_whole_split_are_those_that_are_drawn_one_by_one(images, batch, counts):
    whole, single = (whole_split(images, batch, generator()) for _ in range(2))
    for count in counts:
        expected = torch.cat([single.draw(torch.zeros(1, dtype=torch.int64)) for _ in range(count)])
        assert torch.equal(whole.batches(count), expected)
        for name, value in single.state_dict().items():
            assert torch.equal(whole.state_dict()[name], value)


def test_a_class_smaller_than_the_subset_is_named():
    with pytest.raises(DataError) as caught:
        random_subset(labels(10, 9, 11), 10, NAMES, generator())
    assert str(caught.value) == (
        "memory.images_per_class=10: class dog has only 9 training images; set it to at most 9"
    )


def test_a_repeated_subset_of_enough_images_is_a_random_subset():
    stored = labels(6, 9, 7)
    for count in (1, 6):
        assert torch.equal(
            repeated_subset(stored, count, NAMES, generator(1)), random_subset(stored, count, NAMES, generator(1))
        )


def test_a_repeated_subset_goes_through_a_small_class_again():
    stored = labels(3, 9, 5)
    found = repeated_subset(stored, 8, NAMES, generator()).view(3, 8)
    assert stored[found].tolist() == [[c] * 8 for c in range(3)]
    for class_found, size in zip(found.tolist(), (3, 9, 5), strict=True):
        distinct = class_found[: min(size, 8)]
        assert len(set(distinct)) == len(distinct) and class_found == (distinct * 3)[:8]
