"""Named random streams from one seed, and the deterministic mode."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed of its own for every (seed, names): streams do not move when another draws more or fewer numbers."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of the stream ``names``, for example ``generator(0, "evaluate", 3)``."""
    return torch.Generator(device).manual_seed(derived_seed(seed, *names))


def set_deterministic(enabled: bool) -> None:
    """Let torch refuse operators whose result depends on thread timing (CUDA), and pick fixed algorithms."""
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = not enabled
