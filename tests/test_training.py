"""The one trainer: schedules, the SGD step against torch's own, padding, CutMix, and resuming."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR
from torch.utils._python_dispatch import TorchDispatchMode

from hmn import training as trainer
from hmn.capture import warm_up
from hmn.checkpoint import Checkpoints, Stop
from hmn.compute import Compute
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.errors import Diverged, Interrupted
from hmn.networks import Builder, initialise
from hmn.networks.convnet import ConvNet
from hmn.networks.resnet import ResNet
from hmn.networks.together import Together
from hmn.training import (
    NetworkUpdate,
    Recipe,
    Training,
    accuracy,
    batches_of,
    learning_rate,
    logits_of,
    train_networks,
    training_step,
)

CPU = Compute(torch.device("cpu"))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NORMALISE = Normalise(MEAN, STD)
RECIPE = Recipe(
    epochs=4,
    batch=8,
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    strategy="color_crop_flip_scale_rotate",
    cutmix=0.5,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build() -> nn.Module:
    return ConvNet(3, 3, 8, width=4, depth=2)


def with_batch_norm() -> nn.Module:
    return ConvNet(3, 3, 8, width=4, depth=2, norm="batch")


def images_and_labels(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    stream = generator(seed)
    images = torch.randint(256, (n, 3, 8, 8), generator=stream, dtype=torch.uint8)
    return images, torch.randint(3, (n,), generator=stream)


def training(recipe: Recipe = RECIPE, n: int = 21, seeds: Sequence[int] = (0,), build: Builder = build) -> Training:
    """One network per seed on 21 images in batches of 8: the last is short, and padded where there is no batch norm."""
    images, labels = images_and_labels(n)
    step = training_step(build(), CPU)
    return Training(build, images, labels, recipe, NORMALISE, step, *(generator(seed) for seed in seeds))


def state_of(run: Training) -> dict[str, Tensor]:
    """Parameters, buffers and momentum: everything later epochs depend on, the generator aside."""
    momentum = [state["momentum_buffer"] for state in run.update.optimizer.state.values()]
    return run.network.state_dict() | {f"momentum{index}": value for index, value in enumerate(momentum)}


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# Learning rates


def schedule(kind: str, epochs: int) -> list[float]:
    recipe = dataclasses.replace(RECIPE, schedule=kind, epochs=epochs, lr=0.01)
    return [learning_rate(recipe, epoch) for epoch in range(epochs)]


def torch_schedule(epochs: int, make: Callable[[torch.optim.SGD], LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = make(optimizer)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_a_constant_rate_stays():
    assert schedule("constant", 4) == [0.01] * 4


def test_multistep_drops_to_a_fifth_at_666_and_833_of_1000_epochs():
    # IDC: MultiStep x 0.2 at 2/3 and 5/6 of the epochs.
    rates = schedule("multistep", 1000)
    assert rates[0] == rates[665] == 0.01
    assert rates[666] == rates[832] == pytest.approx(0.002, rel=1e-12)
    assert rates[833] == rates[999] == pytest.approx(0.0004, rel=1e-12)
    assert len(set(rates)) == 3
    expected = torch_schedule(1000, lambda sgd: MultiStepLR(sgd, [666, 833], gamma=0.2))
    assert rates == pytest.approx(expected, rel=1e-9)


def test_cosine_starts_at_the_peak_and_ends_near_zero():
    rates = schedule("cosine", 1000)
    assert rates[0] == 0.01
    assert rates[500] == pytest.approx(0.005, rel=1e-12)
    assert 0 < rates[999] < 3e-6 * 0.01
    expected = torch_schedule(1000, lambda sgd: CosineAnnealingLR(sgd, T_max=1000))
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_training_uses_the_rate_of_its_epoch():
    recipe = dataclasses.replace(RECIPE, schedule="multistep", epochs=6, lr=0.01)
    run = training(recipe, n=4)
    rates = []
    while not run.finished:
        run.run_epoch()
        rates.append(run.update.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01] * 4 + [0.002] + [0.0004], rel=1e-12)


# One update


def update_of(network: nn.Module, batch: int, *, strategy: str = "none", cutmix: float = 0.0, seed: int = 5):
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "strategy": strategy, "cutmix": cutmix}
    return NetworkUpdate(network, training_step(build(), CPU), NORMALISE, generator(seed), batch=batch, **settings)


def pair() -> tuple[nn.Module, nn.Module]:
    network = initialise(build(), generator(3))
    return network, copy.deepcopy(network)


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def normalised(images: Tensor) -> Tensor:
    return torch.stack([(images[:, c].float() / 255 - MEAN[c]) / STD[c] for c in range(3)], dim=1)


def assert_close_networks(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_updates_are_torch_sgd_on_cross_entropy():
    network, reference = pair()
    update, optimizer = update_of(network, 8), sgd(reference)
    for step in range(4):
        images, labels = images_and_labels(8, seed=step)
        loss = update(images, labels)
        expected = F.cross_entropy(reference(normalised(images)), labels)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close_networks(network, reference)
    start = initialise(build(), generator(3))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(network.parameters(), start.parameters(), strict=True))


def test_an_update_augments_with_parameters_per_image_and_mixes_by_the_cutmix_loss():
    network, reference = pair()
    images, labels = images_and_labels(8)
    loss = update_of(network, 8, strategy="color_crop", cutmix=1.0)(images, labels)

    stream = generator(5)
    drawn = augment.draw("color_crop", 8, 8, stream)
    inputs, partners, share = augment.cutmix(augment.apply(normalised(images), drawn), labels, 1.0, stream)
    assert 0 < share < 1 and (partners != labels).any()
    logits = reference(inputs)
    # IDC: r CE(y) + (1 - r) CE(y of the partner)
    expected = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, partners)
    optimizer = sgd(reference)
    expected.backward()
    optimizer.step()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close_networks(network, reference)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_updates_with_cutmix_are_those_of_plain_autograd_in_float64(double):
    network, reference = pair()
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "strategy": "color_crop", "cutmix": 0.7}
    stream, optimizer, normalise = generator(5), sgd(reference), Normalise(MEAN, STD)
    update = NetworkUpdate(network, training_step(build(), CPU), normalise, generator(5), batch=8, **settings)
    shares = []
    for step in range(6):
        images, labels = torch.rand(8, 3, 8, 8, generator=generator(step)), torch.arange(8) % 3
        loss = update(images, labels)
        drawn = augment.draw("color_crop", 8, 8, stream)
        inputs, partners, share = augment.cutmix(augment.apply(normalise(images), drawn), labels, 0.7, stream)
        logits = reference(inputs)
        expected = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, partners)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
        shares.append(float(share))
    assert min(shares) < max(shares) == 1  # some were mixed, some were not
    assert_close_networks(network, reference, tolerance=1e-9)


def test_the_mixed_loss_and_its_gradients_by_hand():
    """One linear layer: the gradient of the bias is softmax minus the mixed target."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    weights, bias = torch.zeros(3, 4), torch.tensor([0.0, math.log(2), math.log(5)])  # softmax 1/8, 2/8, 5/8
    loss, gradients, _ = training_step(network, CPU)(
        {"1.weight": weights, "1.bias": bias},
        {},
        torch.ones(1, 1, 2, 2),
        torch.tensor([0]),
        torch.tensor([2]),
        torch.tensor(0.75),
        torch.ones(1),
    )
    torch.testing.assert_close(loss, torch.tensor(0.75 * math.log(8) + 0.25 * math.log(8 / 5)))
    torch.testing.assert_close(gradients["1.bias"], torch.tensor([1 / 8 - 0.75, 2 / 8, 5 / 8 - 0.25]))
    torch.testing.assert_close(gradients["1.weight"], gradients["1.bias"][:, None].expand(3, 4))


