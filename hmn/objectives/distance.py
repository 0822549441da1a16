"""The distance between two networks' gradients, which every formulation of gradient matching shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6

Parameters = dict[str, Tensor]
Matched = Callable[[Parameters], Parameters]  # those of a network's parameters whose gradients are compared


class Form(NamedTuple):
    """One way to compute a matching step of one class; all ways give the same numbers.

    ``gradients(parameters, images, labels)`` are those of the mean cross entropy with respect to the matched weights.
    ``match(parameters, targets, synthetic, labels)`` are the distances per layer between the synthetic images'
    gradients and ``targets``, and the derivative of their sum with respect to the synthetic pixels.
    """

    gradients: Callable[[Parameters, Tensor, Tensor], Parameters]
    match: Callable[[Parameters, Parameters, Tensor, Tensor], tuple[Tensor, Tensor]]


def squared(synthetic: Tensor, real: Tensor) -> Tensor:
    """``mse``: summed squared difference of one layer's gradients."""
    return (synthetic - real).square().sum()


def absolute(synthetic: Tensor, real: Tensor) -> Tensor:
    """``l1``: summed absolute difference."""
    return (synthetic - real).abs().sum()


def cosine(synthetic: Tensor, real: Tensor) -> Tensor:
    """``cosine``: one minus the cosine of every output channel's gradient, summed over output channels."""
    synthetic, real = synthetic.flatten(1), real.flatten(1)
    norms = synthetic.norm(dim=1) * real.norm(dim=1)
    return (1 - (synthetic * real).sum(1) / (norms + EPSILON)).sum()


METRICS = {"mse": squared, "l1": absolute, "cosine": cosine}


def convolution_weights(parameters: Parameters) -> Parameters:
    """What IDC matches: the 4-D parameters. Biases, norms (1-D) and the classifier (2-D) do not enter."""
    return {name: value for name, value in parameters.items() if value.ndim == 4}


def all_weights(parameters: Parameters) -> Parameters:
    """What DC and DSA match: convolutions and the classifier. Biases and norms (1-D) count nothing by definition."""
    return {name: value for name, value in parameters.items() if value.ndim >= 2}


def distances(metric: str, synthetic: Parameters, real: Parameters) -> Tensor:
    """The distance of every matched layer, (layers,)."""
    return torch.stack([METRICS[metric](synthetic[name], real[name]) for name in synthetic])
