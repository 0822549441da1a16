"""Checks that refuse a plan whose parts do not work together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hmn import distributed, networks
from hmn.config import Config, require
from hmn.config.containers import HabaConfig
from hmn.config.objectives import GradientMatchingConfig, TrajectoryMatchingConfig, UnrolledConfig
from hmn.containers import rebuild
from hmn.containers.base import Container


def check_pairs(config: Config, container: Container) -> None:
    """Refuse settings that are incompatible with each other or with the ``container`` that is condensed."""
    classes, tiers, tied = container.classes, container.tiers(), container.tied
    for tier in config.container.lr_scale:
        require(
            f"container.lr_scale.{tier}",
            tier in tiers,
            config.container.lr_scale[tier],
            f"for a tier of this container: {', '.join(tiers)}",
        )
    over = config.pruning.over_budget
    require("pruning.over_budget", not over or tied is None, over, f"0 for container={config.container.name}: {tied}")
    group = getattr(config.objective, "classes_per_step", None)
    require("objective.classes_per_step", group is None or group <= classes, group, f"at most {classes}")
    if isinstance(config.container, HabaConfig):
        read = isinstance(config.objective, TrajectoryMatchingConfig) and config.container.styles > 1
        for key in HabaConfig.ADVERSARY:
            given, default = getattr(config.container, key), getattr(HabaConfig, key)
            rule = f"{default} unless objective=trajectory_matching with several styles: the adversary compares two"
            require(f"container.{key}", read or given == default, given, rule)


def check_start(config: Config, container: Container, card: dict[str, Any]) -> None:
    """Refuse to start from the set of ``card`` if its shape or image count is not that of what this run condenses."""
    with torch.device("meta"):
        kept = rebuild(card["container"])
    own, found = container.specification(), kept.specification()
    keys = own | found if own["name"] == found["name"] else ["name"]
    differing = sorted(key for key in keys if own.get(key) != found.get(key))
    told = "; ".join(f"{key} is {found.get(key)} in the set, {own.get(key)} in this run" for key in differing)
    more = "; set pruning=none to start from a pruned set" if config.pruning.over_budget else ""
    require("container.start", not differing, config.container.start, f"a set of this run's shape: {told}{more}")


def check_networks(config: Config, network: nn.Module) -> None:
    """Refuse networks that condensing cannot use, and students and experts in several processes."""
    rule = "instance or none, because condensing compares single images on it; mode=evaluate takes others"
    require("network.norm", not networks.has_batch_norm(network), "batch", rule)
    matched = not isinstance(config.objective, GradientMatchingConfig) or any(p.ndim == 4 for p in network.parameters())
    rule = f"one with convolutions for objective={config.objective.name}, which compares their gradients"
    require("network.name", matched, config.network.name, rule)
    name, matching = config.objective.name, config.compute.matching
    written = isinstance(config.objective, GradientMatchingConfig)
    rule = f"auto, loop or compiled for objective={name}: r_operator is written out for gradient matching only"
    require("compute.matching", written or matching != "r_operator", matching, rule)
    alone = not distributed.launched() or not isinstance(config.objective, UnrolledConfig)
    rule = "an objective that matches class by class under torchrun: a student's steps cannot be split over processes"
    require("objective.name", alone, config.objective.name, rule)
