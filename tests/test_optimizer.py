"""A container's optimiser beyond Adam's defaults: SGD, rates by tier and by budget, and the state that it keeps."""

from __future__ import annotations

import copy

import pytest
import torch

from hmn.config.objectives import GradientMatchingConfig
from hmn.containers import KINDS
from hmn.containers.base import Container
from hmn.containers.linba import LinbaShape
from hmn.optimizer import ContainerOptimizer, idc_rate_factor


def container(seed: int = 0) -> Container:
    """Coefficients (2, 3, 4) and bases (4, 1, 2, 2)."""
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
    [(10, 32, 1.0), (1, 32, 0.1), (50, 32, 5.0), (10, 28, 0.765625), (10, 64, 4.0), (20, 224, 2.0), (1, 112, 1.225)],
)
def test_idcs_factor(images_per_class, side, factor):
    """28 pixels as IDC's Fashion-MNIST, 64 as DREAM's Tiny-ImageNet; from 128 pixels on the base is 224."""
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


def test_the_rows_that_classes_own_come_with_their_moments():
    made, stream = container(), torch.Generator().manual_seed(1)
    optimizer = ContainerOptimizer(made, settings(optimizer="sgd"), 4, by_class=False)
    give_gradients(made, stream)
    optimizer.step()
    rows = list(optimizer.class_rows())
    assert [label for label, _ in rows] == [0, 1, 0, 1]
    assert all(torch.equal(row, made.instances[label]) for label, row in rows[:2])
    assert all(row.any() and not torch.equal(row, made.instances[label]) for label, row in rows[2:])
