"""``result.json``: what a finished run measured, on what, with which code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hmn.checkpoint import write_text
from hmn.errors import ArtifactError, Damaged

SCHEMA_VERSION = 1
FILE = "result.json"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "hydra-core",
    "omegaconf",
    "wandb",
    "safetensors",
    "pillow",
    "scikit-learn",
)


def write(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    result = {"schema_version": SCHEMA_VERSION, **result}
    write_text(folder / FILE, json.dumps(result, indent=2) + "\n")
    return result


def read(folder: Path) -> dict[str, Any] | None:
    """The folder's result, or ``None`` before it is finished.

    Raises ``Damaged`` for one that was cut short and ``ArtifactError`` for another schema version.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError
    except ValueError:
        raise Damaged(f"{path}: cut short or damaged: remove it, and the same command measures it anew") from None
    if result.get("schema_version") != SCHEMA_VERSION:
        version = result.get("schema_version")
        raise ArtifactError(f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}: move the run away")
    return result


def held_out_accuracy(result: dict[str, Any]) -> float | None:
    """Of the kept set, on real images that are neither trained nor tested on: what a search may select by.

    ``None`` where ``evaluation.curve_points`` asked for none. The curve is of the set before it was pruned.
    """
    pruning, curve = result.get("pruning", {}), result.get("curve", [])
    if "held_out_accuracy" in pruning:
        return pruning["held_out_accuracy"]
    return curve[-1]["held_out_accuracy"] if curve and not pruning.get("cut_per_class") else None


def summary(result: dict[str, Any]) -> dict[str, float | int | str | None]:
    """The numbers by which runs are compared, under one flat name each; ``None`` for what this mode has not."""
    accuracy, per_class = result["accuracy"], result["images_per_class"]
    return {
        "accuracy_mean": accuracy["mean"],
        "accuracy_std": accuracy["std"],
        "networks": len(accuracy["by_network"]),
        "held_out_accuracy": held_out_accuracy(result),
        "images_per_class": int(per_class) if per_class.isdecimal() else per_class,
        "wall_seconds": sum(result["wall_seconds"].values()),
        **{key: result.get(key) for key in ("stored_floats", "budget_floats", "condense_steps", "condense_seconds")},
        "peak_bytes": result["peak_bytes"],
    }


def provenance() -> dict[str, Any]:
    """Commit and dirty flag of the code (null outside a checkout), its digest, package versions, the machine's kind."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "code": code_version(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _installed(package: str) -> str | None:
    """Its version; ``None`` where it is not known, as of one that was copied."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_of(result: Mapping[str, Any]) -> str:
    """The sources that made a result; all that had a part in it, in turn, if it was continued under others."""
    return "+".join(result.get("codes") or [result.get("code", "unknown")])


def precision_of(result: Mapping[str, Any]) -> str:
    """In which it was computed; older results tell what was asked for, which was the same."""
    return result["precision"] if "precision" in result else result["config"]["compute"]["precision"]


@functools.cache
def code_version() -> str:
    """Twelve hexadecimal digits that name the sources of a run: unlike a commit, the same if only a text changed.

    How runs are swept, ``hmn/sweeps``, changes none of them. Settings are not sources: the run id is of them.
    """
    found = hashlib.sha256()
    for path in sorted((ROOT / "hmn").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("hmn/sweeps/"):
            found.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's, as far as the system tells, and the instructions that PyTorch uses of it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Installed elsewhere, an enclosing checkout would be somebody else's: only a commit that holds this file counts.
    return done.stdout.strip() if done.returncode == 0 and (ROOT / ".git").exists() else None
