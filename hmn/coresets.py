"""Coresets, the baselines that select real images of every class instead of condensing them.

Every method chooses class by class, so every class gives ``count`` images whatever the others' sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hmn.config.containers import CoresetConfig
from hmn.data.kmeans import nearest_to_centres
from hmn.data.sampling import class_sizes, random_subset
from hmn.data.splits import Split
from hmn.evaluate import Judge
from hmn.scores import cached, difficulty, features, networks_of, trained_weights
from hmn.seeding import generator


def choose(
    judge: Judge, train: Split, class_names: Sequence[str], count: int, config: CoresetConfig, cache: Path
) -> Tensor:
    """Indices (C * count,) into ``train``, which is ordered by class, of the images that ``config.method`` keeps.

    ``aum`` and ``forgetting`` keep the hardest images, those with the lowest margins or the most forgetting events, as
    pruning by importance does. When few are kept, this is worse than a random choice; CCS was made for that case.
    What is learned from the full set is saved in the folder ``cache``, which must belong to this dataset, recipe and
    seed. Raises ``DataError`` naming a class that has fewer than ``count`` images.
    """
    labels, device, method = train.labels, train.labels.device, config.method
    stop = judge.checkpoints.stop
    if method == "random":  # the images of mode=random_subset
        return random_subset(labels, count, class_names, generator(judge.seed, "random_subset", device=device))
    sizes = class_sizes(labels, count, class_names).tolist()
    stream = generator(judge.seed, "coreset", device=device)
    if method in ("herding", "k_center", "k_means"):
        path = cache / "weights.safetensors"
        stacked = cached(path, lambda: trained_weights(judge, train, config.networks, config.epochs), device, stop)
        networks = networks_of(judge.build, stacked)
        chosen, start = [], 0
        for size in sizes:
            rows = features(networks, train.images[start : start + size], judge.normalise)
            chosen.append(start + _by_features(method, rows, count, stream))
            start += size
        return torch.cat(chosen)
    path = cache / "difficulty.safetensors"
    scores = cached(path, lambda: difficulty(judge, train, config.networks, config.epochs), device, stop)
    if method == "forgetting":
        return highest(scores["forgetting"], labels, count, stream)
    if method == "aum":
        return highest(-scores["logit_margin"], labels, count, stream)
    cut, bins = config.hard_cut, config.bins
    return ccs(scores["softmax_margin"], labels, count, hard_cut=cut, bins=bins, generator=stream)


def _by_features(method: str, rows: Tensor, count: int, stream: torch.Generator) -> Tensor:
    if method == "herding":
        return herding(rows, count)
    return k_center(rows, count) if method == "k_center" else nearest_to_centres(rows, count, stream)


def herding(features: Tensor, count: int) -> Tensor:
    """Indices (count,) into ``features`` (n, d) of one class, in the order chosen (iCaRL, Rebuffi et al., CVPR 2017).

    The k-th choice, from 0, is the image x not yet chosen that minimises || (k + 1) * mean - sum of the chosen - x ||,
    so that the mean of the chosen stays as near as possible to the mean of all. Features are not normalised, as in
    IDC's baseline.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    chosen = torch.empty(count, dtype=torch.int64, device=features.device)
    for k in range(count):
        distance = (features - ((k + 1) * mean - total)).norm(dim=1)
        distance[chosen[:k]] = torch.inf
        chosen[k] = distance.argmin()
        total += features[chosen[k : k + 1]].squeeze(0)
    return chosen


def k_center(features: Tensor, count: int) -> Tensor:
    """Indices (count,) into ``features`` (n, d) of one class, in the order chosen (Sener & Savarese, ICLR 2018).

    Greedy: first the image nearest to the mean, then repeatedly the image farthest from its nearest chosen image.
    """
    chosen = torch.empty(count, dtype=torch.int64, device=features.device)
    chosen[0] = (features - features.mean(0)).norm(dim=1).argmin()
    nearest = torch.full_like(features[:, 0], torch.inf)
    for k in range(1, count):
        nearest = torch.minimum(nearest, (features - features[chosen[k - 1 : k]]).norm(dim=1))
        nearest[chosen[:k]] = -1  # below 0, the distance of a duplicate, which may still be chosen
        chosen[k] = nearest.argmax()
    return chosen


def highest(scores: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (C * count,), by class, of each class's ``count`` highest ``scores`` (N,); ties are broken at random."""
    shuffled = torch.randperm(len(scores), generator=generator, device=scores.device)
    return _first_of_each_class(shuffled[scores[shuffled].argsort(descending=True, stable=True)], labels, count)


def ccs(
    scores: Tensor, labels: Tensor, count: int, *, hard_cut: float, bins: int, generator: torch.Generator
) -> Tensor:
    """Coverage-centric selection by AUM ``scores`` (N,), class by class: indices (C * count,), ordered by class.

    First, the hardest floor(hard_cut * N) of the whole set are left out. Then :func:`stratified` samples every class
    evenly over the range of its scores (Zheng et al., ICLR 2023, whose own sampling is not class by class). The cut
    spares the ``count`` easiest images of every class, which must have as many.
    """
    order = scores.argsort(stable=True)
    remains = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    remains[order[: int(hard_cut * len(scores) + 1e-9)]] = False  # 0.29 * 100 is 28.999…
    remains[_first_of_each_class(order.flip(0), labels, count)] = True
    chosen = []
    for label in range(int(labels.max()) + 1):
        members = (remains & (labels == label)).nonzero().squeeze(1)
        chosen.append(members[stratified(scores[members], count, bins, generator)])
    return torch.cat(chosen)


def stratified(scores: Tensor, count: int, bins: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) of ``scores`` (n,), n >= count, sampled from ``bins`` bins of equal width (CCS, algorithm 1).

    From the smallest bin to the largest, each gives an equal share of what is still missing, or all it has. The larger
    bins make up for what the smaller ones lack, so the shares add up to ``count``. The largest score is in the last
    bin, whatever its sign.
    """
    exact = scores.double()
    edges = exact.min() + (exact.max() - exact.min()) * torch.arange(1, bins, device=scores.device) / bins
    which = torch.bucketize(exact, edges, right=True)
    shuffled = torch.randperm(len(scores), generator=generator, device=scores.device)
    order = shuffled[which[shuffled].argsort(stable=True)]
    sampled, remaining = [], count
    groups = sorted(order.split(torch.bincount(which, minlength=bins).tolist()), key=len)
    for position, group in enumerate(groups):
        sampled.append(group[: remaining // (bins - position)])
        remaining -= len(sampled[-1])
    return torch.cat(sampled)


def _first_of_each_class(order: Tensor, labels: Tensor, count: int) -> Tensor:
    """The first ``count`` images of every class in ``order`` (N,), by class; every class must have as many."""
    order = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels)
    starts = sizes.cumsum(0) - sizes
    return order[(starts[:, None] + torch.arange(count, device=order.device)).flatten()]
