"""Estimates, made before the first step, of how much a condensing step can process at once in limited memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.compute import GPU_CLASSES, Compute, at_once, evenly
from hmn.config import require
from hmn.config.objectives import ClassMatchingConfig
from hmn.containers.base import Container
from hmn.data import augment
from hmn.objectives.distance import Matched, all_weights, convolution_weights
from hmn.objectives.gradient import loop

ImageBytes = Callable[[nn.Module, tuple[int, int, int]], int]  # (network, (channels, H, W)) -> bytes per image
FLOAT = 4
# Factors from the tables that benchmarks/chunks.py measured: SLACK for what allocators hold beyond the live tensors,
# ALIVE for what a backward pass has alive beside the tensors saved for it (gradients, both sides of an operator).
SLACK = 1.3
ALIVE = 3


def saved_bytes(function: Callable[[], object], owned: list[Tensor]) -> int:
    """Bytes that autograd saves for a backward pass through ``function``, not counting the tensors ``owned``."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in owned}
    alive = []  # an address means nothing once its tensor is freed

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    del result
    return sum(size for address, size in kept.items() if address not in storages)


def decoding_bytes(container: Container, strategy: str) -> tuple[int, int]:
    """Bytes saved from decoding to its backward pass, augmentation included: once for all images, and per image.

    The first number is for what a container computes from its shared parameters before it decodes any image.
    """
    size, device = container.shape.image_size, next(container.parameters()).device

    def kept(images: int) -> int:
        index = torch.arange(images, device=device)
        drawn = augment.draw(strategy, images, size, torch.Generator(device).manual_seed(0))
        return saved_bytes(lambda: augment.apply(container.decode_matched(index), drawn), list(container.parameters()))

    one = kept(1)
    each = kept(2) - one
    return max(0, one - each), each


def matching_bytes(
    network: nn.Module, pixels: tuple[int, int, int], metric: str = "mse", matched: Matched = convolution_weights
) -> int:
    """Bytes saved per synthetic image inside the matching step of its class, by the plain loop: an upper bound."""
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    device = next(iter(parameters.values())).device
    images, labels = torch.randn(2, *pixels, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    form = loop(network, metric, Compute(device), matched)
    targets = form.gradients(parameters, images, labels)
    return saved_bytes(lambda: form.match(parameters, targets, images, labels), list(parameters.values())) // 2


def gradient_bytes(network: nn.Module, pixels: tuple[int, int, int]) -> int:
    """Bytes saved per real image until the real gradient is computed."""
    weights = list(network.parameters())
    images, labels = torch.randn(2, *pixels, device=weights[0].device), torch.zeros(2, dtype=torch.int64)
    return saved_bytes(lambda: F.cross_entropy(network(images), labels.to(images.device)), weights) // 2


def feature_bytes(network: nn.Module, pixels: tuple[int, int, int]) -> int:
    """Bytes saved per synthetic image between its features and their derivative."""
    weights = list(network.parameters())
    images = torch.randn(2, *pixels, device=weights[0].device, requires_grad=True)
    return saved_bytes(lambda: network.features(images), weights) // 2


def classes_per_chunk(
    container: Container,
    network: nn.Module,
    config: ClassMatchingConfig,
    compute: Compute,
    *,
    limit: float | None,
    strategy: str,
    in_step: ImageBytes = matching_bytes,
    of_real: ImageBytes | None = gradient_bytes,
    real_batch: int | None = None,
) -> int:
    """Number of classes that a step decodes and matches at a time; what it computes does not depend on that.

    It is the largest number that stays under ``limit`` GiB. ``in_step`` gives the bytes per synthetic image inside a
    matching step, and ``of_real`` those per real image before it (``None``: none are saved). There are ``real_batch``
    real images, by default the objective's. With a limit of ``None``, it is as many as go into one call, and on a GPU
    up to ``GPU_CLASSES``. Raises ``ConfigError`` with the smallest possible limit if one class does not fit.
    """
    group = config.group(container.classes)
    real_batch = config.real_batch if real_batch is None else real_batch
    if limit is None:
        alone = evenly(group, GPU_CLASSES) if compute.device.type == "cuda" else 1
        return min(max(compute.classes_per_call, alone), group)
    shape = container.shape
    pixels = (shape.channels, shape.image_size, shape.image_size)
    synthetic = config.shown(container.matched_per_class)
    image = FLOAT * math.prod(pixels)
    # For each class in a chunk: its decoding graph, and about four copies of every image on its way to the step.
    once, each = decoding_bytes(container, strategy)
    per_class = ALIVE * synthetic * each + 4 * (real_batch + synthetic) * image
    real = real_batch * of_real(network, pixels) if of_real else 0
    step = max(synthetic * in_step(network, pixels), real)  # the two are not alive at once
    fixed = ALIVE * once + step * min(compute.classes_per_call, group)
    free = limit * 2**30 - compute.current_bytes() - SLACK * fixed
    least = (compute.current_bytes() + SLACK * (fixed + per_class)) / 2**30
    chunk = int(free / (SLACK * per_class))
    lower = "objective.synthetic_batch, objective.real_batch or compute.classes_per_call"
    hint = f"at least {_up(least)}: one class needs that; or lower {lower}"
    require("compute.memory_limit", chunk >= 1, limit, hint)
    return min(chunk, group)


def images_per_chunk(
    container: Container, network: nn.Module, compute: Compute, *, limit: float | None, batch: int, kept: int
) -> int:
    """Number of images decoded at a time for a student to train on; what is computed does not depend on that.

    It is the largest number that stays under ``limit`` GiB beside a student's step on ``batch`` images and ``kept``
    copies of its parameters. With ``None``, it is as many as a machine of this kind can be expected to hold. Raises
    ``ConfigError`` with the smallest possible limit if one image does not fit.
    """
    size = container.shape.image_size
    if limit is None:
        return at_once(1024 if compute.device.type == "cuda" else 128, size)
    pixels = (container.shape.channels, size, size)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    # All images and the gradients of their pixels, beside what the student needs.
    shown = 2 * container.classes * container.matched_per_class * math.prod(pixels)
    step = batch * matching_bytes(network, pixels, "mse", all_weights)
    student = SLACK * (step + FLOAT * (kept * parameters + shown))
    once, each = (SLACK * ALIVE * value for value in decoding_bytes(container, "none"))
    chunk = int((limit * 2**30 - compute.current_bytes() - student - once) / each)
    least = (compute.current_bytes() + student + once + each) / 2**30
    hint = f"at least {_up(least)}; or lower the student's batch, or raise objective.segment"
    require("compute.memory_limit", chunk >= 1, limit, hint)
    return chunk


def _up(gib: float) -> str:
    """``gib`` rounded up to one decimal."""
    return f"{math.ceil(10 * gib) / 10:.1f}"
