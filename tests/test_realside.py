"""What networks of each objective train on, and when: whole steps against plain loops, pools, clusters, resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn import realside
from hmn.build import Workshop, condensation
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.config.objectives import (
    DC_LOOPS,
    ClassMatchingConfig,
    DistributionMatchingConfig,
    GradientMatchingConfig,
    SyntheticGradientConfig,
)
from hmn.containers.image import RawImages, RawShape
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.data.splits import Split
from hmn.errors import ConfigError
from hmn.matching import ClassMatching
from hmn.network_update import training_step
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.distance import all_weights
from hmn.objectives.distribution import CE_FACTOR, IMAGES, distribution_step
from hmn.objectives.gradient import matching_step
from hmn.pool import FIRST, PoolSide
from hmn.realside import LiveSide, SyntheticSide, UntrainedSide
from hmn.seeding import derived_seed, generator
from tests.command import configured

CPU = Compute(torch.device("cpu"))
CLASSES, PER_CLASS, SEED = 3, 4, 5
COUNTS = (11, 12, 13)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_real() -> RealData:
    stream = torch.Generator().manual_seed(9)
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS))
    noise = torch.randint(-40, 41, (len(labels), 3, 8, 8), generator=stream)
    images = (70 + 50 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8)
    train, empty = Split(images, labels), Split(images[:0], labels[:0])
    names = {"name": "tiny", "class_names": ("a", "b", "c"), "notes": (), "fingerprint": "f" * 64}
    return RealData(mean=MEAN, std=STD, train=train, held_out=empty, test=empty, **names)


REAL = make_real()


def build() -> nn.Module:
    return ConvNet(3, CLASSES, 8, width=4, depth=2)


def fresh(*names: str | int) -> nn.Module:
    network = build().to(memory_format=torch.channels_last)  # parameters are drawn in memory order
    return initialise(network, generator(SEED, "condense", *names))


def dc(**changes: Any) -> SyntheticGradientConfig:
    values = {
        "name": "dc",
        "outer_steps": 2,
        "inner_steps": 2,
        "network_epochs": 2,
        "real_batch": 6,
        "network_batch": 5,
    }
    return SyntheticGradientConfig(**values | changes)


def dm(**changes: Any) -> DistributionMatchingConfig:
    values = {"outer_steps": 4, "real_batch": 6, "strategy": "none"}
    return DistributionMatchingConfig(name="distribution_matching", **values | changes)


def idm(**changes: Any) -> DistributionMatchingConfig:
    values = {"pool_networks": 4, "pool_interval": 2, "pool_trained": 2, "pool_steps": 3, "pool_batch": 9}
    return dm(**values | {"ce_weight": 0.5} | changes)


def dream(**changes: Any) -> GradientMatchingConfig:
    values = {"outer_steps": 2, "inner_steps": 4, "real_batch": 5, "k_means_interval": 2}
    values |= {"network_samples": 16, "network_batch": 8}
    return GradientMatchingConfig(name="gradient_matching", **values | changes)


def make_container(seed: int = 0) -> RawImages:
    shape = RawShape(classes=CLASSES, channels=3, image_size=8, pixel_space="unit")
    container = RawImages(shape, PER_CLASS)
    nn.init.uniform_(container.instances, generator=torch.Generator().manual_seed(seed))
    return container


def make_run(config: ClassMatchingConfig, *, container_seed: int = 0) -> ClassMatching:
    shared = {"build": build, "compute": CPU, "seed": SEED, "flip": True}
    train = training_step(build(), CPU)
    if isinstance(config, SyntheticGradientConfig):
        side = SyntheticSide(REAL, config, count=CLASSES * PER_CLASS, train=train, **shared)
        match, parts = matching_step(build(), config.metric, CPU, all_weights), 3
    elif isinstance(config, GradientMatchingConfig):
        side, parts = LiveSide(REAL, config, train=train, **shared), None
        match = matching_step(build(), config.metric, CPU)
    else:
        pool = config.pool_networks
        side = PoolSide(REAL, config, train=train, **shared) if pool else UntrainedSide(REAL, config, **shared)
        match, parts = distribution_step(build(), CPU), 1
    options = {"normalise": side.normalise, "compute": CPU, "seed": SEED}
    return ClassMatching(make_container(container_seed), side, config, match=match, parts=parts, **options)


def noted(run: ClassMatching, monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Tensor]]:
    """Record what the side's ``choose`` or ``choose_update`` will return."""
    found, choose = [], getattr(run.side, name)
    monkeypatch.setattr(run.side, name, lambda *given: found.append(choose(*given)) or found[-1])
    return found


