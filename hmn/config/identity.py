"""What results depend on: the settings whose hash names a run, and those that runs must agree on to share files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from hmn.config import Config
from hmn.config.checks import identity_of

# What the outcome of each kind of run depends on, besides seed and precision.
SECTIONS = {
    "run": ("dataset", "memory", "container", "objective", "pruning", "network", "evaluation"),
    "coreset": ("dataset", "memory", "container", "network", "evaluation"),
    "evaluate": ("dataset", "network", "evaluation"),
    "redundancy": ("dataset", "pruning", "network", "evaluation", "redundancy"),
    "full_data": ("dataset", "network", "evaluation"),
    "random_subset": ("dataset", "memory", "network", "evaluation"),
    "experts": ("dataset", "network"),  # and objective.experts
}


def scientific(config: Config) -> dict[str, Any]:
    """The settings that decide what this mode computes, as plain values: the run id is their hash."""

    sections = {name: identity_of(getattr(config, name), config.kind) for name in SECTIONS[config.kind]}
    if config.mode == "experts":
        sections["experts"] = dataclasses.asdict(config.objective.experts)
    own = {"mode": config.mode, "seed": config.seed, "precision": config.compute.precision}
    return own | sections | {"dataset": config.dataset.identity()}


def condensation_identity(config: Config) -> dict[str, Any]:
    """What condensing depends on, as plain values; with a learning curve, that includes the evaluation's recipe."""
    everything = scientific(config)
    names = ("seed", "precision", "dataset", "memory", "container", "objective", "network")
    kept = {name: everything[name] for name in names} | {"over_budget": config.pruning.over_budget}
    kept["memory"].pop("number", None)  # numbers are rounded after condensing
    if config.evaluation.curve_points:
        unread = ("profile", "networks", "epochs", "test_points")
        kept["curve"] = {name: value for name, value in everything["evaluation"].items() if name not in unread}
    return kept


def bank_identity(config: Config, precision: str) -> dict[str, Any]:
    """What the contents of a snapshot bank depend on, as plain values: runs that agree on it share one bank.

    ``precision`` is the one in use, which is not the configured one where bf16 does not pay.
    """
    objective = config.objective
    names = ("strategy", "augmentation_rule", "real_batch", "inner_steps", "bank")
    kept = {k: v for k, v in dataclasses.asdict(objective).items() if k in names or k.startswith("network_")}
    return {**_data_and_network(config), "objective": kept, "precision": precision}


def experts_identity(config: Config, precision: str) -> dict[str, Any]:
    """What each expert depends on, however many there are, as plain values: runs that agree on it share them."""
    experts = {name: value for name, value in dataclasses.asdict(config.objective.experts).items() if name != "count"}
    return {**_data_and_network(config), "experts": experts, "precision": precision}


def _data_and_network(config: Config) -> dict[str, Any]:
    return {"dataset": scientific(config)["dataset"], "network": dataclasses.asdict(config.network)}


def digest(values: dict[str, Any]) -> str:
    """Eight hexadecimal digits that name ``values``, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