def test_a_batch_weighs_its_images_equally_and_its_padding_not_at_all():
    network, (images, labels) = initialise(build(), generator()), images_and_labels(8)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    inputs, weights = normalised(images), torch.tensor([1.0] * 5 + [0.0] * 3)
    loss, gradients, _ = training_step(build(), CPU)(parameters, {}, inputs, labels, labels, torch.ones(()), weights)
    expected = F.cross_entropy(network(inputs[:5]), labels[:5])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    found = torch.autograd.grad(expected, list(network.parameters()))
    for name, value in zip(gradients, found, strict=True):
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_a_short_batch_is_padded_without_effect(cutmix):
    """Padded from 5 to 8, and mixed among its own images only, it is the same update as a full batch of 5."""
    network, reference = pair()
    images, labels = images_and_labels(5)
    padded = update_of(network, 8, cutmix=cutmix)(images, labels)
    unpadded = update_of(reference, 5, cutmix=cutmix)(images, labels)
    torch.testing.assert_close(padded, unpadded, rtol=1e-6, atol=0)
    assert_close_networks(network, reference)
    for a, b in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)


def test_float_images_are_used_as_they_are_and_bytes_are_divided_by_255():
    network, reference = pair()
    images, labels = images_and_labels(8)
    assert torch.equal(update_of(network, 8)(images, labels), update_of(reference, 8)(images.float() / 255, labels))


