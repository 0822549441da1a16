"""Matching class by class: a step against a naive loop, its draws and network updates, resuming, averages."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn import realside
from hmn.checkpoint import Checkpoints
from hmn.config import GradientMatchingConfig
from hmn.containers.multiformation import Multiformation, MultiformationShape
from hmn.data import augment
from hmn.data.sampling import per_class
from hmn.errors import DataError
from hmn.matching import ClassMatching
from hmn.network_update import UpdateRecipe
from hmn.objectives.gradient import matching_step
from hmn.seeding import derived_seed, generator
from tests.small_matching import (
    CLASSES,
    CPU,
    MEAN,
    OWNED,
    PER_CLASS,
    REAL,
    SEED,
    STD,
    assert_same,
    build,
    clone_of,
    config,
    fresh_network,
    live_side,
    make_container,
    make_run,
)


class Recorder:
    """Records the gradients given to each optimiser step, and the container at which they were taken."""

    def __init__(self, run: ClassMatching, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turns: list[tuple[list[int], nn.Module, dict[str, Tensor]]] = []
        step = run.optimizer.step

        def recorded(classes: Tensor) -> None:
            gradients = {name: p.grad.clone() for name, p in run.container.named_parameters()}
            self.turns.append((classes.tolist(), copy.deepcopy(run.container), gradients))
            step(classes)

        monkeypatch.setattr(run.optimizer, "step", recorded)


class Oracle:
    """IDC's step as a loop over classes, with the same streams and one backward pass of the mean over classes."""

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
    for _ in range(3):  # step 2 renews the network
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
        # The step reports the distances summed over all its classes, and the norms of all its gradients.
        torch.testing.assert_close(losses, sum(expected), rtol=1e-6, atol=0)
        named = {id(parameter): name for name, parameter in run.container.named_parameters()}
        for tier, parameters in run.container.tiers().items():
            names = [named[id(parameter)] for parameter in parameters]
            taken = [gradients[name].flatten() for _, _, gradients in recorder.turns for name in names]
            torch.testing.assert_close(norms[tier], torch.cat(taken).norm(), rtol=1e-6, atol=0)


def watch_turns(run: ClassMatching, monkeypatch: pytest.MonkeyPatch, steps: int) -> list[list[list[int]]]:
    """The classes of every optimiser step, per matching step."""
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
    assert not torch.equal(rows[:, 0] % PER_CLASS, rows[:, 1] % PER_CLASS)  # each class draws its own images


@pytest.mark.parametrize("cap", [5, 128])
def test_without_a_cap_every_image_is_matched_in_order(monkeypatch: pytest.MonkeyPatch, cap: int):
    run = make_run(config(synthetic_batch=cap, network_samples=0))
    asked: list[Tensor] = []
    decode = run.container.decode
    monkeypatch.setattr(run.container, "decode", lambda index: asked.append(index) or decode(index))
    run.run_step()
    assert asked[0].tolist() == list(range(CLASSES * PER_CLASS))


def tiles_and_others(stored: Tensor) -> Tensor:
    """The four enlarged tiles, row by row, of the first image of ``stored`` (3, channels, 8, 8), then the others."""
    tiles = torch.stack([stored[0, :, y : y + 4, x : x + 4] for y in (0, 4) for x in (0, 4)])
    return torch.cat([F.interpolate(tiles, size=8, mode="bilinear", align_corners=False), stored[1:]])


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_a_container_that_shows_condensing_other_forms_is_matched_by_those_each_under_its_class(chunk: int | None):
    """With a bound of 8, one of three stored images comes as 4 tiles and two come whole: 6 images, and not all 12."""
    shape = MultiformationShape(classes=CLASSES, channels=3, image_size=8, factor=2, decode="bound", bound=8)
    container = Multiformation(shape, 3)
    nn.init.uniform_(container.instances, generator=generator(0))
    matched: list[tuple[Tensor, Tensor]] = []
    match = matching_step(build(), "mse", CPU)

    def watched(parameters: dict[str, Tensor], real: Tensor, synthetic: Tensor, labels: Tensor):
        matched.append((synthetic.clone(), labels))
        return match(parameters, real, synthetic, labels)

    run = make_run(config(strategy="none"), container=container, match=watched, chunk=chunk)
    expected = torch.stack([tiles_and_others(stored) for stored in container.instances.detach()])
    run.run_step()
    pixels, labels = (torch.cat(parts) for parts in zip(*matched, strict=True))
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    assert labels.tolist() == [0, 1, 2]


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
    """A stand-in for :class:`NetworkUpdate` that records the images a network is shown."""

    shown: list[tuple[Tensor, Tensor]]
    optimizer = SimpleNamespace(state={})

    def __init__(self, network: nn.Module, *others: Any) -> None:
        self.recipe = others[-1]

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.shown.append((images, labels))

    def on_batches(self, images: Tensor, labels: Tensor, index: Tensor) -> None:
        for batch in index:
            self(images[batch], labels[batch])


@pytest.mark.parametrize(
    ("samples", "batch", "updates", "size"),
    [(0, 8, 0, 8), (1, 8, 1, 8), (8, 8, 1, 8), (9, 8, 2, 8), (64, 8, 8, 8), (100, 64, 3, 39)],
)
def test_a_network_is_updated_until_at_least_network_samples_were_seen(
    monkeypatch: pytest.MonkeyPatch, samples: int, batch: int, updates: int, size: int
):
    """There are ceil(samples / batch) updates; a batch is at most the training set of 39 images."""
    monkeypatch.setattr(realside, "NetworkUpdate", Updates)
    monkeypatch.setattr(Updates, "shown", [], raising=False)
    run = make_run(config(network_samples=samples, network_batch=batch))
    for _ in range(2):
        run.run_step()
    assert [len(images) for images, _ in Updates.shown] == [size] * 2 * updates


def test_updates_see_real_images_of_all_classes_each_once_in_a_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(realside, "NetworkUpdate", Updates)
    monkeypatch.setattr(Updates, "shown", [], raising=False)
    run = make_run(config(network_samples=32, network_batch=8))  # 4 of the 4.9 batches in the data
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
    rates = {"lr": 0.3, "momentum": 0.9, "weight_decay": 5e-4}
    assert run.side.updates.recipe == UpdateRecipe(
        batch=settings.network_batch, **rates, strategy=strategy, cutmix=0.25
    )


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

    rest = make_run(settings, container_seed=99)  # as in a new process, whose container starts elsewhere
    rest.load_state_dict(Checkpoints(tmp_path, 0).load("condense"))
    assert (rest.step, rest.curve) == (2, {0: 0.25})
    found = [rest.run_step() for _ in range(2)]
    assert_same(found, expected[2:])
    assert_same({**rest.state_dict(), "curve": {}}, whole.state_dict())


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


def test_streams_have_the_names_that_kept_results_were_made_with():
    run = make_run(config())
    side, own = run.side, run.generators
    own = own | {"augment": side.augmenting, "real": side.real_batches.generator}
    own |= {"network": side.network_batches.generator, "clusters": side.clustering}
    found = {name: stream.initial_seed() for name, stream in own.items()}
    assert found == {name: derived_seed(SEED, "condense", name) for name in own}
