"""Double-end pruning (HMN): the AUM of the over-budget images, and which instances are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from hmn.data.splits import Split
from hmn.evaluate import Judge, quick_accuracy
from hmn.scores import difficulty
from hmn.seeding import generator

BETAS = tuple(step / 10 for step in range(11))


def area_under_margin(judge: Judge, decoded: Split, score: str, networks: int, epochs: int) -> Tensor:
    """AUM (N,) of the decoded images: high is easy, low is hard.

    ``score`` is ``logit_margin`` (HMN) or ``softmax_margin`` (CCS), as :func:`hmn.scores.difficulty` measures them for
    networks trained on these images, or ``random``, the ablation's control, which draws random scores instead.
    """
    if score == "random":
        stream = generator(judge.seed, "score", device=decoded.images.device)
        return torch.rand(len(decoded.images), generator=stream, device=decoded.images.device)
    return difficulty(judge, decoded, networks, epochs, stream="score")[score]


def hardest_count(beta: float, cut: int) -> int:
    """floor(beta * k): how many of the ``cut`` images come from the hard end."""
    return int(beta * cut + 1e-9)  # 0.7 * 90 is 62.999…


def kept_images(scores: Tensor, keep: int, beta: float) -> Tensor:
    """Indices (C * keep,) of the images that stay. ``scores`` (C, G_o) are AUM values.

    Each class drops k = G_o - keep images: the floor(beta * k) with the lowest scores, and the rest from those with the
    highest. Ties are broken by index, so the same scores always drop the same images.
    """
    classes, count = scores.shape
    hardest = hardest_count(beta, count - keep)
    order = scores.argsort(dim=1, stable=True)[:, hardest : hardest + keep]
    starts = torch.arange(classes, device=scores.device)[:, None] * count
    return (order.sort(dim=1).values + starts).flatten()


def kept_after(count: int, share: float) -> int:
    """Number of images left of ``count`` after dropping the fraction ``share`` in [0, 1), rounded up."""
    return count - int(share * count + 1e-9)


def candidates(cut: int) -> list[float]:
    """The betas of the grid 0, 0.1, ..., 1 that drop different images: with k < 10, several drop the same ones."""
    first_with: dict[int, float] = {}
    for beta in BETAS:
        first_with.setdefault(hardest_count(beta, cut), beta)
    return list(first_with.values())


def search_beta(
    judge: Judge, decoded: Split, scores: Tensor, keep: int, held_out: Split, epochs: int
) -> tuple[float, dict[float, float]]:
    """The best beta of the grid and every candidate's accuracy on held-out real images; ties go to the smaller beta."""
    found = {}
    for beta in candidates(scores.shape[1] - keep):
        index = kept_images(scores, keep, beta)
        kept = decoded.select(index)
        # All candidates use the same network, order and augmentation, so that only the images differ.
        found[beta] = quick_accuracy(judge, kept, held_out, epochs, "search_beta", slot=f"search_beta_{beta}")
    return max(found, key=found.__getitem__), found
