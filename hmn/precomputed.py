"""What networks on real images gave, once for all runs: files that must be whole and of the images at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hmn.errors import ArtifactError


def check_images(paths: Sequence[Path], fingerprint: str) -> None:
    """Raise ``ArtifactError`` for a path whose file was cut short, or made on other images than ``fingerprint``."""
    for path in paths:
        try:
            with safe_open(path, "pt") as kept:
                found = (kept.metadata() or {}).get("data")
        except SafetensorError as error:
            raise ArtifactError(f"{path}: cut short or damaged ({error}): remove it, it is then made anew") from None
        if found != fingerprint:
            raise ArtifactError(f"{path}: made on other images; remove {path.parent}, it is then made anew")


def read_part(path: Path, head: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of ``path`` whose names begin with ``head/``, by the rest of the name; no others are read."""
    with safe_open(path, "pt", device=str(device)) as kept:
        names = [name for name in kept.keys() if name.startswith(f"{head}/")]  # noqa: SIM118
        return {name.removeprefix(f"{head}/"): kept.get_tensor(name) for name in names}
