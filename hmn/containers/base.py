"""What condensing, pruning, evaluation and artifacts need of a data container."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Container(Protocol):
    """A differentiable store of C classes with G images each; image i belongs to class i // G.

    Containers are ``nn.Module``s whose parameters are exactly what the budget is charged for. Nothing in them may
    normalise over a batch: an image must not change when another one is dropped.
    """

    classes: int
    images_per_class: int

    def decode(self, index: Tensor) -> Tensor:
        """Images (n, channels, H, W) in [0, 1] of the instances ``index`` (n,), differentiable."""

    def tiers(self) -> Mapping[str, list[nn.Parameter]]:
        """All parameters by tier; a tier is what logs, gradient norms and learning rates go by."""

    def memory_tiers(self) -> frozenset[str]:
        """The tiers that are memories (they take ``memory_lr``); the others are network weights (``weights_lr``)."""

    def class_parameters(self) -> list[nn.Parameter]:
        """The parameters whose first axis is the class: a step for one class must not move another class's rows."""

    def keep(self, index: Tensor) -> None:
        """Keep only the instances ``index``, as many of every class. Raises ``ValueError`` if they are not."""

    def specification(self) -> dict[str, Any]:
        """Plain values from which :func:`hmn.containers.rebuild` makes an empty container of the same shape."""


def storage_floats(container: nn.Module) -> int:
    """The float32 numbers that the budget is charged for: every parameter, networks included."""
    return sum(parameter.numel() for parameter in container.parameters())


def tier_floats(container: Container) -> dict[str, int]:
    return {name: sum(p.numel() for p in parameters) for name, parameters in container.tiers().items()}
