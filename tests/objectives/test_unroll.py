"""A student's training and its hand-written backward pass, against autograd through the whole training."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from hmn.compute import Compute
from hmn.data import augment
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.unroll import Unrolled, copies, inner, trajectory_loss

CPU = Compute(torch.device("cpu"))
SGD = [(0.0, 0.0), (0.9, 0.0), (0.9, 0.9)]  # momentum and dampening: MTT, LinBa, SPEED
IMAGES, BATCH = 6, 4
LR = 0.3  # large enough that a missing term shows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student(dtype: torch.dtype = torch.float64) -> nn.Module:
    return initialise(ConvNet(1, 3, 4, width=3, depth=1), generator()).to(dtype)


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


class Problem:
    """Images (6, 1, 4, 4) and batches of four of them, so that steps share images."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        stream = generator(1)
        self.network = student(dtype)
        self.start = parameters_of(self.network)
        self.pixels = torch.randn(IMAGES, 1, 4, 4, generator=stream, dtype=torch.float64).to(dtype).requires_grad_()
        self.labels = torch.tensor([0, 0, 1, 1, 2, 2])
        self.index = [torch.randint(IMAGES, (BATCH,), generator=stream) for _ in range(5)]
        self.draws = [augment.draw("flip_crop_scale", BATCH, 4, stream) for _ in range(5)]
        self.outer = (torch.randn(7, 1, 4, 4, generator=stream).to(dtype), torch.randint(3, (7,), generator=stream))
        self.lr = torch.tensor(LR, dtype=dtype)

    def batch(self, t: int) -> tuple[Tensor, Tensor]:
        return augment.apply(self.pixels[self.index[t]], self.draws[t]), self.labels[self.index[t]]

    def cross_entropy(self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.network, parameters, (images,)), labels)


def trained_by_autograd(problem: Problem, steps: int, momentum: float, dampening: float, lr: Tensor):
    """theta_T with the graph of all steps, as torch's SGD computes it except for the first velocity."""
    theta = {name: value.clone().requires_grad_() for name, value in problem.start.items()}
    v = {name: torch.zeros_like(value) for name, value in theta.items()}
    for t in range(steps):
        loss = problem.cross_entropy(theta, *problem.batch(t))
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        for name, gradient in zip(theta, gradients, strict=True):
            v[name] = momentum * v[name] + (1 - dampening) * gradient
        theta = {name: theta[name] - lr * v[name] for name in theta}
    return theta


def by_autograd(problem: Problem, steps: int, momentum: float, dampening: float):
    """theta_T and the outer loss's gradients with respect to the pixels and to the learning rate."""
    lr = problem.lr.clone().requires_grad_()
    end = trained_by_autograd(problem, steps, momentum, dampening, lr)
    outer = problem.cross_entropy(end, *problem.outer)
    return end, *torch.autograd.grad(outer, [problem.pixels, lr])


def by_hand(problem: Problem, steps: int, momentum: float, dampening: float, segment: int = 1):
    unrolled = Unrolled(problem.network, CPU, momentum=momentum, dampening=dampening, segment=segment)
    trail = unrolled.train(problem.start, problem.batch, steps, problem.lr)
    _, gradient = unrolled.loss_and_gradient(trail.end, *problem.outer)
    problem.pixels.grad = None
    by_lr = unrolled.backward(trail, gradient, problem.batch, problem.lr)
    return trail.end, problem.pixels.grad, by_lr


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("momentum", "dampening"), SGD)
def test_the_way_back_is_autograd_s_through_the_whole_training(momentum: float, dampening: float, steps: int):
    problem = Problem()
    end, pixels, by_lr = by_hand(problem, steps, momentum, dampening)
    expected_end, expected_pixels, expected_by_lr = by_autograd(problem, steps, momentum, dampening)
    for name, value in expected_end.items():
        torch.testing.assert_close(end[name], value.detach(), rtol=0, atol=1e-12)
    assert expected_pixels.norm() > 1e-3  # otherwise a tolerance of 1e-9 says little
    torch.testing.assert_close(pixels, expected_pixels, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_lr, expected_by_lr, rtol=1e-9, atol=1e-9)


def test_in_float32_two_steps_agree_to_1e_5():
    problem = Problem(torch.float32)
    _, pixels, by_lr = by_hand(problem, 2, 0.9, 0.0)
    _, expected_pixels, expected_by_lr = by_autograd(problem, 2, 0.9, 0.0)
    torch.testing.assert_close(pixels, expected_pixels, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_lr, expected_by_lr, rtol=1e-5, atol=1e-5)


