"""Range checks name key, value and rule; the run id changes with the science and with nothing else."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from hmn.config import NETWORK_NORMS, BankConfig, Config, NetworkConfig, containers, objectives
from hmn.config.checks import is_scientific
from hmn.config.identity import digest, scientific
from hmn.errors import ConfigError
from hmn.plan import Plan, make_plan
from tests.command import configured


def changed(config: Config, **values: Any) -> Config:
    """``config`` with other values; a key ``section__field`` is the dotted ``section.field``."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            value = dataclasses.replace(sections.get(section, getattr(config, section)), **{name: value})
        sections[section] = value
    return dataclasses.replace(config, **sections)


def refused(line: str, **values: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(configured(), **values)
    assert str(caught.value) == line


# Ranges

RANGE_RULE = "null or [first, last) of at least 2 classes, counted from 0"
REFUSED = {
    "dataset": {
        "kind": {"mnist": "one of svhn, cifar10, cifar100, tiny_imagenet, imagenet10, folder, arrays, digits"},
        "image_size": {3: "at least 4"},
        "channels": {0: "1 or 3", 2: "1 or 3", 4: "1 or 3"},
        "classes": {1: "at least 2"},
        "class_order": {-1: "null or a seed in [0, 2^32)", 2**32: "null or a seed in [0, 2^32)"},
        "class_range": dict.fromkeys([(), (0, 1), (3, 2), (-2, 2), (0, 2, 4)], RANGE_RULE),
        "held_out_fraction": {-0.1: "in [0, 1)", 1.0: "in [0, 1)"},
        "test_fraction": {0.0: "null or in (0, 1)", 1.0: "null or in (0, 1)"},
    },
    "memory": {"images_per_class": {0: "at least 1"}, "number": {"bfloat16": "one of float32, float16"}},
    "container": {
        "name": {"pixels": "one of hmn"},
        "latent_side": {0: "at least 1"},
        "dataset_channels": {0: "at least 1"},
        "feature_channels": {-1: "at least 0"},
        "feature_kernel": {2: "odd and positive", -1: "odd and positive", 0: "odd and positive"},
        "class_channels": {-1: "at least 0"},
        "instance_channels": {0: "at least 1"},
        "decoder_width": {0: "at least 1", 5: "even"},
        "decoder": {"linear": "one of upsample, transposed"},
        "init": {"noise": "one of random, fit_real, kept"},
        "instance_init_scale": {0.0: "positive"},
        "fit_steps": {0: "at least 1"},
        "fit_batch": {0: "at least 1"},
        "fit_learning_rate": {0.0: "positive"},
        "fit_weights_lr": {0.0: "positive"},
    },
    "objective": {
        "name": {"trajectory": "one of gradient_matching"},
        "metric": {"l2": "one of mse, l1, cosine"},
        "outer_steps": {0: "at least 1"},
        "inner_steps": {0: "at least 1"},
        "real_batch": {0: "at least 1"},
        "synthetic_batch": {0: "at least 1"},
        "classes_per_step": {0: "null or at least 1"},
        "step_policy": {"both": "one of accumulate, per_class"},
        "memory_lr": {0.0: "positive"},
        "weights_lr": {0.0: "positive"},
        "beta1": {1.0: "in [0, 1)", -0.1: "in [0, 1)"},
        "beta2": {1.0: "in [0, 1)", -0.1: "in [0, 1)"},
        "final_lr_fraction": {1.1: "in [0, 1]", -0.1: "in [0, 1]"},
        "network_samples": {-1: "at least 0"},
        "network_batch": {0: "at least 1"},
        "network_lr": {0.0: "positive"},
        "network_momentum": {1.0: "in [0, 1)", -0.1: "in [0, 1)"},
        "network_weight_decay": {-1e-9: "at least 0"},
        "network_cutmix": {1.1: "in [0, 1]", -0.1: "in [0, 1]"},
    },
    "pruning": {
        "over_budget": {1.0: "in [0, 1)", -0.1: "in [0, 1)"},
        "score": {"el2n": "one of logit_margin, softmax_margin, random"},
        "beta": {1.1: "null or in [0, 1]", -0.1: "null or in [0, 1]"},
        "score_networks": {0: "at least 1"},
        "score_epochs": {0: "at least 1"},
        "search_epochs": {0: "at least 1"},
    },
    "network": {
        "name": {"resnet": f"one of {', '.join(NETWORK_NORMS)}"},
        "width": {0: "null or at least 1"},
        "depth": {0: "null or at least 1"},
        "norm": {"group": "one of instance, batch, none"},
    },
    "evaluation": {
        "networks": {0: "at least 1"},
        "epochs": {0: "at least 1"},
        "full_data_epochs": {0: "null or at least 1"},
        "batch": {0: "at least 1"},
        "lr": {0.0: "positive"},
        "momentum": {1.0: "in [0, 1)", -0.1: "in [0, 1)"},
        "weight_decay": {-1e-9: "at least 0"},
        "schedule": {"linear": "one of cosine, multistep"},
        "cutmix": {1.1: "in [0, 1]", -0.1: "in [0, 1]"},
        "test_points": {0: "at least 1"},
        "curve_points": {1: "0 or at least 2", -1: "0 or at least 2"},
        "curve_epochs": {0: "at least 1"},
    },
    "tracking": {
        "mode": {"on": "one of auto, online, offline, disabled"},
        "log_every_steps": {0: "at least 1"},
        "images_every_steps": {0: "at least 1"},
    },
    "compute": {
        "device": {
            device: "auto, cpu, cuda or cuda:N" for device in ("tpu", "cuda:", "cuda:x", "cuda:0:1", "cpu:0", "")
        },
        "precision": {"fp16": "one of fp32, tf32, bf16"},
        "matching": {"fast": "one of auto, loop, compiled, r_operator"},
        "classes_per_call": {0: "null or at least 1"},
        "memory_limit": {0.0: "null or positive"},
        "threads": {0: "null or at least 1"},
        "networks_together": {0: "null or at least 1"},
        "checkpoint_every_seconds": {-1.0: "at least 0"},
    },
    "redundancy": {"drop": dict.fromkeys([(), (1.0,), (0.1, -0.1)], "one or more shares in [0, 1)")},
    "plan": {"format": {"xml": "one of text, json"}},
}
SECTIONS = (*REFUSED, "paths")


@pytest.mark.parametrize(
    ("section", "name", "value", "rule"),
    [
        (section, name, value, rule)
        for section, names in REFUSED.items()
        for name, values in names.items()
        for value, rule in values.items()
    ],
)
def test_a_value_out_of_range_is_named_with_its_key_and_the_rule(section, name, value, rule):
    refused(f"{section}.{name}={value}: must be {rule}", **{f"{section}__{name}": value})


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"name": "mlp", "norm": "batch"}, "network.norm=batch: must be one of none"),
        ({"name": "resnet18", "norm": "none"}, "network.norm=none: must be one of instance, batch"),
        ({"name": "resnet18", "depth": 3}, "network.depth=3: must be null for resnet18"),
        ({"name": "lenet", "norm": "none", "width": 6}, "network.width=6: must be null for lenet"),
    ],
)
def test_a_network_takes_only_what_it_can_be_given(setting, line):
    with pytest.raises(ConfigError, match=f"^{line}$"):
        NetworkConfig(**setting)


