"""Double-end pruning (HMN): margins of the over-budget images, their AUM, and which instances are dropped."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hmn.data.splits import Split
from hmn.evaluate import Judge, quick_accuracy, train_judges
from hmn.seeding import generator
from hmn.training import Training, logits_of

BETAS = tuple(step / 10 for step in range(11))


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{i != y} z_i for every row (..., n); negative where the network is wrong (Pleiss et al., NeurIPS 2020).

    ``logits`` (..., n, classes) may come from several networks; ``labels`` (n,).
    """
    column = labels.expand(logits.shape[:-1])[..., None]
    own = logits.gather(-1, column)[..., 0]
    others = logits.scatter(-1, column, -torch.inf)
    return own - others.max(-1).values


def area_under_margin(judge: Judge, decoded: Split, score: str, networks: int, epochs: int) -> Tensor:
    """AUM (N,) of the decoded images: high is easy, low is hard.

    Networks train on the images by the judge's recipe without CutMix, whose mixed labels have no margin. The margins of
    the un-augmented images are measured after each epoch. ``logit_margin`` (HMN) averages the margins of logits over
    epochs, ``softmax_margin`` (CCS) sums those of softmax probabilities; both average over ``networks``. ``random``,
    the ablation's control, draws random scores instead.
    """
    if score == "random":
        stream = generator(judge.seed, "score", device=decoded.images.device)
        return torch.rand(len(decoded.images), generator=stream, device=decoded.images.device)
    recipe = replace(judge.recipe, epochs=epochs, cutmix=0.0)

    def observe(_group: range, training: Training, memo: dict[str, Tensor]) -> None:
        logits = logits_of(training.network, decoded.images, judge.normalise)
        values = logits if score == "logit_margin" else logits.softmax(-1)
        memo["margins"] += margins(values, decoded.labels).view(-1, len(decoded.labels)).sum(0)

    memo = {"margins": torch.zeros(len(decoded), device=decoded.images.device)}
    train_judges(judge, networks, decoded, recipe, "score", observe, memo)
    return memo["margins"] / (networks * epochs if score == "logit_margin" else networks)


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
