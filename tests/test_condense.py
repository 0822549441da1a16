"""The bi-level loop: its optimiser, one step against a naive oracle, resuming, divergence and interruption."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn import condense as condensing
from hmn import realside
from hmn.checkpoint import Checkpoints, Stop
from hmn.compute import Compute
from hmn.condense import Report, condense, curve_steps, grid_rows
from hmn.config import GradientMatchingConfig, HmnConfig
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape
from hmn.data import augment
from hmn.data.datasets import RealData, Split
from hmn.data.sampling import per_class
from hmn.errors import DataError, Diverged, Interrupted
from hmn.matching import ClassMatching
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.gradient import matching_step
from hmn.optimizer import ContainerOptimizer
from hmn.realside import LiveSide
from hmn.seeding import generator
from hmn.training import training_step

CPU = Compute(torch.device("cpu"))
CLASSES, PER_CLASS, SEED = 3, 5, 4  # 5 images per class in the container, 12 + 13 + 14 real ones
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SHAPE = HmnShape(
    classes=CLASSES,
    channels=3,
    image_size=8,
    latent_side=4,
    dataset_channels=2,
    feature_channels=2,
    feature_kernel=3,
    class_channels=1,
    instance_channels=1,
    decoder_width=4,
)
MEMORIES = ("instances", "class", "dataset")
TIERS = ("instances", "class", "dataset", "extractors", "decoder")
OWNED = ("instances", "class_memory", "extractor_weight", "extractor_bias")


def make_container(seed: int = 0) -> HierarchicalMemory:
    container = HierarchicalMemory(SHAPE, PER_CLASS)
    container.initialise(torch.Generator().manual_seed(seed), HmnConfig(name="hmn"), None)
    return container


def make_real() -> RealData:
    """Noise around a brightness of each class's own."""
    stream = torch.Generator().manual_seed(9)
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor([12, 13, 14]))
    noise = torch.randint(-40, 41, (len(labels), 3, 8, 8), generator=stream)
    images = (70 + 60 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8)
    train = Split(images, labels)
    return RealData(
        name="tiny",
        class_names=("a", "b", "c"),
        mean=MEAN,
        std=STD,
        train=train,
        held_out=Split(images[:0], labels[:0]),
        test=train,
        notes=(),
        fingerprint="f" * 64,
    )


REAL = make_real()


def config(**changes: Any) -> GradientMatchingConfig:
    values = {"outer_steps": 2, "inner_steps": 2, "real_batch": 6, "network_samples": 16, "network_batch": 8}
    return GradientMatchingConfig(name="gradient_matching", **{**values, **changes})


def build() -> nn.Module:
    return ConvNet(3, CLASSES, 8, width=4, depth=2)


def make_run(settings: GradientMatchingConfig, *, container_seed: int = 0, flip: bool = True, **parts: Any):
    compute = Compute(torch.device(parts.pop("device", "cpu")))
    parts = {"match": matching_step(build().to(compute.device), settings.metric, compute), **parts}
    side = live_side(settings, flip=flip, compute=compute)
    container = make_container(container_seed).to(compute.device)
    shared = {"normalise": side.normalise, "compute": compute, "seed": SEED, "fingerprint": REAL.fingerprint}
    return ClassMatching(container, side, settings, **shared, **parts)


def live_side(
    settings: GradientMatchingConfig, *, flip: bool = True, seed: int = SEED, compute: Compute = CPU
) -> LiveSide:
    train, real = training_step(build().to(compute.device), compute), REAL.to(compute.device)
    return LiveSide(real, settings, build=build, train=train, compute=compute, seed=seed, flip=flip)


def fresh_network(outer: int) -> nn.Module:
    network = build().to(memory_format=torch.channels_last)
    return initialise(network, generator(SEED, "condense", "matched_network", outer))


