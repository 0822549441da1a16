"""Draw a run's learning curve: ``python experiments/curve.py RUN_FOLDER OUTPUT.png`` (needs the extra ``figures``).

The upper plot shows the held-out accuracy while condensing and after pruning, the lower plot the matching loss of every
logged step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hmn import results
from hmn.explain import in_one_line
from hmn.tracking import read_metrics


def draw(folder: Path, output: Path) -> None:
    """Draw the run of ``folder``. Raises ``SystemExit`` with one line if it holds no finished run with a curve."""
    result = results.read(folder)
    if result is None or not result.get("curve"):
        sys.exit(f"{folder}: no finished run with evaluation.curve_points set")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    steps = [point["step"] for point in result["curve"]]
    percents = [100 * point["held_out_accuracy"] for point in result["curve"]]
    over = "over budget, " if result["pruning"]["cut_per_class"] else ""
    above.plot(steps, percents, "o-", label=f"{over}while condensing")
    if result["pruning"]["cut_per_class"] and (pruned := result["pruning"].get("held_out_accuracy")) is not None:
        above.plot(steps[-1], 100 * pruned, "s", label="pruned to the budget")
    above.set_ylabel("held-out accuracy, %")
    above.set_title(f"{result['data']['name']}, {result['network']}: one network a point, short training", fontsize=10)
    above.legend()
    losses = [row for row in read_metrics(folder / "metrics.jsonl") if "condense/loss" in row]
    below.semilogy([row["condense/step"] for row in losses], [row["condense/loss"] for row in losses])
    below.set_ylabel("matching loss, all classes")
    below.set_xlabel("matching step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    print(json.dumps({"steps": steps, "held_out_percent": percents}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.output)


if __name__ == "__main__":
    in_one_line(main)
