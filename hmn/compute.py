"""Device, precision and compilation: how a run is computed."""

from __future__ import annotations

import ctypes
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hmn.config import ComputeConfig, require


@dataclass(frozen=True)
class Compute:
    device: torch.device
    precision: str = "fp32"
    compiled: bool = False
    networks_together: int | None = None  # null: all on a GPU; one on a CPU, where several gain nothing

    def together(self, networks: int) -> int:
        """How many of ``networks`` that are trained on the same images are trained at once."""
        return min(self.networks_together or (1 if self.device.type == "cpu" else networks), networks)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def maybe_compile(self, function: Callable) -> Callable:
        """``function`` compiled for its fixed input shapes, where this run compiles."""
        return torch.compile(function, fullgraph=True, dynamic=False) if self.compiled else function

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        units = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units


def device_of(config: ComputeConfig) -> torch.device:
    """The configured device, or the best there is. Raises ``ConfigError`` for a GPU that this machine lacks."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        available = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        require("compute.device", available, config.device, "cpu or auto: this machine has no such GPU")
    return device


def choose(config: ComputeConfig, expected_flops: float) -> Compute:
    """Device, precision and whether to compile; ``expected_flops`` of the whole run decide whether compiling pays.

    Raises ``ConfigError`` if a GPU is asked for where there is none, or compiling where no C++ compiler is.
    """
    device = device_of(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    can_compile = device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    if config.matching == "compiled":
        require("compute.matching", can_compile, "compiled", "loop or auto: no C++ compiler was found")
    # Compiling takes about two minutes; eager code does some 2e11 operations a second on two cores, 1e13 on a GPU.
    eager_seconds = expected_flops / (2e11 if device.type == "cpu" else 1e13)
    compiled = config.matching == "compiled" or (config.matching == "auto" and can_compile and eager_seconds > 600)
    return Compute(device, config.precision, compiled, config.networks_together)


def keep_heap_pages() -> bool:
    """Keep freed pages in the process (Linux, glibc): mapping them anew costs more than the arithmetic on them.

    Process-wide, so entry points call it, before the first large allocation. Returns whether it took effect.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8  # malloc.h's names for mallopt
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 << 20), (arena_max, 1))
    return all([libc.mallopt(parameter, value) for parameter, value in settings])
