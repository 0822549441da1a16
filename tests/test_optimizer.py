"""A container's optimiser: SGD and Adam, rates by tier and by budget, steps class by class, and its saved state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hmn.config.objectives import GradientMatchingConfig
from hmn.containers import KINDS
from hmn.containers.base import Container
from hmn.containers.linba import LinbaShape
from hmn.optimizer import ContainerOptimizer, idc_rate_factor
from tests.small_matching import CLASSES, MEMORIES, OWNED, TIERS, assert_same, config, lr_at, make_container


def container(seed: int = 0) -> Container:
    """A container with coefficients (2, 3, 4) and bases (4, 1, 2, 2)."""
    shape = LinbaShape(classes=2, channels=1, image_size=4, bases=4, downsample=2)
    made = KINDS["linba"].container(shape, 3)
    made.initialise(torch.Generator().manual_seed(seed), None, None)
    return made


def settings(**values: object) -> GradientMatchingConfig:
    return GradientMatchingConfig(name="gradient_matching", **{"final_lr_fraction": 1.0, "memory_lr": 0.1} | values)


def give_gradients(made: Container, stream: torch.Generator) -> dict[str, torch.Tensor]:
    for parameter in made.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=stream)
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters()}


def values_of(made: Container) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.named_parameters()}


def test_sgd_moves_along_a_decaying_sum_of_gradients():
    made, stream = container(), torch.Generator().manual_seed(1)
    optimizer = ContainerOptimizer(made, settings(optimizer="sgd", momentum=0.5), 4, by_class=False)
    expected = values_of(made)
    velocity = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(4):
        optimizer.set_rates(step)
        for name, gradient in give_gradients(made, stream).items():
            velocity[name] = 0.5 * velocity[name] + gradient
            expected[name] = expected[name] - 0.1 * velocity[name]
        optimizer.step()
    for name, value in values_of(made).items():
        torch.testing.assert_close(value, expected[name])


def test_sgd_of_one_class_leaves_the_others_rows_and_momentum():
    made, stream = container(), torch.Generator().manual_seed(1)
    optimizer = ContainerOptimizer(made, settings(optimizer="sgd", momentum=0.9), 4, by_class=True)
    give_gradients(made, stream)
    optimizer.step(torch.tensor([0, 1]))
    before = values_of(made)["instances"]
    give_gradients(made, stream)
    optimizer.step(torch.tensor([1]))
    after = values_of(made)["instances"]
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_a_rate_is_multiplied_by_the_factor_and_by_its_tiers_scale():
    optimizer = ContainerOptimizer(
        container(), settings(), 4, by_class=False, factor=0.5, lr_scale={"bases": 3.0, "instances": 0.0}
    )
    optimizer.set_rates(0)
    assert [group["lr"] for group in optimizer.inner.param_groups] == pytest.approx([0.0, 0.1 * 0.5 * 3.0])
    assert optimizer.learning_rate == 0.0


@pytest.mark.parametrize(
    ("images_per_class", "side", "factor"),
    [
        *[(10, 32, 1.0), (1, 32, 0.1), (50, 32, 5.0), (10, 28, 0.765625), (10, 64, 4.0), (20, 224, 2.0)],
        *[(1, 112, 1.225), (10, 127, (127 / 32) ** 2), (10, 128, (128 / 224) ** 2)],
    ],
)
def test_idcs_factor(images_per_class, side, factor):
    """28 pixels are IDC's Fashion-MNIST, 64 are DREAM's Tiny-ImageNet; from 128 pixels on, the base is 224."""
    assert idc_rate_factor(images_per_class, side) == pytest.approx(factor)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_state_that_is_loaded_goes_on_bit_for_bit(optimizer, by_class):
    config = settings(optimizer=optimizer, final_lr_fraction=0.1)
    made, stream = container(), torch.Generator().manual_seed(1)
    one = ContainerOptimizer(made, config, 4, by_class=by_class)
    for step in range(2):
        one.set_rates(step)
        give_gradients(made, stream)
        one.step()
    other = container(seed=5)
    other.load_state_dict(made.state_dict())
    two = ContainerOptimizer(other, config, 4, by_class=by_class)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for stepped, stepper in ((made, one), (other, two)):
        again = torch.Generator().manual_seed(2)
        for step in range(2, 4):
            stepper.set_rates(step)
            give_gradients(stepped, again)
            stepper.step()
    for name, value in values_of(made).items():
        assert torch.equal(value, values_of(other)[name]), name


def test_the_step_counts_of_an_adam_that_is_recorded_go_where_its_parameters_are():
    """A GPU's Adam is capturable and its checkpoints lie on the host; `meta` stands for the GPU."""
    made = container()
    one = ContainerOptimizer(made, settings(), 4, by_class=False)
    give_gradients(made, torch.Generator().manual_seed(1))
    one.step()
    two = ContainerOptimizer(container().to("meta"), settings(), 4, by_class=False)
    for group in two.inner.param_groups:
        group["capturable"] = True
    two.load_state_dict(one.state_dict())
    assert all(group["capturable"] for group in two.inner.param_groups)
    assert {entry["step"].device.type for entry in two.inner.state.values()} == {"meta"}


