"""The training of one network, or of several at once: order, bit-for-bit resuming, batch norm."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hmn import training as trainer
from hmn.capture import warm_up
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.data import augment
from hmn.network_update import Batch, training_step
from hmn.networks import Builder, initialise
from hmn.networks.resnet import ResNet
from hmn.training import Recipe, Training, accuracy, batches_of, learning_rate, logits_of
from tests.small_training import (
    CPU,
    NORMALISE,
    RECIPE,
    assert_equal_states,
    build,
    generator,
    images_and_labels,
    in_float64,
    normalised,
    state_of,
    training,
    with_batch_norm,
)
from tests.tape import record_on_a_cpu

# One training


def test_a_training_starts_from_the_parameters_its_generator_draws():
    run, other = training(seeds=[7]), training(seeds=[8])
    expected = initialise(build().to(memory_format=torch.channels_last), generator(7))  # drawn in memory order
    assert all(torch.equal(a, b) for a, b in zip(run.network.parameters(), expected.parameters(), strict=True))
    assert not torch.equal(run.network.classifier.weight, other.network.classifier.weight)


class Recorder:
    """A stand-in for an update that records the images it is given, which are numbers here."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def set_learning_rate(self, lr: float) -> None:
        pass

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(labels, images_and_labels(21)[1][images])
        self.seen.append(images)
        return torch.zeros(images.shape[:-1])


def shown(run: Training, epochs: int) -> list[Tensor]:
    """The indices of the images that each update of ``run`` is given."""
    run.images, run.update = torch.arange(21), Recorder()
    for _ in range(epochs):
        run.run_epoch()
    return run.update.seen


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    seen = shown(training(), 2)
    assert [len(batch) for batch in seen] == [8, 8, 5] * 2
    epochs = [torch.cat(seen[start : start + 3]).tolist() for start in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(21))] * 2
    assert epochs[0] != epochs[1] != list(range(21))


@pytest.mark.parametrize(
    ("images", "sizes"), [(21, [7, 7, 7]), (17, [6, 6, 5]), (16, [8, 8]), (9, [5, 4]), (8, [8]), (3, [3])]
)
def test_even_batches_are_as_many_and_differ_by_one_image_at_most(images: int, sizes: list[int]):
    order = torch.randperm(images, generator=generator())
    even = batches_of(order, dataclasses.replace(RECIPE, even_batches=True))
    assert [len(batch) for batch in even] == sizes
    assert len(even) == len(batches_of(order, RECIPE))
    assert torch.equal(torch.cat(even), order)
    together = batches_of(order.expand(2, -1), dataclasses.replace(RECIPE, even_batches=True))
    assert [batch.shape for batch in together] == [(2, size) for size in sizes]


def test_a_training_with_even_batches_shows_them():
    seen = shown(training(dataclasses.replace(RECIPE, even_batches=True)), 2)
    assert [len(batch) for batch in seen] == [7, 7, 7] * 2
    assert [sorted(torch.cat(seen[start : start + 3]).tolist()) for start in (0, 3)] == [list(range(21))] * 2


def test_a_set_smaller_than_a_batch_is_one_batch_without_padding():
    assert training(n=5).update.recipe.batch == 5
    assert training(n=21).update.recipe.batch == 8


def test_training_is_repeatable_and_learns_its_images():
    recipe = dataclasses.replace(RECIPE, epochs=30, lr=0.1, strategy="none", cutmix=0.0)
    one, other = training(recipe), training(recipe)
    for run in (one, other):
        while not run.finished:
            run.run_epoch()
    assert_equal_states(state_of(one), state_of(other))
    assert accuracy(one.network, one.images, one.labels, NORMALISE) > 0.9


@pytest.mark.parametrize("build", [build, with_batch_norm])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_two_epochs_a_checkpoint_and_two_more_are_four_epochs_bit_for_bit(tmp_path: Path, seeds, build):
    whole = training(seeds=seeds, build=build)
    for _ in range(4):
        whole.run_epoch()
    half = training(seeds=seeds, build=build)
    for _ in range(2):
        half.run_epoch()
    checkpoints = Checkpoints(tmp_path, 0)
    checkpoints.save("training", half.state_dict())
    rest = training(seeds=[99 + seed for seed in seeds], build=build)  # what it starts with must not matter
    rest.load_state_dict(checkpoints.load("training"))
    assert rest.epoch == 2
    for _ in range(2):
        rest.run_epoch()
    assert rest.finished
    assert_equal_states(state_of(whole), state_of(rest))
    assert torch.equal(whole.generator.get_state(), rest.generator.get_state())


