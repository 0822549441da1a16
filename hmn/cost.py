"""FLOPs of the parts of a run, counted on tensors without storage; one multiply-add counts as 2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hmn.compute import Compute
from hmn.config.objectives import (
    BpttConfig,
    DistributionMatchingConfig,
    GradientMatchingConfig,
    ObjectiveConfig,
    SyntheticGradientConfig,
    TrajectoryMatchingConfig,
    UnrolledConfig,
)
from hmn.networks import Builder
from hmn.objectives.distance import Matched, all_weights, convolution_weights
from hmn.objectives.gradient import nested
from hmn.objectives.unroll import Unrolled


@dataclass(frozen=True)
class Step:
    """FLOPs of one container step without decoding: of the comparison itself, and of the network training for it."""

    matching: int
    update: int


def training_flops(build: Builder, pixels: tuple[int, int, int]) -> int:
    """FLOPs of the forward and backward pass of one training image of shape ``pixels``: (channels, H, W)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build()
        loss = F.cross_entropy(network(torch.empty(2, *pixels)), torch.zeros(2, dtype=torch.int64))
        torch.autograd.grad(loss, list(network.parameters()))
    return counter.get_total_flops() // 2


def step_flops(
    objective: ObjectiveConfig, build: Builder, pixels: tuple[int, int, int], *, classes: int, images_per_class: int
) -> Step:
    """FLOPs of one step of ``objective`` for a container that shows it ``images_per_class`` images per class."""
    return STEPS[type(objective)](objective, build, pixels, classes, images_per_class)


def gradient_matching(
    objective: GradientMatchingConfig, build: Builder, pixels: tuple[int, int, int], classes: int, images: int
) -> Step:
    """FLOPs of one step: all its classes by the plain loop, and the network's training on real images in between.

    With a bank, only the comparison counts: real gradients and trained networks are made once for many runs.
    """
    real, compared = _gradients_compared(objective, build, pixels, images, convolution_weights)
    if objective.bank.networks:
        return Step(compared * objective.group(classes), 0)
    batches = math.ceil(objective.network_samples / objective.network_batch)
    update = batches * objective.network_batch * training_flops(build, pixels)
    return Step((compared + real) * objective.group(classes), update)


def synthetic_gradient(
    objective: SyntheticGradientConfig, build: Builder, pixels: tuple[int, int, int], classes: int, images: int
) -> Step:
    """As :func:`gradient_matching`, of all weights; the network trains on synthetic images between inner steps."""
    passes = objective.network_epochs * (objective.inner_steps - 1) / objective.inner_steps
    update = int(passes * classes * images * training_flops(build, pixels))
    matching = sum(_gradients_compared(objective, build, pixels, images, all_weights))
    return Step(matching * objective.group(classes), update)


def distribution_matching(
    objective: DistributionMatchingConfig, build: Builder, pixels: tuple[int, int, int], classes: int, images: int
) -> Step:
    """FLOPs of one step: features of real images, features of synthetic ones with their derivative, pool training."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build().requires_grad_(False)
        network.features(torch.empty(objective.real_batch, *pixels))
        synthetic = torch.empty(objective.shown(images), *pixels, requires_grad=True)
        torch.autograd.grad(network.features(synthetic * 1).sum(), synthetic)  # * 1: the counter takes no leaf
    trained = objective.pool_trained * objective.pool_steps * objective.pool_batch if objective.pool_networks else 0
    matching = counter.get_total_flops() * objective.group(classes)
    return Step(matching, trained * training_flops(build, pixels))


def _gradients_compared(
    objective: GradientMatchingConfig | SyntheticGradientConfig,
    build: Builder,
    pixels: tuple[int, int, int],
    images: int,
    matched: Matched,
) -> tuple[int, int]:
    """FLOPs for one class: of the gradient of its real images, and of the comparison with it."""
    real_counter, counter = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.device("meta"):
        network = build()
        form = nested(network, objective.metric, Compute(torch.device("cpu")), matched)
        real = torch.empty(objective.real_batch, *pixels)
        synthetic = torch.empty(objective.shown(images), *pixels)
        labels = [torch.zeros(len(batch), dtype=torch.int64) for batch in (real, synthetic)]
        parameters = dict(network.named_parameters())
        with real_counter:
            gradients = form.gradients(parameters, real, labels[0])
        with counter:
            form.match(parameters, gradients, synthetic, labels[1])
    return real_counter.get_total_flops(), counter.get_total_flops()


def student_flops(network: nn.Module, pixels: tuple[int, int, int]) -> tuple[int, int]:
    """FLOPs per image of a student's training step, and of the backward pass through that step."""
    unrolled = Unrolled(network, Compute(torch.device("cpu")))
    theta, lr = {name: value.detach() for name, value in network.named_parameters()}, torch.tensor(0.0)
    batch = torch.empty(2, *pixels), torch.zeros(2, dtype=torch.int64)
    counts = []
    for call in (
        lambda: unrolled.forward(theta, theta, *batch, lr),
        lambda: unrolled.vjp(theta, theta, theta, *batch, lr),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[1]


def through_student(
    objective: UnrolledConfig, build: Builder, pixels: tuple[int, int, int], classes: int, images: int
) -> Step:
    """FLOPs of a student's training, of the backward pass through it, and of its loss on real images where it has one.

    A container that shows a student only part of its images at a time costs correspondingly less.
    """
    real = 0
    if isinstance(objective, BpttConfig):
        batch, real = classes * min(objective.class_batch, images), classes * objective.real_batch
    else:
        batch = min(objective.student_batch or classes * images, classes * images)
    with torch.device("meta"):
        forward, backward = student_flops(build(), pixels)
    again = forward * (objective.segment - 1) // objective.segment  # repeats all but the last step of a segment
    return Step(objective.student_steps * batch * (forward + again + backward), real * forward)


STEPS = {
    GradientMatchingConfig: gradient_matching,
    TrajectoryMatchingConfig: through_student,
    BpttConfig: through_student,
    SyntheticGradientConfig: synthetic_gradient,
    DistributionMatchingConfig: distribution_matching,
}