def test_the_top_level_is_checked_too():
    modes = "run, plan, evaluate, full_data, random_subset, experts, redundancy"
    refused(f"mode=train: must be one of {modes}", mode="train")
    refused("seed=-1: must be at least 0", seed=-1)


NUMBERS = (int, float, int | None, float | None)


def numbers() -> list[tuple[str, str]]:
    """Every field that is a number or a null."""
    found = []
    for section in SECTIONS:
        hints = get_type_hints(type(getattr(configured(), section)))
        found += [(section, name) for name, hint in hints.items() if hint in NUMBERS]
    return found


@pytest.mark.parametrize(("section", "name"), numbers())
def test_no_number_goes_without_a_range(section, name):
    hint = get_type_hints(type(getattr(configured(), section)))[name]
    value = math.nan if hint in (float, float | None) else -1
    with pytest.raises(ConfigError, match=rf"^{section}\.{name}={value}: must be "):
        changed(configured(), **{f"{section}__{name}": value})


EVERY = [("container", one, {"name": one.NAME}) for one in containers.SCHEMAS]
EVERY += [("objective", one, {"name": one.NAMES[0]}) for one in objectives.SCHEMAS.values()]
EVERY += [("objective", objectives.DistributionMatchingConfig, {"name": "distribution_matching", "pool_networks": 4})]
EVERY += [("objective.experts", objectives.ExpertsConfig, {}), ("objective.bank", BankConfig, {})]


