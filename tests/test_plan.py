"""``mode=plan``: what a run will store and cost, counted by hand, without data and without leaving anything behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from hmn import plan
from hmn.data.official import IMAGENET10
from hmn.errors import ArtifactError, ConfigError, DataError
from hmn.plan import make_plan
from tests.command import ROOT, configured, planned

# ConvNet-D3-W128 on 32 x 32 (Zhao & Bilen, ICLR 2021): multiply-adds of its layers at 32, 16, 8 and 1 pixels, times 2.
CONVOLUTIONS = (2 * 32**2 * 128 * 27, 2 * 16**2 * 128 * 1152, 2 * 8**2 * 128 * 1152)
CLASSIFIER = 2 * 2048 * 10
FORWARD = sum(CONVOLUTIONS) + CLASSIFIER
# A layer's weight gradient costs one more forward pass, and so does its input gradient, which pixels do not need.
TRAINING = 3 * FORWARD - CONVOLUTIONS[0]

# Shared floats: dataset memory + ten extractors + ten class memories + decoder (convolutions k*k*in*out + out).
PRESETS = {
    "ipc1": {  # P1c: s = 4, 8 -> 4 channels by 1x1, decoder 10 -> 16 -> 16 -> 8 -> 3
        "budget_floats": 30_720,
        "shared_floats": 8 * 16 + 10 * (8 * 4 + 4) + 10 * 2 * 16 + (1456 + 2320 + 1160 + 219),
        "instance_floats": 64,
        "stored_floats": 30_283,
        "images_per_class": 38,
        "over_budget_images_per_class": 43,
    },
    "ipc10": {  # P2: s = 8, 8 -> 8 channels by 3x3, decoder 18 -> 64 -> 32 -> 3
        "budget_floats": 307_200,
        "shared_floats": 8 * 64 + 10 * (9 * 8 * 8 + 8) + 10 * 8 * 64 + (10432 + 18464 + 867),
        "instance_floats": 128,
        "stored_floats": 306_195,
        "images_per_class": 207,
        "over_budget_images_per_class": 231,
    },
    "ipc50": {  # P3: s = 8, 16 -> 16 channels by 3x3, decoder 35 -> 128 -> 64 -> 3
        "budget_floats": 1_536_000,
        "shared_floats": 16 * 64 + 10 * (9 * 16 * 16 + 16) + 10 * 16 * 64 + (40448 + 73792 + 1731),
        "instance_floats": 192,
        "stored_floats": 1_534_755,
        "images_per_class": 721,
        "over_budget_images_per_class": 801,
    },
}


@pytest.mark.parametrize("memory", PRESETS)
def test_storage_of_cifar10_is_the_hand_count(memory):
    summary = planned("mode=plan", "dataset=cifar10", f"memory={memory}").summary()
    expected = PRESETS[memory]
    assert {key: summary[key] for key in expected} == expected
    assert sum(summary["tier_floats"].values()) == summary["stored_floats"] <= summary["budget_floats"]
    assert summary["tier_floats"]["instances"] == 10 * expected["images_per_class"] * expected["instance_floats"]
    assert summary["network_parameters"] == 320_010
    one_more = summary["stored_floats"] + 10 * expected["instance_floats"]
    assert one_more > summary["budget_floats"]


@pytest.mark.parametrize(("dataset", "parameters"), [("cifar100", 504_420), ("tiny_imagenet", 857_160)])
def test_networks_of_other_data_have_the_published_sizes(dataset, parameters):
    """ConvNet-D3 with 100 classes, ConvNet-D4 at 64 pixels with 200."""
    assert planned("mode=plan", f"dataset={dataset}").summary()["network_parameters"] == parameters


def test_flops_are_the_hand_count():
    plan = planned("mode=plan", "dataset=cifar10")
    assert FORWARD == 101_490_688
    assert plan.training_flops == TRAINING == 297_394_176
    assert round(TRAINING / FORWARD, 2) == 2.93
    # 2,000 samples in batches of 64 are 32 batches.
    assert plan.step_flops.update == 32 * 64 * TRAINING
    # A matching step differentiates by convolution weights only, once on real images and twice on decoded ones.
    weights, inputs = sum(CONVOLUTIONS), sum(CONVOLUTIONS[1:]) + CLASSIFIER
    once = FORWARD + weights + inputs
    twice = once + 2 * weights + inputs + FORWARD
    per_class = 64 * once + 43 * twice
    assert 1 <= plan.step_flops.matching / (10 * per_class) < 1.15  # the counter includes terms that nothing needs


def test_flops_follow_batches_and_classes():
    plan = planned("mode=plan", "dataset=cifar100")
    group = planned("mode=plan", "dataset=cifar100", "objective.classes_per_step=20")
    assert plan.step_flops.matching == 5 * group.step_flops.matching
    few = planned("mode=plan", "dataset=cifar100", "objective.synthetic_batch=10", "objective.real_batch=10")
    assert few.step_flops.matching < plan.step_flops.matching / 5
    assert planned("mode=plan", "objective.network_samples=0").step_flops.update == 0


def test_with_a_bank_a_step_is_the_synthetic_side_alone():
    live, banked = (planned("mode=plan", "dataset=cifar10", f"objective.bank.networks={count}") for count in (0, 2))
    real = 10 * 64 * (TRAINING - CLASSIFIER)  # the classifier's own gradient is not matched
    assert live.step_flops.matching - banked.step_flops.matching == pytest.approx(real, rel=0.001)
    assert banked.step_flops.update == 0


def test_a_plan_tells_the_size_of_the_bank():
    banked = planned("mode=plan", "dataset=cifar10", "objective.bank.networks=10", "objective.bank.snapshots=20")
    weights = 3 * 128 * 9 + 2 * 128 * 128 * 9  # of the convolutions, whose gradients are kept for every class
    assert banked.summary()["bank_bytes"] == 10 * 20 * 4 * (320_010 + 10 * weights)
    assert "bank_bytes" not in planned("mode=plan", "dataset=cifar10").summary()
    assert planned("mode=plan", "objective=distribution_matching").bank_bytes == 0


def test_flops_of_dc_add_the_classifier_and_the_synthetic_epochs():
    image = ("mode=plan", "dataset=cifar10", "memory=ipc10", "container=image", "pruning=none")
    plan = planned(*image, "objective=dc")
    assert plan.matching_steps == 1000 * 10
    # 50 epochs on 100 images after each of a network's 10 steps except the last.
    assert plan.step_flops.update == 50 * 100 * TRAINING * 9 // 10
    assert planned(*image[:2], "container=image", "pruning=none", "objective=dc").step_flops.update == 0
    weights, inputs = sum(CONVOLUTIONS) + CLASSIFIER, sum(CONVOLUTIONS[1:]) + CLASSIFIER
    once = FORWARD + weights + inputs
    per_class = 256 * once + 10 * (once + 2 * weights + inputs + FORWARD)
    assert 1 <= plan.step_flops.matching / (10 * per_class) < 1.05


def test_flops_of_dm_are_one_backward_pass_and_those_of_idm_its_pool():
    image = ("mode=plan", "dataset=cifar10", "memory=ipc10", "container=image", "pruning=none")
    plan = planned(*image, "objective=distribution_matching")
    features = FORWARD - CLASSIFIER
    assert plan.step_flops.matching == 10 * (256 * features + 10 * 2 * features)
    assert plan.step_flops.update == 0
    assert planned(*image, "objective=idm").step_flops.update == 2 * 10 * 256 * TRAINING


def test_flops_of_bptt_are_four_trainings_of_each_image_that_a_student_sees():
    """Its step, the same step again on the way back, and twice that for the gradients of a product's two factors."""
    image = ("mode=plan", "dataset=cifar10", "memory=ipc10", "container=image", "pruning=none", "objective=bptt")
    plan = planned(*image, "objective.student_steps=3", "objective.class_batch=4", "objective.real_batch=5")
    assert plan.step_flops.matching == 3 * (10 * 4) * 4 * TRAINING
    assert plan.step_flops.update == 10 * 5 * TRAINING
    whole = planned(*image, "objective.student_steps=3", "objective.class_batch=32")
    assert whole.step_flops.matching == 3 * (10 * 10) * 4 * TRAINING  # no more images than there are


