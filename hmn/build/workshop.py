"""The parts of a run that condensations are built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.config import Config
from hmn.data.augment import usable
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.network_update import TrainingStep
from hmn.networks import Builder
from hmn.optimizer import idc_rate_factor


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Everything that condensing needs from a run, except the container."""

    config: Config
    data: RealData
    build: Builder
    compute: Compute
    train_step: TrainingStep
    normalise: Normalise
    checkpoints: Checkpoints

    @property
    def rate_factor(self) -> float:
        config = self.config
        if config.objective.lr_scaling == "none":
            return 1.0
        return idc_rate_factor(config.memory.images_per_class, self.data.train.images.shape[-1])

    @property
    def strategy(self) -> str:
        strategy = self.config.objective.strategy
        return usable(strategy, self.config.dataset.flip)

    def side_of(self, seed: int) -> dict[str, Any]:
        """The arguments that every real side takes."""
        return {"build": self.build, "compute": self.compute, "seed": seed, "flip": self.config.dataset.flip}