def normalised(images: Tensor) -> Tensor:
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def plain_gradients(network: nn.Module, images: Tensor, label: int) -> list[Tensor]:
    loss = F.cross_entropy(network(normalised(images)), torch.full((len(images),), label))
    return torch.autograd.grad(loss, [p for p in network.parameters() if p.ndim > 1], create_graph=True)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key]) if key != "seconds" else None
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(found, expected) if torch.is_tensor(expected) else found == expected


# As configured from the command line

CONFIGURED = {
    "matching": ["objective=gradient_matching", "metric=cosine", "optimizer=sgd", "network_samples=16"],
    "dc": ["objective=dc", "metric=mse", "inner_steps=2", "network_epochs=1"],
    "dm": ["objective=distribution_matching"],
    "idm": ["objective=idm", "pool_networks=4", "pool_interval=1", "pool_steps=2", "pool_batch=9"],
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_configured_run_is_made_of_what_its_objective_asks_for(tmp_path: Path, name: str):
    group, *settings = [*CONFIGURED[name], "real_batch=6"]
    settings += [] if name in ("dm", "idm") else ["network_batch=5"]
    shop = Workshop(
        config=configured(group, f"seed={SEED}", "dataset.flip=true", *(f"objective.{one}" for one in settings)),
        data=REAL,
        build=build,
        compute=CPU,
        train_step=training_step(build(), CPU),
        normalise=Normalise(MEAN, STD),
        checkpoints=Checkpoints(tmp_path, 60),
    )
    run, expected = condensation(shop, make_container()), make_run(shop.config.objective)
    for _ in range(3):
        (found, _), (losses, _) = run.run_step(), expected.run_step()
        torch.testing.assert_close(found, losses, rtol=1e-3, atol=0)
        assert losses.min() > 0
    assert run.parts == expected.parts  # how many losses a process without classes of its own reports


# DC and DSA


def test_dc_is_the_papers_loop(monkeypatch: pytest.MonkeyPatch):
    """Two outer steps: cosine distances summed over classes, one step of the images, and then epochs on them, except
    after the last step of a network."""
    run = make_run(dc())
    choices, updates = noted(run, monkeypatch, "choose"), noted(run, monkeypatch, "choose_update")
    images = nn.Parameter(run.container.instances.detach().clone())
    optimizer = torch.optim.SGD([images], lr=0.1, momentum=0.5)
    for step in range(4):
        losses, _ = run.run_step()
        if step % 2 == 0:
            network = fresh("matched_network", step // 2)
            training = torch.optim.SGD(network.parameters(), lr=0.01)
            with torch.no_grad():
                images.clamp_(0, 1)  # the container clamps its pixels before every fresh network
        optimizer.zero_grad()
        total = torch.zeros(())
        for label in range(CLASSES):
            real = REAL.train.images[choices[step]["real"][label]]
            assert (REAL.train.labels[choices[step]["real"][label]] == label).all() and len(real) == 6
            pairs = zip(
                plain_gradients(network, images[label], label), plain_gradients(network, real, label), strict=True
            )
            for a, b in pairs:
                rows, others = a.flatten(1), b.detach().flatten(1)
                total = total + (1 - (rows * others).sum(1) / (rows.norm(dim=1) * others.norm(dim=1) + 1e-6)).sum()
        total.backward()
        optimizer.step()
        torch.testing.assert_close(losses.sum(), total.detach(), rtol=1e-4, atol=0)
        torch.testing.assert_close(run.container.instances.detach(), images.detach(), rtol=0, atol=1e-5)
        assert ("update" in updates[step]) == (step % 2 == 0)
        for epoch in updates[step].get("update", ()):
            assert sorted(epoch.tolist()) == list(range(CLASSES * PER_CLASS))
            for index in epoch.split(5):
                training.zero_grad()
                logits = network(normalised(images.detach().flatten(0, 1)[index]))
                F.cross_entropy(logits, index // PER_CLASS).backward()
                training.step()
        for one, other in zip(run.side.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_dsa_augments_what_networks_train_on_by_the_same_rule_and_without_a_mirror_where_it_changes_the_class():
    for flip, strategy in ((True, "color_flip"), (False, "color")):
        side = SyntheticSide(
            REAL,
            dc(name="dsa", strategy="color_flip"),
            count=7,
            train=training_step(build(), CPU),
            build=build,
            compute=CPU,
            seed=SEED,
            flip=flip,
        )
        recipe = side.updates.recipe
        assert (side.strategy, recipe.strategy, recipe.rule) == (strategy, strategy, "vico")
        assert side.draw({}, 4).alternatives == tuple(strategy.split("_"))
        assert recipe.batch == 5 and side.updates.optimizer.param_groups[0]["momentum"] == 0


@pytest.mark.parametrize(("images_per_class", "loops"), DC_LOOPS.items())
def test_loops_of_dc_are_the_papers_by_images_per_class_unless_given(images_per_class: int, loops: tuple[int, int]):
    found = dc(inner_steps=None, network_epochs=None).with_loops(images_per_class)
    assert (found.inner_steps, found.network_epochs) == loops
    found = dc(inner_steps=None, network_epochs=7).with_loops(images_per_class)
    assert (found.inner_steps, found.network_epochs) == (loops[0], 7)


def test_a_budget_that_the_table_lacks_asks_for_both_loops():
    assert dc().with_loops(7) == dc()
    for missing in ("inner_steps", "network_epochs"):
        with pytest.raises(ConfigError, match=f"objective.{missing}=null: must be given: DC's table"):
            dc(**{missing: None}).with_loops(7)


def test_a_sum_over_classes_is_their_number_times_the_mean():
    moved = []
    for reduction in ("sum", "mean"):
        run = make_run(dc(class_reduction=reduction, momentum=0.0, memory_lr=1e-3))
        before = run.container.instances.detach().clone()
        run.run_step()
        moved.append(run.container.instances.detach() - before)
    torch.testing.assert_close(moved[0], CLASSES * moved[1], rtol=0, atol=1e-6)
    assert moved[0].abs().max() > 1e-5


def test_a_process_that_owns_none_of_a_steps_classes_adds_no_distance_to_any_of_the_matched_layers():
    run = make_run(dc())
    run.owned, group = range(1), torch.tensor([1, 2])
    run.side.begin(0)
    assert run._match(group, run._chosen(group)).tolist() == [0.0] * 3  # two convolutions and the classifier


# IDC


def test_every_fresh_network_trains_by_sgd_of_its_own_without_the_momentum_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
):
    run = make_run(dream(k_means_interval=None, inner_steps=2, network_strategy="none", network_cutmix=0.0))
    updates = noted(run, monkeypatch, "choose_update")
    for step in range(4):
        if step % 2 == 0:
            network = fresh("matched_network", step // 2)
            training = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        run.run_step()
        assert updates[step]["update"].shape == (2, 8)
        for index in updates[step]["update"]:
            training.zero_grad()
            F.cross_entropy(network(normalised(REAL.train.images[index])), REAL.train.labels[index]).backward()
            training.step()
        for one, other in zip(run.side.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
            momentum = run.side.updates.optimizer.state[one]["momentum_buffer"]
            torch.testing.assert_close(momentum, training.state[other]["momentum_buffer"], rtol=0, atol=1e-4)


# DM


def plain_features(network: nn.Module, images: Tensor) -> Tensor:
    return network.body(normalised(images)).flatten(1).mean(0)


@pytest.mark.parametrize("policy", ["accumulate", "per_class"])
def test_dm_is_the_papers_loop(monkeypatch: pytest.MonkeyPatch, policy: str):
    """Every step has a fresh network that never trains, mean features of the whole class, and a sum over classes."""
    run = make_run(dm(step_policy=policy, memory_lr=0.01))
    choices = noted(run, monkeypatch, "choose")
    images = nn.Parameter(run.container.instances.detach().clone())
    optimizer = torch.optim.SGD([images], lr=0.01, momentum=0.5)
    for step in range(3):
        losses, _ = run.run_step()
        network = fresh("matched_network", step)
        with torch.no_grad():
            images.clamp_(0, 1)
        index = torch.cat([choice["real"] for choice in choices])
        choices.clear()
        optimizer.zero_grad()
        total = torch.zeros(())
        for label in range(CLASSES):
            real = plain_features(network, REAL.train.images[index[label]]).detach()
            total = total + (real - plain_features(network, images[label])).square().sum()
        total.backward()
        optimizer.step()  # equals a step for each class, as no image belongs to two
        torch.testing.assert_close(losses.sum(), total.detach(), rtol=1e-4, atol=0)
        torch.testing.assert_close(run.container.instances.detach(), images.detach(), rtol=0, atol=1e-5)


# IDM


def pool_of(side: PoolSide) -> list[dict[str, Tensor]]:
    return [{name: value[place].clone() for name, value in side.pool.items()} for place in range(side.count)]


def differs(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in one.items())


def test_the_pool_starts_with_three_grows_by_one_and_drops_the_oldest():
    run = make_run(idm(pool_trained=0, ce_weight=0.0))
    counts = []
    for _ in range(8):
        run.run_step()
        counts.append(run.side.count)
    assert counts == [3, 3, 4, 4, 4, 4, 4, 4]  # a fresh one every 2 steps, at most 4
    # Networks 0 to 5 entered the pool; 4 and 5 took the places of 0 and 1.
    for place, number in enumerate([4, 5, 2, 3]):
        expected = dict(fresh("pool", number).named_parameters())
        found = {name: run.side.pool[f"parameters/{name}"][place] for name in expected}
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_matched_network_is_a_random_one_of_the_pool_the_same_for_all_classes_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
):
    run = make_run(idm(step_policy="per_class", pool_trained=0, ce_weight=0.0, pool_interval=100))
    choices, steps = noted(run, monkeypatch, "choose"), []
    for _ in range(12):
        run.run_step()
        steps.append([int(choice["matched"]) for choice in choices])
        given = run.side.parameters(choices[-1])
        assert all(torch.equal(v, run.side.pool[f"parameters/{n}"][steps[-1][0]]) for n, v in given.items())
        choices.clear()
    assert all(len(step) == CLASSES and len(set(step)) == 1 for step in steps)
    assert {step[0] for step in steps} == set(range(FIRST))


def before_training(
    run: ClassMatching, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[dict[str, Tensor]], Tensor]]:
    """The pool and its accuracies in every step, before the step trains it."""
    found, choose = [], run.side.choose_update
    monkeypatch.setattr(
        run.side, "choose_update", lambda: found.append((pool_of(run.side), run.side.percent.clone())) or choose()
    )
    return found


@pytest.mark.parametrize(
    ("changes", "renewed"),  # by step: the place and the number of the network that enters
    [({"pool_interval": 100}, {}), ({"pool_interval": 2, "pool_networks": FIRST}, {2: (0, 3), 4: (1, 4)})],
    ids=["none_renewed", "two_renewed"],
)
def test_chosen_networks_train_on_real_batches_with_a_momentum_of_their_own_and_report_their_accuracy(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], renewed: dict[int, tuple[int, int]]
):
    run = make_run(idm(**changes))
    pools, updates = before_training(run, monkeypatch), noted(run, monkeypatch, "choose_update")
    networks = [fresh("pool", number) for number in range(FIRST)]
    options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    optimizers = [torch.optim.SGD(network.parameters(), **options) for network in networks]
    percents = [0.0] * FIRST
    for step in range(5):
        run.run_step()
        before, percent = pools[step]
        if step in renewed:
            place, number = renewed[step]
            networks[place], percents[place] = fresh("pool", number), 0.0
            optimizers[place] = torch.optim.SGD(networks[place].parameters(), **options)
            assert not any(value.any() for name, value in before[place].items() if name.startswith("momentum/"))
        torch.testing.assert_close(percent[:FIRST], torch.tensor(percents), rtol=1e-6, atol=1e-4)
        places, batches = updates[step]["trained"].tolist(), updates[step]["update"]
        assert len(set(places)) == 2 and batches.shape == (2, 3, 9)
        for place, indices in zip(places, batches, strict=True):
            right = []
            for index in indices:
                logits = networks[place](normalised(REAL.train.images[index]))
                right.append((logits.argmax(1) == REAL.train.labels[index]).float().mean())
                optimizers[place].zero_grad()
                F.cross_entropy(logits, REAL.train.labels[index]).backward()
                optimizers[place].step()
            percents[place] = 100 * float(torch.stack(right).mean())
        for place, network in enumerate(networks):
            for name, value in network.named_parameters():
                found = run.side.pool[f"parameters/{name}"][place]
                torch.testing.assert_close(found, value.detach(), rtol=0, atol=1e-5)
            assert differs(before[place], pool_of(run.side)[place]) == (place in places)
        torch.testing.assert_close(run.side.percent[:FIRST], torch.tensor(percents), rtol=1e-6, atol=1e-4)
    assert max(percents) > 1  # so they are percent and not fractions


def test_the_cross_entropy_counts_by_the_matched_networks_accuracy_in_percent():
    run = make_run(idm())
    run.side.begin(0)
    run.side.percent.copy_(torch.tensor([10.0, 20.0, 70.0, 0.0]))
    run.side.matched = 2
    choice = run.side.choose(torch.arange(CLASSES))
    found = run.side.real(choice, run.side.draw(choice, CLASSES), slice(1, 3))
    assert found[IMAGES].shape == (2, 6, 3, 8, 8)
    assert found[CE_FACTOR].tolist() == [35.0, 35.0]
    assert torch.is_tensor(make_run(dm()).side.real(choice, run.side.draw(choice, CLASSES), slice(0, 1)))


def test_a_pool_of_fewer_networks_than_train_trains_them_all(monkeypatch: pytest.MonkeyPatch):
    run = make_run(idm(pool_networks=1))
    updates = noted(run, monkeypatch, "choose_update")
    run.run_step()
    assert updates[0]["trained"].tolist() == [0] and run.side.percent[0] > 0


# DREAM


@pytest.mark.parametrize(("interval", "clustered"), [(2, [0, 2, 4, 6]), (3, [0, 3, 4, 7])])
def test_real_batches_are_the_images_nearest_to_the_centres_of_the_networks_own_features(
    monkeypatch: pytest.MonkeyPatch, interval: int, clustered: list[int]
):
    """Images are clustered again every ``interval`` steps of a network's life, which is 4 steps long."""
    asked: list[tuple[Tensor, int]] = []

    def nearest(features: Tensor, k: int, stream: torch.Generator) -> Tensor:
        asked.append((features, k))
        return torch.arange(k) + (len(asked) - 1) // CLASSES  # shifts by one with every clustering

    monkeypatch.setattr(realside, "nearest_to_centres", nearest)
    run = make_run(dream(k_means_interval=interval))
    choices = noted(run, monkeypatch, "choose")
    starts = torch.tensor([0, COUNTS[0], COUNTS[0] + COUNTS[1]])[:, None]
    for step in range(8):
        network = fresh("matched_network", step // 4) if step % 4 == 0 else copy.deepcopy(run.side.network)
        asked_before = len(asked)
        run.run_step()
        assert len(asked) - asked_before == (CLASSES if step in clustered else 0)
        if step in clustered:
            for label, (features, k) in enumerate(asked[-CLASSES:]):
                images = REAL.train.images[REAL.train.labels == label]
                expected = network.body(normalised(images)).flatten(1)
                assert k == 5 and len(features) == COUNTS[label]
                torch.testing.assert_close(features, expected.detach(), rtol=0, atol=1e-5)
        moved = sum(other <= step for other in clustered) - 1
        assert choices[step]["real"].tolist() == (starts + torch.arange(5) + moved).tolist()


def test_each_class_has_its_own_clusters_also_where_few_classes_take_part():
    run = make_run(dream(classes_per_step=1))
    run.run_step()
    for label in range(CLASSES):
        index = run.side.choose(torch.tensor([label]))["real"]
        assert index.shape == (1, 5) and len(set(index[0].tolist())) == 5
        assert (REAL.train.labels[index[0]] == label).all()


# All of them

VARIANTS: dict[str, Callable[[], ClassMatchingConfig]] = {
    "dc": dc,
    "dc_longer": lambda: dc(inner_steps=3, network_batch=64),
    "dsa": lambda: dc(name="dsa", strategy="color_crop_cutout_flip_scale_rotate"),
    "dm": lambda: dm(strategy="color_crop_cutout_flip_scale_rotate", memory_lr=0.1),
    "idm": lambda: idm(strategy="color_crop", memory_lr=0.01),
    "idm_per_class": lambda: idm(step_policy="per_class", pool_interval=1, memory_lr=0.01),
    "dream": lambda: dream(k_means_interval=1),
    "dream_between": lambda: dream(k_means_interval=3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_a_checkpoint_and_two_more_are_four_steps_bit_for_bit(tmp_path: Path, variant: str):
    config = VARIANTS[variant]()
    whole, half = make_run(config), make_run(config)
    expected = [whole.run_step() for _ in range(4)]
    for _ in range(2):
        half.run_step()
    Checkpoints(tmp_path, 0).save("condense", half.state_dict())
    rest = make_run(config, container_seed=99)
    rest.load_state_dict(Checkpoints(tmp_path, 0).load("condense"))
    assert_same([rest.run_step() for _ in range(2)], expected[2:])
    assert_same(rest.state_dict(), whole.state_dict())


@pytest.mark.parametrize("variant", ["dc", "dm", "idm"])
def test_what_is_captured_changes_in_place(variant: str):
    """A recorded step reads and writes the same memory at every replay."""
    run = make_run(VARIANTS[variant]())
    run.run_step()
    before = [tensor.data_ptr() for tensor in run.side.state_tensors()]
    for _ in range(3):
        run.run_step()
    assert [tensor.data_ptr() for tensor in run.side.state_tensors()] == before


def test_networks_are_trained_by_all_settings_of_their_objective():
    live = dream(k_means_interval=None, network_lr=0.2, network_momentum=0.3, network_weight_decay=0.04)
    pool = idm(pool_lr=0.2, pool_momentum=0.3, pool_weight_decay=0.04)
    for settings, expected in ((live, (0.2, 0.3, 0.04)), (pool, (0.2, 0.3, 0.04)), (dc(network_lr=0.2), (0.2, 0, 0))):
        (group,) = make_run(settings).side.updates.optimizer.param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == expected


def test_streams_of_pools_and_of_networks_on_synthetic_images_have_the_names_of_kept_results():
    pool, synthetic = make_run(idm()).side, make_run(dc()).side
    assert pool.pool_batches.generator.initial_seed() == derived_seed(SEED, "condense", "pool_batches")
    assert pool.choosing.initial_seed() == derived_seed(SEED, "condense", "pool")
    assert synthetic.order.initial_seed() == derived_seed(SEED, "condense", "network")
