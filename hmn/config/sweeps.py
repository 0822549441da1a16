"""Schemas of sweeps: on which machines runs are executed, and what happens to a run that fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hmn.config.checks import at_least, one_of, positive, require

FINISH_TIMEOUT = "WANDB_FINISH_TIMEOUT"  # set by a launcher: the seconds that W&B may take at a run's end


@dataclass(kw_only=True)
class LauncherConfig:
    """Where the processes of a sweep's runs are started."""

    name: str = MISSING

    def __post_init__(self) -> None:
        own = type(self).name
        require("launcher.name", self.name == own, self.name, f"{own}: choose another launcher by launcher=NAME")


@dataclass(kw_only=True)
class LocalConfig(LauncherConfig):
    """This machine: a pool of slots that all sweeps share, each of which takes one run at a time."""

    name: str = "local"
    gpus: int | None = None  # number of GPUs to use; null: all that this process sees
    slots_per_gpu: int = 1
    slots: int = 1  # without a GPU
    threads: int | None = None  # CPU threads of each run; null: the machine's, divided among the slots

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("launcher", 0, self, "gpus")
        at_least("launcher", 1, self, "slots_per_gpu", "slots", "threads")


@dataclass(kw_only=True)
class RayConfig(LauncherConfig):
    """A Ray cluster on a shared file system; every run is one task."""

    name: str = "ray"
    address: str | None = None  # HOST:PORT of a cluster's head, or auto; null: RAY_ADDRESS, else one on this machine
    cpus: float = 1.0  # of each run
    gpus: float = 0.0  # of each run; a fraction shares one GPU

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("launcher", self, "cpus")
        at_least("launcher", 0, self, "gpus")


@dataclass(kw_only=True)
class SubmititConfig(LauncherConfig):
    """A SLURM cluster through submitit; every run is one job."""

    name: str = "submitit"
    cluster: str = "slurm"  # local: processes of this machine, to try it out
    timeout_minutes: int = 1440  # a run that is cut off is queued again and resumes
    notice_seconds: int = 120  # notice before the time limit, in which a run saves its state
    at_once: int = 16  # jobs of this sweep that may run at the same time
    cpus: int = 4
    gpus: int = 0
    memory_gb: float = 16.0
    partition: str | None = None
    # More options of sbatch, as submitit names them: account, qos, setup.
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("launcher.cluster", self.cluster, ("slurm", "local"))
        at_least("launcher", 1, self, "timeout_minutes", "at_once", "cpus")
        at_least("launcher", 0, self, "gpus")
        notice, limit = self.notice_seconds, f"below launcher.timeout_minutes={self.timeout_minutes}"
        require("launcher.notice_seconds", 0 < notice < 60 * self.timeout_minutes, notice, limit)
        slurm = self.cluster == "slurm"  # local gives every job the same GPUs and has no queue
        require("launcher.gpus", slurm or not self.gpus, self.gpus, "0 for launcher.cluster=local")
        require("launcher.partition", slurm or not self.partition, self.partition, "null for launcher.cluster=local")
        require("launcher.options", slurm or not self.options, self.options, "empty for launcher.cluster=local")
        positive("launcher", self, "memory_gb")


@dataclass(kw_only=True)
class SweepConfig:
    on_failure: str = "continue"  # continue with the other runs; stop: start no more runs and stop the running ones
    max_retries: int = 1  # of a run ended by a signal or an error; one that cannot be composed is not retried
    # If finished runs were made by other sources: refuse to start, keep them beside the new ones, or repeat them
    other_code: str = "refuse"

    def __post_init__(self) -> None:
        one_of("sweep.on_failure", self.on_failure, ("continue", "stop"))
        one_of("sweep.other_code", self.other_code, ("refuse", "keep", "repeat"))
        at_least("sweep", 0, self, "max_retries")


SCHEMAS = (LocalConfig, RayConfig, SubmititConfig)