def test_the_network_of_a_training_step_gives_the_architecture_only():
    images, labels = images_and_labels(4)
    template = build()
    parameters = {name: value.detach().clone() for name, value in initialise(build(), generator()).named_parameters()}
    batch = ({}, normalised(images), labels, labels, torch.ones(()), torch.ones(4))
    step = training_step(template, CPU)
    before = step(parameters, *batch)[0]
    with torch.no_grad():
        for parameter in template.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(step(parameters, *batch)[0], before)


def test_bf16_trains_with_fp32_parameters_and_loss():
    images, labels = images_and_labels(8)
    parameters = {name: value.detach() for name, value in initialise(build(), generator()).named_parameters()}
    batch = ({}, normalised(images), labels, labels, torch.ones(()), torch.ones(8))
    exact = training_step(build(), CPU)(parameters, *batch)
    loss, gradients, _ = training_step(build(), Compute(torch.device("cpu"), precision="bf16"))(parameters, *batch)
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in gradients.values())
    assert loss != exact[0]
    for name, value in gradients.items():
        if value.ndim > 1:
            assert F.cosine_similarity(value.flatten(), exact[1][name].flatten(), dim=0) > 0.98


# One training


def test_a_training_starts_from_the_parameters_its_generator_draws():
    run, other = training(seeds=[7]), training(seeds=[8])
    expected = initialise(build().to(memory_format=torch.channels_last), generator(7))  # drawn in memory order
    assert all(torch.equal(a, b) for a, b in zip(run.network.parameters(), expected.parameters(), strict=True))
    assert not torch.equal(run.network.classifier.weight, other.network.classifier.weight)


class Recorder:
    """Stands for an update on images that are numbers, and notes which ones it is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def set_learning_rate(self, lr: float) -> None:
        pass

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(labels, images_and_labels(21)[1][images])
        self.seen.append(images)
        return torch.zeros(images.shape[:-1])


def shown(run: Training, epochs: int) -> list[Tensor]:
    """The indices that each of a training's updates is given."""
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
    assert training(n=5).update.batch == 5
    assert training(n=21).update.batch == 8


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
    """Notes every operator that is called."""

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