@pytest.fixture
def double():
    """The whole loop in float64, so that an oracle need not be forgiven anything."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def clone_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def assert_same(one: Any, other: Any, at: str = "state") -> None:
    """Bit for bit, through all lists and dictionaries; seconds differ from run to run."""
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one.keys() - {"seconds"}:
            assert_same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{at}[{index}]")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), at
    else:
        assert one == other, at


# The container's optimiser


def lr_at(done: int, total: int, peak: float, final: float) -> float:
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done / total)) / 2)


def random_gradients(container: nn.Module, stream: torch.Generator) -> dict[str, Tensor]:
    for parameter in container.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=stream)
    return {name: parameter.grad.clone() for name, parameter in container.named_parameters()}


SETTINGS = config(memory_lr=0.03, weights_lr=0.002, beta1=0.8, beta2=0.95, final_lr_fraction=0.2)


def reference_adam(tensors: list[Tensor], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(tensors, lr=lr, betas=(0.8, 0.95), eps=1e-8)


def peak_lr(name: str) -> float:
    """Memories take one rate, extractors and decoder the other."""
    return 0.03 if name in ("dataset", "class_memory", "instances") else 0.002


def test_accumulating_is_torch_adam_with_a_rate_for_memories_and_one_for_networks():
    container = make_container()
    reference = {name: nn.Parameter(value) for name, value in clone_of(container).items()}
    adams = {name: reference_adam([value], peak_lr(name)) for name, value in reference.items()}
    optimizer, stream = ContainerOptimizer(container, SETTINGS, 6, by_class=False), torch.Generator().manual_seed(1)
    for done in range(6):
        gradients = random_gradients(container, stream)
        optimizer.set_rates(done)
        optimizer.step(torch.arange(CLASSES))
        assert all(parameter.grad is None for parameter in container.parameters())
        for name, value in reference.items():
            adams[name].param_groups[0]["lr"] = lr_at(done, 6, peak_lr(name), 0.2)
            value.grad = gradients[name]
            adams[name].step()
    for name, value in container.named_parameters():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-7)


def test_rates_decay_by_a_cosine_from_their_peak_to_the_final_fraction():
    container = make_container()
    optimizer = ContainerOptimizer(container, SETTINGS, 10, by_class=False)
    rates = []
    for done in (0, 5, 10):
        random_gradients(container, torch.Generator().manual_seed(0))
        optimizer.set_rates(done)
        optimizer.step(torch.arange(CLASSES))
        rates.append([group["lr"] for group in optimizer.inner.param_groups])
    for tier, index in zip(TIERS, range(5), strict=True):
        peak = 0.03 if tier in MEMORIES else 0.002
        assert [rate[index] for rate in rates] == pytest.approx([peak, 0.6 * peak, 0.2 * peak], rel=1e-12)


def test_each_tier_is_one_group_of_the_optimiser_and_none_is_left_out():
    container = make_container()
    for by_class in (False, True):
        groups = ContainerOptimizer(container, SETTINGS, 10, by_class=by_class).inner.param_groups
        counts = [sum(member.numel() for member in group["params"]) for group in groups]
        tiers = container.tiers()
        assert tuple(tiers) == TIERS
        assert counts == [sum(p.numel() for p in parameters) for parameters in tiers.values()]
        assert sum(counts) == sum(p.numel() for p in container.parameters())


# Which classes take part in each step: one after another, then groups, class 1 left out for long.
TURNS = [[0], [1], [2], [0, 2], [0, 2], [2], [0, 1, 2], [1]]


def test_stepping_classes_in_turn_equals_parameters_of_their_own():
    container = make_container()
    start = clone_of(container)
    shared = {name: nn.Parameter(value.clone()) for name, value in start.items() if name not in OWNED}
    rows = {(name, c): nn.Parameter(start[name][c].clone()) for name in OWNED for c in range(CLASSES)}
    adams = {key: reference_adam([value], peak_lr(key)) for key, value in shared.items()}
    adams |= {key: reference_adam([value], peak_lr(key[0])) for key, value in rows.items()}
    optimizer, stream = ContainerOptimizer(container, SETTINGS, 8, by_class=True), torch.Generator().manual_seed(1)
    for done, turn in enumerate(TURNS):
        gradients = random_gradients(container, stream)  # also in the rows of others, which must not matter
        optimizer.set_rates(done)
        optimizer.step(torch.tensor(turn))
        for name, value in shared.items():
            value.grad = gradients[name]
        for (name, c), value in rows.items():
            value.grad = gradients[name][c] if c in turn else None
        for key, adam in adams.items():
            name = key if isinstance(key, str) else key[0]
            adam.param_groups[0]["lr"] = lr_at(done, 8, peak_lr(name), 0.2)
            adam.step()
    for name, value in container.named_parameters():
        expected = shared[name] if name in shared else torch.stack([rows[name, c] for c in range(CLASSES)])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)
        assert (value - start[name]).abs().max() > 1e-3


def test_classes_that_do_not_take_part_keep_values_and_moments_bit_for_bit():
    container = make_container()
    optimizer, stream = ContainerOptimizer(container, SETTINGS, 8, by_class=True), torch.Generator().manual_seed(1)
    for done, turn in enumerate(TURNS):
        before, moments = clone_of(container), copy.deepcopy(optimizer.inner.state_dict()["state"])
        random_gradients(container, stream)
        optimizer.set_rates(done)
        optimizer.step(torch.tensor(turn))
        after, later = clone_of(container), optimizer.inner.state_dict()["state"]
        for name in OWNED:
            moved = [not torch.equal(before[name][c], after[name][c]) for c in range(CLASSES)]
            assert moved == [c in turn for c in range(CLASSES)]
        for name in before.keys() - set(OWNED):
            assert not torch.equal(before[name], after[name])
        changed = [key for key in later if key not in moments or later[key]["step"] != moments[key]["step"]]
        assert len(changed) == len(turn) * len(OWNED) + len(before.keys() - set(OWNED))
        for key in moments.keys() - set(changed):
            assert_same(later[key], moments[key])


# One step, against an oracle


class Recorder:
    """Notes the gradients that each optimiser step is given, and the container they were taken at."""

    def __init__(self, run: ClassMatching, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turns: list[tuple[list[int], nn.Module, dict[str, Tensor]]] = []
        step = run.optimizer.step

        def recorded(classes: Tensor) -> None:
            gradients = {name: p.grad.clone() for name, p in run.container.named_parameters()}
            self.turns.append((classes.tolist(), copy.deepcopy(run.container), gradients))
            step(classes)

        monkeypatch.setattr(run.optimizer, "step", recorded)


class Oracle:
    """IDC's step for one class after another, from the same streams, and one backward of the mean over classes."""

    def __init__(self, settings: GradientMatchingConfig) -> None:
        self.settings = settings
        self.augment, self.rows = (generator(SEED, "condense", name) for name in ("augment", "rows"))
        stream = generator(SEED, "condense", "real")
        self.sampler = per_class(REAL.train.labels, REAL.class_names, settings.real_batch, stream)

    def __call__(self, container: nn.Module, network: nn.Module, classes: list[int]):
        """Distances per layer, summed over ``classes``, and the container's gradients."""
        settings, k = self.settings, len(classes)
        drawn = augment.draw(settings.strategy, k, 8, self.augment, one_choice=False)
        real_rows = self.sampler.draw(torch.tensor(classes))
        capped = settings.synthetic_batch < PER_CLASS
        keys = torch.rand(k, PER_CLASS, generator=self.rows) if capped else None
        container.zero_grad()
        total, layers = torch.zeros(()), torch.zeros(2)
        for position, label in enumerate(classes):
            rows = keys[position].argsort()[: settings.synthetic_batch] if capped else torch.arange(PER_CLASS)
            synthetic = container.decode(label * PER_CLASS + rows)
            real = REAL.train.images[real_rows[position]].float() / 255
            together = torch.cat([real.to(synthetic.dtype), synthetic])  # one batch: siamese by construction
            together = torch.stack([(together[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
            together = augment.apply(together, self.of_class(drawn, position, len(together)))
            real_gradients, synthetic_gradients = (
                self.gradients(network, part, label) for part in together.split([len(real), len(synthetic)])
            )
            pairs = zip(synthetic_gradients, real_gradients, strict=True)
            distances = torch.stack([self.distance(s, r.detach()) for s, r in pairs])
            total = total + distances.sum() / k
            layers = layers + distances.detach()
        total.backward()
        return layers, {name: parameter.grad.clone() for name, parameter in container.named_parameters()}

    def distance(self, s: Tensor, r: Tensor) -> Tensor:
        return ((s - r) ** 2).sum() if self.settings.metric == "mse" else (s - r).abs().sum()

    @staticmethod
    def of_class(drawn: augment.Draw, position: int, n: int) -> augment.Draw:
        values = {name: value[[position] * n] for name, value in vars(drawn).items() if torch.is_tensor(value)}
        return dataclasses.replace(drawn, **values)

    @staticmethod
    def gradients(network: nn.Module, images: Tensor, label: int) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(network(images).float(), torch.full((len(images),), label))
        weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
        return torch.autograd.grad(loss, weights, create_graph=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "none", "network_samples": 0},
        {"strategy": "color_crop_cutout_flip_scale_rotate", "metric": "l1"},
        {"synthetic_batch": 2},
        {"classes_per_step": 2},
        {"step_policy": "per_class"},
        {"step_policy": "per_class", "classes_per_step": 2, "synthetic_batch": 4},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "default",
)
@pytest.mark.usefixtures("double")
def test_a_step_is_that_of_a_naive_loop_over_classes(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    settings = config(**changes)
    run, oracle = make_run(settings), Oracle(settings)
    recorder = Recorder(run, monkeypatch)
    for _ in range(3):  # across the renewal of the network at 2
        network = fresh_network(run.step // 2) if run.step % 2 == 0 else copy.deepcopy(run.side.network)
        recorder.turns.clear()
        losses, norms = run.run_step()
        expected = []
        for classes, container, gradients in recorder.turns:
            layers, wanted = oracle(container, network, classes)
            expected.append(layers)
            for name, gradient in gradients.items():
                assert wanted[name].norm() > 1e-6
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-6 * float(wanted[name].norm()))
        # Reported are the distances summed over all classes of the step, and the norms of its last gradient.
        torch.testing.assert_close(losses, sum(expected), rtol=1e-6, atol=0)
        for tier, parameters in container.tiers().items():
            norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
            torch.testing.assert_close(norms[tier], norm, rtol=1e-6, atol=0)


def watch_turns(run: ClassMatching, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[list[list[int]]]:
    """The classes of every optimiser step, by step."""
    recorder, found = Recorder(run, monkeypatch), []
    for _ in range(steps):
        recorder.turns.clear()
        run.run_step()
        found.append([classes for classes, _, _ in recorder.turns])
    return found


def test_accumulating_is_one_optimiser_step_for_all_classes(monkeypatch: pytest.MonkeyPatch):
    run = make_run(config(network_samples=0))
    assert watch_turns(run, monkeypatch, 2) == [[[0, 1, 2]]] * 2
    assert not run.optimizer.rows


def test_per_class_is_one_optimiser_step_for_each_class_at_what_the_earlier_ones_left(monkeypatch: pytest.MonkeyPatch):
    run = make_run(config(step_policy="per_class", network_samples=0))
    recorder = Recorder(run, monkeypatch)
    run.run_step()
    assert [classes for classes, _, _ in recorder.turns] == [[0], [1], [2]]
    decoders = [container.decoder[0].weight for _, container, _ in recorder.turns]
    assert not torch.equal(decoders[0], decoders[1]) and not torch.equal(decoders[1], decoders[2])
    assert len(run.optimizer.rows) == len(OWNED)


@pytest.mark.parametrize("policy", ["accumulate", "per_class"])
def test_classes_per_step_draws_distinct_classes_and_reaches_all(monkeypatch: pytest.MonkeyPatch, policy: str):
    run = make_run(config(classes_per_step=2, step_policy=policy, network_samples=0, inner_steps=12))
    turns = watch_turns(run, monkeypatch, 12)
    groups = [sum(step, []) for step in turns]
    assert all(len(step) == (1 if policy == "accumulate" else 2) for step in turns)
    assert all(len(group) == len(set(group)) == 2 for group in groups)
    assert {tuple(sorted(group)) for group in groups} == {(0, 1), (0, 2), (1, 2)}


def test_a_step_for_some_classes_leaves_the_memories_of_the_others(monkeypatch: pytest.MonkeyPatch):
    run = make_run(config(classes_per_step=1, network_samples=0))
    for _ in range(4):
        before = clone_of(run.container)
        ((taking_part,),) = watch_turns(run, monkeypatch, 1)
        after = clone_of(run.container)
        for name in OWNED:
            moved = [not torch.equal(before[name][c], after[name][c]) for c in range(CLASSES)]
            assert moved == [[c] == taking_part for c in range(CLASSES)]


@pytest.mark.parametrize("asked", [3, 7, None])
def test_more_classes_per_step_than_there_are_are_all_of_them(monkeypatch: pytest.MonkeyPatch, asked: int | None):
    run = make_run(config(classes_per_step=asked, network_samples=0))
    assert watch_turns(run, monkeypatch, 1) == [[[0, 1, 2]]]
    assert not run.optimizer.rows


def test_a_cap_on_the_synthetic_batch_picks_distinct_images_of_each_class_anew(monkeypatch: pytest.MonkeyPatch):
    run = make_run(config(synthetic_batch=2, network_samples=0, inner_steps=15))
    asked: list[Tensor] = []
    decode = run.container.decode
    monkeypatch.setattr(run.container, "decode", lambda index: asked.append(index) or decode(index))
    for _ in range(15):
        run.run_step()
    rows = torch.stack(asked).unflatten(1, (CLASSES, 2))
    assert (rows // PER_CLASS == torch.arange(CLASSES)[None, :, None]).all()
    assert (rows[..., 0] != rows[..., 1]).all()
    assert set(rows.flatten().tolist()) == set(range(CLASSES * PER_CLASS))
    assert not torch.equal(rows[:, 0] % PER_CLASS, rows[:, 1] % PER_CLASS)  # each class draws its own


@pytest.mark.parametrize("cap", [5, 128])
def test_without_a_cap_every_image_is_matched_in_order(monkeypatch: pytest.MonkeyPatch, cap: int):
    run = make_run(config(synthetic_batch=cap, network_samples=0))
    asked: list[Tensor] = []
    decode = run.container.decode
    monkeypatch.setattr(run.container, "decode", lambda index: asked.append(index) or decode(index))
    run.run_step()
    assert asked[0].tolist() == list(range(CLASSES * PER_CLASS))


def test_the_network_is_renewed_every_inner_steps_and_trains_in_between(monkeypatch: pytest.MonkeyPatch):
    matched: list[dict[str, Tensor]] = []
    match = matching_step(build(), "mse", CPU)

    def watched(parameters: dict[str, Tensor], *batch: Tensor):
        matched.append({name: value.clone() for name, value in parameters.items()})
        return match(parameters, *batch)

    run = make_run(config(outer_steps=3), match=watched)
    for _ in range(6):
        run.run_step()
    assert len(matched) == 6
    for step in range(6):
        fresh = clone_of(fresh_network(step // 2))
        untrained = all(torch.equal(value, matched[step][name]) for name, value in fresh.items())
        assert untrained == (step % 2 == 0)
    assert run.side.updates.optimizer.param_groups[0]["lr"] == 0.01


class Updates:
    """Stands for :class:`NetworkUpdate`: notes the images that a network is shown."""

    shown: list[tuple[Tensor, Tensor]]
    optimizer = SimpleNamespace(state={})

    def __init__(self, network: nn.Module, *_: Any, batch: int, **settings: Any) -> None:
        self.batch, self.settings = batch, settings

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.shown.append((images, labels))


@pytest.mark.parametrize(
    ("samples", "batch", "updates", "size"),
    [(0, 8, 0, 8), (1, 8, 1, 8), (8, 8, 1, 8), (9, 8, 2, 8), (64, 8, 8, 8), (100, 64, 3, 39)],
)
def test_a_network_is_updated_until_at_least_network_samples_were_seen(
    monkeypatch: pytest.MonkeyPatch, samples: int, batch: int, updates: int, size: int
):
    """ceil(samples / batch), the batch no larger than the training set of 39 images."""
    monkeypatch.setattr(realside, "NetworkUpdate", Updates)
    monkeypatch.setattr(Updates, "shown", [], raising=False)
    run = make_run(config(network_samples=samples, network_batch=batch))
    for _ in range(2):
        run.run_step()
    assert [len(images) for images, _ in Updates.shown] == [size] * 2 * updates


def test_updates_see_real_images_of_all_classes_each_once_in_a_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(realside, "NetworkUpdate", Updates)
    monkeypatch.setattr(Updates, "shown", [], raising=False)
    run = make_run(config(network_samples=32, network_batch=8))  # 4 of the 4.9 batches that there are
    index = {image.numpy().tobytes(): position for position, image in enumerate(REAL.train.images)}
    for _ in range(2):
        run.run_step()
    passes = []
    for part in (Updates.shown[:4], Updates.shown[4:]):
        rows = [index[image.numpy().tobytes()] for images, _ in part for image in images]
        assert torch.equal(torch.cat([labels for _, labels in part]), REAL.train.labels[rows])
        assert len(set(rows)) == 32
        passes.append(rows)
    assert passes[0] != passes[1]


@pytest.mark.parametrize("flip", [True, False])
def test_the_updates_follow_the_configuration_and_the_mirror_only_where_it_keeps_the_class(
    monkeypatch: pytest.MonkeyPatch, flip: bool
):
    monkeypatch.setattr(realside, "NetworkUpdate", Updates)
    settings = config(strategy="flip_cutout", network_strategy="color_flip", network_lr=0.3, network_cutmix=0.25)
    run = make_run(settings, flip=flip)
    assert run.side.strategy == ("flip_cutout" if flip else "cutout")
    strategy = "color_flip" if flip else "color"
    expected = {"lr": 0.3, "momentum": 0.9, "weight_decay": 5e-4, "strategy": strategy, "cutmix": 0.25}
    assert run.side.updates.settings == expected


def test_a_class_with_fewer_images_than_a_real_batch_is_named():
    with pytest.raises(
        DataError, match=r"^objective\.real_batch=13: class a has only 12 training images; set it to at"
    ):
        make_run(config(real_batch=13))


def test_matching_gets_closer_to_the_real_images():
    """One network that does not train, no augmentation, whole classes: only the container can lower the loss."""
    settings = config(
        outer_steps=1,
        inner_steps=30,
        strategy="none",
        network_samples=0,
        real_batch=12,
        memory_lr=0.05,
        weights_lr=0.01,
    )
    run = make_run(settings)
    losses = [float(run.run_step()[0].sum()) for _ in range(30)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# Resuming

VARIANTS = {
    "renewal_after_resuming": {"outer_steps": 2, "inner_steps": 3},
    "renewal_at_resuming": {"outer_steps": 2, "inner_steps": 2},
    "per_class": {"inner_steps": 3, "step_policy": "per_class", "classes_per_step": 2, "synthetic_batch": 3},
    "groups": {"inner_steps": 3, "classes_per_step": 1, "network_samples": 0},
    "average": {"inner_steps": 3, "average": 0.5},
    "no_renewal": {"inner_steps": 4, "network_batch": 64, "network_cutmix": 1.0, "network_strategy": "color_crop"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_a_checkpoint_and_two_more_are_four_steps_bit_for_bit(tmp_path: Path, variant: str):
    settings = config(**VARIANTS[variant])
    whole, half = make_run(settings), make_run(settings)
    expected = [whole.run_step() for _ in range(4)]
    for _ in range(2):
        half.run_step()
    half.curve[0] = 0.25
    Checkpoints(tmp_path, 0).save("condense", half.state_dict())

    rest = make_run(settings, container_seed=99)  # a process of its own, whose container starts elsewhere
    rest.load_state_dict(Checkpoints(tmp_path, 0).load("condense"))
    assert (rest.step, rest.curve) == (2, {0: 0.25})
    found = [rest.run_step() for _ in range(2)]
    assert_same(found, expected[2:])
    assert_same({**rest.state_dict(), "curve": {}}, whole.state_dict())


def test_a_checkpoint_names_the_data_it_was_made_on():
    assert make_run(config()).state_dict()["data"] == REAL.fingerprint


def test_the_seed_decides_everything_and_another_one_differs():
    settings = config()
    runs = [make_run(settings) for _ in range(2)]
    other = ClassMatching(
        make_container(),
        live_side(settings, seed=SEED + 1),
        settings,
        match=matching_step(build(), "mse", CPU),
        normalise=runs[0].normalise,
        compute=CPU,
        seed=SEED + 1,
        fingerprint=REAL.fingerprint,
    )
    for run in (*runs, other):
        run.run_step()
    assert_same(runs[0].state_dict(), runs[1].state_dict())
    assert not torch.equal(runs[0].container.instances, other.container.instances)
    assert not torch.equal(runs[0].side.network.classifier.weight, other.side.network.classifier.weight)


# Averages


def watched_steps(run: ClassMatching, steps: int) -> list[list[Tensor]]:
    """The container's parameters before and after every step."""
    seen = [[p.detach().clone() for p in run.container.parameters()]]
    for _ in range(steps):
        run.run_step()
        seen.append([p.detach().clone() for p in run.container.parameters()])
    return seen


@pytest.mark.parametrize("policy", ["accumulate", "per_class"])
@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9])
def test_the_average_follows_by_its_decay_and_faster_at_the_start(decay: float, policy: str):
    run = make_run(config(average=decay, step_policy=policy))
    start, *after = watched_steps(run, 4)
    expected = [tensor.double() for tensor in start]
    for step, tensors in enumerate(after, start=1):
        kept = min(decay, (1 + step) / (10 + step))
        expected = [kept * old + (1 - kept) * new for old, new in zip(expected, tensors, strict=True)]
    moving = [tensor.clone() for tensor in run.container.parameters()]
    kept = copy.deepcopy(run.container)
    run.settle(kept)
    for found, value in zip(kept.parameters(), expected, strict=True):
        torch.testing.assert_close(found, value.float())
    assert all(torch.equal(one, other) for one, other in zip(run.container.parameters(), moving, strict=True))


def test_averaging_does_not_change_the_steps():
    plain, averaged = make_run(config()), make_run(config(average=0.9))
    for one, other in zip(watched_steps(plain, 4), watched_steps(averaged, 4), strict=True):
        assert all(map(torch.equal, one, other))


def test_without_an_average_the_last_step_is_kept():
    run = make_run(config())
    *_, last = watched_steps(run, 2)
    run.settle(run.container)
    assert all(map(torch.equal, run.container.parameters(), last))


# The whole loop


def run_all(run: ClassMatching, checkpoints: Checkpoints, **options: Any) -> list[Report]:
    reports: list[Report] = []
    condense(run, checkpoints, **{"log_every_steps": 1, "on_report": reports.append, **options})
    return reports


def test_reports_tell_what_the_steps_since_the_last_one_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(config(outer_steps=1, inner_steps=5))
    steps: list[tuple[Tensor, dict[str, Tensor]]] = []
    run_step = run.run_step

    def watched() -> tuple[Tensor, dict[str, Tensor]]:
        steps.append(run_step())
        return steps[-1]

    monkeypatch.setattr(run, "run_step", watched)
    reports = run_all(run, Checkpoints(tmp_path, 1e9), log_every_steps=2)
    assert [report.step for report in reports] == [2, 4, 5]
    for report, (first, last) in zip(reports, [(0, 2), (2, 4), (4, 5)], strict=True):
        mean = torch.stack([loss for loss, _ in steps[first:last]]).mean(0)
        assert report.losses == mean.tolist()
        assert report.gradient_norms == {tier: float(norm) for tier, norm in steps[last - 1][1].items()}
        assert tuple(report.gradient_norms) == TIERS
        assert report.learning_rate == pytest.approx(lr_at(last - 1, 5, 0.01, 0.1), rel=1e-9)
        assert report.peak_bytes > 0
    assert len(reports[0].losses) == 2  # matched layers


def test_the_finished_state_is_kept_and_not_worked_on_again(tmp_path: Path):
    run = make_run(config())
    run_all(run, Checkpoints(tmp_path, 1e9))
    state = Checkpoints(tmp_path, 1e9).load("condense")
    assert state["step"] == 4
    again = make_run(config(), container_seed=99)
    again.load_state_dict(state)
    assert run_all(again, Checkpoints(tmp_path, 1e9)) == []
    assert_same(clone_of(again.container), clone_of(run.container))


@pytest.mark.parametrize(
    ("total", "points", "steps"),
    [(200, 5, [0, 50, 100, 150, 200]), (10, 4, [0, 3, 7, 10]), (200, 2, [0, 200]), (1, 5, [0, 1]), (200, 0, [])],
)
def test_the_curve_has_evenly_spaced_points_both_ends_included(total: int, points: int, steps: list[int]):
    assert curve_steps(total, points) == steps


def test_the_curve_is_measured_at_its_steps_once_even_by_a_run_that_is_resumed(tmp_path: Path):
    measured: list[tuple[int, Tensor]] = []

    def curve_of(run: ClassMatching):
        def on_curve(step: int) -> float:
            assert step == run.step
            measured.append((step, run.container.instances.detach().clone()))
            return step / 10

        return on_curve

    stop = Stop()
    run = make_run(config())
    start = run.container.instances.detach().clone()

    def stop_at_3(report: Report) -> None:
        stop.signum = signal.SIGTERM if report.step == 3 else None

    with pytest.raises(Interrupted):
        run_all(run, Checkpoints(tmp_path, 1e9, stop), curve_points=3, on_curve=curve_of(run), on_report=stop_at_3)
    rest = make_run(config(), container_seed=99)
    rest.load_state_dict(Checkpoints(tmp_path, 1e9).load("condense"))
    assert rest.step == 3
    run_all(rest, Checkpoints(tmp_path, 1e9), curve_points=3, on_curve=curve_of(rest))
    assert [step for step, _ in measured] == [0, 2, 4]
    assert rest.curve == {0: 0.0, 2: 0.2, 4: 0.4}
    assert torch.equal(measured[0][1], start)
    assert torch.equal(measured[2][1], rest.container.instances)
    assert Checkpoints(tmp_path, 1e9).load("condense")["curve"] == rest.curve
    finished = make_run(config(), container_seed=99)
    finished.load_state_dict(Checkpoints(tmp_path, 1e9).load("condense"))
    run_all(finished, Checkpoints(tmp_path, 1e9), curve_points=3, on_curve=curve_of(finished))
    assert len(measured) == 3


def test_measuring_the_curve_does_not_touch_the_run(tmp_path: Path):
    plain, curved = make_run(config()), make_run(config())
    run_all(plain, Checkpoints(tmp_path / "plain", 1e9))
    run_all(curved, Checkpoints(tmp_path / "curved", 0), curve_points=4, on_curve=lambda step: 0.5, log_every_steps=3)
    assert_same({**curved.state_dict(), "curve": {}}, plain.state_dict())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_run_is_kept_exits_by_its_signal_and_goes_on_bit_for_bit(tmp_path: Path, signum: int):
    whole = make_run(config())
    run_all(whole, Checkpoints(tmp_path / "whole", 1e9))
    stop = Stop()
    run = make_run(config())

    def stop_at_2(report: Report) -> None:
        stop.signum = signum if report.step == 2 else None

    with pytest.raises(Interrupted) as raised:
        run_all(run, Checkpoints(tmp_path / "parts", 1e9, stop), on_report=stop_at_2)
    assert raised.value.exit_code == 128 + signum
    state = Checkpoints(tmp_path / "parts", 1e9).load("condense")
    assert state["step"] == 2
    rest = make_run(config(), container_seed=99)
    rest.load_state_dict(state)
    run_all(rest, Checkpoints(tmp_path / "parts", 1e9))
    assert_same(rest.state_dict(), whole.state_dict())


class Clock:
    """Stands for ``time.monotonic``; moves only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(condensing.time, "monotonic", lambda: self.now)


def test_rates_count_the_seconds_of_steps_and_not_of_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    run = make_run(config(synthetic_batch=3, classes_per_step=2, network_samples=0))
    run_step = run.run_step

    def slow_step() -> tuple[Tensor, dict[str, Tensor]]:
        clock.now += 2
        return run_step()

    def slow_curve(_step: int) -> float:
        clock.now += 500
        return 0.0

    monkeypatch.setattr(run, "run_step", slow_step)
    reports = run_all(run, Checkpoints(tmp_path, 1e9), log_every_steps=2, curve_points=3, on_curve=slow_curve)
    assert run.seconds == 8.0
    assert [report.steps_per_second for report in reports] == [0.5, 0.5]
    # 2 classes, each 6 real and 3 synthetic images, half a step a second
    assert [report.images_per_second for report in reports] == [9.0, 9.0]


# Divergence


def spoilt_from(step: int, what: str):
    """A matching step whose distances, pixel gradient or both stop being finite at ``step``."""
    match, calls = matching_step(build(), "mse", CPU), [0]

    def matching(*arguments: Any) -> tuple[Tensor, Tensor]:
        layers, gradient = match(*arguments)
        calls[0] += 1
        if calls[0] >= step:
            layers = layers * torch.nan if "loss" in what else layers
            gradient = gradient * torch.inf if "gradient" in what else gradient
        return layers, gradient

    return matching


def all_finite(state: dict[str, Any]) -> bool:
    tensors = [
        *state["container"].values(),
        *(value for row in state["optimizer"]["state"].values() for value in row.values()),
    ]
    return all(bool(value.isfinite().all()) for value in tensors)


ALL_TIERS = ", ".join(TIERS)


@pytest.mark.parametrize(
    ("what", "loss", "where"),
    [
        ("loss and gradient", "nan", f"tiers with a non-finite gradient: {ALL_TIERS}"),
        ("loss", "nan", "no tier's gradient is non-finite yet"),
        ("gradient", r"[\d.]+", f"tiers with a non-finite gradient: {ALL_TIERS}"),
    ],
)
def test_what_is_not_finite_stops_the_run_naming_step_and_tier_and_never_reaches_the_checkpoint(
    tmp_path: Path, what: str, loss: str, where: str
):
    settings = config(outer_steps=1, inner_steps=6)
    run = make_run(settings, match=spoilt_from(3, what))
    with pytest.raises(Diverged) as raised:
        run_all(run, Checkpoints(tmp_path, 0), log_every_steps=100)
    pattern = rf"condensing: the matching loss is {loss} at step 3 \({where}\); the last checkpoint is kept; lower .*"
    assert re.fullmatch(pattern, str(raised.value))
    state = Checkpoints(tmp_path, 0).load("condense")
    assert state["step"] == 2
    assert all_finite(state)


def test_the_first_bad_step_is_named_though_it_is_found_later(tmp_path: Path):
    run = make_run(config(outer_steps=1, inner_steps=6), match=spoilt_from(3, "loss"))
    reports: list[Report] = []
    with pytest.raises(Diverged, match=r"is nan at step 3 \("):
        run_all(run, Checkpoints(tmp_path, 1e9), log_every_steps=5, on_report=reports.append)
    assert reports == []
    assert Checkpoints(tmp_path, 1e9).load("condense") is None


def test_a_tier_alone_is_named(tmp_path: Path):
    run = make_run(config())
    run.container.class_memory.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(Diverged, match=r"at step 1 \(tiers with a non-finite gradient: class\)"):
        run_all(run, Checkpoints(tmp_path, 1e9))


def test_a_stop_that_comes_with_a_bad_step_does_not_keep_it(tmp_path: Path):
    stop = Stop()
    run = make_run(config(outer_steps=1, inner_steps=6), match=spoilt_from(2, "loss and gradient"))
    checkpoints = Checkpoints(tmp_path, 1e9, stop)
    checkpoints.save("condense", run.state_dict())
    stop.signum = signal.SIGTERM
    run.run_step()
    with pytest.raises(Diverged, match="at step 2 "):
        run_all(run, checkpoints, log_every_steps=100)
    assert Checkpoints(tmp_path, 1e9).load("condense")["step"] == 0


# Image grids


def test_a_grid_shows_the_first_images_of_every_class():
    container = make_container()
    assert list(grid_rows(container, 2)) == [0, 1, 5, 6, 10, 11]
    assert list(grid_rows(container, 10)) == list(range(15))
