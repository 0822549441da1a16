"""Train fresh networks on a set under one profile; report their last-epoch test accuracy, mean and deviation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hmn.checkpoint import Checkpoints
from hmn.config import EvaluationConfig
from hmn.data.augment import usable
from hmn.data.preprocess import Normalise
from hmn.data.splits import Split
from hmn.network_update import TrainingStep
from hmn.networks import Builder
from hmn.seeding import derived_seed, generator
from hmn.training import Recipe, Training, accuracy, train_networks


@dataclass(frozen=True, kw_only=True)
class Judge:
    """All that judging a set needs, except the set: how networks are made, trained and shown images."""

    build: Builder
    step: TrainingStep
    normalise: Normalise
    recipe: Recipe
    seed: int
    checkpoints: Checkpoints
    together: int = 1  # how many networks are trained at once

    def training(self, train: Split, recipe: Recipe, stream: str, networks: Sequence[int]) -> Training:
        """A joint training of the networks numbered ``networks``, each initialised from its own seed in ``stream``."""
        generators = [generator(self.seed, stream, index, device=train.images.device) for index in networks]
        return Training(self.build, train.images, train.labels, recipe, self.normalise, self.step, *generators)

    def train(
        self,
        count: int,
        images: Split,
        recipe: Recipe,
        stream: str,
        observe: Callable[[range, Training, dict[str, Tensor]], None],
        memo: dict[str, Tensor],
        slot: str | None = None,
    ) -> dict[str, Tensor]:
        """Train ``count`` fresh networks on ``images``; returns ``memo``, as :func:`hmn.training.train_networks` does.

        ``stream`` names their random streams. ``slot`` names their checkpoint, progress bar and errors, by default
        ``stream``.
        """
        make = functools.partial(self.training, images, recipe, stream)
        return train_networks(count, make, observe, memo, self.checkpoints, slot or stream, self.together)


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """Test accuracies in [0, 1]: ``by_network`` holds each network's at all test points, ending with the last epoch."""

    by_network: list[list[float]]
    test_epochs: list[int]
    seeds: list[int]

    @property
    def last(self) -> list[float]:
        return [points[-1] for points in self.by_network]

    @property
    def mean(self) -> float:
        return sum(self.last) / len(self.last)

    @property
    def std(self) -> float | None:
        """Standard deviation over networks, with ddof 1; ``None`` for a single network."""
        return float(torch.tensor(self.last, dtype=torch.float64).std()) if len(self.last) > 1 else None

    @property
    def best_mean(self) -> float:
        """Mean over networks of the best test point: chosen on the test split, so an extra and never the result."""
        return sum(max(points) for points in self.by_network) / len(self.by_network)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a result and a card keep them."""
        return {"mean": self.mean, "std": self.std, "best_mean": self.best_mean, **asdict(self)}


def recipe_of(config: EvaluationConfig, *, flip: bool) -> Recipe:
    """The profile's recipe; without ``flip``, it does not mirror images, for data whose classes that would change."""
    return Recipe(
        epochs=config.epochs,
        batch=config.batch,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        strategy=usable(config.strategy, flip),
        cutmix=config.cutmix,
        even_batches=config.even_batches,
    )


def tiny_rest(images: int, recipe: Recipe) -> str | None:
    """A warning if every epoch ends in a batch so small that its noisy step may cost accuracy, else ``None``."""
    rest = images % recipe.batch
    if recipe.even_batches or images < recipe.batch or not 0 < rest < recipe.batch / 8:
        return None
    told = f"batches of {recipe.batch} leave a last one of {rest}"
    return f"{images} images: {told}, which may cost accuracy; evaluation.even_batches=true makes batches even"


def tested_epochs(epochs: int, points: int) -> list[int]:
    """At most ``points`` evenly spaced epochs, the last one included."""
    return sorted({max(1, round(epochs * (point + 1) / points)) for point in range(points)})


def evaluate(
    judge: Judge, train: Split, test: Split, networks: int, points: int, stream: str, slot: str | None = None
) -> Accuracies:
    """Train ``networks`` fresh networks on ``train`` by the judge's recipe and test each at ``points`` epochs.

    ``stream`` and ``slot`` as in :meth:`Judge.train`.
    """
    tested = tested_epochs(judge.recipe.epochs, points)

    def observe(group: range, training: Training, memo: dict[str, Tensor]) -> None:
        if training.epoch in tested:
            values = accuracy(training.network, test.images, test.labels, judge.normalise)
            memo["accuracy"][group.start : group.stop, tested.index(training.epoch)] = values

    memo = {"accuracy": torch.zeros(networks, len(tested), dtype=torch.float64)}
    judge.train(networks, train, judge.recipe, stream, observe, memo, slot)
    seeds = [derived_seed(judge.seed, stream, index) for index in range(networks)]
    return Accuracies(by_network=memo["accuracy"].tolist(), test_epochs=tested, seeds=seeds)


def quick_accuracy(
    judge: Judge, train: Split, held_out: Split, epochs: int, stream: str, slot: str | None = None
) -> float:
    """Held-out accuracy of one network trained for ``epochs``: for curves and selection, never the result."""
    short = replace(judge, recipe=replace(judge.recipe, epochs=epochs))
    return evaluate(short, train, held_out, networks=1, points=1, stream=stream, slot=slot).mean
