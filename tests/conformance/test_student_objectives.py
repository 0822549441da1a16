"""What every objective that goes through a student's training must satisfy, against autograd through all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hmn.compute import Compute
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.unroll import Unrolled, trajectory_loss

CPU = Compute(torch.device("cpu"))
STEPS, LR = 3, 0.3
Parameters = dict[str, Tensor]


class Setting(NamedTuple):
    """A student's start, images (6, 1, 4, 4) with labels, an expert's end, and real images with labels."""

    network: nn.Module
    start: Parameters
    pixels: Tensor
    labels: Tensor
    target: Parameters
    real: tuple[Tensor, Tensor]


def setting(dtype: torch.dtype, fill: Callable[[Tensor, float], Tensor] | None = None) -> Setting:
    stream = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream, dtype=torch.float64).to(dtype)

    network = initialise(ConvNet(1, 3, 4, width=3, depth=1), stream).to(dtype)
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    target = {name: value + 0.1 * noise(*value.shape) for name, value in start.items()}
    pixels, real = noise(6, 1, 4, 4), noise(5, 1, 4, 4)
    if fill is not None:
        start = {name: fill(value, 0.5) + (value.ndim == 1) for name, value in start.items()}
        target = {name: 0.9 * value for name, value in start.items()}
        pixels, real = fill(pixels, 1.0), fill(real, 2.0)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    return Setting(network, start, pixels.requires_grad_(), labels, target, (real, torch.tensor([0, 1, 2, 0, 1])))


def cross_entropy(at: Setting, parameters: Parameters, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(at.network, parameters, (images,)), labels)


def reach_expert(at: Setting, end: Parameters) -> Tensor:
    """MTT: the squared distance to the expert's end, relative to the squared distance that the expert moved."""
    went = sum(((at.start[name] - at.target[name]) ** 2).sum() for name in end)
    return sum(((end[name] - at.target[name]) ** 2).sum() for name in end) / went


def classify_real(at: Setting, end: Parameters) -> Tensor:
    """LinBa: the cross-entropy on real images."""
    return cross_entropy(at, end, *at.real)


class Objective(NamedTuple):
    judge: Callable[[Setting, Unrolled, Parameters], tuple[Tensor, Parameters]]
    plain: Callable[[Setting, Parameters], Tensor]
    momentum: float
    stored: float  # the loss on ramps


OBJECTIVES = {
    "trajectory_matching": Objective(
        lambda at, unrolled, end: trajectory_loss(end, at.start, at.target), reach_expert, 0.0, stored=8.541090748
    ),
    "bptt": Objective(
        lambda at, unrolled, end: unrolled.loss_and_gradient(end, *at.real), classify_real, 0.9, stored=1.684573034
    ),
}


def by_hand(name: str, at: Setting) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to the pixels."""
    unrolled = Unrolled(at.network, CPU, momentum=OBJECTIVES[name].momentum)
    lr = torch.tensor(LR, dtype=at.pixels.dtype)

    def batch(t: int) -> tuple[Tensor, Tensor]:
        return at.pixels[t : t + 4], at.labels[t : t + 4]

    trail = unrolled.train(at.start, batch, STEPS, lr)
    loss, gradient = OBJECTIVES[name].judge(at, unrolled, trail.end)
    at.pixels.grad = None
    unrolled.backward(trail, gradient, batch, lr)
    return loss, at.pixels.grad


def by_autograd(name: str, at: Setting) -> tuple[Tensor, Tensor]:
    theta = {key: value.clone().requires_grad_() for key, value in at.start.items()}
    velocity = {key: torch.zeros_like(value) for key, value in theta.items()}
    for t in range(STEPS):
        loss = cross_entropy(at, theta, at.pixels[t : t + 4], at.labels[t : t + 4])
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        for key, gradient in zip(theta, gradients, strict=True):
            velocity[key] = OBJECTIVES[name].momentum * velocity[key] + gradient
        theta = {key: theta[key] - LR * velocity[key] for key in theta}
    loss = OBJECTIVES[name].plain(at, theta)
    return loss.detach(), torch.autograd.grad(loss, at.pixels)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_pixel_gradient_are_autograd_s(name, dtype, tolerance):
    expected, expected_gradient = by_autograd(name, setting(dtype))
    loss, gradient = by_hand(name, setting(dtype))
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance * scale)
    assert gradient.abs().amax((1, 2, 3)).min() > 1e-4 * scale  # every image has a gradient


def ramp(like: Tensor, reach: float) -> Tensor:
    """Values from -reach to reach in storage order, scrambled by a fixed stride so that rows differ."""
    n = like.numel()
    return ((torch.arange(n) * 7919 % n).to(like.dtype) / max(n - 1, 1) * 2 - 1).view(like.shape) * reach


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_on_ramps_is_the_stored_one(name):
    loss, _ = by_hand(name, setting(torch.float64, ramp))
    assert float(loss) == pytest.approx(OBJECTIVES[name].stored, rel=1e-7)


def flat(values: Parameters) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def of_a_step(at: Setting, unrolled: Unrolled) -> Tensor:
    """The velocity after a student's first step, which is its gradient."""
    still = {name: torch.zeros_like(value) for name, value in at.start.items()}
    return flat(unrolled.forward(at.start, still, at.pixels.detach(), at.labels, torch.tensor(LR))[1])


def of_the_way_back(at: Setting, unrolled: Unrolled) -> Tensor:
    """The pixel gradient of one step, backpropagated from a gradient at the end of the step."""
    still = {name: torch.zeros_like(value) for name, value in at.start.items()}
    towards = {name: at.target[name] - value for name, value in at.start.items()}
    _, _, by_pixels, _ = unrolled.vjp(at.start, still, towards, at.pixels.detach(), at.labels, torch.tensor(LR))
    return by_pixels.flatten()


def of_the_judgement(at: Setting, unrolled: Unrolled) -> Tensor:
    """The gradient of the cross-entropy on real images."""
    return flat(unrolled.loss_and_gradient(at.start, *at.real)[1])


@pytest.mark.parametrize("gradient", [of_a_step, of_the_way_back, of_the_judgement])
def test_bf16_gives_fp32_that_points_where_fp32_does(gradient):
    at = setting(torch.float32)
    exact = gradient(at, Unrolled(at.network, CPU))
    found = gradient(at, Unrolled(at.network, Compute(CPU.device, precision="bf16")))
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert F.cosine_similarity(found, exact, dim=0) > 0.95


def test_a_student_that_ends_where_its_expert_did_is_at_distance_zero_and_one_that_stayed_at_one():
    at = setting(torch.float64)
    loss, gradient = trajectory_loss(at.target, at.start, at.target)
    assert float(loss) == 0 and not any(value.any() for value in gradient.values())
    assert float(trajectory_loss(at.start, at.start, at.target)[0]) == pytest.approx(1.0)