@pytest.mark.parametrize("objective", ["dc", "distribution_matching", "trajectory_matching", "bptt"])
def test_the_written_out_form_is_refused_for_what_it_has_no_formula_for(objective):
    with pytest.raises(
        ConfigError, match=r"^compute\.matching=r_operator: must be auto, loop or compiled for objective="
    ):
        planned("mode=plan", f"objective={objective}", "compute.matching=r_operator")


def test_dc_asks_for_its_loops_where_its_table_has_none():
    with pytest.raises(
        ConfigError, match=r"^objective\.inner_steps=null: must be given: .*=\d+, only for 1, 10, 20, 30, 40, 50$"
    ):
        planned("mode=plan", "objective=dc", "memory.images_per_class=5")
    plan = planned("mode=plan", "objective=dc", "memory=ipc50")
    assert (plan.config.objective.inner_steps, plan.config.objective.network_epochs) == (50, 10)


def test_a_run_id_has_what_files_and_trackers_take_of_a_name():
    named = planned("dataset=cifar10", 'dataset.name="John\'s birds: 2#3"').run_id
    assert named.startswith("John_s_birds__2_3-ipc1-hmn-")


def test_expected_flops_are_those_of_condensing_and_of_training_the_judges():
    small = ("dataset=cifar10", "objective.outer_steps=2", "objective.inner_steps=3", "evaluation.networks=4")
    plan = planned(*small, "evaluation.epochs=5")
    condensing = 6 * (plan.step_flops.matching + plan.step_flops.update)
    assert plan.expected_flops == condensing + 4 * 5 * 380 * TRAINING
    assert planned(*small, "evaluation.epochs=5", "mode=random_subset").expected_flops == 4 * 5 * 10 * TRAINING
    full = planned(*small, "evaluation.full_data_epochs=2", "mode=full_data")
    assert full.expected_flops == 4 * 2 * 45_000 * TRAINING  # without the tenth that is held out
    hundred = planned("dataset=cifar100", "evaluation.full_data_epochs=2", "mode=full_data", "evaluation.networks=4")
    assert hundred.expected_flops == 4 * 2 * 45_000 * hundred.training_flops


