"""The result table that a run prints and logs: what it measured, beside its references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("set", "images/class", "floats", "accuracy %", "best of tests %", "networks")


def row(name: str, result: dict[str, Any]) -> list[str]:
    """One measured set; accuracies as mean ± standard deviation over networks (ddof 1), in percent."""
    accuracy = result["accuracy"]
    return [
        name,
        result["images_per_class"],
        f"{result['stored_floats']:,}",
        percent(accuracy),
        f"{100 * accuracy['best_mean']:.2f}",
        str(len(accuracy["by_network"])),
    ]


def percent(accuracy: Mapping[str, Any]) -> str:
    """``mean`` ± ``std`` in percent, without the latter if there is none."""
    spread = "" if accuracy["std"] is None else f" ± {100 * accuracy['std']:.2f}"
    return f"{100 * accuracy['mean']:.2f}{spread}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table whose columns are padded to their widest cell, the first left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        right = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *right]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
