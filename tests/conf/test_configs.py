"""Every file of ``conf/`` composes, passes the checks, and has a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from hmn.config import DATASETS, NETWORK_NORMS
from hmn.containers import KINDS
from hmn.containers.presets import PRESETS
from hmn.data.official import IMAGENET10
from hmn.networks import builder, full_name
from tests.command import CONF, configured, planned

FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
# From MTT's code: student steps, M, latest start, learning rates of pixels and alpha, alpha, images per student step
MTT_ROWS = {
    "cifar10_ipc1": (50, 2, 2, 100, 1e-7, 0.01, None),
    "cifar10_ipc10": (30, 2, 20, 100, 1e-5, 0.001, None),
    "cifar10_ipc50": (30, 2, 40, 1000, 1e-5, 0.001, None),
    "cifar100_ipc1": (20, 3, 20, 1000, 1e-5, 0.01, None),
    "cifar100_ipc10": (20, 2, 20, 1000, 1e-5, 0.01, None),
    "cifar100_ipc50": (80, 2, 40, 1000, 1e-5, 0.01, 125),
    "tiny_imagenet_ipc1": (10, 2, 10, 10000, 1e-4, 0.01, None),
    "tiny_imagenet_ipc10": (20, 2, 40, 10000, 1e-4, 0.01, 200),
    "tiny_imagenet_ipc50": (20, 2, 40, 10000, 1e-4, 0.01, 300),
}
MTT_OPTIONS = [*MTT_ROWS, "haba", "hmn", "speed"]
ALL_OPERATORS = "color_crop_cutout_flip_scale_rotate"
IDC = {"outer_steps": 2000, "inner_steps": 100, "metric": "mse", "real_batch": 64, "synthetic_batch": 128}
IDC |= {"step_policy": "per_class", "class_reduction": "mean", "lr_scaling": "idc", "final_lr_fraction": 1.0}
IDC |= {"optimizer": "sgd", "momentum": 0.5, "memory_lr": 0.005, "weights_lr": 0.005, "k_means_interval": None}
IDC |= {"strategy": "color_crop_cutout", "augmentation_rule": "idc", "network_strategy": "color_crop"}
IDC |= {"network_samples": 2000, "network_batch": 64, "network_lr": 0.01, "network_momentum": 0.9}
IDC |= {"network_weight_decay": 5e-4, "network_cutmix": 0.5}
DC = {"outer_steps": 1000, "inner_steps": None, "network_epochs": None, "metric": "cosine", "real_batch": 256}
DC |= {"synthetic_batch": None, "network_batch": 256, "network_lr": 0.01, "optimizer": "sgd", "momentum": 0.5}
DC |= {"memory_lr": 0.1, "weights_lr": 0.1, "final_lr_fraction": 1.0, "lr_scaling": "none", "strategy": "none"}
DC |= {"augmentation_rule": "vico", "class_reduction": "sum", "step_policy": "accumulate"}
DM = {"outer_steps": 20_000, "inner_steps": 1, "real_batch": 256, "synthetic_batch": None, "pool_networks": 0}
DM |= {"optimizer": "sgd", "momentum": 0.5, "memory_lr": 1.0, "weights_lr": 1.0, "final_lr_fraction": 1.0}
DM |= {"strategy": ALL_OPERATORS, "augmentation_rule": "vico", "class_reduction": "sum", "step_policy": "accumulate"}
IDM = {"step_policy": "per_class", "memory_lr": 0.2, "weights_lr": 0.2, "ce_weight": 0.5, "pool_networks": 100}
IDM |= {"pool_interval": 30, "pool_trained": 2, "pool_steps": 10, "pool_batch": 256, "pool_lr": 0.01}
IDM |= {"pool_momentum": 0.9, "pool_weight_decay": 5e-4}
LINBA = {"outer_steps": 5000, "student_steps": 150, "student_momentum": 0.9, "student_dampening": 0.0}
LINBA |= {"student_lr": 0.01, "class_batch": 32, "real_batch": 64, "gradient_clip": 2.0, "strategy": "none"}
LINBA |= {"optimizer": "sgd", "momentum": 0.5, "memory_lr": 0.1, "weights_lr": 0.1, "final_lr_fraction": 1.0}
STUDENT = {"optimizer": "sgd", "final_lr_fraction": 1.0, "strategy": ALL_OPERATORS, "augmentation_rule": "vico"}
HABA = {"outer_steps": 15_000, "student_steps": 50, "student_batch": None, "student_momentum": 0.0, "momentum": 0.95}
HABA |= {"memory_lr": 100, "weights_lr": 100, "expert_epochs": 2, "max_start_epoch": 2}
HABA |= {"student_lr": 0.01, "student_lr_lr": 1e-7, "student_lr_momentum": 0.9}
SPEED = {"outer_steps": 20_000, "student_steps": 60, "student_batch": 64, "student_momentum": 0.9, "momentum": 0.95}
SPEED |= {"student_dampening": 0.9, "memory_lr": 100, "weights_lr": 0.01, "expert_epochs": 2, "max_start_epoch": 10}
SPEED |= {"student_lr": 0.01, "student_lr_lr": 1e-5, "student_lr_momentum": 0.95}
PAPERS = {
    "idc": IDC,
    "dream": IDC | {"real_batch": 128, "k_means_interval": 10},
    "dc": DC,
    "dsa": DC | {"strategy": ALL_OPERATORS},
    "distribution_matching": DM,
    "idm": DM | IDM,
    "bptt": LINBA,
    "mtt_haba": STUDENT | HABA,
    "mtt_speed": STUDENT | SPEED,
}
GROUPS = {
    "dataset": sorted(DATASETS),
    "memory": ["ipc1", "ipc10", "ipc50"],
    "container": sorted([*KINDS, *(f"hmn_{name}" for name in PRESETS)]),
    "objective": sorted(
        ["bptt", "dc", "distribution_matching", "dream", "dsa", "gradient_matching", "gradient_matching_bank"]
        + ["idc", "idm"]
        + [f"mtt_{row}" for row in MTT_OPTIONS]
        + ["trajectory_matching"]
    ),
    "pruning": ["double_end", "none"],
    "network": sorted([*NETWORK_NORMS, "densenet_cifar", "resnet10_cifar"]),
    "evaluation": ["hmn_cosine", "idc_multistep"],
    "tracking": ["auto", "disabled", "offline", "online"],
    "compute": ["auto", "cpu", "cuda"],
    "paths": ["local"],
    "launcher": ["local", "ray", "submitit"],
}
VARIANTS = [path for path in FILES if path.parts[0] in ("experiment", "debug")]
USERS_DATA = ("folder", "arrays", "imagenet10")  # read from dataset.root


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """Users' data as far as a plan reads it: class folders without images, labels, and the shape of an array."""
    folder, imagenet, arrays = (tmp_path_factory.mktemp(name) for name in ("folder", "imagenet", "arrays"))
    for split in ("train", "test"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
    for split in ("train", "val"):
        for wnid in IMAGENET10:
            (imagenet / split / wnid).mkdir(parents=True)
    labels, pixels = np.arange(10), np.zeros((10, 32, 32, 3), np.uint8)
    np.savez(arrays / "ten.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return {"folder": folder, "imagenet10": imagenet, "arrays": arrays / "ten.npz"}


def test_the_groups_and_their_options_are_all_there():
    folders = [folder for folder in CONF.iterdir() if folder.is_dir()]
    found = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}
    assert found.pop("experiment")
    assert found.pop("debug")
    assert found == GROUPS


@pytest.mark.parametrize("name", DATASETS)
def test_each_dataset_file_selects_its_kind_and_has_a_plan(name, roots):
    given = [f"dataset.root={roots[name]}"] if name in roots else []
    plan = planned("mode=plan", f"dataset={name}", *given)
    assert plan.config.dataset.kind == name
    assert plan.data.classes == {"cifar100": 100, "tiny_imagenet": 200}.get(name, 10)
    sides = {"digits": 8, "mnist": 28, "fashion_mnist": 28, "tiny_imagenet": 64, "imagenet10": 224}
    assert plan.data.image_size == sides.get(name, 32)
    assert plan.data.channels == (1 if name in ("digits", "mnist", "fashion_mnist") else 3)


def test_memory_files_are_named_by_their_images_per_class():
    counts = {name: configured(f"memory={name}").memory.images_per_class for name in GROUPS["memory"]}
    assert counts == {"ipc1": 1, "ipc10": 10, "ipc50": 50}


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_file_fits_the_budget_of_the_data_it_was_made_for(name, tmp_path):
    row = PRESETS[name]
    for label in range(row.classes):
        (tmp_path / str(label)).mkdir()
    data = ["dataset=folder", f"dataset.root={tmp_path}", "dataset.test_fraction=0.5"]
    data += [f"dataset.image_size={row.image_size}", f"dataset.channels={1 if row.image_size == 8 else 3}"]
    memory = f"memory.images_per_class={row.images_per_class}"
    plan = planned("mode=plan", f"container=hmn_{name}", *data, memory)
    assert plan.config.container.preset == name
    assert plan.config.container.latent_side == row.latent_side
    assert 1 <= plan.storage.images_per_class < plan.storage.over_budget_images_per_class
    assert plan.storage.stored_floats(row.classes) <= plan.storage.budget_floats


@pytest.mark.parametrize("name", ["evaluation", "pruning", "tracking", "compute"])
def test_each_option_of_a_group_passes_the_checks_and_differs_from_the_others(name):
    options = [getattr(configured(f"{name}={option}"), name) for option in GROUPS[name]]
    assert all(options.count(option) == 1 for option in options)


def test_profiles_are_what_their_names_say():
    """IDC: 1000 epochs, x 0.2 at 2/3 and 5/6; HMN: cosine. Ten networks each."""
    for name, schedule in (("hmn_cosine", "cosine"), ("idc_multistep", "multistep")):
        profile = configured(f"evaluation={name}").evaluation
        assert (profile.profile, profile.schedule, profile.epochs, profile.networks) == (name, schedule, 1000, 10)
        assert (profile.batch, profile.lr, profile.momentum, profile.weight_decay) == (64, 0.01, 0.9, 5e-4)
        assert (profile.strategy, profile.cutmix) == ("color_crop_flip_scale_rotate", 0.5)


NETWORKS = {  # name in tables, and number of parameters for three channels and ten classes
    "alexnet": ("AlexNet", 1_872_202),
    "convnet": ("ConvNet-D3-W128", 320_010),
    "densenet121": ("DenseNet121-BN", 6_956_298),
    "densenet_cifar": ("DenseNet121-W12-BN", 1_000_618),
    "lenet": ("LeNet", 62_006),
    "mlp": ("MLP", 411_146),
    "resnet10": ("ResNet10-BN", 4_903_242),
    "resnet10_cifar": ("ResNet10-W32-BN", 1_228_970),
    "resnet18": ("ResNet18-BN", 11_173_962),
    "resnet18_ap": ("ResNet18AP", 11_250_762),
    "resnet_ap10": ("ResNetAP10", 4_903_242),
    "vgg11": ("VGG11", 9_231_114),
    "vgg16": ("VGG16-BN", 14_728_266),
}


@pytest.mark.parametrize("name", GROUPS["network"])
def test_each_network_file_gives_the_published_network(name):
    config = configured(f"network={name}").network
    with torch.device("meta"):
        network = builder(config, channels=3, classes=10, image_size=32)()
    assert (full_name(config, 32), sum(value.numel() for value in network.parameters())) == NETWORKS[name]


@pytest.mark.parametrize("row", MTT_ROWS)
def test_mtt_files_are_the_rows_of_its_table(row):
    objective = configured(f"objective=mtt_{row}").objective
    names = ("student_steps", "expert_epochs", "max_start_epoch", "memory_lr", "student_lr_lr", "student_lr")
    assert tuple(getattr(objective, name) for name in (*names, "student_batch")) == MTT_ROWS[row]
    assert (objective.name, objective.momentum, objective.outer_steps) == ("trajectory_matching", 0.5, 5000)


@pytest.mark.parametrize("name", PAPERS)
def test_an_objective_of_a_paper_has_the_settings_of_its_code(name):
    objective = configured(f"objective={name}").objective
    assert {key: getattr(objective, key) for key in PAPERS[name]} == PAPERS[name]


@pytest.mark.parametrize(
    ("images", "steps", "epochs"), [(1, 1, 1), (10, 10, 50), (20, 20, 25), (30, 30, 20), (40, 40, 15), (50, 50, 10)]
)
def test_dc_has_the_loops_of_its_paper(images, steps, epochs):
    found = configured("objective=dc").objective.with_loops(images)
    assert (found.inner_steps, found.network_epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("name", "table", "row", "differing"),
    [
        # Its published runs were fitted with one rate for all parameters
        ("tuned_ipc1", "q75_metric", "l1", {"fit_learning_rate": (0.2, 0.02), "fit_weights_lr": (0.005, None)}),
        ("tuned_ipc10", "q75_main_ipc10", "HMN", {}),
    ],
)
def test_tuned_settings_are_those_of_the_published_runs_of_hmn(name, table, row, differing):
    tuned = configured(f"experiment={name}")
    rows = OmegaConf.to_container(OmegaConf.load(CONF.parent / "experiments" / "tables" / f"{table}.yaml"))
    steps = rows["axes"].get("steps", {}).get("2000", [])
    published = configured(*rows["base"], *steps, *rows["axes"][rows["rows"][0]][row])
    for section in ("memory", "objective", "network"):
        assert getattr(tuned, section) == getattr(published, section)
    assert tuned.pruning.over_budget == published.pruning.over_budget
    ours, theirs = dataclasses.asdict(tuned.container), dataclasses.asdict(published.container)
    assert {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]} == differing
    assert tuned.compute.precision == published.compute.precision


