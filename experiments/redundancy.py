"""Draw how redundant condensed sets are: ``python -m experiments.redundancy OUTPUT.png FILE_OR_RUN...``.

The figure shows what ``mode=redundancy`` measured: accuracy without the images of every class that networks find
easiest. Every argument is the folder of such a run, its ``result.json``, or a ``redundancy.json`` of
experiments/redundancy, which an older command wrote. Needs the extra ``figures``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmn import results
from hmn.errors import ArtifactError
from hmn.explain import in_one_line


def read(path: Path) -> dict[str, Any]:
    """``set``, ``rows``, ``data`` and ``network`` of a measurement. Raises ``ArtifactError`` if there is none."""
    file = path / results.FILE if path.is_dir() else path
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{file}: does not exist; give a finished run of mode=redundancy") from None
    except ValueError:
        raise ArtifactError(f"{file}: not JSON; give a finished run of mode=redundancy") from None
    if not isinstance(measured, dict) or "rows" not in measured:
        raise ArtifactError(f"{file}: has no rows; give a finished run of mode=redundancy")
    return measured


def draw(measured: Sequence[dict[str, Any]], output: Path) -> None:
    """Draw a line per measurement. Raises ``ArtifactError`` if data or network are not those of the first."""
    data, network = measured[0]["data"]["name"], measured[0]["network"]
    for one in measured:
        found = (one["data"]["name"], one["network"])
        if found != (data, network):
            raise ArtifactError(
                f"{one['set']}: measured on {', '.join(found)}, not {data}, {network}: draw it separately"
            )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for one in measured:
        shares = [100 * row["dropped"] for row in one["rows"]]
        means = [100 * row["mean"] for row in one["rows"]]
        stds = [100 * (row["std"] or 0.0) for row in one["rows"]]
        label = f"{one['set']}, {one['rows'][0]['images_per_class']} images per class"
        axes.errorbar(shares, means, stds, marker="o", capsize=3, label=label)
    axes.set_xlabel("easiest images dropped from each class, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{data}, {network}: mean ± std over networks", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the picture to write")
    parser.add_argument("measured", type=Path, nargs="+", help="runs of mode=redundancy, or files of their results")
    given = parser.parse_args(arguments)
    draw([read(path) for path in given.measured], given.output)


if __name__ == "__main__":
    in_one_line(main)
