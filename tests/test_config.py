"""Errors of range checks name the key, the value and the rule."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

import pytest

from hmn.config import DATASETS, NETWORK_NORMS, BankConfig, NetworkConfig, containers, objectives
from hmn.errors import ConfigError
from tests.command import changed, configured


def refused(line: str, **values: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(configured(), **values)
    assert str(caught.value) == line


# Ranges

RANGE_RULE = "null or [first, last) of at least 2 classes, counted from 0"
REFUSED = {
    "dataset": {
        "kind": {"usps": f"one of {', '.join(DATASETS)}"},
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
        "blocks": {"cuda": "one of compiler, triton", "triton": "compiler unless compute.matching=r_operator"},
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
    """Every field whose type is a number, with or without null."""
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
    rule = "false unless metric=mse and synthetic_batch is even or null"
    refused(f"objective.unbiased=true: must be {rule}", objective__unbiased=True, objective__metric="l1")
    refused(f"objective.unbiased=true: must be {rule}", objective__unbiased=True, objective__synthetic_batch=63)


def test_settings_of_another_optimizer_are_refused():
    """``configured()`` uses Adam, so it accepts betas; a setting that nothing reads may keep its default."""
    rule = "must be 0.5 with objective.optimizer=adam, which does not use it"
    refused(f"objective.momentum=0.9: {rule}", objective__momentum=0.9)
    for name, default in (("beta1", 0.9), ("beta2", 0.99)):
        rule = f"must be {default} with objective.optimizer=sgd, which does not use it"
        refused(f"objective.{name}=0.5: {rule}", objective__optimizer="sgd", **{f"objective__{name}": 0.5})


def test_a_deviation_of_zero_is_refused():
    refused("dataset.std=[0.0]: must be positive", dataset__std=[0.0])


@pytest.mark.parametrize("kind", ["folder", "arrays"])
def test_a_users_data_need_a_root(kind):
    refused(f"dataset.root=null: must be given for dataset={kind}", dataset__kind=kind)


def test_only_arrays_know_their_own_size():
    refused("dataset.image_size=null: must be given", dataset__image_size=None)
    refused("dataset.channels=null: must be 1 or 3", dataset__channels=None)
    arrays = {"dataset__root": "x.npz", "dataset__kind": "arrays", "dataset__channels": 2}
    refused("dataset.channels=2: must be 1, 3 or null", **arrays)
    refused("dataset.channels=2: must be 1, 3 or null", **arrays | {"dataset__kind": "folder"})
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
    refused("artifact=there: must be null unless mode=evaluate or mode=redundancy", artifact="there")


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


def test_places_may_be_of_a_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configured('paths.runs_dir="~/runs"').paths.runs_dir == "/home/me/runs"
