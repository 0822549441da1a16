"""Settings that a run does not read because of another setting; a run reports those that it was given.

They are not errors: a sweep may combine a setting with options that read it and with others that do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from hmn.config import Config
from hmn.config.checks import read_by
from hmn.config.containers import HmnConfig
from hmn.config.identity import SECTIONS
from hmn.config.objectives import (
    ClassMatchingConfig,
    DistributionMatchingConfig,
    GradientMatchingConfig,
    SyntheticGradientConfig,
    TrajectoryMatchingConfig,
    UnrolledConfig,
)
from hmn.config.overrides import key_of


@dataclasses.dataclass(frozen=True)
class Condensed:
    """What :func:`unread` needs to know of what a run condenses."""

    networks: bool  # whether it has networks beside its memories
    images_per_class: int  # from which a step takes its images
    cut: int  # images per class that are pruned


def unread(config: Config, condensed: Condensed | None) -> dict[str, str]:
    """Every section and field that this run does not read, with the setting that is the reason."""
    found = dict(_of_kind(config))
    if config.kind in ("run", "coreset"):
        found |= dict(_of_container(config))
    if condensed is not None:
        found |= dict([*_of_objective(config, condensed), *_of_judging(config, condensed)])
    return found


def keys_not_read(reasons: Mapping[str, str], typed: Sequence[str]) -> tuple[str, ...]:
    """The keys among the ``typed`` overrides that are not read, each with its own reason or its section's."""
    told = {}
    for key in map(key_of, typed):
        above = [key.rsplit(".", dots)[0] for dots in range(key.count(".") + 1)]
        reason = next((reasons[name] for name in above if name in reasons), None)
        if reason is not None:
            told[key] = f"{key} ({reason})"
    return tuple(told.values())


def _of_kind(config: Config) -> Iterator[tuple[str, str]]:
    kind = config.kind
    why = f"container={config.container.name}, which condenses nothing" if kind == "coreset" else f"mode={kind}"
    for section in ("dataset", "memory", "container", "objective", "pruning", "network", "evaluation", "redundancy"):
        if section not in SECTIONS[kind] and (kind, section) != ("experts", "objective"):
            yield section, why
        for item in dataclasses.fields(getattr(config, section)):
            # A run prints the references that were measured with these.
            if not read_by(item, kind) and not (config.mode == "run" and read_by(item, "full_data")):
                yield f"{section}.{item.name}", why
    if kind == "experts":
        for item in dataclasses.fields(config.objective):
            if item.name not in ("name", "experts"):
                yield f"objective.{item.name}", why


def _of_container(config: Config) -> Iterator[tuple[str, str]]:
    container = config.container
    if container.init != "fit_real":
        yield from _named("container", container, "fit_", f"container.init={container.init}")
    if isinstance(container, HmnConfig):
        if container.feature_channels == 0:
            for name in ("dataset_channels", "feature_kernel"):
                yield f"container.{name}", "container.feature_channels=0"
        if container.init == "kept":
            yield "container.instance_init_scale", "container.init=kept"


def _of_objective(config: Config, condensed: Condensed) -> Iterator[tuple[str, str]]:
    objective = config.objective
    if not condensed.networks:
        alone = f"container={config.container.name}, which has no networks"
        yield from (("objective.weights_lr", alone), ("container.fit_weights_lr", alone))
    if isinstance(objective, ClassMatchingConfig | UnrolledConfig) and objective.strategy == "none":
        yield "objective.augmentation_rule", "objective.strategy=none"
    if isinstance(objective, ClassMatchingConfig) and objective.step_policy == "per_class":
        yield "objective.class_reduction", "objective.step_policy=per_class"
    if isinstance(objective, GradientMatchingConfig):
        if not objective.network_samples:
            for key, why in _named("objective", objective, "network_", "objective.network_samples=0"):
                if key != "objective.network_samples":
                    yield key, why
        if objective.shown(condensed.images_per_class) == condensed.images_per_class:
            yield "objective.unbiased", f"a step shows all {condensed.images_per_class} images of a class"
        if not objective.bank.networks:
            for name in ("snapshots", "seed"):
                yield f"objective.bank.{name}", "objective.bank.networks=0"
    if isinstance(objective, DistributionMatchingConfig) and objective.pool_networks:
        settings = ("pool_trained", "pool_steps")
        zero = next((name for name in settings if getattr(objective, name) == 0), None)
        if zero is not None:  # ce_weight multiplies an accuracy, which is then not measured
            for name in ("pool_batch", "pool_lr", "pool_momentum", "pool_weight_decay", "ce_weight", *settings):
                if name != zero:
                    yield f"objective.{name}", f"objective.{zero}=0"
    if isinstance(objective, SyntheticGradientConfig):
        # At one image per class DC's own table has one step of a network.
        untrained = "objective.inner_steps=1" if objective.inner_steps == 1 else "objective.network_epochs=0"
        if objective.inner_steps == 1 or objective.network_epochs == 0:
            for name in ("network_batch", "network_lr"):
                yield f"objective.{name}", untrained
        if objective.inner_steps == 1:
            yield "objective.network_epochs", untrained
    if isinstance(objective, TrajectoryMatchingConfig) and not objective.student_lr_lr:
        for name in ("student_lr_momentum", "student_lr_min"):
            yield f"objective.{name}", "objective.student_lr_lr=0"


def _of_judging(config: Config, condensed: Condensed) -> Iterator[tuple[str, str]]:
    pruning = config.pruning
    if not condensed.cut:
        why = "pruning.over_budget=0"
        if pruning.over_budget:
            why = f"pruning.over_budget={pruning.over_budget:g}, which makes room for no more images"
        for name in ("beta", "score", "score_networks", "score_epochs", "search_epochs"):
            yield f"pruning.{name}", why
    else:
        if pruning.score == "random":
            yield from _named("pruning", pruning, "score_", "pruning.score=random")
        if pruning.beta is not None:
            yield "pruning.search_epochs", f"pruning.beta={pruning.beta:g}"
    if not config.evaluation.curve_points:
        yield "evaluation.curve_epochs", "evaluation.curve_points=0"


def _named(section: str, config: object, head: str, why: str) -> Iterator[tuple[str, str]]:
    """All fields of ``config`` whose names begin with ``head``, with the reason ``why``."""
    for item in dataclasses.fields(config):
        if item.name.startswith(head):
            yield f"{section}.{item.name}", why
