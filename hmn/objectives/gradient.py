"""Gradient matching: the distance between network gradients on real and synthetic images.

DC (Zhao et al., ICLR 2021) and DSA (Zhao & Bilen, ICML 2021) compare the gradients of all weights, IDC (Kim et al.,
ICML 2022) only those of the convolutions.

A matching step returns the distance and its derivative with respect to the synthetic pixels. The container that decoded
those pixels therefore needs first derivatives only, and this module is independent of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from hmn.compute import Compute, wide
from hmn.objectives.distance import Form, Matched, Parameters, convolution_weights, distances, parts
from hmn.objectives.r_operator import r_operator

# (parameters, real side (k, ...), synthetic (k, n, channels, H, W), labels (k,)) -> distance per layer, summed over the
# k classes, and pixel gradients (k, n, channels, H, W). The real side is images, or gradients by parameter name.
MatchingStep = Callable[[Parameters, Tensor | Parameters, Tensor, Tensor], tuple[Tensor, Tensor]]


def loop(
    network: nn.Module, metric: str, compute: Compute, matched: Matched = convolution_weights, share: float = 1.0
) -> Form:
    """Double backward by autograd: the plain form that the faster ones are tested against."""

    def derivatives(parameters: Parameters, images: Tensor, labels: Tensor, *, create_graph: bool) -> Parameters:
        parameters = {name: value.detach() for name, value in parameters.items()}
        weights = {name: value.requires_grad_() for name, value in matched(parameters).items()}
        loss = F.cross_entropy(wide(functional_call(network, parameters, (images,))), labels)
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph)
        return dict(zip(weights, found, strict=True))

    def gradients(parameters: Parameters, images: Tensor, labels: Tensor) -> Parameters:
        with compute.autocast():
            return derivatives(parameters, images, labels, create_graph=False)

    def match(parameters: Parameters, targets: Parameters, synthetic: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with compute.autocast():
            pixels = synthetic.detach().requires_grad_()
            found = [derivatives(parameters, *part, create_graph=True) for part in parts(pixels, labels, share)]
            per_layer = distances(metric, found, targets, share)
            (pixel_gradient,) = torch.autograd.grad(per_layer.sum(), pixels)
        return per_layer.detach(), pixel_gradient

    return Form(gradients, match)


def nested(
    network: nn.Module, metric: str, compute: Compute, matched: Matched = convolution_weights, share: float = 1.0
) -> Form:
    """Nested ``torch.func.grad``: one graph with both derivatives, which a compiler can fuse as a whole."""

    def loss(weights: Parameters, others: Parameters, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(wide(functional_call(network, (weights, others), (images,))), labels)

    def derivatives(parameters: Parameters, images: Tensor, labels: Tensor) -> Parameters:
        weights = matched(parameters)
        others = {name: value for name, value in parameters.items() if name not in weights}
        return grad(loss)(weights, others, images, labels)

    def gradients(parameters: Parameters, images: Tensor, labels: Tensor) -> Parameters:
        with compute.autocast():
            return derivatives(parameters, images, labels)

    def match(parameters: Parameters, targets: Parameters, synthetic: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        def matching(pixels: Tensor) -> tuple[Tensor, Tensor]:
            found = [derivatives(parameters, *part) for part in parts(pixels, labels, share)]
            per_layer = distances(metric, found, targets, share)
            return per_layer.sum(), per_layer

        with compute.autocast():
            pixel_gradient, per_layer = grad(matching, has_aux=True)(synthetic)
        return per_layer, pixel_gradient

    return Form(gradients, match)


FORMS = {"loop": loop, "compiled": nested, "r_operator": r_operator}


def matching_step(
    network: nn.Module, metric: str, compute: Compute, matched: Matched = convolution_weights, share: float = 1.0
) -> MatchingStep:
    """The step on real images (k, B, channels, H, W), in the form and with the classes per call that ``compute`` sets.

    ``network`` gives the architecture; its own parameters are never read. ``share`` is the fraction of a class's images
    in the synthetic batch; below 1, ``mse`` is :func:`hmn.objectives.distance.unbiased`.

    Raises ``ConfigError`` for the R-operator where it has no formula: for other networks, or if more than the
    convolutions are ``matched``.
    """
    form = FORMS[compute.matching](network, metric, compute, matched, share)

    def one_class(parameters: Parameters, real: Tensor, synthetic: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        targets = form.gradients(parameters, real, label.expand(len(real)))
        return form.match(parameters, targets, synthetic, label.expand(len(synthetic)))

    return over_classes(one_class, compute)


def stored_step(network: nn.Module, metric: str, compute: Compute, *, share: float = 1.0) -> MatchingStep:
    """The step towards stored gradients {name: (k, ...)} from :func:`real_gradients`: no pass over real images."""
    form = FORMS[compute.matching](network, metric, compute, share=share)

    def one_class(
        parameters: Parameters, targets: Parameters, synthetic: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        return form.match(parameters, targets, synthetic, label.expand(len(synthetic)))

    return over_classes(one_class, compute)


def real_gradients(network: nn.Module, compute: Compute) -> Callable[[Parameters, Tensor, Tensor], Parameters]:
    """A function of (parameters, images (k, B, ...), labels (k,)) that returns gradients {name: (k, ...)} per class."""
    form = FORMS[compute.matching](network, "mse", compute)  # the gradients do not depend on the metric

    def one_class(parameters: Parameters, real: Tensor, label: Tensor) -> Parameters:
        return form.gradients(parameters, real, label.expand(len(real)))

    call = compute.maybe_compile(one_class)

    def every_class(parameters: Parameters, real: Tensor, labels: Tensor) -> Parameters:
        found = [call(parameters, _class(real, k), labels[k]) for k in range(len(labels))]
        return {name: torch.stack([gradients[name] for gradients in found]) for name in found[0]}

    return every_class


def over_classes(one_class: Callable[..., tuple[Tensor, Tensor]], compute: Compute) -> MatchingStep:
    """``one_class`` for k classes, ``compute.classes_per_call`` at a time, which does not change the numbers."""
    width = compute.classes_per_call
    if width == 1:
        call = compute.maybe_compile(one_class)
    else:
        # All classes share the weights, so forward convolutions stay dense: only weight gradients become per class.
        call = compute.maybe_compile(torch.vmap(one_class, in_dims=(None, 0, 0, 0)))

    def step(
        parameters: Parameters, real: Tensor | Parameters, synthetic: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, pixel_gradients = None, torch.empty_like(synthetic)
        for start in range(0, len(labels), width):
            part = start if width == 1 else slice(start, start + width)
            layers, pixel_gradients[part] = call(parameters, _class(real, part), _class(synthetic, part), labels[part])
            layers = layers if width == 1 else layers.sum(0)
            total = layers if total is None else total + layers
        return total, pixel_gradients

    return step


def _class(values: Tensor | Parameters, part: int | slice) -> Tensor | Parameters:
    if isinstance(values, dict):
        return {name: value[part] for name, value in values.items()}
    return values[part].contiguous(memory_format=torch.channels_last) if isinstance(part, int) else values[part]
