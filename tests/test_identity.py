"""The run id changes with the science and with nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmn.config import BankConfig, Config, containers, objectives
from hmn.config.checks import is_scientific
from hmn.config.identity import digest, scientific
from hmn.data import official
from hmn.plan import Plan, make_plan
from tests.command import changed, configured

SECTIONS = (
    "dataset",
    "memory",
    "container",
    "objective",
    "pruning",
    "network",
    "evaluation",
    "tracking",
    "compute",
    "redundancy",
    "plan",
    "paths",
)

BASE = ("dataset=cifar10", "memory=ipc10")

# A different value for every setting, grouped by whether the setting changes what mode=run computes.
SCIENCE: dict[str, dict[str, Any]] = {
    "dataset": {
        "kind": "svhn",
        "name": "mine",
        "image_size": 64,
        "channels": ...,  # tested below, because mean and std go with it
        "classes": 11,
        "class_order": 0,
        "class_range": [0, 2],
        "mean": None,
        "std": None,
        "flip": False,
        "held_out_fraction": 0.2,
        "test_fraction": 0.5,
    },
    "memory": {"images_per_class": 11, "number": "float16"},
    "container": {
        "name": ...,  # another container has other settings
        "preset": "p1",
        "latent_side": 4,
        "dataset_channels": 4,
        "feature_channels": 4,
        "feature_kernel": 1,
        "class_channels": 4,
        "instance_channels": 3,
        "decoder_width": 32,
        "decoder": "transposed",
        "decoder_norm": True,
        "output": "linear",
        "init": "fit_real",
        "lr_scale": {"decoder": 2.0},
        "instance_init_scale": 2.0,
        "fit_steps": 7,
        "fit_batch": 7,
        "fit_images": "k_means",
        "fit_learning_rate": 0.1,
        "fit_weights_lr": 0.1,
    },
    "objective": {
        "name": ...,  # another objective has other settings
        "metric": "l1",
        "outer_steps": 7,
        "inner_steps": 7,
        "real_batch": 7,
        "synthetic_batch": 7,
        "classes_per_step": 7,
        "strategy": "none",
        "augmentation_rule": "vico",
        "step_policy": "per_class",
        "class_reduction": "sum",
        "optimizer": "sgd",
        "lr_scaling": "idc",
        "momentum": ...,  # tested below, because it goes with sgd
        "gradient_clip": 7.0,
        "average": 0.5,
        "memory_lr": 0.1,
        "weights_lr": 0.1,
        "beta1": 0.1,
        "beta2": 0.1,
        "final_lr_fraction": 0.2,
        "unbiased": True,
        "network_samples": 7,
        "network_batch": 7,
        "network_lr": 0.1,
        "network_momentum": 0.1,
        "network_weight_decay": 0.1,
        "network_strategy": "none",
        "network_cutmix": 0.1,
        "k_means_interval": 7,
        "bank": BankConfig(networks=7),
    },
    "pruning": {
        "over_budget": 0.2,
        "score": "random",
        "beta": 0.3,
        "score_networks": 7,
        "score_epochs": 7,
        "search_epochs": 7,
    },
    "network": {"name": ..., "width": 7, "depth": 2, "norm": "batch"},
    "evaluation": {
        "profile": "mine",
        "networks": 7,
        "epochs": 7,
        "batch": 7,
        "even_batches": True,
        "lr": 0.1,
        "momentum": 0.1,
        "weight_decay": 0.1,
        "schedule": "multistep",
        "strategy": "none",
        "cutmix": 0.1,
        "test_points": 7,
        "curve_points": 7,
        "curve_epochs": 7,
    },
    "compute": {"precision": "bf16"},
}
CIRCUMSTANCE: dict[str, dict[str, Any]] = {
    "dataset": {"root": "/elsewhere", "download": False},
    "container": {"start": ...},  # only with init=kept; the run id has its checksum
    "evaluation": {"full_data_epochs": 7},
    "tracking": {
        "mode": "disabled",
        "project": "mine",
        "entity": "me",
        "group": "ours",
        "labels": {"method": "ours"},
        "log_every_steps": 7,
        "images_every_steps": 7,
    },
    "compute": {
        "device": "cpu",
        "deterministic": False,
        "matching": "loop",
        "blocks": ...,  # only with matching=r_operator
        "convolutions": "direct",
        "classes_per_call": 7,
        "memory_limit": 7.0,
        "threads": 7,
        "networks_together": 7,
        "record": False,
        "share_condensed": True,
        "keep_heap": False,
        "checkpoint_every_seconds": 7.0,
    },
    "paths": {"runs_dir": "/elsewhere", "data_dir": "/elsewhere", "cache_dir": "/elsewhere"},
    "redundancy": {"drop": [0.5]},
    "plan": {"format": "json"},
}


def pairs(table: dict[str, dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(f"{section}__{name}", value) for section, names in table.items() for name, value in names.items()]


def test_every_setting_is_either_science_or_circumstance():
    named = sorted(key for key, _ in pairs(SCIENCE) + pairs(CIRCUMSTANCE))
    fields = [(section, dataclasses.fields(getattr(configured(), section))) for section in SECTIONS]
    assert named == sorted(f"{section}__{item.name}" for section, items in fields for item in items)


def identity(config: Config) -> str:
    return digest(scientific(config))


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, value in pairs(SCIENCE) if value is not ...])
def test_another_experiment_has_another_id(key, value):
    config = configured(*BASE)
    assert identity(changed(config, **{key: value})) != identity(config)


def test_so_have_another_seed_mode_momentum_and_number_of_channels():
    config = configured(*BASE)
    by_sgd = changed(config, objective__optimizer="sgd")
    measured = changed(config, dataset__mean=None, dataset__std=None)
    others = [changed(config, seed=1), changed(config, mode="full_data")]
    others += [measured, changed(measured, dataset__channels=1)]
    others += [by_sgd, changed(by_sgd, objective__momentum=0.1)]
    assert len({identity(other) for other in [config, *others]}) == 7


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, value in pairs(CIRCUMSTANCE) if value is not ...])
def test_the_same_experiment_elsewhere_has_the_same_id(key, value):
    config = configured(*BASE)
    assert identity(changed(config, **{key: value})) == identity(config)


def test_the_same_experiment_with_other_kernels_has_the_same_id():
    config = configured(*BASE)
    other = changed(config, compute__matching="r_operator", compute__blocks="triton")
    assert identity(other) == identity(config)


def test_of_every_container_and_objective_only_these_stay_out_of_the_id():
    """``start``, whose checksum is in the id, and ``segment``, which changes what is kept in memory but no result."""
    sections = (*containers.SCHEMAS, *objectives.SCHEMAS.values(), objectives.ExpertsConfig, BankConfig)
    found = {item.name for section in sections for item in dataclasses.fields(section) if not is_scientific(item)}
    assert found == {"start", "segment"}


@pytest.mark.parametrize("kind", sorted(official.CLASSES))
def test_official_data_are_the_same_wherever_they_lie(kind):
    here, there = (configured(f"dataset={kind}", f"dataset.root={root}") for root in ("/here", "/there"))
    assert identity(here) == identity(there)


@pytest.mark.parametrize("kind", ["folder", "arrays"])
def test_a_users_data_are_others_elsewhere(kind):
    here, there = (configured(f"dataset={kind}", f"dataset.root={root}") for root in ("/here", "/there"))
    assert identity(here) != identity(there)


@pytest.mark.parametrize("root", ["data/mine/", "./data/mine", "data//mine"])
def test_the_same_folder_is_the_same_however_it_is_written(root):
    one, other = (configured("dataset=folder", f"dataset.root={text}") for text in (root, "data/mine"))
    assert identity(one) == identity(other)


def test_the_id_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def plan_of(*overrides: str) -> Plan:
    return make_plan(configured(*BASE, *overrides))


def test_the_same_settings_said_otherwise_have_the_same_id():
    """The automatic preset and its name, a group's file and its field, an integer for a float."""
    ids = {plan_of(*given).run_id for given in ([], ["container=hmn_p2"], ["container.preset=p2"])}
    ids |= {plan_of(given).run_id for given in ("container.latent_side=8", "container.decoder_width=64")}
    ids |= {plan_of("memory=ipc1", "memory.images_per_class=10").run_id, plan_of("mode=plan").run_id}
    assert len(ids) == 1
    assert plan_of("pruning.over_budget=0").run_id == plan_of("pruning=none").run_id
    assert plan_of("container=hmn_p1").run_id not in ids


