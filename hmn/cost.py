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
    GradientMatchingConfig,
    ObjectiveConfig,
    TrajectoryMatchingConfig,
    UnrolledConfig,
)
from hmn.networks import Builder
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
    """All its classes by the plain loop; the network trains on real images in between."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build()
        form = nested(network, objective.metric, Compute(torch.device("cpu")))
        real = torch.empty(objective.real_batch, *pixels)
        synthetic = torch.empty(min(objective.synthetic_batch, images), *pixels)
        labels = [torch.zeros(len(batch), dtype=torch.int64) for batch in (real, synthetic)]
        parameters = dict(network.named_parameters())
        form.match(parameters, form.gradients(parameters, real, labels[0]), synthetic, labels[1])
    group = min(objective.classes_per_step or classes, classes)
    batches = math.ceil(objective.network_samples / objective.network_batch)
    update = batches * objective.network_batch * training_flops(build, pixels)
    return Step(counter.get_total_flops() * group, update)


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
    again = forward * (objective.segment > 1)  # all but the first step of a segment
    return Step(objective.student_steps * batch * (forward + again + backward), real * forward)


STEPS = {
    GradientMatchingConfig: gradient_matching,
    TrajectoryMatchingConfig: through_student,
    BpttConfig: through_student,
}
