"""Makes the condensation that the configured objective asks for, out of a run's data, networks and container."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hmn import bank, distributed
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.condense import Condensation
from hmn.config import Config, bank_identity, digest
from hmn.config.objectives import GradientMatchingConfig, ObjectiveConfig
from hmn.containers.base import Container
from hmn.data.augment import without_flip
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.matching import ClassMatching
from hmn.memory import classes_per_chunk
from hmn.networks import Builder
from hmn.objectives.gradient import matching_step, real_gradients, stored_step
from hmn.optimizer import idc_rate_factor
from hmn.realside import LiveSide
from hmn.training import TrainingStep


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What condensing needs of a run, the container aside."""

    config: Config
    data: RealData
    build: Builder
    compute: Compute
    train_step: TrainingStep
    normalise: Normalise
    checkpoints: Checkpoints

    @property
    def rate_factor(self) -> float:
        config = self.config
        if config.objective.lr_scaling == "none":
            return 1.0
        return idc_rate_factor(config.memory.images_per_class, self.data.train.images.shape[-1])

    @property
    def strategy(self) -> str:
        strategy = self.config.objective.strategy
        return strategy if self.config.dataset.flip else without_flip(strategy)


def condensation(shop: Workshop, container: Container) -> Condensation:
    return MAKERS[type(shop.config.objective)](shop, container)


def gradient_matching(shop: Workshop, container: Container) -> ClassMatching:
    """Networks and real images as the run goes, or from a bank, which is made first if it is missing."""
    config, compute, objective = shop.config, shop.compute, shop.config.objective
    network = shop.build().to(compute.device)
    chunk = classes_per_chunk(
        container,
        network,
        objective,
        compute,
        limit=config.compute.memory_limit,
        strategy=shop.strategy,
        metric=objective.metric,
    )

    def live(seed: int, stream: str) -> LiveSide:
        return LiveSide(
            shop.data,
            objective,
            build=shop.build,
            train=shop.train_step,
            compute=compute,
            seed=seed,
            flip=config.dataset.flip,
            stream=stream,
        )

    if objective.bank.networks:
        with shop.checkpoints.timed("bank"):
            paths = distributed.from_first(
                lambda: bank.build(
                    Path(config.paths.cache_dir) / "banks" / digest(bank_identity(config)),
                    lambda number: live(objective.bank.seed, f"bank/{number}"),
                    real_gradients(shop.build().to(compute.device), compute),
                    objective,
                    classes=container.classes,
                    fingerprint=shop.data.fingerprint,
                    chunk=chunk,
                    stop=shop.checkpoints.stop,
                )
            )
        size = container.shape.image_size
        side = bank.BankSide(paths, objective.bank, shop.strategy, size, compute.device, config.seed)
        make_step = stored_step
    else:
        side, make_step = live(config.seed, "condense"), matching_step
    return ClassMatching(
        container,
        side,
        objective,
        match=make_step(network, objective.metric, compute),
        normalise=shop.normalise,
        compute=compute,
        seed=config.seed,
        fingerprint=shop.data.fingerprint,
        chunk=chunk,
        rate_factor=shop.rate_factor,
        lr_scale=config.container.lr_scale,
    )


MAKERS: dict[type[ObjectiveConfig], Callable[[Workshop, Container], Condensation]] = {
    GradientMatchingConfig: gradient_matching,
}