def test_the_id_says_what_it_is():
    head, _, tail = plan_of().run_id.rpartition("-")
    assert (head, len(tail), int(tail, 16) >= 0) == ("cifar10-ipc10-hmn", 8, True)
    assert plan_of("mode=full_data").run_id.startswith("cifar10-full_data-")
    assert plan_of("mode=random_subset").run_id.startswith("cifar10-ipc10-random_subset-")
    assert plan_of("dataset.name=a/b").run_id.startswith("a_b-ipc10-hmn-")
    assert plan_of("paths.runs_dir=there").folder == Path("there") / plan_of().run_id


FIT_DEFAULTS_THEN = (
    "container.fit_steps=500",
    "container.fit_batch=1024",
    "container.fit_learning_rate=0.02",
    "container.fit_weights_lr=null",
)


@pytest.mark.parametrize(
    ("run_id", "given"),
    [
        ("digits-ipc1-hmn-7ac2a604", FIT_DEFAULTS_THEN),
        ("cifar10-ipc10-image-40c8bdd3", ("dataset=cifar10", "memory=ipc10", "container=image")),
        ("cifar100-ipc1-coreset_random-5cd39a92", ("dataset=cifar100", "container=coreset")),
        ("svhn-full_data-daddcd1a", ("dataset=svhn", "mode=full_data")),
        ("tiny_imagenet-ipc1-random_subset-ba93c74e", ("dataset=tiny_imagenet", "mode=random_subset")),
        ("cifar10-experts-6988ace2", ("dataset=cifar10", "mode=experts", "objective=mtt_hmn")),
    ],
)
def test_ids_of_runs_that_may_lie_around_stay_as_they_were(run_id, given):
    """The ids are of commit b457f6d, which had no choice of classes, no lists of artifacts and no mode=redundancy."""
    assert make_plan(configured(*given)).run_id == run_id


