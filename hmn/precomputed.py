"""Results of networks on real images, computed once for all runs: files must be whole and of the images at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hmn.errors import ArtifactError


def check_images(paths: Sequence[Path], fingerprint: str) -> None:
    """Raise ``ArtifactError`` for a file that was cut short or made from other images than those of ``fingerprint``."""
    for path in paths:
        try:
            with safe_open(path, "pt") as kept:
                found = (kept.metadata() or {}).get("data")
        except SafetensorError as error:
            raise ArtifactError(f"{path}: cut short or damaged ({error}); remove it to have it made again") from None
        if found != fingerprint:
            raise ArtifactError(f"{path}: made from other images; remove {path.parent} to have it made again")


def read_part(path: Path, head: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of ``path`` whose names begin with ``head/``, keyed by the rest of the name; no others are read."""
    with safe_open(path, "pt", device=str(device)) as kept:
        names = [name for name in kept.keys() if name.startswith(f"{head}/")]  # noqa: SIM118
        return {name.removeprefix(f"{head}/"): kept.get_tensor(name) for name in names}
