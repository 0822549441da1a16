"""Builds the condensations that compare real and synthetic images class by class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from hmn import bank, distributed
from hmn.build.workshop import Workshop
from hmn.chunks import ImageBytes, classes_per_chunk, feature_bytes, gradient_bytes, matching_bytes
from hmn.config.identity import bank_identity, digest
from hmn.containers.base import Container
from hmn.matching import ClassMatching
from hmn.objectives.distance import all_weights
from hmn.objectives.distribution import distribution_step
from hmn.objectives.gradient import MatchingStep, matching_step, real_gradients, stored_step
from hmn.pool import PoolSide
from hmn.realside import LiveSide, RealSide, SyntheticSide, UntrainedSide

KEPT_ON_GPU = 8 << 30  # most bytes of a snapshot bank to keep


def kept_on(device: torch.device) -> int:
    """Bytes of a snapshot bank to keep on ``device``, most of whose memory steps and other runs need."""
    return min(KEPT_ON_GPU, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else 0


def gradient_matching(shop: Workshop, container: Container) -> ClassMatching:
    """Gradient matching on networks trained as the run goes, or on a snapshot bank, which is built first if missing."""
    config, compute, objective = shop.config, shop.compute, shop.config.objective
    network = shop.build().to(compute.device)
    folder = Path(config.paths.cache_dir) / "banks" / digest(bank_identity(config, shop.compute.precision))
    banked = objective.bank.networks and all(path.exists() for path in bank.files(folder, objective.bank))
    real_batch = 0 if banked else objective.real_batch  # an existing bank supplies real gradients, not images
    chunk = _chunk(shop, container, network, partial(matching_bytes, metric=objective.metric), real_batch=real_batch)

    def live(seed: int, stream: str) -> LiveSide:
        return LiveSide(shop.data, objective, train=shop.train_step, stream=stream, **shop.side_of(seed))

    if objective.bank.networks:
        bank.require_room(folder, network, objective.bank, container.classes)
        with shop.checkpoints.timed("bank"):
            paths = distributed.from_first(
                lambda: bank.build(
                    folder,
                    lambda number: live(objective.bank.seed, f"bank/{number}"),
                    real_gradients(shop.build().to(compute.device), compute),
                    objective,
                    classes=container.classes,
                    fingerprint=shop.data.fingerprint,
                    chunk=chunk,
                    stop=shop.checkpoints.stop,
                )
            )
        # With a memory limit no part of the bank stays on the device: the limit is for what a step needs.
        keep = kept_on(compute.device) if config.compute.memory_limit is None else 0
        rule, seed = objective.augmentation_rule, config.seed
        side = bank.BankSide(paths, objective.bank, shop.strategy, compute.device, seed, rule, keep)
        make_step = stored_step
    else:
        side, make_step = live(config.seed, "condense"), matching_step
    total = container.matched_per_class
    share = objective.shown(total) / total if objective.unbiased else 1.0
    return _class_matching(shop, container, side, make_step(network, objective.metric, compute, share=share), chunk)


def synthetic_gradient(shop: Workshop, container: Container) -> ClassMatching:
    """DC and DSA: networks train on the synthetic set, and gradients of all weights are matched."""
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
    """DM on fresh networks, or IDM on a pool of trained ones; the distance is one number."""
    compute, objective = shop.compute, shop.config.objective
    network = shop.build().to(compute.device)
    chunk = _chunk(shop, container, network, feature_bytes, of_real=None)
    shared = shop.side_of(shop.config.seed)
    if objective.pool_networks:
        side = PoolSide(shop.data, objective, train=shop.train_step, **shared)
    else:
        side = UntrainedSide(shop.data, objective, **shared)
    return _class_matching(shop, container, side, distribution_step(network, compute), chunk, 1)


def _chunk(
    shop: Workshop,
    container: Container,
    network: nn.Module,
    in_step: ImageBytes,
    of_real: ImageBytes | None = gradient_bytes,
    real_batch: int | None = None,
) -> int:
    return classes_per_chunk(
        container,
        network,
        shop.config.objective,
        shop.compute,
        limit=shop.config.compute.memory_limit,
        strategy=shop.strategy,
        in_step=in_step,
        of_real=of_real,
        real_batch=real_batch,
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
        chunk=chunk,
        rate_factor=shop.rate_factor,
        lr_scale=config.container.lr_scale,
    )
