"""What the makers of condensations take of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.config import Config
from hmn.data.augment import usable
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.networks import Builder
from hmn.optimizer import idc_rate_factor
from hmn.training import TrainingStep


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What condensing needs of a run, the container aside."""

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
    def arithmetic(self) -> dict[str, str]:
        """In which what runs share is computed: machines without bf16 have fp32 instead, and files of their own."""
        return {"precision": self.compute.precision}

    @property
    def strategy(self) -> str:
        strategy = self.config.objective.strategy
        return usable(strategy, self.config.dataset.flip)

    def side_of(self, seed: int) -> dict[str, Any]:
        """What every real side takes."""
        return {"build": self.build, "compute": self.compute, "seed": seed, "flip": self.config.dataset.flip}
