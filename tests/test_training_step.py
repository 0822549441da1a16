"""One update of a network: its rate, the SGD step against torch's own, padding, CutMix and precision."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from hmn.compute import Compute
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.network_update import Batch, NetworkUpdate, UpdateRecipe, training_step
from hmn.networks import initialise
from hmn.training import learning_rate
from tests.small_training import (
    CPU,
    MEAN,
    NORMALISE,
    RECIPE,
    STD,
    build,
    generator,
    images_and_labels,
    normalised,
    state_of,
    training,
)

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


def update_of(
    network: nn.Module, batch: int, *, strategy: str = "none", cutmix: float = 0.0, rule: str = "idc", seed: int = 5
) -> NetworkUpdate:
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "strategy": strategy, "cutmix": cutmix, "rule": rule}
    recipe = UpdateRecipe(batch=batch, **settings)
    return NetworkUpdate(network, training_step(build(), CPU), NORMALISE, generator(seed), recipe)


def pair() -> tuple[nn.Module, nn.Module]:
    network = initialise(build(), generator(3))
    return network, copy.deepcopy(network)


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


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
    mix = augment.draw_mix((8,), 8, stream)
    inputs, partners, share = augment.cutmix(augment.apply(normalised(images), drawn), labels, 1.0, mix)
    assert 0 < share < 1 and (partners != labels).any()
    logits = reference(inputs)
    # IDC: r CE(y) + (1 - r) CE(y of the partner)
    expected = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, partners)
    optimizer = sgd(reference)
    expected.backward()
    optimizer.step()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close_networks(network, reference)


@pytest.mark.parametrize("cutmix", [0.0, 0.7])
def test_batches_that_are_augmented_at_once_are_those_one_after_the_other(cutmix, double, monkeypatch):
    """A GPU does the former and a CPU the latter, with the same draws and with updates in the same order."""
    strategy = "color_crop_cutout_flip_scale_rotate"
    images, labels = images_and_labels(40)
    index = torch.rand(5, 40, generator=generator()).argsort(-1)[:, :8]
    networks, updates, calls = pair(), [], []
    apply = augment.apply
    monkeypatch.setattr(augment, "apply", lambda seen, drawn: calls.append(len(seen)) or apply(seen, drawn))
    for network, at_once in zip(networks, (False, True), strict=True):
        update = update_of(network, 8, strategy=strategy, cutmix=cutmix)
        update.normalise = Normalise(MEAN, STD)  # in float64
        update.fused = at_once
        update.on_batches(images, labels, index)
        updates.append(update)
    assert calls == [8] * 5 + [40]
    assert torch.equal(*(update.generator.get_state() for update in updates))
    assert_close_networks(*networks, tolerance=1e-12)
    moved = zip(networks[0].parameters(), pair()[0].parameters(), strict=True)
    assert all((now - before).abs().max() > 1e-3 for now, before in moved)


def test_an_update_augments_by_its_own_rule():
    network, reference = pair()
    images, labels = images_and_labels(8)
    loss = update_of(network, 8, strategy="color_flip", rule="vico")(images, labels)
    drawn = augment.draw("color_flip", 8, 8, generator(5), rule="vico")
    expected = F.cross_entropy(reference(augment.apply(normalised(images), drawn)), labels)
    optimizer = sgd(reference)
    expected.backward()
    optimizer.step()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close_networks(network, reference)


def test_updates_with_cutmix_are_those_of_plain_autograd_in_float64(double):
    network, reference = pair()
    stream, optimizer, normalise = generator(5), sgd(reference), Normalise(MEAN, STD)
    update = update_of(network, 8, strategy="color_crop", cutmix=0.7)
    update.normalise = normalise  # in float64
    shares = []
    for step in range(6):
        images, labels = torch.rand(8, 3, 8, 8, generator=generator(step)), torch.arange(8) % 3
        loss = update(images, labels)
        drawn = augment.draw("color_crop", 8, 8, stream)
        mix = augment.draw_mix((8,), 8, stream)
        inputs, partners, share = augment.cutmix(augment.apply(normalise(images), drawn), labels, 0.7, mix)
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
        Batch(torch.ones(1, 1, 2, 2), torch.tensor([0]), torch.tensor([2]), torch.tensor(0.75)),
        torch.ones(1),
    )
    torch.testing.assert_close(loss, torch.tensor(0.75 * math.log(8) + 0.25 * math.log(8 / 5)))
    torch.testing.assert_close(gradients["1.bias"], torch.tensor([1 / 8 - 0.75, 2 / 8, 5 / 8 - 0.25]))
    torch.testing.assert_close(gradients["1.weight"], gradients["1.bias"][:, None].expand(3, 4))


def test_a_batch_weighs_its_images_equally_and_its_padding_not_at_all():
    network, (images, labels) = initialise(build(), generator()), images_and_labels(8)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    inputs, weights = normalised(images), torch.tensor([1.0] * 5 + [0.0] * 3)
    batch = Batch(inputs, labels, labels, torch.ones(()))
    loss, gradients, _ = training_step(build(), CPU)(parameters, {}, batch, weights)
    expected = F.cross_entropy(network(inputs[:5]), labels[:5])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    found = torch.autograd.grad(expected, list(network.parameters()))
    for name, value in zip(gradients, found, strict=True):
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_a_short_batch_is_padded_without_effect(cutmix):
    """Padding it from 5 to 8 and mixing among its own images only gives the same update as a full batch of 5."""
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
    batch = ({}, Batch(normalised(images), labels, labels, torch.ones(())), torch.ones(4))
    step = training_step(template, CPU)
    before = step(parameters, *batch)[0]
    with torch.no_grad():
        for parameter in template.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(step(parameters, *batch)[0], before)


def test_bf16_trains_with_fp32_parameters_and_loss():
    images, labels = images_and_labels(8)
    parameters = {name: value.detach() for name, value in initialise(build(), generator()).named_parameters()}
    batch = ({}, Batch(normalised(images), labels, labels, torch.ones(())), torch.ones(8))
    exact = training_step(build(), CPU)(parameters, *batch)
    loss, gradients, _ = training_step(build(), Compute(torch.device("cpu"), precision="bf16"))(parameters, *batch)
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in gradients.values())
    assert loss != exact[0]
    for name, value in gradients.items():
        if value.ndim > 1:
            assert F.cosine_similarity(value.flatten(), exact[1][name].flatten(), dim=0) > 0.98


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
def test_networks_together_are_trained_by_a_compiled_step_as_without_compiling():
    plain, compiled = training(seeds=[0, 1]), training(seeds=[0, 1])
    compiled.update.step = training_step(build(), Compute(torch.device("cpu"), matching="compiled", compiled=True))
    for run in (plain, compiled):
        run.run_epoch()
    for name, value in state_of(plain).items():
        torch.testing.assert_close(state_of(compiled)[name], value, rtol=1e-3, atol=1e-5)