# Networks together


class Calls(TorchDispatchMode):
    """Records the name of every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", [build, with_batch_norm])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("n", [8, 5])
def test_an_update_never_waits_for_the_device(seeds: list[int], n: int, build: Builder):
    run = training(seeds=seeds, build=build)
    index = torch.arange(n).expand(*run.together, n)
    with Calls() as calls:
        loss = run.run_batch({"index": index})["loss"]
    assert {"aten::rand.generator", "aten::convolution"} <= calls.names
    assert "aten::_local_scalar_dense" not in calls.names
    with Calls() as calls:
        float(loss.sum())
    assert "aten::_local_scalar_dense" in calls.names


def three_and_each(recipe: Recipe) -> tuple[Training, list[Training]]:
    """Three networks trained together, and each of them alone, in float64."""
    images, labels = torch.rand(21, 3, 8, 8, generator=generator(), dtype=torch.float64), images_and_labels(21)[1]
    given = (in_float64, images, labels, recipe, NORMALISE, training_step(in_float64(), CPU))
    together = Training(*given, *map(generator, range(3)))
    return together, [Training(*given, generator(seed)) for seed in range(3)]


def assert_each_is_in(together: Training, each: list[Training]) -> None:
    stacked = state_of(together)
    for position, alone in enumerate(each):
        assert state_of(alone).keys() == stacked.keys()
        for name, value in state_of(alone).items():
            torch.testing.assert_close(stacked[name][position], value, rtol=0, atol=1e-10)


def test_networks_together_are_each_what_it_is_alone(monkeypatch):
    """Orders are equal and nothing is augmented; momentum, decay, three rates and a padded last batch are included."""
    recipe = dataclasses.replace(
        RECIPE, epochs=6, strategy="none", cutmix=0.0, weight_decay=0.1, lr=0.1, schedule="multistep"
    )
    together, each = three_and_each(recipe)
    assert_each_is_in(together, [])
    start = {name: value.clone() for name, value in together.network.state_dict().items()}
    orders = torch.rand(6, 3, 21, generator=generator()).argsort(-1)
    for order in orders:
        monkeypatch.setattr(trainer, "permutations", lambda *_, order=order: order)
        losses = together.run_epoch()
        for position, alone in enumerate(each):
            monkeypatch.setattr(trainer, "permutations", lambda *_, order=order[position]: order)
            assert alone.run_epoch() == pytest.approx([losses[position]], abs=1e-10)
    assert_each_is_in(together, each)
    assert all((value - start[name]).abs().min() > 0 for name, value in together.network.state_dict().items())


@pytest.mark.parametrize("n", [8, 5])
def test_every_network_sees_its_own_augmentation_and_mixture(monkeypatch, n: int):
    recipe = dataclasses.replace(RECIPE, strategy="color_crop_cutout_flip_scale_rotate", cutmix=1.0)
    together, each = three_and_each(recipe)
    cutmix, noted = augment.cutmix, []
    drawn = augment.draw(recipe.strategy, 24, 8, generator(), batches=3)
    assert len(set(drawn.chosen.tolist())) > 1
    parts = [{k: v[8 * i : 8 * i + 8] for k, v in vars(drawn).items() if torch.is_tensor(v)} for i in range(3)]

    def drawing(*given: object, rule: str, batches: int) -> augment.Draw:
        assert (given[1:3], rule, batches) == ((24, 8), "idc", 3)
        return drawn

    def mixing(*given: object, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        noted.append((given[0], *cutmix(*given, **options)))
        return noted[-1][1:]

    monkeypatch.setattr(augment, "draw", drawing)
    monkeypatch.setattr(augment, "cutmix", mixing)
    index = torch.rand(3, 21, generator=generator()).argsort(-1)[:, :n]
    losses = together.run_batch({"index": index})["loss"]
    ((inputs, mixed, partners, shares),) = noted
    assert len(set(shares.tolist())) == 3
    for position, alone in enumerate(each):

        def mixed_alone(images: Tensor, *_: object, i: int = position, **__: object) -> tuple[Tensor, Tensor, Tensor]:
            torch.testing.assert_close(images, inputs[i], rtol=0, atol=1e-12)
            return mixed[i], partners[i], shares[i]

        own = augment.Draw(**{**vars(drawn), **parts[position]})
        monkeypatch.setattr(augment, "draw", lambda *_, own=own, **__: own)
        monkeypatch.setattr(augment, "cutmix", mixed_alone)
        torch.testing.assert_close(alone.run_batch({"index": index[position]})["loss"], losses[position])
    assert_each_is_in(together, each)


def test_networks_together_start_from_their_own_generators_and_shuffle_apart():
    run = training(seeds=[7, 8, 9])
    for position, seed in enumerate((7, 8, 9)):
        alone = training(seeds=[seed]).network.state_dict()
        assert all(torch.equal(value[position], alone[name]) for name, value in run.network.state_dict().items())
    seen = shown(run, 1)
    assert [tuple(batch.shape) for batch in seen] == [(3, 8), (3, 8), (3, 5)]
    orders = torch.cat(seen, 1).tolist()
    assert [sorted(order) for order in orders] == [list(range(21))] * 3
    assert len(set(map(tuple, orders))) == 3


def test_networks_together_draw_from_the_first_ones_generator_alone():
    runs = [training(seeds=seeds) for seeds in ([0, 1], [0, 1], [0, 2])]
    losses = [run.run_epoch() for run in runs]
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[2][0] and losses[0][1] != losses[2][1]


@pytest.mark.parametrize("build", [build, with_batch_norm])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_what_is_loaded_goes_into_the_tensors_that_a_captured_update_uses(seeds: list[int], build: Builder):
    """Momentum tensors exist before the first update, because a graph must not create them at every replay."""
    run, other = training(seeds=seeds, build=build), training(seeds=seeds, build=build)
    before = {name: value.data_ptr() for name, value in state_of(run).items()}
    assert any(name.startswith("momentum") for name in before)
    other.run_epoch()
    run.run_epoch()
    run.load_state_dict(other.state_dict())
    run.run_epoch()
    assert {name: value.data_ptr() for name, value in state_of(run).items()} == before


@pytest.mark.parametrize("build", [build, with_batch_norm])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_a_recorded_update_is_the_same_and_reads_its_rate_from_a_tensor(monkeypatch, seeds, build):
    usual = training(seeds=seeds, build=build)
    record_on_a_cpu(monkeypatch)
    captured = training(seeds=seeds, build=build)
    step, rate = captured.update.step, captured.update.optimizer.param_groups[0]["lr"]

    def otherwise_laid_out(*given: object) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Lay out gradients as a compiler may: columns, not rows, are contiguous in memory."""
        loss, gradients, buffers = step(*given)
        return loss, {name: g.mT.contiguous().mT if g.ndim > 1 else g for name, g in gradients.items()}, buffers

    captured.update.step = otherwise_laid_out
    with Calls() as calls:
        for epoch in range(4):
            usual.run_epoch()
            captured.run_epoch()
            assert captured.update.optimizer.param_groups[0]["lr"] is rate
            assert float(rate) == pytest.approx(learning_rate(RECIPE, epoch))
    assert "aten::_fused_sgd_.tensor_lr" in calls.names
    for name, value in state_of(usual).items():
        torch.testing.assert_close(state_of(captured)[name], value, rtol=0, atol=1e-5)


