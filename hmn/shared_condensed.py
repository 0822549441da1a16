"""Containers as condensing left them, over budget and not yet pruned, kept for other runs that condense the same.

How much is then pruned from which end, and how networks are trained on the set, does not change what is condensed. Runs
that differ in these settings alone share one condensation, as runs share snapshot banks and experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hmn.config.identity import condensation_identity, digest
from hmn.containers.base import Container
from hmn.errors import ArtifactError
from hmn.files import write_tensors
from hmn.plan import Plan

TENSORS = "container.safetensors"


def identity_of(plan: Plan) -> dict[str, Any]:
    """The settings on which all runs that share the condensation of ``plan`` agree, as plain values."""
    return condensation_identity(plan.config) | {"start": plan.artifact}


def folder_of(plan: Plan, fingerprint: str, code: str, precision: str) -> Path:
    """Folder of the condensation of ``plan`` from the images of ``fingerprint``, by the sources of ``code``.

    ``precision`` is the one it is computed in, which is fp32 where bf16 does not pay.
    """
    identity = identity_of(plan) | {"data": fingerprint, "code": code, "precision": precision}
    return Path(plan.config.paths.cache_dir) / "condensed" / digest(identity)


def offer(folder: Path, container: Container, made: dict[str, Any]) -> None:
    """Keep ``container`` with ``made``, plain values that describe its condensing, unless the folder has one."""
    if not (folder / TENSORS).exists():
        write_tensors(folder / TENSORS, container.state_dict(), {"made": json.dumps(made)})


def load(folder: Path, container: Container) -> dict[str, Any] | None:
    """Bring an empty ``container`` into the form that is kept, fill it and return the ``made`` that was kept with it.

    Returns ``None`` if nothing is kept. Raises ``ArtifactError`` for a file that does not hold such a container.
    """
    path = folder / TENSORS
    if not path.exists():
        return None
    container.finish()  # only its shapes matter: what it holds is replaced
    try:
        with safe_open(path, "pt") as kept:
            made = json.loads(kept.metadata()["made"])
            container.load_state_dict({name: kept.get_tensor(name) for name in kept.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"{path}: not the container of this run ({reason}); remove it to have it made again"
        ) from None
    return made
