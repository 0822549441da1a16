"""The table of a small sweep whose run folders are filled by tests."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

from experiments.filling import Filled
from experiments.tables import csv_text
from hmn import results
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import Planned
from hmn.sweeps.table import Table

COMMAND = "python sweep.py experiment=small"
AXES = {
    "dataset": {"A": [], "B": []},
    "ipc": {"1": [], "10": []},
    "method": {"Ours": [], "Theirs": []},
    "seed": {"0": [], "1": []},
}
HEAD = "table,method,dataset,ipc,network,number,std,unit,source,protocol,note"


def result(accuracies: list[float], **changes: object) -> dict[str, object]:
    """A result as a run writes it, with the ``accuracies`` of its networks."""
    return {
        "mode": "run",
        "accuracy": {"mean": statistics.fmean(accuracies), "std": None, "best_mean": 0.9}
        | {"by_network": [[0.0, value] for value in accuracies]},
        "images_per_class": "78",
        "stored_floats": 30635,
        "curve": [{"step": 0, "held_out_accuracy": 0.1}, {"step": 5, "held_out_accuracy": 0.25}],
        "condense_seconds": 900.0,
        "wall_seconds": {"condense": 1000.0, "evaluate": 800.0},
        "peak_bytes": 3 * 2**29,
        "device": "cpu, 2 threads",
        "precision": "bf16",
        "data": {"name": "cifar10-q75", "fingerprint": "c6c867f81b10" + 52 * "0", "notes": []},
        "config": {"container": {"name": "hmn", "latent_side": 4, "instance_channels": 2}},
        "commit": "0123456789abcdef",
        "dirty": False,
        "code": "feedfacecafe",
        **changes,
    }


class Runs:
    """A sweep over ``axes`` whose run folders are filled by a test."""

    def __init__(self, folder: Path, *, shows: tuple[str, ...] = ("accuracy",), axes: dict = AXES, **changes) -> None:
        self.folder = folder
        layout = {"rows": ("method",), "columns": ("dataset", "ipc"), "over": ("seed",), "reported": "small"} | changes
        made = [{}]
        for axis, labels in axes.items():
            made = [{**one, axis: label} for one in made for label in labels]
        self.table = Table(
            name="small",
            title="A small table",
            reproduces="nothing",
            kind="table",
            expects={},
            shows=shows,
            axes=axes,
            cells=tuple(Cell("/".join(one.values()), one, tuple(f"{k}={v}" for k, v in one.items())) for one in made),
            **layout,
        )
        self.command = COMMAND

    def path(self, name: str) -> Path:
        return self.folder / name.replace("/", "-")

    def plan(self, kept: Path | None = None) -> list[Planned]:
        return [
            Planned(cell, cell.overrides, cell.name.replace("/", "-"), self.path(cell.name))
            for cell in self.table.cells
        ]

    def finish(self, name: str, accuracies: list[float], **changes: object) -> None:
        assert name in {cell.name for cell in self.table.cells}
        results.write(self.path(name), result(accuracies, **changes))


def rows_of(filled: Filled) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(csv_text(filled))))
