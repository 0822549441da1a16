"""``result.json``: what a finished run measured, on what, with which code."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmn.errors import ArtifactError, Damaged
from hmn.files import write_json

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
    write_json(folder / FILE, result)
    return result


def read(folder: Path) -> dict[str, Any] | None:
    """The folder's result, or ``None`` before it is finished.

    Raises ``Damaged`` for a result that was cut short and ``ArtifactError`` for another schema version.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError
    except ValueError:
        raise Damaged(f"{path}: cut short or damaged; remove it, and the same command measures it again") from None
    if result.get("schema_version") != SCHEMA_VERSION:
        version = result.get("schema_version")
        raise ArtifactError(f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; move the run away")
    return result


def held_out_accuracy(result: dict[str, Any]) -> float | None:
    """Accuracy of the kept set on real images that are neither trained nor tested on; a search may select by it.

    ``None`` where ``evaluation.curve_points`` asked for none. The accuracy curve is of the set before pruning.
    """
    pruning, curve = result.get("pruning", {}), result.get("curve", [])
    if "held_out_accuracy" in pruning:
        return pruning["held_out_accuracy"]
    return curve[-1]["held_out_accuracy"] if curve and not pruning.get("cut_per_class") else None


def summary(result: dict[str, Any]) -> dict[str, float | int | str | None]:
    """What W&B shows of a run, under flat names: the numbers by which runs are compared, and where they come from.

    ``None`` stands for those this mode does not have.
    """
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
        "code": code_of(result),
        **{key: result.get(key) for key in ("commit", "device")},
    }


def provenance() -> dict[str, Any]:
    """Commit and dirty flag of the code (null outside a checkout), its digest, package versions, kind of machine."""
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
    """Version of ``package``; ``None`` if unknown, as for a package that was copied without its metadata."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_of(result: Mapping[str, Any]) -> str:
    """Digest of the sources that made a result, or all digests in order, joined by ``+``, if others continued it."""
    return "+".join(result.get("codes") or [result.get("code", "unknown")])


def precision_of(result: Mapping[str, Any]) -> str:
    """Precision in which a result was computed; older results record the requested one, which was the same."""
    return result["precision"] if "precision" in result else result["config"]["compute"]["precision"]


@functools.cache
def code_version() -> str:
    """Twelve hexadecimal digits that identify the sources of a run: the bytes of every module of ``hmn``.

    Unlike a commit, it stays the same when pages, tables or tests change. ``hmn/sweeps`` is left out, because how runs
    are swept does not change them. Settings are not sources either: the run id covers them.
    """
    found = hashlib.sha256()
    for path in sorted((ROOT / "hmn").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        of_editor = "/." in name  # locks and copies of files that are being edited
        if not name.startswith("hmn/sweeps/") and not of_editor:
            found.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Around an installed package, an enclosing checkout is somebody else's: only a commit that holds this file counts.
    return done.stdout.strip() if done.returncode == 0 and (ROOT / ".git").exists() else None
