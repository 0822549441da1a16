"""Compare finished runs: ``python experiments/compare.py RUN_FOLDER... --json OUTPUT.json`` prints a Markdown table.

Runs that differ only in the seed form one row. Its test accuracy is the mean and standard deviation (ddof 1) over seeds
of each run's mean over its networks; its condensing and evaluation times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from hmn import results
from hmn.explain import in_one_line
from hmn.files import write_json
from hmn.tracking import read_metrics

# What separates rows: ways to compute one experiment. Runs of a row that differ in anything else are refused.
WAYS = {
    "precision": results.precision_of,
    "matching": lambda result: result["config"]["compute"]["matching"],
    "bank": lambda result: _bank(result["config"]["objective"].get("bank", {"networks": 0})),
    "steps": lambda result: result["condense_steps"],
    "device": lambda result: result["device"],
}
# Settings in which runs of a row may differ. Images are compared by fingerprint instead of by path.
NOT_COMPARED = ("seed", "compute", "tracking", "paths", "dataset.root", "dataset.download")
FREE = ("container.lr_scale",)  # mappings with the user's own keys, compared as a whole


def _bank(settings: dict[str, int]) -> str:
    networks = settings["networks"]
    return f"{networks} x {settings['snapshots']}" if networks else "none"


def row(folders: list[Path], found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for runs that differ only in their seed, ordered by seed."""
    pairs = sorted(zip(folders, found, strict=True), key=lambda pair: pair[1]["config"]["seed"])
    folders, found = map(list, zip(*pairs, strict=True))
    accuracies = [100 * result["accuracy"]["mean"] for result in found]
    curves = [[100 * point["held_out_accuracy"] for point in result["curve"]] for result in found]
    return {
        **{name: way(found[0]) for name, way in WAYS.items()},
        "seeds": [result["config"]["seed"] for result in found],
        "networks": len(found[0]["accuracy"]["by_network"]),
        "accuracy": [round(value, 2) for value in accuracies],
        "mean": statistics.mean(accuracies),
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "held_out_curve": [round(statistics.mean(values), 2) for values in zip(*curves, strict=True)],
        "curve_seconds": _curve_seconds(folders),
        "condense_seconds": statistics.median(result["condense_seconds"] for result in found),
        "evaluate_seconds": statistics.median(result["wall_seconds"]["evaluate"] for result in found),
        "bank_seconds": max(result["wall_seconds"].get("bank", 0.0) for result in found),
        "compile_seconds": [round(sum(result["compile_seconds"]), 1) for result in found],
        "peak_gib": max(result["peak_bytes"] for result in found) / 2**30,
        "commits": sorted({result["commit"] or "unknown" for result in found}),
        "codes": sorted({results.code_of(result) for result in found}),
    }


def _curve_seconds(folders: list[Path]) -> list[float]:
    """Median condensing seconds at each point of the curve, over the runs that condensed their own set."""
    seconds = [
        [
            record["curve/condense_seconds"]
            for record in read_metrics(folder / "metrics.jsonl")
            if "curve/condense_seconds" in record
        ]
        for folder in folders
    ]
    return [round(statistics.median(values), 1) for values in zip(*filter(None, seconds), strict=True)]


def table(rows: list[dict[str, Any]]) -> str:
    head = [*WAYS, "test accuracy %", "seeds", "condensing s", "bank s", "evaluation s", "peak GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for one in rows:
        spread = "" if one["std"] is None else f" ± {one['std']:.2f}"
        cells = [*(one[name] for name in WAYS), f"{one['mean']:.2f}{spread}", len(one["seeds"])]
        cells += [f"{one[name]:.0f}" for name in ("condense_seconds", "bank_seconds", "evaluate_seconds")]
        lines.append("| " + " | ".join(map(str, [*cells, f"{one['peak_gib']:.2f}"])) + " |")
    return "\n".join(lines)


def _alike(members: list[tuple[Path, dict[str, Any]]]) -> None:
    """Exit unless all runs have the same settings, apart from the seed and the way to compute."""
    first, reference = members[0]
    for folder, result in members:
        if differing := _differing(result, reference):
            sys.exit(f"{folder} and {first}: not seeds of one experiment: they differ in {', '.join(differing)}")


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The settings that differ, not counting those that only one of the two versions of the code has."""
    own, others = ({**_flat(found["config"]), "images": found["data"]["fingerprint"]} for found in (one, other))
    return sorted(key for key in own.keys() & others.keys() if own[key] != others[key])


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        if f"{prefix}{key}" in NOT_COMPARED:
            continue
        nested = isinstance(value, dict) and f"{prefix}{key}" not in FREE
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    arguments = parser.parse_args()
    groups: dict[tuple[Any, ...], list[tuple[Path, dict[str, Any]]]] = {}
    for folder in arguments.folders:
        result = results.read(folder)
        if result is None or "condense_steps" not in result:
            sys.exit(f"{folder}: no finished condensation")
        groups.setdefault(tuple(way(result) for way in WAYS.values()), []).append((folder, result))
    for members in groups.values():
        _alike(members)
    rows = [row(*map(list, zip(*members, strict=True))) for members in groups.values()]
    print(table(rows))
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    in_one_line(main)