@pytest.mark.parametrize(
    ("dataset", "images"),
    [
        ("mnist", 60_000),
        ("fashion_mnist", 60_000),
        ("svhn", 73_257),
        ("cifar10", 50_000),
        ("cifar100", 50_000),
        ("tiny_imagenet", 100_000),
        ("imagenet10", 13_000),
        ("digits", 0.8 * 1_797),  # a fifth is the test set
    ],
)
def test_training_images_are_reckoned_with_before_they_are_read(dataset, images):
    plan = planned("mode=plan", f"dataset={dataset}", "dataset.held_out_fraction=0.25")
    assert plan.train_images == pytest.approx(0.75 * images, rel=0.005)


def test_expected_flops_of_judging_kept_sets_are_those_of_their_images(monkeypatch):
    kept = ROOT / "experiments" / "release" / "hmn-cifar10-q75-ipc1"
    first, second = kept, kept.with_name(f"{kept.name}-6000-steps")  # 38 images per class each
    monkeypatch.setattr("hmn.plan.check_together", lambda cards: None)  # the two have the same classes
    judged = ("dataset=cifar10", "evaluation.networks=4", "evaluation.epochs=5")
    one = planned(*judged, "mode=evaluate", f"artifact={first}")
    assert one.expected_flops == 4 * 5 * 380 * TRAINING
    both = planned(*judged, "mode=evaluate", f"artifact=[{first},{second}]")
    assert both.expected_flops == 4 * 5 * 2 * 380 * TRAINING
    less = planned(*judged, "mode=redundancy", f"artifact={first}", "redundancy.drop=[0,0.75]")
    assert less.expected_flops == 4 * 5 * (380 + 95) * TRAINING