def test_classes_make_other_runs_and_are_named_by_their_positions():
    ranges = [f"dataset.class_range=[{first},{first + 2}]" for first in (0, 2)]
    orders = [f"dataset.class_order={order}" for order in (0, 1)]
    plans = [plan_of(*given) for given in [(), *zip(ranges), *zip(orders), (ranges[0], orders[0])]]
    assert len({plan.run_id for plan in plans}) == 6
    assert [plan.run_id.rsplit("-", 1)[0] for plan in plans[:3]] == [
        "cifar10-ipc10-hmn",
        "cifar10_classes0-1-ipc10-hmn",
        "cifar10_classes2-3-ipc10-hmn",
    ]
    assert plan_of(ranges[0], "dataset.name=mine").run_id.startswith("mine-ipc10-hmn-")


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("redundancy__drop", [0.5], True),
        *[(f"pruning__{name}", SCIENCE["pruning"][name], True) for name in ("score", "score_networks", "score_epochs")],
        *[(f"pruning__{name}", SCIENCE["pruning"][name], False) for name in ("over_budget", "beta", "search_epochs")],
        ("evaluation__epochs", 7, True),
        ("evaluation__curve_points", 7, False),
        ("network__width", 7, True),
        ("memory__images_per_class", 7, False),
    ],
)
def test_redundancy_depends_on_how_it_is_scored_and_not_on_how_the_set_came_about(key, value, other):
    config = changed(configured(*BASE), artifact="there", mode="redundancy")
    assert (identity(changed(config, **{key: value})) != identity(config)) is other


OTHER_RUN = ("container=hmn_p1", "container.decoder_width=8", "objective.metric=l1", "pruning=none")


def test_the_full_data_reference_is_shared_by_all_memories_and_containers():
    shared = {plan_of("mode=full_data", *given).run_id for given in ([], ["memory=ipc50"], OTHER_RUN)}
    assert len(shared) == 1
    others = ["network.width=64", "evaluation.epochs=10", "evaluation.full_data_epochs=10", "seed=1"]
    others += ["dataset.held_out_fraction=0.2", "compute.precision=bf16"]
    ids = {plan_of("mode=full_data", other).run_id for other in others}
    assert len(ids | shared) == 7


def test_the_random_subset_reference_is_shared_by_all_containers_of_a_memory():
    shared = {plan_of("mode=random_subset", *given).run_id for given in ([], OTHER_RUN)}
    shared |= {plan_of("mode=random_subset", "evaluation.full_data_epochs=10", "evaluation.curve_points=3").run_id}
    assert len(shared) == 1
    ids = {plan_of("mode=random_subset", other).run_id for other in ("memory=ipc50", "network.width=64", "seed=1")}
    assert len(ids | shared) == 4


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("evaluation__epochs", 7, True),
        ("evaluation__schedule", "multistep", True),
        ("network__width", 7, True),
        ("evaluation__curve_points", 7, False),
        ("pruning__score_epochs", 7, False),
        ("memory__images_per_class", 7, False),
    ],
)
def test_judging_a_kept_set_depends_on_how_it_is_judged_alone(key, value, other):
    config = changed(configured(*BASE), artifact="there", mode="evaluate")
    assert (identity(changed(config, **{key: value})) != identity(config)) is other


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3)])
def test_channels_that_are_found_make_the_same_run_as_the_same_channels_given(tmp_path, shape):
    arrays = {"x_train": np.zeros((6, *shape), np.uint8), "x_test": np.zeros((2, *shape), np.uint8)}
    np.savez(tmp_path / "mine.npz", **arrays, y_train=np.arange(6) % 2, y_test=np.arange(2))
    given = ("dataset=arrays", f"dataset.root={tmp_path}/mine.npz", "memory=ipc10", "container=image")
    found, three = make_plan(configured(*given)), make_plan(configured(*given, "dataset.channels=3"))
    assert found.config.dataset.channels == found.data.channels == (*shape, 1)[2]
    assert (found.run_id == three.run_id) is (len(shape) == 3)
