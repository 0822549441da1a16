"""Named random streams from one seed, and the deterministic mode."""

from __future__ import annotations

import hashlib
import os

import torch


def derived_seed(seed: int, *names: str | int) -> int:
    """A separate 63-bit seed for every (seed, names), so that no stream changes when another draws more numbers."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of the stream ``names``, for example ``generator(0, "evaluate", 3)``."""
    return torch.Generator(device).manual_seed(derived_seed(seed, *names))


def set_deterministic(enabled: bool) -> None:
    """Pick algorithms whose result does not depend on thread timing; warn about operators that have none (CUDA)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else CUDA's matrix products are nondeterministic
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it: skip the NaN fill
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = not enabled