@given(steps=st.integers(1, 5), segment=st.integers(1, 7), sgd=st.sampled_from(SGD))
@settings(max_examples=15)
def test_keeping_fewer_steps_changes_nothing(steps: int, segment: int, sgd: tuple[float, float]):
    whole, parts = by_hand(Problem(), steps, *sgd), by_hand(Problem(), steps, *sgd, segment)
    for name, value in whole[0].items():
        assert torch.equal(parts[0][name], value)
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(parts[2], whole[2])


def test_a_segment_keeps_one_state_of_its_steps():
    problem = Problem()
    kept = {}
    for segment in (1, 2, 5):
        unrolled = Unrolled(problem.network, CPU, segment=segment)
        kept[segment] = sorted(unrolled.train(problem.start, problem.batch, 5, problem.lr).kept)
    assert kept == {1: [0, 1, 2, 3, 4], 2: [0, 2, 4], 5: [0]}


@pytest.mark.parametrize("segment", [1, 2, 3, 5, 7])
def test_what_a_student_keeps_of_its_steps_is_counted(segment: int):
    """Copies kept before the backward pass, plus those within one segment during it."""
    problem = Problem()
    unrolled = Unrolled(problem.network, CPU, momentum=0.9, segment=segment)
    trail = unrolled.train(problem.start, problem.batch, 5, problem.lr)
    kept = sum(1 if v is None else 2 for _, v in trail.kept.values())
    within = unrolled._thetas(trail, 0, problem.batch, problem.lr)
    assert copies(5, segment) == kept + len(within)


def test_a_student_that_does_not_move_still_says_where_its_rate_should_go():
    """|theta_N - target|^2 / |start - target|^2 is 1 at alpha = 0, and its derivative follows from -alpha sum v."""
    problem = Problem()
    problem.lr = torch.zeros((), dtype=torch.float64)
    target = {name: value + 0.1 for name, value in problem.start.items()}
    unrolled = Unrolled(problem.network, CPU)
    trail = unrolled.train(problem.start, problem.batch, 3, problem.lr)
    loss, gradient = trajectory_loss(trail.end, problem.start, target)
    by_lr = unrolled.backward(trail, gradient, problem.batch, problem.lr)
    assert loss == 1
    assert not problem.pixels.grad.any()
    lr = problem.lr.clone().requires_grad_()
    expected = trajectory_loss(trained_by_autograd(problem, 3, 0.0, 0.0, lr), problem.start, target)[0]
    torch.testing.assert_close(by_lr, torch.autograd.grad(expected, lr)[0], rtol=1e-9, atol=0)


def test_the_given_parameters_stay_as_they_are():
    problem = Problem()
    before = {name: value.clone() for name, value in problem.start.items()}
    by_hand(problem, 3, 0.9, 0.0)
    for name, value in before.items():
        assert torch.equal(problem.start[name], value)


def test_the_trajectory_loss_by_hand():
    start, target = (
        {"a": torch.tensor([0.0, 0.0]), "b": torch.zeros(1)},
        {
            "a": torch.tensor([3.0, 0.0]),
            "b": torch.tensor([4.0]),
        },
    )
    end = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}
    loss, gradient = trajectory_loss(end, start, target)
    torch.testing.assert_close(loss, torch.tensor((1 + 4) / 25))
    torch.testing.assert_close(gradient["a"], torch.tensor([0.0, 2 / 25]))
    torch.testing.assert_close(gradient["b"], torch.tensor([-4 / 25]))
    assert trajectory_loss(target, start, target)[0] == 0


def test_the_trajectory_loss_s_gradient_is_autograd_s():
    stream = generator(3)
    end, start, target = ({n: torch.randn(4, 2, generator=stream) for n in "ab"} for _ in range(3))
    leaves = {name: value.requires_grad_() for name, value in end.items()}
    loss, gradient = trajectory_loss(leaves, start, target)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for value, want in zip(gradient.values(), expected, strict=True):
        torch.testing.assert_close(value, want)


def test_the_inner_product_is_over_all_parameters():
    one, other = (
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])},
        {"a": torch.ones(2), "b": torch.ones(1, 1)},
    )
    assert inner(one, other) == 6


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
def test_compiled_steps_are_the_same(monkeypatch):
    problem = Problem(torch.float32)
    _, pixels, by_lr = by_hand(problem, 2, 0.9, 0.9)
    monkeypatch.setattr(f"{__name__}.CPU", Compute(torch.device("cpu"), compiled=True))
    _, found, found_by_lr = by_hand(problem, 2, 0.9, 0.9)
    torch.testing.assert_close(found, pixels, rtol=1e-3, atol=1e-5 * float(pixels.abs().max()))
    torch.testing.assert_close(found_by_lr, by_lr, rtol=1e-4, atol=0)
