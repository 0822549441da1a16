"""FLOPs of what a run does, counted on tensors without storage; one multiply-add counts as 2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hmn.compute import Compute
from hmn.config.objectives import GradientMatchingConfig, ObjectiveConfig
from hmn.networks import Builder
from hmn.objectives.gradient import nested


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


STEPS = {GradientMatchingConfig: gradient_matching}