# Batch norm


def resnet_with_batch_norm() -> nn.Module:
    return ResNet(3, 3, 16, blocks=(1, 1, 1, 1), width=4, norm="batch")


def plain_loop(network: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, orders: Tensor) -> nn.Module:
    """Train ``network`` with PyTorch's own modules and optimiser in these orders (epochs, N), without augmentation."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    for epoch, order in enumerate(orders):
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, epoch)
        for index in order.split(recipe.batch):
            optimizer.zero_grad()
            F.cross_entropy(network(NORMALISE(images[index])), labels[index]).backward()
            optimizer.step()
    return network


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize(("build", "size"), [(with_batch_norm, 8), (resnet_with_batch_norm, 16)])
def test_batch_norm_is_trained_as_pytorch_trains_it(monkeypatch, build: Builder, size: int, seeds: list[int]):
    """Running statistics and a short last batch included, for one network and for several together."""
    recipe = dataclasses.replace(RECIPE, epochs=3, strategy="none", cutmix=0.0, weight_decay=0.1)
    images = torch.rand(21, 3, size, size, generator=generator(), dtype=torch.float64)
    labels = images_and_labels(21)[1]
    orders = torch.rand(3, len(seeds), 21, generator=generator()).argsort(-1)
    step = training_step(build().double(), CPU)
    run = Training(
        lambda: build().double(), images, labels, recipe, NORMALISE, step, *(generator(seed) for seed in seeds)
    )
    for order in orders:
        monkeypatch.setattr(trainer, "permutations", lambda *_, order=order: order.reshape(*run.together, 21))
        run.run_epoch()
    found, logits = run.network.state_dict(), logits_of(run.network, images, NORMALISE, batch=10)
    for position, seed in enumerate(seeds):
        network = initialise(build().double().to(memory_format=torch.channels_last), generator(seed))
        start = copy.deepcopy(network.state_dict())
        expected = plain_loop(network, images, labels, recipe, orders[:, position])
        assert found.keys() == expected.state_dict().keys()
        for name, value in expected.state_dict().items():
            own = found[name][position] if run.together else found[name]
            torch.testing.assert_close(own, value, rtol=0, atol=1e-10)
            assert not torch.equal(value, start[name])
        own = logits[position] if run.together else logits
        torch.testing.assert_close(own, expected.eval()(NORMALISE(images)), rtol=0, atol=1e-9)


def test_batch_norm_judges_every_image_by_itself():
    run = training(build=with_batch_norm)
    run.run_epoch()
    images = images_and_labels(21)[0]
    together, alone = (logits_of(run.network, images, NORMALISE, batch=batch) for batch in (21, 1))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(run.network(NORMALISE(images)), together, atol=1e-3)  # by batch statistics


def test_a_training_step_writes_to_nothing():
    network, (images, labels) = initialise(with_batch_norm(), generator()), images_and_labels(8)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    buffers = dict(network.named_buffers())
    before = copy.deepcopy(network.state_dict())
    template = with_batch_norm()
    given = (parameters, buffers, Batch(normalised(images), labels, labels, torch.ones(())), torch.ones(8))
    moved = training_step(template, CPU)(*given)[2]
    assert_equal_states(before, network.state_dict())
    assert all((value == 0).all() for name, value in template.named_buffers() if name.endswith("running_mean"))
    assert moved.keys() == buffers.keys()
    assert not any(torch.equal(moved[name], value) for name, value in buffers.items())


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_warming_up_leaves_no_trace_in_running_statistics(seeds: list[int]):
    run = training(seeds=seeds, build=with_batch_norm)
    before = {name: value.clone() for name, value in state_of(run).items()}
    index = torch.arange(8).expand(*run.together, 8)
    warm_up(run.run_batch, {"index": index}, run.update.tensors, [run.generator])
    assert_equal_states(state_of(run), before)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_batch_norm_trains_in_bf16_with_fp32_statistics(seeds: list[int]):
    images, labels = images_and_labels(21)
    step = training_step(with_batch_norm(), Compute(torch.device("cpu"), precision="bf16"))
    streams = (generator(seed) for seed in seeds)
    run = Training(with_batch_norm, images, labels, RECIPE, NORMALISE, step, *streams)
    exact = training(seeds=seeds, build=with_batch_norm)
    assert run.run_epoch() == pytest.approx(exact.run_epoch(), rel=0.02)
    mean, other = (one.network.get_buffer("body.1.running_mean") for one in (run, exact))
    assert mean.dtype == torch.float32 and not torch.equal(mean, other)
    torch.testing.assert_close(mean, other, rtol=0, atol=0.01)


def test_a_compiler_can_trace_running_statistics_whole():
    network, (images, labels) = initialise(with_batch_norm(), generator()), images_and_labels(5)
    state = ({name: value.detach() for name, value in network.named_parameters()}, dict(network.named_buffers()))
    given = (*state, Batch(normalised(images), labels, labels, torch.ones(())), torch.ones(5))
    step = training_step(with_batch_norm(), CPU)
    for found, expected in zip(torch.compile(step, fullgraph=True, backend="eager")(*given), step(*given), strict=True):
        torch.testing.assert_close(found, expected)
