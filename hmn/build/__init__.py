"""Initialises a run's container and builds the condensation that its configured objective asks for."""

from __future__ import annotations

from collections.abc import Callable

from hmn.build import matching, student
from hmn.build.starts import fit, how_started, start
from hmn.build.student import experts
from hmn.build.workshop import Workshop
from hmn.condense import Condensation
from hmn.config.objectives import (
    BpttConfig,
    DistributionMatchingConfig,
    GradientMatchingConfig,
    ObjectiveConfig,
    SyntheticGradientConfig,
    TrajectoryMatchingConfig,
)
from hmn.containers.base import Container

__all__ = ["Workshop", "condensation", "experts", "fit", "how_started", "start"]

MAKERS: dict[type[ObjectiveConfig], Callable[[Workshop, Container], Condensation]] = {
    GradientMatchingConfig: matching.gradient_matching,
    TrajectoryMatchingConfig: student.trajectory_matching,
    BpttConfig: student.bptt,
    SyntheticGradientConfig: matching.synthetic_gradient,
    DistributionMatchingConfig: matching.distribution_matching,
}


def condensation(shop: Workshop, container: Container) -> Condensation:
    """The condensation of ``container`` by the configured objective, before its first step."""
    return MAKERS[type(shop.config.objective)](shop, container)
