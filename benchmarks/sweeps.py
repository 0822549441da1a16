"""Measure what sweeping itself costs: ``python -m benchmarks.sweeps [--json FILE] [--rounds N] [--runs N]``.

Times are medians over rounds in seconds, with minimum and maximum, of a run that does nothing, through the launcher and
without it, and of a sweep of made-up finished runs, in threes that differ only in the seed: planned for the first time,
planned again, and tabulated.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hmn import results
from hmn.config.sweeps import LocalConfig
from hmn.files import write_json
from hmn.sweeps.attempt import Task
from hmn.sweeps.cells import Cell, grid
from hmn.sweeps.cli import status_text
from hmn.sweeps.launchers import launch
from hmn.sweeps.planning import by_run, plan_cells

NOTHING = "pass\n"


def seconds(call: Callable[[], object], rounds: int) -> dict[str, float]:
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return {"seconds_median": statistics.median(found), "seconds_min": min(found), "seconds_max": max(found)}


def process(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def launched(program: Path, folder: Path, runs: int) -> Callable[[], object]:
    tasks = [
        Task(f"run-{number}", f"runs/run-{number}", (), str(folder), program=str(program)) for number in range(runs)
    ]
    return lambda: list(launch(tasks, LocalConfig(gpus=0)))


def finished_sweep(runs: int) -> tuple[Cell, ...]:
    """About ``runs`` cells, in threes that differ only in the seed."""
    rates = ",".join(str(round(0.001 * number, 3)) for number in range(1, runs // 3 + 1))
    return grid(["dataset=cifar10", "memory=ipc10", f"objective.memory_lr={rates}", "seed=0,1,2"])


def fabricate(planned: list[Any]) -> None:
    """Write a result of the usual size for each run."""
    for one in by_run(planned).values():
        accuracy = {"mean": 0.5, "std": 0.01, "best_mean": 0.5, "by_network": [[0.5] * 4] * 10}
        curve = [{"step": step, "held_out_accuracy": 0.4} for step in range(0, 20000, 1000)]
        made = {"run_id": one.run_id, "accuracy": accuracy, "curve": curve, "images_per_class": "207"}
        results.write(one.folder, made | {"stored_floats": 306195, **results.provenance()})


def measure(rounds: int, runs: int) -> list[dict[str, Any]]:
    rows = []

    def row(name: str, call: Callable[[], object], per: int = 1, times: int = rounds) -> None:
        found = {key: value / per for key, value in seconds(call, times).items()}
        rows.append({"name": name, "rounds": times, **found})
        print(f"{name}: {found['seconds_median']:.3f} s ({found['seconds_min']:.3f} to {found['seconds_max']:.3f})")

    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # runs are written there
        try:
            nothing = Path(folder) / "nothing.py"
            nothing.write_text(NOTHING)
            row("a process that does nothing", process(str(nothing)))
            row("the same through the launcher, each of ten", launched(nothing, Path(folder), 10), per=10)
            row(
                "python run.py mode=plan: imports, composing, planning",
                process(str(results.ROOT / "run.py"), "mode=plan"),
            )
            cells, cache = finished_sweep(runs), Path("plan.json")
            row(f"{len(cells)} cells planned for the first time", lambda: plan_cells(cells, cache), times=1)
            fabricate(plan_cells(cells, cache))
            row(f"{len(cells)} finished runs planned again", lambda: plan_cells(cells, cache))
            row(f"{len(cells)} finished runs planned and tabulated", lambda: status_text(plan_cells(cells, cache)))
        finally:
            os.chdir(home)
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--runs", type=int, default=1000)
    options.add_argument("--json", type=Path, help="write the rows to this file, too")
    given = options.parse_args()
    rows = measure(given.rounds, given.runs)
    if given.json:
        made = {"command": "python -m benchmarks.sweeps", "cpus": os.cpu_count(), **results.provenance()}
        write_json(given.json, {"header": made, "rows": rows})


if __name__ == "__main__":
    main()
