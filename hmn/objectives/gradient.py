"""Gradient matching (IDC, Kim et al., ICML 2022): the distance between network gradients on real and synthetic images.

A matching step returns the distance and its derivative with respect to the synthetic pixels. Whatever made those
pixels needs first derivatives only, and nothing here knows what that was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from hmn.compute import Compute

EPSILON = 1e-6


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

Parameters = dict[str, Tensor]
# (parameters, real images, real labels, synthetic images, synthetic labels) -> distance per layer, pixel gradient
MatchingStep = Callable[[Parameters, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def convolution_weights(parameters: Parameters) -> Parameters:
    """What is matched: the 4-D parameters. Biases, norms (1-D) and the classifier (2-D) do not enter."""
    return {name: value for name, value in parameters.items() if value.ndim == 4}


def matching_loop(network: nn.Module, metric: str, compute: Compute) -> MatchingStep:
    """Autograd twice, one class per call: the plain form that every faster one is tested against."""
    distance = METRICS[metric]

    def gradients(parameters: Parameters, images: Tensor, labels: Tensor, *, create_graph: bool) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(functional_call(network, parameters, (images,)).float(), labels)
        return torch.autograd.grad(loss, list(convolution_weights(parameters).values()), create_graph=create_graph)

    def step(
        parameters: Parameters, real: Tensor, real_labels: Tensor, synthetic: Tensor, synthetic_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        with compute.autocast():
            parameters = {name: value.detach().requires_grad_(value.ndim == 4) for name, value in parameters.items()}
            pixels = synthetic.detach().requires_grad_()
            of_real = gradients(parameters, real, real_labels, create_graph=False)
            of_synthetic = gradients(parameters, pixels, synthetic_labels, create_graph=True)
            distances = torch.stack([distance(s, r) for s, r in zip(of_synthetic, of_real, strict=True)])
            (pixel_gradient,) = torch.autograd.grad(distances.sum(), pixels)
        return distances.detach(), pixel_gradient

    return step


def matching_nested(network: nn.Module, metric: str, compute: Compute) -> MatchingStep:
    """The same step as nested ``torch.func.grad``: one graph with both derivatives, which a compiler can fuse whole."""
    distance = METRICS[metric]

    def loss(weights: Parameters, others: Parameters, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, (weights, others), (images,)).float(), labels)

    def step(
        parameters: Parameters, real: Tensor, real_labels: Tensor, synthetic: Tensor, synthetic_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = convolution_weights(parameters)
        others = {name: value for name, value in parameters.items() if name not in weights}
        with compute.autocast():
            of_real = grad(loss)(weights, others, real, real_labels)

            def matching(pixels: Tensor) -> tuple[Tensor, Tensor]:
                of_synthetic = grad(loss)(weights, others, pixels, synthetic_labels)
                distances = torch.stack([distance(of_synthetic[name], of_real[name]) for name in weights])
                return distances.sum(), distances

            pixel_gradient, distances = grad(matching, has_aux=True)(synthetic)
        return distances, pixel_gradient

    return compute.maybe_compile(step)


def matching_step(network: nn.Module, metric: str, compute: Compute) -> MatchingStep:
    """The fastest form for ``compute``. ``network`` gives the architecture; its own parameters are never read."""
    return (matching_nested if compute.compiled else matching_loop)(network, metric, compute)
