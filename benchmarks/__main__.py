"""Run all benchmarks for this kind of machine into one table: ``make bench``, or ``python -m benchmarks``.

Parts run one after another, each in its own process; they share a compile cache that starts empty. The result goes to
``benchmarks/results/cpu.json`` and ``cpu.md``, or ``gpu.*`` where there is a GPU. Options are passed on to all parts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import chunks, condensation, evaluation, matching, memory, outer_step, reports, settings
from hmn.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "matching": [],
    "outer_step": [],
    "evaluation": [],
    "condensation": [],
    "memory": ["--parts", "hmn"],
    "chunks": [],
}


def planned(kind: str, options: argparse.Namespace) -> list[str]:
    """The names of all rows for a ``kind`` of device."""
    found = []
    for module in (matching, outer_step, evaluation):
        found += [f"{module.PART}: {form.name}" for form in module.planned(kind, options)]
    for form in condensation.planned(kind, options):
        found += [f"{condensation.PART}: {name}" for name in condensation.names(form)]
    found += [f"memory: {name}" for name in memory.planned(kind, options)]
    return found + [f"{chunks.PART}: {chunks.name(case, limit)}" for case, limit in chunks.jobs(chunks.LIMIT)]


def merge(parts: dict[str, dict[str, Any]], failed: Sequence[str], absent: Sequence[str]) -> dict[str, Any]:
    """Merge the parts' reports: the first header, another part's differing values under its name, and all rows."""
    head: dict[str, Any] = {}
    found: dict[str, Any] = {"schema_version": reports.SCHEMA_VERSION, "header": head, "rows": []}
    for name, report in parts.items():
        for key, value in report["header"].items():
            if key == "command":  # how it was started here, not how to measure it again
                continue
            own = key in ("date", "load_average", "ceilings", "float64_differences")
            if own or head.setdefault(key, value) != value:
                head[f"{name} {key}"] = value
        found["rows"] += report["rows"]
    found["not_measured"] = [f"{name}: failed, see its message" for name in failed] + list(absent)
    return found


def main() -> int:
    options = settings.parser(__doc__, rounds=0).parse_args()
    arguments = sys.argv[1:]
    if options.forms or options.forms_of or options.json:
        raise SystemExit(
            "--forms, --forms-of and --json belong to single parts, as in python -m benchmarks.matching --forms ..."
        )
    kind = settings.kind_of(options)
    parts = {name: own for name, own in PARTS.items() if not options.no_memory or name not in ("memory", "chunks")}
    measured, failed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "compiled"),
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
            reports.COMPILE_CACHE: "empty at the start; a later part finds what an earlier one compiled",
        }
        for number, (name, own) in enumerate(parts.items(), start=1):
            print(f"[{number}/{len(parts)}] {name}", file=sys.stderr, flush=True)
            kept = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", *own, *arguments, "--json", str(kept)]
            if subprocess.run(command, stdout=subprocess.DEVNULL, check=False, env=os.environ | cache).returncode:
                failed.append(name)
            else:
                measured[name] = json.loads(kept.read_text(encoding="utf-8"))
    if not measured:
        raise SystemExit("every part has failed: see their messages; earlier results are kept")
    absent = (
        [] if kind == "cuda" or torch.cuda.is_available() else [f"GPU, {name}" for name in planned("cuda", options)]
    )
    found = merge(measured, failed, absent)
    found["header"]["command"] = reports.command()
    written = RESULTS / ("gpu" if kind == "cuda" else "cpu")
    write_json(written.with_suffix(".json"), found)
    write_text(written.with_suffix(".md"), reports.text(found))
    print(reports.text(found))
    print(f"written: {written}.json, {written}.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
