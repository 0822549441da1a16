"""Makes the condensation that the configured objective asks for, out of a run's data, networks and container."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hmn import bank, distributed
from hmn import experts as expert_training
from hmn.adversary import StyleAdversary
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.condense import Condensation
from hmn.config import Config, bank_identity, digest, experts_identity
from hmn.config.containers import HabaConfig
from hmn.config.objectives import (
    BpttConfig,
    DistributionMatchingConfig,
    GradientMatchingConfig,
    ObjectiveConfig,
    SyntheticGradientConfig,
    TrajectoryMatchingConfig,
)
from hmn.containers.base import Container
from hmn.data.augment import without_flip
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.data.sampling import per_class
from hmn.experts import Trajectories
from hmn.matching import ClassMatching
from hmn.memory import classes_per_chunk, feature_bytes, images_per_chunk, matching_bytes
from hmn.networks import Builder, initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.distance import all_weights
from hmn.objectives.distribution import distribution_step
from hmn.objectives.gradient import MatchingStep, matching_step, real_gradients, stored_step
from hmn.objectives.unroll import Unrolled
from hmn.optimizer import idc_rate_factor
from hmn.pool import PoolSide
from hmn.realside import FeatureSide, LiveSide, RealSide, SyntheticSide
from hmn.seeding import generator
from hmn.training import Training, TrainingStep
from hmn.unrolled import Batches, ClassifyReal, Goal, LearnedRate, ReachExpert, ThroughStudent, of_every_class, shuffled


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

    def side_of(self, seed: int) -> dict[str, Any]:
        """What every real side takes."""
        return {"build": self.build, "compute": self.compute, "seed": seed, "flip": self.config.dataset.flip}


def condensation(shop: Workshop, container: Container) -> Condensation:
    return MAKERS[type(shop.config.objective)](shop, container)


def gradient_matching(shop: Workshop, container: Container) -> ClassMatching:
    """Networks and real images as the run goes, or from a bank, which is made first if it is missing."""
    config, compute, objective = shop.config, shop.compute, shop.config.objective
    network = shop.build().to(compute.device)
    chunk = _chunk(shop, container, network, partial(matching_bytes, metric=objective.metric))

    def live(seed: int, stream: str) -> LiveSide:
        return LiveSide(shop.data, objective, train=shop.train_step, stream=stream, **shop.side_of(seed))

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
        size, rule = container.shape.image_size, objective.augmentation_rule
        side = bank.BankSide(paths, objective.bank, shop.strategy, size, compute.device, config.seed, rule)
        make_step = stored_step
    else:
        side, make_step = live(config.seed, "condense"), matching_step
    return _class_matching(shop, container, side, make_step(network, objective.metric, compute), chunk)


def synthetic_gradient(shop: Workshop, container: Container) -> ClassMatching:
    compute, objective = shop.compute, shop.config.objective
    network = shop.build().to(compute.device)
    chunk = _chunk(shop, container, network, partial(matching_bytes, metric=objective.metric, matched=all_weights))
    side = SyntheticSide(
        shop.data,
        objective,
        count=container.classes * container.images_per_class,
        train=shop.train_step,
        **shop.side_of(shop.config.seed),
    )
    match = matching_step(network, objective.metric, compute, all_weights)
    parts = len(all_weights(dict(network.named_parameters())))
    return _class_matching(shop, container, side, match, chunk, parts)


def distribution_matching(shop: Workshop, container: Container) -> ClassMatching:
    compute, objective = shop.compute, shop.config.objective
    network = shop.build().to(compute.device)
    chunk = _chunk(shop, container, network, feature_bytes)
    shared = shop.side_of(shop.config.seed)
    if objective.pool_networks:
        side = PoolSide(shop.data, objective, train=shop.train_step, **shared)
    else:
        side = FeatureSide(shop.data, objective, **shared)
    return _class_matching(shop, container, side, distribution_step(network, compute), chunk, 1)


def _chunk(
    shop: Workshop,
    container: Container,
    network: nn.Module,
    in_step: Callable[[nn.Module, tuple[int, int, int]], int],
) -> int:
    limit = shop.config.compute.memory_limit
    objective, strategy = shop.config.objective, shop.strategy
    return classes_per_chunk(
        container, network, objective, shop.compute, limit=limit, strategy=strategy, in_step=in_step
    )


def _class_matching(
    shop: Workshop, container: Container, side: RealSide, match: MatchingStep, chunk: int, parts: int | None = None
) -> ClassMatching:
    config = shop.config
    return ClassMatching(
        container,
        side,
        config.objective,
        match=match,
        parts=parts,
        normalise=shop.normalise,
        compute=shop.compute,
        seed=config.seed,
        fingerprint=shop.data.fingerprint,
        chunk=chunk,
        rate_factor=shop.rate_factor,
        lr_scale=config.container.lr_scale,
    )


def experts(shop: Workshop) -> list[Path]:
    """The files of the configured experts, which are trained first if they are missing."""
    config, compute, settings = shop.config, shop.compute, shop.config.objective.experts
    strategy = settings.strategy if config.dataset.flip else without_flip(settings.strategy)
    recipe = expert_training.recipe_of(settings, strategy)

    def train(numbers: Sequence[int]) -> Training:
        streams = [generator(settings.seed, "experts", number, device=compute.device) for number in numbers]
        train = shop.data.train
        return Training(shop.build, train.images, train.labels, recipe, shop.normalise, shop.train_step, *streams)

    with shop.checkpoints.timed("experts"):
        return expert_training.build(
            Path(config.paths.cache_dir) / "experts" / digest(experts_identity(config)),
            train,
            settings.count,
            fingerprint=shop.data.fingerprint,
            together=compute.together(settings.count),
            stop=shop.checkpoints.stop,
        )


def trajectory_matching(shop: Workshop, container: Container) -> ThroughStudent:
    """Experts are trained first if they are missing; of several views of a container a student sees one per step."""
    config, objective, device = shop.config, shop.config.objective, shop.compute.device
    trajectories = Trajectories(
        experts(shop),
        max_start=objective.max_start_epoch,
        length=objective.expert_epochs,
        device=device,
        generator=generator(config.seed, "condense", "experts"),
    )
    views = container.views()
    adversary = None
    if isinstance(config.container, HabaConfig) and len(views) > 1:  # one style has none to differ from
        shape = container.shape
        extractor = ConvNet(shape.channels, shape.classes, shape.image_size).to(device)
        adversary = StyleAdversary(
            initialise(extractor, generator(config.seed, "condense", "adversary", device=device)),
            views,
            views[0] // container.matched_per_class,
            config.container,
            batch=objective.student_batch,
            compute=shop.compute,
            generator=generator(config.seed, "condense", "styles"),
        )
    rate = LearnedRate(
        objective.student_lr, lr=objective.student_lr_lr, momentum=objective.student_lr_momentum, device=device
    )
    batches = shuffled(views, objective.student_batch)
    unrolled = _unrolled(shop)
    return _through_student(shop, container, ReachExpert(trajectories), unrolled, batches, rate, adversary)


def bptt(shop: Workshop, container: Container) -> ThroughStudent:
    objective, data, device = shop.config.objective, shop.data, shop.compute.device
    stream = generator(shop.config.seed, "condense", "real", device=device)
    unrolled = _unrolled(shop)
    goal = ClassifyReal(
        shop.build().to(device),
        unrolled.cross_entropy,
        data.train.images,
        data.train.labels,
        real=per_class(data.train.labels, data.class_names, objective.real_batch, stream),
        normalise=shop.normalise,
        seed=shop.config.seed,
    )
    batches = of_every_class(container.classes, container.matched_per_class, objective.class_batch)
    rate = LearnedRate(objective.student_lr, lr=0.0, momentum=0.0, device=device)
    return _through_student(shop, container, goal, unrolled, batches, rate)


def _unrolled(shop: Workshop) -> Unrolled:
    objective = shop.config.objective
    return Unrolled(
        shop.build().to(shop.compute.device),
        shop.compute,
        momentum=objective.student_momentum,
        dampening=objective.student_dampening,
        segment=objective.segment,
    )


def _through_student(
    shop: Workshop,
    container: Container,
    goal: Goal,
    unrolled: Unrolled,
    batches: Batches,
    rate: LearnedRate,
    adversary: StyleAdversary | None = None,
) -> ThroughStudent:
    config, objective = shop.config, shop.config.objective
    largest = max(len(index) for index in batches(objective.student_steps, generator(0)))
    chunk = images_per_chunk(
        container,
        shop.build().to(shop.compute.device),
        shop.compute,
        limit=config.compute.memory_limit,
        batch=largest,
        kept=math.ceil(objective.student_steps / objective.segment) + 2 * objective.segment,
    )
    return ThroughStudent(
        container,
        goal,
        objective,
        unrolled=unrolled,
        batches=batches,
        rate=rate,
        normalise=shop.normalise,
        strategy=shop.strategy,
        compute=shop.compute,
        seed=config.seed,
        fingerprint=shop.data.fingerprint,
        chunk=chunk,
        rate_factor=shop.rate_factor,
        lr_scale=config.container.lr_scale,
        adversary=adversary,
    )


MAKERS: dict[type[ObjectiveConfig], Callable[[Workshop, Container], Condensation]] = {
    GradientMatchingConfig: gradient_matching,
    TrajectoryMatchingConfig: trajectory_matching,
    BpttConfig: bptt,
    SyntheticGradientConfig: synthetic_gradient,
    DistributionMatchingConfig: distribution_matching,
}