def test_the_plan_as_json_comes_from_an_empty_folder_and_leaves_it_empty(tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), "mode=plan", "plan.format=json", "dataset=cifar10", "memory=ipc10"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []

    assert {key: summary[key] for key in PRESETS["ipc10"]} == PRESETS["ipc10"]
    assert summary["run_id"] == planned("dataset=cifar10", "memory=ipc10").run_id
    assert summary["dataset"] == {"name": "cifar10", "classes": 10, "channels": 3, "image_size": 32}
    assert (summary["network"], summary["network_parameters"]) == ("ConvNet-D3-W128", 320_010)
    assert summary["container"]["preset"] == "p2"
    assert set(summary["tier_floats"]) == {"dataset", "class", "instances", "extractors", "decoder"}
    assert summary["network_update_flops"] == 32 * 64 * TRAINING
    assert summary["matching_step_flops"] > 10 * (64 + 128) * TRAINING
    assert summary["matching_steps"] == 200 * 100
    assert summary["evaluation_steps_per_network"] == 1000 * 33  # 2,070 images in batches of 64


def test_the_plan_as_text_has_a_line_for_each_number():
    text = planned("mode=plan", "dataset=cifar10").text("text")
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    expected = {"budget_floats": "30,720", "images_per_class": "38", "network_parameters": "320,010"}
    assert {key: lines[key] for key in expected} == expected
    assert lines["tier_floats"] == "instances=24,320  class=320  dataset=128  extractors=360  decoder=5,155"
    assert len(lines) == len(planned("mode=plan", "dataset=cifar10").summary())


