"""k-means against plain loops over samples, and what every clustering must satisfy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn.data.kmeans import k_means, lloyd, nearest_to_centres, seeds


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int, f: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, f, generator=generator(seed), dtype=torch.float64)


def naive_lloyd(features: list[list[float]], centres: list[list[float]]) -> tuple[list[list[float]], list[int]]:
    """Lloyd's iterations until no sample changes its cluster, for starts that leave no cluster empty."""

    def squared(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    before = None
    while True:
        assigned = [min(range(len(centres)), key=lambda c: squared(x, centres[c])) for x in features]
        clusters = [[x for x, a in zip(features, assigned, strict=True) if a == c] for c in range(len(centres))]
        centres = [[sum(axis) / len(members) for axis in zip(*members, strict=True)] for members in clusters]
        if assigned == before:
            return centres, assigned
        before = assigned


@pytest.mark.parametrize("seed", range(4))
def test_iterations_are_those_of_the_plain_loop(seed):
    features = points(40, seed=seed)
    start = features[seeds(features, 5, generator(seed))]
    expected_centres, expected = naive_lloyd(features.tolist(), start.tolist())
    centres, assigned = lloyd(features, start)
    assert assigned.tolist() == expected
    torch.testing.assert_close(centres, torch.tensor(expected_centres, dtype=torch.float64), rtol=0, atol=1e-12)


def test_separate_clusters_are_found_and_their_middles_picked():
    stream = generator()
    middles = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]])
    around = torch.randn(4, 9, 2, generator=stream)
    around[:, 4] = 0.01  # one sample at the centre, up to the mean of the others
    around -= around.mean(1, keepdim=True)
    features = (middles[:, None] + around).flatten(0, 1)
    centres, assigned = k_means(features, 4, generator(1))
    assert torch.equal(centres[assigned].round(), middles.repeat_interleave(9, 0))
    picked = nearest_to_centres(features, 4, generator(1))
    nearest = [9 * group + int(around[group].norm(dim=1).argmin()) for group in range(4)]
    assert sorted(picked.tolist()) == nearest


@settings(max_examples=80, derandomize=True)
@given(st.integers(1, 12), st.data(), st.integers(0, 1000))
def test_no_cluster_is_empty_and_nobody_is_picked_twice_even_among_copies(n, data, seed):
    k = data.draw(st.integers(1, n))
    few = data.draw(st.lists(st.integers(-1, 1), min_size=2 * n, max_size=2 * n))  # many equal samples
    features = torch.tensor(few, dtype=torch.float32).view(n, 2)
    centres, assigned = k_means(features, k, generator(seed))
    assert sorted(set(assigned.tolist())) == list(range(k))
    for cluster in range(k):
        torch.testing.assert_close(centres[cluster], features[assigned == cluster].mean(0), rtol=0, atol=1e-6)
    picked = nearest_to_centres(features, k, generator(seed))
    assert len(set(picked.tolist())) == k and picked.min() >= 0 and picked.max() < n
    assert assigned[picked].tolist() == list(range(k))


def test_an_empty_cluster_takes_the_sample_farthest_from_its_centre():
    features = torch.tensor([[0.0], [1.0], [5.0], [40.0]])
    # All but the last are nearest to the centre 0; the farthest of these samples moves to the empty cluster.
    centres, assigned = lloyd(features, torch.tensor([[0.0], [1000.0], [40.0]]), iterations=1)
    assert assigned.tolist() == [0, 0, 1, 2]
    assert centres.tolist() == [[0.5], [5.0], [40.0]]


def test_a_sample_that_is_alone_in_its_cluster_does_not_leave_it():
    features = torch.tensor([[0.0], [1.0], [30.0]])  # 30 is the farthest from its centre, 50
    _, assigned = lloyd(features, torch.tensor([[0.0], [1000.0], [50.0]]), iterations=1)
    assert assigned.tolist() == [0, 1, 2]


def test_seeds_are_drawn_by_squared_distance():
    # From 0: 1 with probability 1/10, 3 with 9/10; the first seed is uniform.
    features = torch.tensor([[0.0], [1.0], [3.0]])
    stream = generator()
    pairs = [tuple(seeds(features, 2, stream).tolist()) for _ in range(3000)]
    from_zero = [second for first, second in pairs if first == 0]
    assert len(from_zero) == pytest.approx(1000, abs=100)
    assert from_zero.count(2) / len(from_zero) == pytest.approx(0.9, abs=0.03)


def test_a_clustering_depends_on_the_generator_alone():
    features = points(60)
    first, again = (nearest_to_centres(features, 7, generator(3)) for _ in range(2))
    assert torch.equal(first, again)
    others = {tuple(sorted(nearest_to_centres(features, 7, generator(seed)).tolist())) for seed in range(5)}
    assert len(others) > 1


def test_as_many_clusters_as_samples_are_all_samples():
    assert sorted(nearest_to_centres(points(6), 6, generator()).tolist()) == list(range(6))


def test_more_clusters_than_samples_are_refused():
    with pytest.raises(ValueError, match="3 samples cannot make 4 clusters"):
        k_means(points(3), 4, generator())


@pytest.mark.parametrize("seed", range(5))
def test_seeds_among_copies_are_different_samples(seed):
    drawn = seeds(torch.zeros(4, 2), 4, torch.Generator().manual_seed(seed))
    assert sorted(drawn.tolist()) == [0, 1, 2, 3]
