"""Distances between gradients, shared by all implementations of gradient matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6

Parameters = dict[str, Tensor]
Matched = Callable[[Parameters], Parameters]  # selects the parameters whose gradients are compared


class Form(NamedTuple):
    """One way to compute a matching step of one class; all forms give the same numbers.

    ``gradients(parameters, images, labels)`` returns the gradients of the mean cross entropy with respect to the
    matched weights. ``match(parameters, targets, synthetic, labels)`` returns the distance per layer between the
    synthetic images' gradients and ``targets``, and the derivative of their sum with respect to the synthetic pixels.
    """

    gradients: Callable[[Parameters, Tensor, Tensor], Parameters]
    match: Callable[[Parameters, Parameters, Tensor, Tensor], tuple[Tensor, Tensor]]


def squared(synthetic: Tensor, real: Tensor) -> Tensor:
    """``mse``: the summed squared difference of one layer's gradients."""
    return (synthetic - real).square().sum()


def absolute(synthetic: Tensor, real: Tensor) -> Tensor:
    """``l1``: the summed absolute difference of one layer's gradients."""
    return (synthetic - real).abs().sum()


def cosine(synthetic: Tensor, real: Tensor) -> Tensor:
    """``cosine``: one minus the cosine of every output channel's gradient, summed over output channels."""
    synthetic, real = synthetic.flatten(1), real.flatten(1)
    norms = synthetic.norm(dim=1) * real.norm(dim=1)
    return (1 - (synthetic * real).sum(1) / (norms + EPSILON)).sum()


def unbiased(first: Tensor, second: Tensor, real: Tensor, share: float) -> Tensor:
    """Estimate of the squared difference between ``real`` and the mean gradient of all N images of a class, from n.

    The n images are random; ``first`` and ``second`` are the mean gradients of their two halves, ``share`` is n / N.
    If the gradients of single images have variance S^2, the squared difference of the n images' own mean is in
    expectation S^2 (1 / n - 1 / N) too large, an excess that matching would reduce by making the images of a class
    alike. The product of the two halves' differences, drawn without replacement, is in expectation S^2 / N too small.
    Weighted by ``share``, the two biases cancel.
    """
    between = ((first - real) * (second - real)).sum()
    return (1 - share) * between + share * squared((first + second) / 2, real)


METRICS = {"mse": squared, "l1": absolute, "cosine": cosine}


def convolution_weights(parameters: Parameters) -> Parameters:
    """The weights that IDC matches: 4-D parameters, without biases and norms (1-D) and the classifier (2-D)."""
    return {name: value for name, value in parameters.items() if value.ndim == 4}


def all_weights(parameters: Parameters) -> Parameters:
    """The weights that DC and DSA match: convolutions and classifier. Their distance ignores biases and norms (1-D)."""
    return {name: value for name, value in parameters.items() if value.ndim >= 2}


def parts(images: Tensor, labels: Tensor, share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole batch or, if ``share`` is below one, the two halves that :func:`distances` needs."""
    count = 1 if share == 1 else 2
    return zip(images.chunk(count), labels.chunk(count), strict=True)


def distances(metric: str, synthetic: Sequence[Parameters], real: Parameters, share: float = 1.0) -> Tensor:
    """The distance of every matched layer, (layers,); ``synthetic``: mean gradients of each of the :func:`parts`."""
    if share == 1:
        (whole,) = synthetic
        return torch.stack([METRICS[metric](whole[name], real[name]) for name in whole])
    first, second = synthetic
    return torch.stack([unbiased(first[name], second[name], real[name], share) for name in first])
