"""The cells of a sweep, and how axes on the command line expand to cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser


@dataclass(frozen=True)
class Cell:
    """A run and its place in a table. Several cells may be the same run."""

    name: str  # unique within the sweep
    labels: dict[str, str]  # by axis
    overrides: tuple[str, ...]  # for run.py
    reads: tuple[str, ...] = ()  # names of the cells whose kept sets it reads, in this order


def grid(overrides: Sequence[str]) -> tuple[Cell, ...]:
    """All combinations of the comma-separated values in ``overrides``, as Hydra expands them."""
    axes = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in OverridesParser.create().parse_overrides(list(overrides))
    ]
    cells = []
    for own in itertools.product(*axes):
        swept = [value for values, value in zip(axes, own, strict=True) if len(values) > 1]
        labels = dict(value.lstrip("+").split("=", 1) for value in swept)
        cells.append(Cell(", ".join(f"{key}={value}" for key, value in labels.items()) or "run", labels, own))
    return tuple(cells)
