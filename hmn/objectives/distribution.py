"""Distribution matching (DM, Zhao & Bilen, WACV 2023): the distance between mean features of real and synthetic images.

The features are the input of a network's classifier. No gradient of weights is needed, so a step costs one backward
pass. IDM (Zhao et al., CVPR 2023) adds the cross entropy of synthetic images on networks that are trained meanwhile.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from hmn.compute import Compute, wide
from hmn.config import require
from hmn.objectives.distance import Parameters
from hmn.objectives.gradient import MatchingStep, over_classes

IMAGES, CE_FACTOR = "images", "ce_factor"


def distribution_step(network: nn.Module, compute: Compute) -> MatchingStep:
    """A step of (parameters, real, synthetic (k, n, ...), labels (k,)) that returns distance and pixel gradients.

    The distance (1,) is summed over the k classes. ``real`` is a tensor of images (k, B, ...) or, with IDM's cross
    entropy, a dict of ``IMAGES`` and ``CE_FACTOR`` (k,), whose value is the same for all classes. ``network`` gives the
    architecture; its own parameters are never read. Raises ``ConfigError`` for the R-operator, which matches gradients.
    """
    require("compute.matching", compute.matching != "r_operator", "r_operator", "loop or compiled for features")
    outputs = _FeaturesAndLogits(network)

    def distance(
        pixels: Tensor, parameters: Parameters, real: Tensor | Parameters, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        images = real[IMAGES] if isinstance(real, dict) else real
        of_real, _ = functional_call(outputs, parameters, (images,))
        of_synthetic, logits = functional_call(outputs, parameters, (pixels,))
        value = (wide(of_real).mean(0) - wide(of_synthetic).mean(0)).square().sum()
        if isinstance(real, dict):
            value = value + real[CE_FACTOR] * F.cross_entropy(wide(logits), label.expand(len(pixels)))
        return value, value

    def one_class(
        parameters: Parameters, real: Tensor | Parameters, synthetic: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        with compute.autocast():
            named = {f"network.{name}": value for name, value in parameters.items()}
            pixel_gradient, value = grad(distance, has_aux=True)(synthetic, named, real, label)
        return value[None], pixel_gradient

    return over_classes(one_class, compute)


class _FeaturesAndLogits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network.features(images)
        return found, self.network.classifier(found)