def test_fused_sgd_as_a_gpu_has_it_steps_groups_of_classes_as_plain_sgd_does():
    found = []
    for fused in (False, True):
        made, stream = container(), torch.Generator().manual_seed(1)
        optimizer = ContainerOptimizer(made, settings(optimizer="sgd", momentum=0.9), 4, by_class=True)
        for group in optimizer.inner.param_groups:
            group["fused"] = fused
        for classes in ([0], [0, 1], [1]):
            give_gradients(made, stream)
            optimizer.step(torch.tensor(classes))
        found.append(values_of(made))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


def test_the_rows_that_classes_own_come_with_their_moments():
    made, stream = container(), torch.Generator().manual_seed(1)
    optimizer = ContainerOptimizer(made, settings(optimizer="sgd"), 4, by_class=False)
    give_gradients(made, stream)
    optimizer.step()
    rows = list(optimizer.class_rows())
    assert [label for label, _ in rows] == [0, 1, 0, 1]
    assert all(torch.equal(row, made.instances[label]) for label, row in rows[:2])
    assert all(row.any() and not torch.equal(row, made.instances[label]) for label, row in rows[2:])


# Adam on HMN, whose classes own their extractors too

ADAM = config(memory_lr=0.03, weights_lr=0.002, beta1=0.8, beta2=0.95, final_lr_fraction=0.2)


def reference_adam(tensors: list[Tensor], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(tensors, lr=lr, betas=(0.8, 0.95), eps=1e-8)


def peak_lr(name: str) -> float:
    """Memories take one rate, extractors and decoder the other."""
    return 0.03 if name in ("dataset", "class_memory", "instances") else 0.002


def test_accumulating_is_torch_adam_with_a_rate_for_memories_and_one_for_networks():
    made = make_container()
    reference = {name: nn.Parameter(value) for name, value in values_of(made).items()}
    adams = {name: reference_adam([value], peak_lr(name)) for name, value in reference.items()}
    optimizer, stream = ContainerOptimizer(made, ADAM, 6, by_class=False), torch.Generator().manual_seed(1)
    for done in range(6):
        gradients = give_gradients(made, stream)
        optimizer.set_rates(done)
        optimizer.step(torch.arange(CLASSES))
        assert all(parameter.grad is None for parameter in made.parameters())
        for name, value in reference.items():
            adams[name].param_groups[0]["lr"] = lr_at(done, 6, peak_lr(name), 0.2)
            value.grad = gradients[name]
            adams[name].step()
    for name, value in made.named_parameters():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-7)