def numbers_of_every_schema() -> list[tuple[str, type, dict[str, Any], str]]:
    return [(*one, name) for one in EVERY for name, hint in get_type_hints(one[1]).items() if hint in NUMBERS]


@pytest.mark.parametrize(("section", "schema", "given", "name"), numbers_of_every_schema())
def test_nor_does_one_of_any_container_or_objective(section, schema, given, name):
    value = math.nan if get_type_hints(schema)[name] in (float, float | None) else -1
    with pytest.raises(ConfigError, match=rf"^{section}\.{name}={value}: must be "):
        schema(**given | {name: value})


@pytest.mark.parametrize("key", ["objective.strategy", "objective.network_strategy", "evaluation.strategy"])
@pytest.mark.parametrize("value", ["colour", "color_crop_crop", "", "none_crop", "color-crop"])
def test_an_unknown_augmentation_is_refused_with_the_known_ones(key, value):
    known = "color, crop, cutout, flip, scale, rotate"
    refused(f"{key}={value}: must be none, or some of {known} joined by _", **{key.replace(".", "__"): value})


@pytest.mark.parametrize("value", ["none", "color", "rotate_crop"])
def test_a_known_augmentation_is_taken(value):
    assert changed(configured(), objective__strategy=value).objective.strategy == value


@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_are_one_number_per_channel(name):
    rule = "null or 1 numbers, one per channel"
    refused(f"dataset.{name}=[0.5, 0.5, 0.5]: must be {rule}", **{f"dataset__{name}": [0.5] * 3})


def test_the_unbiased_distance_is_mse_of_two_halves():
    rule = "false but for metric=mse and an even synthetic_batch"
    refused(f"objective.unbiased=true: must be {rule}", objective__unbiased=True, objective__metric="l1")
    refused(f"objective.unbiased=true: must be {rule}", objective__unbiased=True, objective__synthetic_batch=63)


def test_settings_of_another_optimizer_are_refused():
    """``configured()`` has Adam, whose betas are taken; a default that nothing reads may stay."""
    rule = "must be 0.5 with objective.optimizer=adam, which has none"
    refused(f"objective.momentum=0.9: {rule}", objective__momentum=0.9)
    for name, default in (("beta1", 0.9), ("beta2", 0.99)):
        rule = f"must be {default} with objective.optimizer=sgd, which has none"
        refused(f"objective.{name}=0.5: {rule}", objective__optimizer="sgd", **{f"objective__{name}": 0.5})


def test_a_deviation_of_zero_is_refused():
    refused("dataset.std=[0.0]: must be positive", dataset__std=[0.0])


@pytest.mark.parametrize("kind", ["folder", "arrays"])
def test_a_users_data_need_a_root(kind):
    refused(f"dataset.root=null: must be given for dataset={kind}", dataset__kind=kind)


