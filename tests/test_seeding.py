"""Named random streams: distinct from each other, and the same in every version of this program."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmn.seeding import derived_seed, generator, set_deterministic

# Kept results name their seeds: a change here makes every one of them irreproducible.
GOLDEN = {
    (0,): 3456079177858693020,
    (1,): 3874038210105081456,
    (0, "split"): 3769940940748469125,
    (0, "container"): 9140204944563087823,
    (0, "condense", "matched_network", 199): 2919685587579186289,
    (0, "evaluate", 3): 2266111937287629357,
    (2**31 - 1, "score", 2): 2043293746698978778,
}


@pytest.mark.parametrize("names", GOLDEN)
def test_seeds_are_the_ones_that_kept_results_were_made_with(names: tuple):
    assert derived_seed(*names) == GOLDEN[names]


def test_streams_are_the_ones_that_kept_results_were_made_with():
    stream = generator(0, "condense", "real")
    assert torch.randint(1000, (6,), generator=stream).tolist() == [272, 260, 718, 889, 797, 768]
    assert torch.rand(2, generator=stream).tolist() == [0.5908617377281189, 0.068661630153656]


@given(st.integers(0, 2**31), st.lists(st.one_of(st.text("abc_", min_size=1), st.integers(0, 99)), max_size=3))
def test_a_seed_fits_63_bits_and_depends_on_nothing_but_its_name(seed: int, names: list):
    value = derived_seed(seed, *names)
    assert 0 <= value < 2**63
    assert derived_seed(seed, *names) == value
    assert generator(seed, *names).initial_seed() == value


def test_every_seed_and_every_name_has_a_stream_of_its_own():
    names = [("evaluate", index) for index in range(20)] + [("condense", name) for name in ("real", "rows", "classes")]
    names += [("evaluate",), (), ("evaluate", 1, 2), ("evaluate", 12)]
    seeds = {derived_seed(seed, *name) for seed in (0, 1, 2, 11) for name in names}
    assert len(seeds) == 4 * len(set(names))
    drawn = {tuple(torch.rand(2, generator=generator(0, *name)).tolist()) for name in names}
    assert len(drawn) == len(set(names))


def test_a_stream_does_not_move_when_another_draws_first():
    alone = torch.rand(3, generator=generator(0, "real"))
    other = generator(0, "augment")
    torch.rand(1000, generator=other)
    torch.manual_seed(3)
    after = generator(0, "real")
    torch.rand(1000, generator=other)
    torch.rand(5)
    assert torch.equal(torch.rand(3, generator=after), alone)


def test_the_deterministic_mode_is_switched_on_and_off():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    before_benchmark, filling = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    try:
        for enabled in (True, False):
            set_deterministic(enabled)
            assert torch.are_deterministic_algorithms_enabled() is enabled
            assert torch.backends.cudnn.deterministic is enabled
            assert torch.backends.cudnn.benchmark is not enabled
            assert torch.utils.deterministic.fill_uninitialized_memory is False
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = filling
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1], before_benchmark