def test_rates_decay_by_a_cosine_from_their_peak_to_the_final_fraction():
    made = make_container()
    optimizer = ContainerOptimizer(made, ADAM, 10, by_class=False)
    rates = []
    for done in (0, 5, 10):
        give_gradients(made, torch.Generator().manual_seed(0))
        optimizer.set_rates(done)
        optimizer.step(torch.arange(CLASSES))
        rates.append([group["lr"] for group in optimizer.inner.param_groups])
    for tier, index in zip(TIERS, range(5), strict=True):
        peak = 0.03 if tier in MEMORIES else 0.002
        assert [rate[index] for rate in rates] == pytest.approx([peak, 0.6 * peak, 0.2 * peak], rel=1e-12)


def test_each_tier_is_one_group_of_the_optimiser_and_none_is_left_out():
    made = make_container()
    for by_class in (False, True):
        groups = ContainerOptimizer(made, ADAM, 10, by_class=by_class).inner.param_groups
        counts = [sum(member.numel() for member in group["params"]) for group in groups]
        tiers = made.tiers()
        assert tuple(tiers) == TIERS
        assert counts == [sum(p.numel() for p in parameters) for parameters in tiers.values()]
        assert sum(counts) == sum(p.numel() for p in made.parameters())


# The classes that take part in each step: one after another, then groups; class 1 is left out for long.
TURNS = [[0], [1], [2], [0, 2], [0, 2], [2], [0, 1, 2], [1]]


def test_stepping_classes_in_turn_equals_parameters_of_their_own():
    made = make_container()
    start = values_of(made)
    shared = {name: nn.Parameter(value.clone()) for name, value in start.items() if name not in OWNED}
    rows = {(name, c): nn.Parameter(start[name][c].clone()) for name in OWNED for c in range(CLASSES)}
    adams = {key: reference_adam([value], peak_lr(key)) for key, value in shared.items()}
    adams |= {key: reference_adam([value], peak_lr(key[0])) for key, value in rows.items()}
    optimizer, stream = ContainerOptimizer(made, ADAM, 8, by_class=True), torch.Generator().manual_seed(1)
    for done, turn in enumerate(TURNS):
        gradients = give_gradients(made, stream)  # also for classes that do not take part, which must not matter
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
    for name, value in made.named_parameters():
        expected = shared[name] if name in shared else torch.stack([rows[name, c] for c in range(CLASSES)])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)
        assert (value - start[name]).abs().max() > 1e-3


def test_classes_that_do_not_take_part_keep_values_and_moments_bit_for_bit():
    made = make_container()
    optimizer, stream = ContainerOptimizer(made, ADAM, 8, by_class=True), torch.Generator().manual_seed(1)
    for done, turn in enumerate(TURNS):
        before, moments = values_of(made), copy.deepcopy(optimizer.inner.state_dict()["state"])
        give_gradients(made, stream)
        optimizer.set_rates(done)
        optimizer.step(torch.tensor(turn))
        after, later = values_of(made), optimizer.inner.state_dict()["state"]
        for name in OWNED:
            moved = [not torch.equal(before[name][c], after[name][c]) for c in range(CLASSES)]
            assert moved == [c in turn for c in range(CLASSES)]
        for name in before.keys() - set(OWNED):
            assert not torch.equal(before[name], after[name])
        changed = [key for key in later if key not in moments or later[key]["step"] != moments[key]["step"]]
        assert len(changed) == len(turn) * len(OWNED) + len(before.keys() - set(OWNED))
        for key in moments.keys() - set(changed):
            assert_same(later[key], moments[key])


def test_sgd_stays_fused_where_a_state_from_the_host_is_loaded():
    one, two = (ContainerOptimizer(container(), settings(optimizer="sgd"), 4, by_class=False) for _ in range(2))
    for group in two.inner.param_groups:
        group["fused"] = True
    two.load_state_dict(one.state_dict())
    assert all(group["fused"] for group in two.inner.param_groups)
    assert not any(group["fused"] for group in two.state_dict()["param_groups"])