@pytest.mark.parametrize("path", VARIANTS, ids=str)
def test_each_variant_composes_and_has_a_plan(path, roots):
    assert planned_with_data("mode=plan", f"{path.parts[0]}={path.stem}", roots=roots).storage.images_per_class >= 1


@pytest.mark.parametrize("path", [path for path in VARIANTS if path.parts[0] == "experiment"], ids=str)
def test_a_debug_variant_shortens_every_experiment(path, roots):
    plan = planned_with_data("mode=plan", f"experiment={path.stem}", "debug=smoke", roots=roots)
    assert plan.matching_steps == 6
    assert plan.config.dataset == planned_with_data(f"experiment={path.stem}", roots=roots).config.dataset


def planned_with_data(*overrides: str, roots: dict[str, Path]):
    kind = configured(*overrides).dataset.kind
    return planned(*overrides, *([f"dataset.root={roots[kind]}"] if kind in USERS_DATA else []))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_file_sets_only_what_the_schema_knows(path):
    values = OmegaConf.to_container(OmegaConf.load(CONF / path))
    values = {name: value for name, value in values.items() if name not in ("defaults", "hydra")}
    schema = [f"{path.parts[0]}={path.stem}"] if path.parts[0] in ("objective", "debug", "launcher") else []
    config = configured(*schema)
    if path.parts[0] in GROUPS:
        values = {path.parts[0]: values}
    assert set(values) <= keys(config)
    for name, section in values.items():
        if isinstance(section, dict):
            assert set(section) <= keys(getattr(config, name))


def keys(section: object) -> set[str]:
    return {item.name for item in dataclasses.fields(section)}


def test_a_variant_may_set_what_the_defaults_set(tmp_path):
    """Variants override the top level's own values, not the other way round."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nseed: 5\nmode: full_data\nnetwork: {width: 7}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = configured("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
    assert (config.seed, config.mode, config.network.width) == (5, "full_data", 7)
