"""Double-end pruning (HMN): margins of the over-budget images, their AUM, and which instances go."""

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

    ``logits`` (..., n, classes) may be several networks'; ``labels`` (n,).
    """
    column = labels.expand(logits.shape[:-1])[..., None]
    own = logits.gather(-1, column)[..., 0]
    others = logits.scatter(-1, column, -torch.inf)
    return own - others.max(-1).values


def area_under_margin(judge: Judge, decoded: Split, score: str, networks: int, epochs: int) -> Tensor:
    """AUM (N,) of the decoded images: high is easy, low is hard.

    Networks train on the images by the judge's recipe without CutMix, whose mixed labels have no margin. After each
    epoch the un-augmented images' margins are added up: of logits, then averaged over epochs (``logit_margin``, HMN),
    or of softmax probabilities, summed (``softmax_margin``, CCS); both are averaged over ``networks``. ``random`` draws
    the scores instead, the ablation's control.
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

    Per class, of the k = G_o - keep that go, floor(beta * k) have the lowest scores and the rest the highest; ties go
    by index, so the same scores always lose the same images.
    """
    classes, count = scores.shape
    hardest = hardest_count(beta, count - keep)
    order = scores.argsort(dim=1, stable=True)[:, hardest : hardest + keep]
    starts = torch.arange(classes, device=scores.device)[:, None] * count
    return (order.sort(dim=1).values + starts).flatten()


def kept_after(count: int, share: float) -> int:
    """Images left of ``count`` without the fraction ``share`` in [0, 1), rounded so that more are left."""
    return count - int(share * count + 1e-9)


def candidates(cut: int) -> list[float]:
    """The betas of the grid 0, 0.1, ..., 1 that cut differently: with k < 10 several round to the same images."""
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
        # All by the same network, order and augmentation, so that only the images differ.
        found[beta] = quick_accuracy(judge, kept, held_out, epochs, "search_beta", slot=f"search_beta_{beta}")
    return max(found, key=found.__getitem__), found