def in_float64() -> nn.Module:
    return build().double()


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
    """Equal orders, no augmentation: momentum, decay, three learning rates and a padded last batch included."""
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
    """And it makes those of the first update beforehand: a graph must not make them anew at every replay."""
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
def test_an_update_that_can_be_captured_is_the_same_and_reads_its_rate_from_a_tensor(monkeypatch, seeds, build):
    usual = training(seeds=seeds, build=build)
    monkeypatch.setattr(trainer, "_replayable", lambda _: True)
    monkeypatch.setattr(trainer.Replay, "_warm_up", lambda self, inputs: None)  # then recording fails on a CPU
    captured = training(seeds=seeds, build=build)
    step, rate = captured.update.step, captured.update.optimizer.param_groups[0]["lr"]

    def otherwise_laid_out(*batch: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """As a compiler may: columns of gradients lie together in memory, not rows."""
        loss, gradients, buffers = step(*batch)
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
    """What PyTorch's own modules and optimiser make of these orders (epochs, N), without augmentation."""
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
        assert not torch.allclose(run.network(NORMALISE(images)), together, atol=1e-3)  # by the batch's statistics


def test_a_training_step_writes_to_nothing():
    network, (images, labels) = initialise(with_batch_norm(), generator()), images_and_labels(8)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    buffers = dict(network.named_buffers())
    before = copy.deepcopy(network.state_dict())
    template = with_batch_norm()
    given = (parameters, buffers, normalised(images), labels, labels, torch.ones(()), torch.ones(8))
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
    given = (*state, normalised(images), labels, labels, torch.ones(()), torch.ones(5))
    step = training_step(with_batch_norm(), CPU)
    for found, expected in zip(torch.compile(step, fullgraph=True, backend="eager")(*given), step(*given), strict=True):
        torch.testing.assert_close(found, expected)


# Several networks, one after another or together


def observe(networks: range, run: Training, memo: dict[str, Tensor]) -> None:
    """Something that adds up over epochs and depends on every parameter."""
    for position, index in enumerate(networks):
        for value in run.network.state_dict().values():
            own = value[position] if len(networks) > 1 else value
            memo["sum"][index] += float(own.double().sum())
        memo["epochs"][index] += 1


def train_three(checkpoints: Checkpoints, observe=observe, together: int = 1) -> tuple[dict[str, Tensor], list[range]]:
    made: list[range] = []

    def make(networks: range) -> Training:
        made.append(networks)
        return training(seeds=networks)

    memo = {"sum": torch.zeros(3, dtype=torch.float64), "epochs": torch.zeros(3, dtype=torch.int64)}
    return train_networks(3, make, observe, memo, checkpoints, "networks", "networks", together), made


GROUPS = {1: [range(1), range(1, 2), range(2, 3)], 2: [range(2), range(2, 3)], 3: [range(3)], 7: [range(3)]}


@pytest.mark.parametrize("together", GROUPS)
def test_networks_are_trained_in_groups_and_observed_after_every_epoch(tmp_path: Path, together: int):
    memo, made = train_three(Checkpoints(tmp_path, 1e9), together=together)
    assert made == GROUPS[together]
    assert memo["epochs"].tolist() == [4, 4, 4]
    expected = {"sum": torch.zeros(3, dtype=torch.float64), "epochs": torch.zeros(3, dtype=torch.int64)}
    for networks in made:
        run = training(seeds=networks)
        for _ in range(4):
            run.run_epoch()
            observe(networks, run, expected)
    assert_equal_states(memo, expected)
    assert len(set(memo["sum"].tolist())) == 3


@pytest.mark.parametrize(("together", "groups"), [(1, GROUPS[1]), (2, [range(2), range(2, 4), range(4, 5)])])
def test_a_bar_says_which_networks_are_trained(tmp_path: Path, monkeypatch, together: int, groups: list[range]):
    titles = []
    bar = trainer.tqdm
    monkeypatch.setattr(trainer, "tqdm", lambda *args, **options: titles.append(options["desc"]) or bar(**options))
    count = groups[-1].stop
    arguments = (count, lambda networks: training(seeds=networks), lambda *_: None, {}, Checkpoints(tmp_path, 1e9))
    train_networks(*arguments, "slot", "score", together)
    assert titles == (
        ["score 1/3", "score 2/3", "score 3/3"] if together == 1 else ["score 1-2/5", "score 3-4/5", "score 5/5"]
    )


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_loss_that_is_not_finite_in_any_batch_stops_training_and_names_the_network(tmp_path, together, batch):
    """One bad loss of the second network in the second epoch, whose update did no harm."""
    bad = torch.tensor([0.0, torch.inf, 0.0])

    def make(networks: range) -> Training:
        run, done = training(seeds=networks), []
        run_batch = run.run_batch

        def spoilt(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            loss = run_batch(inputs)["loss"]
            done.append(loss)
            own = bad[networks.start : networks.stop].view(loss.shape)
            return {"loss": loss + own if len(done) == 4 + batch else loss}

        run.run_batch = spoilt
        return run

    message = r"^judge 2/3: the training loss of this network is inf after epoch 2: lower its learning rate$"
    with pytest.raises(Diverged, match=message):
        train_networks(3, make, lambda *_: None, {}, Checkpoints(tmp_path, 1e9), "slot", "judge", together)


def test_a_network_that_diverges_leaves_the_others_as_they_are():
    run, other = training(seeds=[0, 1, 2]), training(seeds=[0, 1, 2])
    with torch.no_grad():
        run.network.classifier.bias[1].fill_(torch.nan)
    losses, expected = run.run_epoch(), other.run_epoch()
    assert math.isnan(losses[1])
    assert [losses[0], losses[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize(("together", "begun"), [(1, GROUPS[1][1:]), (2, GROUPS[2]), (3, GROUPS[3])])
@pytest.mark.parametrize("epoch", [2, 4])
def test_an_interruption_with_the_second_of_three_networks_leaves_no_trace(tmp_path: Path, epoch, together, begun):
    expected, _ = train_three(Checkpoints(tmp_path / "whole", 1e9), together=together)
    stop = Stop()

    def observe_and_stop(networks: range, run: Training, memo: dict[str, Tensor]) -> None:
        observe(networks, run, memo)
        if 1 in networks and run.epoch == epoch:
            stop.signum = 15

    with pytest.raises(Interrupted):
        train_three(Checkpoints(tmp_path / "parts", 1e9, stop), observe_and_stop, together)
    found, made = train_three(Checkpoints(tmp_path / "parts", 1e9), together=together)
    assert made == begun
    assert_equal_states(found, expected)


def test_what_was_begun_together_is_finished_together(tmp_path: Path):
    """A setting that may change between sittings must not lose what is trained: here from 2 at once to 1."""
    expected, _ = train_three(Checkpoints(tmp_path / "whole", 1e9), together=2)
    stop = Stop()
    stop.signum = 15
    with pytest.raises(Interrupted):
        train_three(Checkpoints(tmp_path / "parts", 1e9, stop), together=2)
    found, made = train_three(Checkpoints(tmp_path / "parts", 1e9), together=1)
    assert made == [range(2), range(2, 3)]
    assert_equal_states(found, expected)


def test_a_crash_repeats_only_what_came_after_the_last_checkpoint(tmp_path: Path):
    expected, _ = train_three(Checkpoints(tmp_path / "whole", 1e9))

    def observe_and_fail(networks: range, run: Training, memo: dict[str, Tensor]) -> None:
        observe(networks, run, memo)
        if (*networks, run.epoch) == (1, 3):
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError):
        train_three(Checkpoints(tmp_path / "parts", 0), observe_and_fail)
    epochs: list[tuple[int, int]] = []

    def observe_and_note(networks: range, run: Training, memo: dict[str, Tensor]) -> None:
        observe(networks, run, memo)
        epochs.append((*networks, run.epoch))

    found, _ = train_three(Checkpoints(tmp_path / "parts", 0), observe_and_note)
    assert epochs == [(1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4)]
    assert_equal_states(found, expected)


def test_a_finished_stage_is_read_back_without_training(tmp_path: Path):
    expected, _ = train_three(Checkpoints(tmp_path, 1e9))
    found, made = train_three(Checkpoints(tmp_path, 1e9))
    assert made == []
    assert_equal_states(found, expected)


# Judging


class ByHand(nn.Module):
    """Logits are the first pixels' normalised channels; the mode the network is in when called is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        self.sizes.append(len(images))
        return images[:, :, 0, 0]


def test_logits_are_those_of_normalised_images_in_evaluation_mode_chunk_by_chunk():
    network, (images, _) = ByHand(), images_and_labels(5)
    logits = logits_of(network, images, NORMALISE, batch=2)
    assert torch.equal(logits, torch.stack([NORMALISE(images[i : i + 1])[0, :, 0, 0] for i in range(5)]))
    assert (network.modes, network.sizes) == ([False] * 3, [2, 2, 1])
    assert network.training
    assert not logits.requires_grad


def test_accuracy_is_the_share_of_images_whose_largest_logit_is_the_labels():
    images = torch.zeros(4, 3, 2, 2)
    images[[0, 1, 2, 3], [0, 2, 1, 1], 0, 0] = 1.0  # predictions 0, 2, 1, 1
    value = accuracy(ByHand(), images, torch.tensor([0, 2, 1, 0]), Normalise((0.0,) * 3, (1.0,) * 3))
    assert value == 0.75


def test_logits_and_accuracies_of_networks_together_are_those_of_each():
    networks = [initialise(in_float64(), generator(seed)) for seed in range(3)]
    images = torch.rand(50, 3, 8, 8, generator=generator(), dtype=torch.float64)
    labels = images_and_labels(50)[1]
    logits = logits_of(Together(networks), images, NORMALISE, batch=20)
    expected = torch.stack([logits_of(network, images, NORMALISE, batch=20) for network in networks])
    assert logits.shape == (3, 50, 3) and not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    found = accuracy(Together(networks), images, labels, NORMALISE)
    assert found.tolist() == [float(accuracy(network, images, labels, NORMALISE)) for network in networks]
    assert len(set(found.tolist())) > 1
