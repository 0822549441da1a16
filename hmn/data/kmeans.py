"""k-means: Lloyd's iterations from k-means++ seeds (Arthur & Vassilvitskii, SODA 2007), and the nearest samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 50  # at most; a few hundred points in feature space converge in 10 to 20


def nearest_to_centres(features: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices (k,) of the samples nearest to the centres of k clusters of ``features`` (n, f), all distinct.

    Each centre gets the nearest sample of its own cluster, even if a sample of another cluster is nearer. Raises
    ``ValueError`` for k > n.
    """
    centres, assigned = k_means(features, k, generator)
    others = assigned[:, None] != torch.arange(k, device=features.device)
    return torch.cdist(features, centres).masked_fill(others, torch.inf).argmin(0)


def k_means(features: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres (k, f) of the clusters of ``features`` (n, f), and every sample's cluster (n,); no cluster is empty.

    Raises ``ValueError`` for k > n.
    """
    return lloyd(features, features[seeds(features, k, generator)])


def seeds(features: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: indices (k,) of distinct samples, each drawn by its squared distance to the nearest earlier one."""
    n = len(features)
    if k > n:
        raise ValueError(f"{n} samples cannot make {k} clusters")
    free = torch.ones(n, device=features.device, dtype=features.dtype)
    nearest = free  # the first is drawn uniformly
    chosen = []
    for _ in range(k):
        weights = nearest * free
        # Duplicates of drawn samples are at distance 0: where only such are left, they are drawn uniformly.
        weights = torch.where(weights.sum() > 0, weights, free)
        index = torch.multinomial(weights, 1, generator=generator)
        distance = (features - features[index]).square().sum(1)
        nearest = torch.minimum(nearest, distance) if chosen else distance
        free = free.index_fill(0, index, 0)
        chosen.append(index)
    return torch.cat(chosen)


def lloyd(features: Tensor, centres: Tensor, *, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """Centres (k, f), the means of their clusters, and clusters (n,) after at most ``iterations`` from ``centres``.

    An empty cluster takes the sample farthest from its own centre, except one that would leave its cluster empty.
    """
    k, before = len(centres), None
    for _ in range(iterations):
        distances = torch.cdist(features, centres)
        assigned = _without_empty_clusters(distances, distances.argmin(1))
        # A product with the 0/1 matrix of members: an indexed sum is not deterministic on a GPU.
        members = F.one_hot(assigned, k).to(features.dtype)
        centres = members.T @ features / members.sum(0)[:, None]
        if before is not None and torch.equal(assigned, before):
            break
        before = assigned
    return centres, assigned


def _without_empty_clusters(distances: Tensor, assigned: Tensor) -> Tensor:
    """``assigned`` (n,), changed where one of the k clusters would be empty; ``distances`` (n, k) to the centres."""
    counts = torch.bincount(assigned, minlength=distances.shape[1])
    for empty in (counts == 0).nonzero().flatten().tolist():  # rare: otherwise the only cost is reading the list
        own = distances.gather(1, assigned[:, None])[:, 0]
        farthest = own.masked_fill(counts[assigned] == 1, -1).argmax()
        counts[assigned[farthest]] -= 1
        counts[empty] += 1
        assigned = assigned.index_fill(0, farthest, empty)
    return assigned
