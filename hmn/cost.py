"""FLOPs of what a run does, counted on tensors without storage; one multiply-add counts as 2."""

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
    """Of one container step, decoding aside: the comparison itself, and the training of networks that belongs to it."""

    matching: int
    update: int


def training_flops(build: Builder, pixels: tuple[int, int, int]) -> int:
    """Forward and backward pass of one training image (channels, H, W)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build()
        loss = F.cross_entropy(network(torch.empty(2, *pixels)), torch.zeros(2, dtype=torch.int64))
        torch.autograd.grad(loss, list(network.parameters()))
    return counter.get_total_flops() // 2


def step_flops(
    objective: ObjectiveConfig, build: Builder, pixels: tuple[int, int, int], *, classes: int, images_per_class: int
) -> Step:
    """Of one step of ``objective`` for a container that shows it ``images_per_class``."""
    return STEPS[type(objective)](objective, build, pixels, classes, images_per_class)


def gradient_matching(
    objective: GradientMatchingConfig, build: Builder, pixels: tuple[int, int, int], classes: int, images: int
) -> Step:
    """All its classes by the plain loop; the network trains on real images in between.

    A bank has the real gradients and the trained networks already: it is made once for many runs, and not counted.
    """
    batches = math.ceil(objective.network_samples / objective.network_batch)
    update = batches * objective.network_batch * training_flops(build, pixels)
    real, compared = _gradients_compared(objective, build, pixels, images, convolution_weights)
    banked = objective.bank.networks > 0
    return Step((compared + real * (not banked)) * objective.group(classes), update * (not banked))


def synthetic_gradient(
    objective: SyntheticGradientConfig, build: Builder, pixels: tuple[int, int, int], classes: int, images: int
) -> Step:
    """As gradient matching, of all weights; the network trains on the synthetic images, but not after its last step."""
    passes = objective.network_epochs * (objective.inner_steps - 1) / objective.inner_steps
    update = int(passes * classes * images * training_flops(build, pixels))
    matching = sum(_gradients_compared(objective, build, pixels, images, all_weights))
    return Step(matching * objective.group(classes), update)


def distribution_matching(
    objective: DistributionMatchingConfig, build: Builder, pixels: tuple[int, int, int], classes: int, images: int
) -> Step:
    """Features of real images, and of synthetic ones with their derivative; a pool trains in between."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build().requires_grad_(False)
        network.features(torch.empty(objective.real_batch, *pixels))
        synthetic = torch.empty(objective.shown(images), *pixels, requires_grad=True)
        torch.autograd.grad(network.features(synthetic * 1).sum(), synthetic)  # the counter takes no leaf as input
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
    """Of one class: the gradient of the real images, and the comparison with it."""
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
    """Of one image in a student's step, and on the way back through that step."""
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
    """A student's training and the way back, and the judgement of it where that takes real images.

    A container that shows a student a part of its images at a time costs that much less.
    """
    real = 0
    if isinstance(objective, BpttConfig):
        batch, real = classes * min(objective.class_batch, images), classes * objective.real_batch
    else:
        batch = min(objective.student_batch or classes * images, classes * images)
    with torch.device("meta"):
        forward, backward = student_flops(build(), pixels)
    again = forward * (objective.segment - 1) // objective.segment  # all but the first step of a segment
    return Step(objective.student_steps * batch * (forward + again + backward), real * forward)


STEPS = {
    GradientMatchingConfig: gradient_matching,
    TrajectoryMatchingConfig: through_student,
    BpttConfig: through_student,
    SyntheticGradientConfig: synthetic_gradient,
    DistributionMatchingConfig: distribution_matching,
}