def test_only_arrays_know_their_own_size():
    refused("dataset.image_size=null: must be given", dataset__image_size=None)
    assert changed(configured(), dataset__root="x.npz", dataset__kind="arrays", dataset__image_size=None)


def test_held_out_images_are_there_for_whatever_is_selected_on_them():
    rule = "positive while pruning.beta is null: the search is judged on held-out images"
    refused(f"dataset.held_out_fraction=0.0: must be {rule}", dataset__held_out_fraction=0.0)
    fixed = changed(configured(), pruning__beta=0.3, dataset__held_out_fraction=0.0)
    assert changed(configured(), pruning__over_budget=0.0, dataset__held_out_fraction=0.0)
    with pytest.raises(ConfigError, match="dataset.held_out_fraction=0.0: .* while evaluation.curve_points is set"):
        changed(fixed, evaluation__curve_points=2)


@pytest.mark.parametrize("mode", ["evaluate", "redundancy"])
def test_judging_needs_an_artifact(mode):
    refused(f"artifact=null: must be given for mode={mode}", mode=mode)
    refused(f"artifact=[]: must be given for mode={mode}", artifact=[], mode=mode)


def test_an_artifact_that_nothing_would_read_is_refused():
    refused("artifact=there: must be null but for mode=evaluate and mode=redundancy", artifact="there")


def test_no_artifact_is_joined_with_itself_and_redundancy_is_of_one():
    refused("artifact=[a,b,a]: must be different kept sets", artifact=["a", "b", "a"], mode="evaluate")
    refused("artifact=[a,b]: must be one kept set for mode=redundancy", artifact=["a", "b"], mode="redundancy")
    assert changed(configured(), artifact=["a"], mode="redundancy").artifacts == ("a",)
    assert changed(configured(), artifact="a", mode="evaluate").artifacts == ("a",)


# From the command line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("+foo=1", "foo: unknown key; valid are mode, seed, artifact, "),
        ("+network.foo=1", "network.foo: unknown key; valid are name, width, depth, norm"),
        ("+plan.foo=1", "plan.foo: unknown key; valid are format"),
        ("+objective.bank.foo=1", "objective.bank.foo: unknown key; valid are networks, snapshots"),
        ("~memory", "memory: give it a value"),
        ("memory.images_per_class=???", "memory.images_per_class: give it a value"),
        ("plan.format=xml", "plan.format=xml: must be one of text, json"),
        ("seed=-1", "seed=-1: must be at least 0"),
    ],
)
def test_what_an_override_adds_or_takes_away_is_said(override, line):
    with pytest.raises(ConfigError) as caught:
        configured(override)
    assert str(caught.value).startswith(line)


# The run id

BASE = ("dataset=cifar10", "memory=ipc10")

# Another value for every setting, by whether it changes what mode=run computes.
SCIENCE: dict[str, dict[str, Any]] = {
    "dataset": {
        "kind": "svhn",
        "name": "mine",
        "image_size": 64,
        "channels": ...,  # below, as mean and std go with it
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
        "momentum": ...,  # below, as it goes with sgd
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
    "container": {"start": ...},  # given with init=kept alone; the run id has its checksum
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


def test_of_every_container_and_objective_only_these_stay_out_of_the_id():
    """``start``, whose checksum is in it, and ``segment``, which changes what is kept and nothing that is computed."""
    sections = (*containers.SCHEMAS, *objectives.SCHEMAS.values(), objectives.ExpertsConfig, BankConfig)
    found = {item.name for section in sections for item in dataclasses.fields(section) if not is_scientific(item)}
    assert found == {"start", "segment"}


@pytest.mark.parametrize("kind", ["svhn", "cifar10", "cifar100", "tiny_imagenet", "imagenet10"])
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


def test_places_may_be_of_a_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configured('paths.runs_dir="~/runs"').paths.runs_dir == "/home/me/runs"


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
    """Of commit b457f6d, before there were classes to choose, several artifacts and mode=redundancy."""
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
