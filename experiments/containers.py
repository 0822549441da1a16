"""Every container under one loss: ``python -m experiments.containers OUTPUT [KEY=VALUE ...]``.

Runs the cells below one after another through run.py, with the settings of ``experiment=cifar10_q75_containers`` and
KEY=VALUE over them. A finished cell's kept result is read back and an interrupted one goes on, so that the command can
be stopped and given again. Writes OUTPUT/containers.json and OUTPUT/containers.md after every cell, and
OUTPUT/containers.png, a row of images per container (the latter needs the extra ``figures``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmn import artifacts, results
from hmn.checkpoint import write_text

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = "experiment=cifar10_q75_containers"
FIT = ["container.init=fit_real", "container.fit_steps=4000", "container.fit_batch=128"]


def rates(memory: float, weights: float) -> list[str]:
    return [f"objective.memory_lr={memory}", f"objective.weights_lr={weights}"]


# Learning rates by a search of short runs on held-out training images, see OUTPUT's README. What can start from real
# images does, as its authors have it; what starts at random in theirs is fitted to random real images first.
CELLS: dict[str, list[str]] = {
    "random": ["mode=random_subset"],
    "image": ["container=image", *rates(0.1, 0.01)],
    "multiformation": ["container=multiformation", *rates(0.1, 0.01)],
    "haba": ["container=haba", *rates(0.03, 0.03)],
    "linba": ["container=linba", *FIT, *rates(0.01, 0.001)],
    "fred": ["container=fred", *rates(0.1, 0.01)],
    "speed": ["container=speed", *FIT, *rates(0.03, 0.003)],
    "hmn": ["container=hmn", *FIT, *rates(0.03, 0.003)],
}


def run(name: str, overrides: Sequence[str]) -> Path | None:
    """The cell's run folder, or ``None`` where it failed, which it has said itself."""
    command = [sys.executable, str(ROOT / "run.py"), EXPERIMENT, *CELLS[name], *overrides]
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    print(done.stdout, flush=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("run folder: "))
    return Path(line.removeprefix("run folder: "))


def row(name: str, folder: Path) -> dict[str, Any]:
    result = results.read(folder)
    seconds, accuracy = result["wall_seconds"], result["accuracy"]
    return {
        "name": name,
        "overrides": CELLS[name],
        "run_id": result["run_id"],
        "images_per_class": result["images_per_class"],
        "stored_floats": result["stored_floats"],
        "accuracy": {key: accuracy[key] for key in ("mean", "std", "by_network")},
        "held_out_curve": result.get("curve", []),
        "fit_seconds": seconds.get("fit", 0.0),
        "bank_seconds": seconds.get("bank", 0.0),
        "condense_seconds": result.get("condense_seconds", 0.0),
        "evaluate_seconds": seconds["evaluate"],
        "peak_bytes": result["peak_bytes"],
        "network": result["network"],
        "device": result["device"],
        "commit": result["commit"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["container", "images per class", "floats", "test accuracy %", "held out %, start to end"]
    head += ["fit s", "condensing s", "evaluation s", "peak GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for one in rows:
        accuracy, curve = (
            one["accuracy"],
            [f"{100 * point['held_out_accuracy']:.1f}" for point in one["held_out_curve"]],
        )
        cells = [one["name"], one["images_per_class"], f"{one['stored_floats']:,}"]
        cells += [f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f}", " / ".join(curve)]
        cells += [f"{one[key]:.0f}" for key in ("fit_seconds", "condense_seconds", "evaluate_seconds")]
        lines.append("| " + " | ".join([*cells, f"{one['peak_bytes'] / 2**30:.2f}"]) + " |")
    return "\n".join(lines)


def draw(folders: dict[str, Path], output: Path) -> None:
    """The first image of every class, a row for each container; two rows where it holds more than one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = []
    for name, folder in folders.items():
        if not (folder / artifacts.TENSORS).exists():
            continue
        images, labels = artifacts.load_condensed(folder).tensors()
        per_class = len(labels) // len(labels.unique())
        shown += [(name, images[first::per_class]) for first in range(min(2, per_class))]
    columns = len(shown[0][1])
    figure, axes = pyplot.subplots(len(shown), columns, figsize=(columns, len(shown)), layout="constrained")
    for line, (name, images) in zip(axes, shown, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            axis.set_axis_off()
        line[0].set_title(name, fontsize=8, loc="left")
    figure.savefig(output, dpi=64)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the folder to write to")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings over the experiment's, as of run.py"
    )
    given = parser.parse_intermixed_args()
    given.output.mkdir(parents=True, exist_ok=True)
    folders, rows, failed = {}, [], []
    for name in CELLS:
        if (folder := run(name, given.overrides)) is None:
            failed.append(name)
            continue
        folders[name] = folder
        rows.append(row(name, folder))
        write_text(given.output / "containers.json", json.dumps(rows, indent=2) + "\n")
        write_text(given.output / "containers.md", table(rows) + "\n")
    print(table(rows))
    draw(folders, given.output / "containers.png")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    main()