def test_class_folders_are_enough_for_a_plan(tmp_path):
    for split in ("train", "test"):
        for name in ("ant", "bee", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
    given = ("mode=plan", "dataset=folder", f"dataset.root={tmp_path}", "memory=ipc10")
    summary = planned(*given).summary()
    assert summary["dataset"] == {"name": tmp_path.name, "classes": 3, "channels": 3, "image_size": 32}
    assert summary["budget_floats"] == 10 * 3 * 3 * 32 * 32
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 0
    assert planned(*given, "dataset.name=insects").summary()["dataset"]["name"] == "insects"


def test_a_plan_shares_the_id_of_its_run():
    assert planned("mode=plan", "dataset=cifar10").run_id == planned("dataset=cifar10").run_id


# What has no plan


def test_a_budget_too_small_names_the_smallest_that_fits():
    """P3's shared tiers take 150,435 floats, and ten images take 192 each; the budget is one real image per class."""
    with pytest.raises(ConfigError) as caught:
        planned("dataset=cifar10", "memory=ipc1", "container=hmn_p3")
    line = str(caught.value)
    assert "\n" not in line
    assert "150,435 floats" in line
    assert "over the budget of 30,720" in line
    assert "the smallest budget that fits is 152,355" in line
    assert "memory.images_per_class" in line
    per_image = 10 * 3 * 32 * 32
    enough = -(-152_355 // per_image)
    given = ("dataset=cifar10", "container=hmn_p3")
    assert planned(*given, f"memory.images_per_class={enough}").storage.images_per_class >= 1
    with pytest.raises(ConfigError, match="smallest budget"):
        planned(*given, f"memory.images_per_class={enough - 1}")


@pytest.mark.parametrize(("side", "latent"), [(32, 5), (32, 12), (32, 32), (30, 4), (32, 64)])
def test_an_image_side_that_doubling_cannot_reach_is_named(side, latent):
    with pytest.raises(ConfigError, match=rf"^container.latent_side={latent}: must be .*dataset.image_size={side} "):
        planned("dataset=cifar10", f"dataset.image_size={side}", f"container.latent_side={latent}")


STEP = ("mode=plan", "dataset=cifar100", "dataset.class_order=0", "memory.images_per_class=20")


@pytest.mark.parametrize("classes", [10, 20])
@pytest.mark.parametrize("container", ["hmn", "image", "multiformation", "coreset"])
def test_a_step_is_planned_for_its_own_classes(container, classes):
    pruning = "double_end" if container == "hmn" else "none"
    summary = planned(
        *STEP, f"dataset.class_range=[20,{20 + classes}]", f"container={container}", f"pruning={pruning}"
    ).summary()
    assert summary["dataset"]["classes"] == classes
    assert summary["budget_floats"] == 20 * classes * 3 * 32 * 32
    assert summary["network_parameters"] == 320_010 + (classes - 10) * (2048 + 1)
    images = {"image": 20, "coreset": 20, "multiformation": 80}
    if container in images:
        assert (summary["images_per_class"], summary["stored_floats"]) == (
            images[container],
            summary["budget_floats"],
        )
    else:  # the shapes for ten classes and ten images, the nearest in the paper's tables
        shared = 8 * 64 + classes * (9 * 8 * 8 + 8) + classes * 8 * 64 + (10432 + 18464 + 867)
        count = (summary["budget_floats"] - shared) // (classes * 128)
        assert (summary["container"]["preset"], summary["images_per_class"]) == ("p2", count)


def test_two_digits_in_the_storage_of_ten_images():
    digits = ("mode=plan", "dataset=digits", "memory=ipc10")
    for first in range(0, 10, 2):
        summary = planned(*digits, f"dataset.class_range=[{first},{first + 2}]").summary()
        assert (summary["budget_floats"], summary["images_per_class"]) == (2 * 10 * 64, 30)
    with pytest.raises(ConfigError, match=r"over the budget of 128; the smallest budget that fits is 277"):
        planned("mode=plan", "dataset=digits", "memory=ipc1", "dataset.class_range=[0,2]")


def test_what_the_data_contradict_is_refused(tmp_path):
    refused = {
        "network.depth=4": ("dataset=digits", r"^network.depth=4: must be small enough .* 8-pixel image"),
        "container.preset=p12": ("dataset=cifar10", r"^container.preset=p12: must be auto or one of p1, p1b, "),
        "objective.classes_per_step=11": ("dataset=cifar10", r"^objective.classes_per_step=11: must be at most 10"),
        "dataset.test_fraction=0.5": ("dataset=cifar10", r"^dataset.test_fraction=0.5: must be null"),
        "dataset.root=there": ("dataset=digits", r"^dataset.root=there: must be null"),
        "dataset.test_fraction=null": ("dataset=digits", r"^dataset.test_fraction=null: must be given"),
    }
    for override, (dataset, line) in refused.items():
        with pytest.raises(ConfigError, match=line):
            planned(dataset, override)
    with pytest.raises(DataError, match=r"^dataset.classes=11: .* has 10"):
        planned("dataset=cifar10", "dataset.classes=11")
    with pytest.raises(DataError, match="lacks the class folder n02869837"):
        for split in ("train", "val"):
            for wnid in list(IMAGENET10)[1:]:
                (tmp_path / split / wnid).mkdir(parents=True)
        planned("dataset=imagenet10", f"dataset.root={tmp_path}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_asked_for_where_there_is_none_is_refused_but_may_be_planned_for():
    config = configured("dataset=cifar10", "compute.device=cuda:1")
    with pytest.raises(ConfigError, match=r"^compute.device=cuda:1: must be cpu or auto: this machine has no such GPU"):
        make_plan(config)
    assert planned("mode=plan", "dataset=cifar10", "compute=cuda").storage.images_per_class == 38


def test_imagenet10_needs_its_root_for_all_but_a_plan():
    assert planned("mode=plan", "dataset=imagenet10").data.image_size == 224
    with pytest.raises(ConfigError) as caught:
        planned("dataset=imagenet10")
    assert str(caught.value) == "dataset.root=null: must be given for dataset=imagenet10"


def test_a_rate_of_a_tier_that_the_container_lacks_is_refused():
    with pytest.raises(ConfigError) as caught:
        planned("mode=plan", "dataset=cifar10", "+container.lr_scale.tokens=0.1")
    known = "instances, class, dataset, extractors, decoder"
    assert str(caught.value) == f"container.lr_scale.tokens=0.1: must be for a tier of this container: {known}"


def test_a_network_without_convolutions_has_no_gradients_of_them_to_match():
    with pytest.raises(ConfigError, match=r"^network\.name=mlp: must be one with convolutions for objective=gradient"):
        planned("mode=plan", "dataset=cifar10", "network=mlp")
    assert planned("mode=plan", "dataset=cifar10", "network=mlp", "objective=dc", "container=image", "pruning=none")


def test_habas_adversary_is_refused_where_nothing_reads_it():
    haba = ("mode=plan", "container=haba", "memory=ipc10", "pruning=none", "container.club_weight=0.5")
    with pytest.raises(ConfigError, match=r"^container\.club_weight=0\.5: must be 0\.1 unless objective=trajectory_"):
        planned(*haba)
    haba += ("objective=trajectory_matching",)
    assert planned(*haba).config.container.club_weight == 0.5
    with pytest.raises(ConfigError, match=r"^container\.club_weight=0\.5: must be 0\.1 unless .* with several styles"):
        planned(*haba, "container.styles=1")


def test_experts_are_planned_whatever_the_container():
    """The container's styles are not counted in this mode."""
    haba = ("mode=experts", "dataset=digits", "container=haba", "objective=trajectory_matching")
    assert planned(*haba, "container.club_weight=0.5").config.container.club_weight == 0.5


SMALL = ("mode=plan", "dataset=digits")
NOT_READ = [
    (("container.fit_steps=5000",), ["container.fit_steps (container.init=random)"]),
    (("container.fit_steps=5000", "container.init=fit_real"), []),
    (
        ("container.feature_channels=0", "container.feature_kernel=1"),
        ["container.feature_kernel (container.feature_channels=0)"],
    ),
    (("pruning=none", "pruning.beta=0.3", "seed=1"), ["pruning.beta (pruning.over_budget=0)"]),
    (("pruning.beta=0.3", "pruning.search_epochs=7"), ["pruning.search_epochs (pruning.beta=0.3)"]),
    (("pruning.score=random", "pruning.score_epochs=7"), ["pruning.score_epochs (pruning.score=random)"]),
    (("evaluation.curve_epochs=7",), ["evaluation.curve_epochs (evaluation.curve_points=0)"]),
    (("evaluation.curve_epochs=7", "evaluation.curve_points=2"), []),
    (
        ("container=image", "pruning=none", "objective.weights_lr=1"),
        ["objective.weights_lr (container=image, which has no networks)"],
    ),
    (("objective.weights_lr=1",), []),
    (("objective.weights_lr=1", "container.feature_channels=0"), []),
    (("objective.weights_lr=1", "container.class_channels=0"), []),
    (
        ("objective=dc", "memory=ipc1", "container=image", "pruning=none", "objective.network_lr=1"),
        ["objective.network_lr (objective.inner_steps=1)"],
    ),
    (("objective=dc", "memory=ipc10", "container=image", "pruning=none", "objective.network_lr=1"), []),
    (
        ("objective.strategy=none", "objective.augmentation_rule=vico"),
        ["objective.augmentation_rule (objective.strategy=none)"],
    ),
    (
        ("objective.step_policy=per_class", "objective.class_reduction=sum"),
        ["objective.class_reduction (objective.step_policy=per_class)"],
    ),
    (("objective.network_samples=0", "objective.network_lr=1"), ["objective.network_lr (objective.network_samples=0)"]),
    (("objective.bank.seed=1",), ["objective.bank.seed (objective.bank.networks=0)"]),
    (
        (
            "objective=trajectory_matching",
            "container=image",
            "pruning=none",
            "objective.student_lr_lr=0",
            "objective.student_lr_min=0",
        ),
        ["objective.student_lr_min (objective.student_lr_lr=0)"],
    ),
    (
        ("objective=idm", "objective.pool_trained=0", "objective.pool_steps=5", "objective.ce_weight=1"),
        ["objective.pool_steps (objective.pool_trained=0)", "objective.ce_weight (objective.pool_trained=0)"],
    ),
    (
        ("objective=idm", "objective.pool_steps=0", "objective.pool_lr=1"),
        ["objective.pool_lr (objective.pool_steps=0)"],
    ),
    (("objective=idm", "objective.pool_lr=1", "objective.pool_interval=2"), []),
    (("evaluation.full_data_epochs=7", "redundancy.drop=[0.5]"), ["redundancy.drop (mode=run)"]),
    (
        ("objective=dsa", "memory=ipc1", "container=image", "pruning=none", "objective.network_epochs=5"),
        ["objective.network_epochs (objective.inner_steps=1)"],
    ),
    (
        ("container=image", "memory=ipc10", "pruning=none", "objective.unbiased=true"),
        ["objective.unbiased (a step shows all 10 images of a class)"],
    ),
    (
        ("container=image", "memory=ipc10", "pruning=none", "objective.unbiased=true", "objective.synthetic_batch=8"),
        [],
    ),
    (
        ("container=image", "memory=ipc1", "pruning.over_budget=0.1", "pruning.beta=0.5", "pruning.score_epochs=9"),
        [
            f"pruning.{name} (pruning.over_budget=0.1, which makes room for no more images)"
            for name in ("beta", "score_epochs")
        ],
    ),
    (("container=image", "memory=ipc10", "pruning.over_budget=0.1", "pruning.beta=0.5"), []),
    (
        ("container=coreset", "pruning=none", "container.fit_steps=7"),
        ["pruning (container=coreset, which condenses nothing)", "container.fit_steps (container.init=real)"],
    ),
    (
        (
            "container=coreset",
            "container.method=herding",
            "pruning=none",
            "objective.bank.networks=2",
            "network.width=8",
        ),
        [
            "pruning (container=coreset, which condenses nothing)",
            "objective.bank.networks (container=coreset, which condenses nothing)",
        ],
    ),
]


@pytest.mark.parametrize(("given", "told"), NOT_READ)
def test_who_gives_what_nothing_reads_is_told_which_setting_that_is_for(given, told):
    plan = planned(*SMALL, *given)
    assert list(plan.not_read) == told
    assert plan.summary().get("not_read", []) == told
    assert all(one in plan.text("text") for one in told)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ("mode=full_data", "memory=ipc10", "evaluation.curve_epochs=7", "evaluation.full_data_epochs=7"),
            ["memory", "evaluation.curve_epochs"],
        ),
        (
            ("mode=random_subset", "memory=ipc10", "memory.number=float16", "pruning.beta=0.3"),
            ["memory.number", "pruning.beta"],
        ),
        (
            (
                "mode=experts",
                "objective=mtt_hmn",
                "objective.experts.epochs=60",
                "objective.memory_lr=1",
                "container=image",
            ),
            ["objective.memory_lr", "container"],
        ),
    ],
)
def test_other_modes_say_which_settings_they_do_not_read(given, told):
    plan = planned("dataset=digits", "seed=1", *given)
    assert list(plan.not_read) == [f"{key} ({given[0]})" for key in told]


def test_of_what_files_give_nothing_is_said():
    """Here the file gives settings of a fit, which container.init=random does not read."""
    assert planned("mode=plan", "experiment=demo", "container.init=random").not_read == ()


def test_a_card_of_another_version_asks_which_data_are_meant():
    card = {"data": {"config": {"kind": "digits", "colour": 1}}}
    with pytest.raises(ArtifactError, match=r"^artifact=a: its data settings \(.*colour.*\) are from another version"):
        plan._dataset_of("a", card)
