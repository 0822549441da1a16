"""What networks on real images gave, once for all runs: files that must be whole and of the images at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

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
