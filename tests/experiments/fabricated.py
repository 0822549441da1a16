"""Fabricated folders, as runs and sweeps leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hmn import results

PROVENANCE = {
    "code": "0123456789ab",
    "commit": "c0ffee" * 6 + "c0ff",
    "dirty": False,
    "python": "3.11.0",
    "packages": {"torch": "2.13.0"},
    "platform": "Linux x86_64",
}


def result(run_id: str, accuracies: Sequence[float], **changes: Any) -> dict[str, Any]:
    """A result with one network per entry of ``accuracies``, which are fractions in [0, 1]."""
    made = {
        "run_id": run_id,
        "mode": "run",
        "accuracy": {
            "mean": float(np.mean(accuracies)),
            "std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
            "best_mean": float(np.mean(accuracies)),
            "by_network": [[value] for value in accuracies],
            "test_epochs": [10],
            "seeds": list(range(len(accuracies))),
        },
        "images_per_class": "36",
        "stored_floats": 6269,
        "budget_floats": 6400,
        "tier_floats": {"instances": 5000, "decoder": 1269},
        "pruning": {"over_budget": 0.2, "cut_per_class": 10, "score": "logit_margin", "beta": 0.3},
        "curve": [],
        "condense_seconds": 60.0,
        "data": {"name": "digits", "fingerprint": "f" * 64, "notes": []},
        "network": "ConvNet-D2-W8",
        "profile": "hmn_cosine",
        "device": "cpu, 1 threads",
        "precision": "fp32",
        "compiled": False,
        "winograd": False,
        "wall_seconds": {"condense": 60.0, "evaluate": 30.0},
        "peak_bytes": 2**30,
        "config": {"mode": "run", "seed": 0, "memory": {"images_per_class": 10}, "container": {"name": "hmn"}},
    }
    return {**made, **PROVENANCE, **changes}


def write_run(folder: Path, run_result: Mapping[str, Any], *, losses: int = 0, pictures: bool = False) -> Path:
    """Write a finished run with ``losses`` condensing steps and, if there are any, a curve and a histogram."""
    folder.mkdir(parents=True, exist_ok=True)
    results.write(folder, dict(run_result))
    records: list[dict[str, Any]] = [
        {"condense/step": step, "condense/loss": 100.0 / step} for step in range(1, losses + 1)
    ]
    if losses:
        records += [
            {"curve/step": step, "curve/held_out_accuracy": share}
            for step, share in ((0, 0.25), (losses // 2, 0.5), (losses, 0.75))
        ]
        records.append({"prune/step": 0, "curve/pruned_accuracy": 0.625})
        aum = {"counts": [1, 0, 3], "edges": [-1.0, 0.0, 1.0, 2.0], "nonfinite": 0}
        records.append({"prune/step": 0, "prune/aum": aum})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if pictures:
        for number, name in enumerate(("over_budget.png", "condensed.png")):
            noise(64, number).save(folder / name)
    return folder


def noise(side: int, seed: int = 0) -> Image.Image:
    """An image of noise, which compresses worst."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_failure(folder: Path, error: str, command: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure.json").write_text(json.dumps({"error": error, "command": command, "exit_code": 1}))
    return folder


def write_sweep(runs: Path, cells: Sequence[Mapping[str, Any]], *, title: str = "A sweep") -> Path:
    """Write a sweep of ``cells`` (name, labels and run_id of each), whose runs were once in another place."""
    folder = runs / "sweeps" / "main-01234567"
    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        {"overrides": [f"seed={number}"], "folder": cell["run_id"] and f"elsewhere/{cell['run_id']}", **cell}
        for number, cell in enumerate(cells)
    ]
    made = {"schema_version": 1, "name": folder.name, "title": title, "command": "python sweep.py experiment=main"}
    (folder / "sweep.json").write_text(json.dumps({**made, "cells": cells}))
    return folder
