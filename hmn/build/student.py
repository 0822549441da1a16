"""Builds the condensations that differentiate through a student's training, and the experts that students aim at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from hmn import experts as expert_training
from hmn.adversary import StyleAdversary
from hmn.build.workshop import Workshop
from hmn.chunks import images_per_chunk
from hmn.config.containers import HabaConfig
from hmn.config.identity import digest, experts_identity
from hmn.containers.base import Container
from hmn.data.augment import usable
from hmn.data.sampling import per_class
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.unroll import Unrolled, copies
from hmn.seeding import generator
from hmn.through_student import (
    Batches,
    ClassifyReal,
    Goal,
    LearnedRate,
    ReachExpert,
    ThroughStudent,
    of_every_class,
    shuffled,
)
from hmn.training import Training


def experts(shop: Workshop) -> list[Path]:
    """The files of the configured experts, which are trained first if they are missing."""
    config, compute, settings = shop.config, shop.compute, shop.config.objective.experts
    recipe = expert_training.recipe_of(settings, usable(settings.strategy, config.dataset.flip))

    def train(numbers: Sequence[int]) -> Training:
        streams = [generator(settings.seed, "experts", number, device=compute.device) for number in numbers]
        train = shop.data.train
        return Training(shop.build, train.images, train.labels, recipe, shop.normalise, shop.train_step, *streams)

    folder = Path(config.paths.cache_dir) / "experts" / digest(experts_identity(config, shop.compute.precision))
    with shop.checkpoints.timed("experts"):
        return expert_training.build(
            folder,
            train,
            settings.count,
            fingerprint=shop.data.fingerprint,
            together=expert_training.together(shop.build(), settings.epochs, compute.together(settings.count)),
            stop=shop.checkpoints.stop,
            open_checkpoints=lambda: shop.checkpoints.beside(folder / "unfinished"),
        )


def trajectory_matching(shop: Workshop, container: Container) -> ThroughStudent:
    """MTT. Experts are trained first if missing; at each of its steps a student sees one of the container's views."""
    config, objective, device = shop.config, shop.config.objective, shop.compute.device
    views = container.views()
    batches = shuffled(views, objective.student_batch)
    chunk = _chunk(shop, container, batches)  # first, to report too little memory before experts are trained
    goal = ReachExpert(
        experts(shop),
        max_start=objective.max_start_epoch,
        length=objective.expert_epochs,
        device=device,
        generator=generator(config.seed, "condense", "experts"),
    )
    adversary = None
    if isinstance(config.container, HabaConfig) and len(views) > 1:  # a single style has no other to differ from
        shape = container.shape
        depth = min(3, int(math.log2(shape.image_size)))  # HaBa's three blocks, or as many as leave one pixel
        extractor = ConvNet(shape.channels, shape.classes, shape.image_size, depth=depth).to(device)
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
        objective.student_lr,
        lr=objective.student_lr_lr,
        momentum=objective.student_lr_momentum,
        least=objective.student_lr_min,
        device=device,
    )
    return _through_student(shop, container, goal, _unrolled(shop), batches, chunk, rate, adversary)


def bptt(shop: Workshop, container: Container) -> ThroughStudent:
    """LinBa's loss: fresh students train on random images of every class at a fixed rate; real images judge them."""
    objective, data, device = shop.config.objective, shop.data, shop.compute.device
    stream = generator(shop.config.seed, "condense", "real", device=device)
    unrolled = _unrolled(shop)
    goal = ClassifyReal(
        shop.build().to(device),
        unrolled.loss_and_gradient,
        data.train.images,
        data.train.labels,
        real=per_class(data.train.labels, data.class_names, objective.real_batch, stream),
        normalise=shop.normalise,
        seed=shop.config.seed,
    )
    batches = of_every_class(container.classes, container.matched_per_class, objective.class_batch)
    rate = LearnedRate(objective.student_lr, lr=0.0, momentum=0.0, least=0.0, device=device)
    return _through_student(shop, container, goal, unrolled, batches, _chunk(shop, container, batches), rate)


def _unrolled(shop: Workshop) -> Unrolled:
    objective = shop.config.objective
    return Unrolled(
        shop.build().to(shop.compute.device),
        shop.compute,
        momentum=objective.student_momentum,
        dampening=objective.student_dampening,
        segment=objective.segment,
    )


def _chunk(shop: Workshop, container: Container, batches: Batches) -> int:
    """How many images are decoded at a time."""
    objective = shop.config.objective
    return images_per_chunk(
        container,
        shop.build().to(shop.compute.device),
        shop.compute,
        limit=shop.config.compute.memory_limit,
        batch=len(batches(1, generator(0))[0]),  # the first one is the largest
        kept=copies(objective.student_steps, objective.segment),
    )


def _through_student(
    shop: Workshop,
    container: Container,
    goal: Goal,
    unrolled: Unrolled,
    batches: Batches,
    chunk: int,
    rate: LearnedRate,
    adversary: StyleAdversary | None = None,
) -> ThroughStudent:
    config, objective = shop.config, shop.config.objective
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
        chunk=chunk,
        rate_factor=shop.rate_factor,
        lr_scale=config.container.lr_scale,
        adversary=adversary,
    )
