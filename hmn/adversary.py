"""HaBa's adversary (Liu et al., NeurIPS 2022): it recognises a basis in any style, and the styles try to hide it.

A feature extractor learns features that two styles of one basis share. The container is trained to make those features
differ, so that its styles do not all show the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hmn.compute import Compute, wide
from hmn.config.containers import HabaConfig
from hmn.networks.convnet import ConvNet

TEMPERATURE = 0.07

# Indices of images (n,) on the host -> the images (n, channels, H, W) as a network sees them, augmented as one batch
See = Callable[[Tensor], Tensor]


class StyleAdversary:
    """The feature extractor and its optimiser.

    ``views`` (styles, n) holds the indices of each style's images, on the host; every style has the same bases in the
    same order. ``labels`` (n,) are the bases' classes. A step uses at most ``batch`` bases, or all of them if that is
    ``None``.
    """

    def __init__(
        self,
        network: ConvNet,
        views: Tensor,
        labels: Tensor,
        config: HabaConfig,
        *,
        batch: int | None,
        compute: Compute,
        generator: torch.Generator,
    ) -> None:
        self.network, self.views, self.labels, self.config = network, views, labels, config
        self.batch, self.compute, self.generator = batch or views.shape[1], compute, generator
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=config.adversary_lr, momentum=config.adversary_momentum
        )

    def push(self, see: See) -> Tensor:
        """Add the gradient of two styles' feature similarity to the container; return that loss as a device tensor."""
        index, _ = self._pair()
        first, second = self._features(see(index)).chunk(2)
        loss = self.config.club_weight * (F.cosine_similarity(first, second) + 1).mean() / 2
        loss.backward()
        return loss.detach()

    def learn(self, see: See) -> None:
        """Train the extractor for one step on classes, similarity of styles and contrast; the container is fixed."""
        index, labels = self._pair()
        with torch.no_grad():
            images = see(index)
        labels = labels.to(images.device)
        features = self._features(images)
        first, second = features.chunk(2)
        with self.compute.autocast():
            logits = wide(self.network.classifier(features))
        weights = self.config
        loss = weights.class_weight * F.cross_entropy(logits, labels.repeat(2))
        loss = loss + weights.likeli_weight * (1 - F.cosine_similarity(first, second)).mean() / 2
        loss = loss + weights.contrast_weight * supervised_contrast(features, labels.repeat(2))
        self.optimizer.zero_grad()  # clears what push() left there
        loss.backward()
        self.optimizer.step()

    def _features(self, images: Tensor) -> Tensor:
        with self.compute.autocast():
            return wide(self.network.features(images))

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Indices of random bases in one random style, then in another (2 k,), and their labels (k,); on the host."""
        rows = torch.randperm(self.views.shape[1], generator=self.generator)[: self.batch]
        first, second = torch.randperm(len(self.views), generator=self.generator)[:2]
        return torch.cat([self.views[first, rows], self.views[second, rows]]), self.labels[rows]

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def supervised_contrast(features: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2): a scalar, of features (n, f) and labels (n,).

    It is the mean negative log-probability that an image picks one of its own class among all others, by the cosine of
    their features. Every class must have at least two images.
    """
    unit = F.normalize(features)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_probability = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~itself
    return -(log_probability.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
