"""Rows with ratios to the reference, and their report: provenance, tables and JSON."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.settings import SHAPES
from benchmarks.timing import DEFAULT, Times, Variant
from hmn import capture
from hmn.files import write_json
from hmn.machine import cpu_name
from hmn.results import provenance

SCHEMA_VERSION = 1
COMPILE_CACHE = "HMN_BENCHMARK_COMPILE_CACHE"  # the variable in which `make bench` describes the cache of its parts


# Rows


@dataclass(kw_only=True)
class Row:
    """One measured form. Speed-ups are the reference's seconds over this form's in a round; ``None``: no ratio."""

    part: str
    name: str
    speedup_median: float | None = None
    speedup_min: float | None = None
    speedup_max: float | None = None
    peak_bytes: int | None = None  # in a process of its own; on a GPU the most that was allocated at once
    reserved_bytes: int | None = None  # GPU: the allocator's pool, captured graphs included
    idle_bytes: int | None = None  # the process before its first step: libraries, images, parameters
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    rounds: int | None = None
    calls_per_round: int | None = None
    first_call_seconds: float | None = None
    flops: float | None = None  # of the job, per call
    flops_per_second: float | None = None
    ceiling_flops_per_second: float | None = None
    ceiling_share: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def ratios(reference: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios within rounds."""
    values = [theirs / ours for theirs, ours in zip(reference, own, strict=True)]
    return statistics.median(values), min(values), max(values)


def rows(
    part: str,
    variants: Sequence[Variant],
    times: Mapping[str, Times],
    ceilings: Mapping[str, float],
    baseline: str = "reference",
) -> list[Row]:
    """A row for every variant, in order. ``ceilings`` are FLOP/s by precision."""
    measured = []
    for variant in variants:
        own = times[variant.name]
        middle = statistics.median(own.rounds)
        row = Row(part=part, name=variant.name, note=variant.note)
        if baseline in times:
            values = ratios(times[baseline].rounds, own.rounds)
            row.speedup_median, row.speedup_min, row.speedup_max = values
        row.median_ms, row.min_ms, row.max_ms = (1000 * value for value in (middle, min(own.rounds), max(own.rounds)))
        row.rounds, row.calls_per_round, row.first_call_seconds = len(own.rounds), own.calls, own.first
        row.flops, row.flops_per_second = variant.flops, variant.flops / middle
        precision = "tf32" if variant.precision == DEFAULT else variant.precision
        if ceiling := ceilings.get(precision):
            row.ceiling_flops_per_second, row.ceiling_share = ceiling, row.flops_per_second / ceiling
        measured.append(row)
    return measured


# Reports


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores"


def header(options: argparse.Namespace, device: torch.device, images: str) -> dict[str, Any]:
    """What a reader needs to judge the rows and to measure them again."""
    code = provenance()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": code["commit"],
        "dirty": code["dirty"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": code["python"],
        "platform": code["platform"],
        "device": device.type,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # before the start: how busy other work keeps the machine
        "allocator": allocator(options, device),
        "algorithms": "deterministic" if options.deterministic else "the fastest, chosen by trial",
        "network": f"ConvNet-D3-W{options.width}, instance norm",
        "compile_cache": os.environ.get(COMPILE_CACHE, "the user's: first calls may find their code in it"),
        "memory_format": "reference: contiguous (NCHW); ours: channels_last",
        "images": images,
        "shapes": {name: getattr(options, name) for name in SHAPES},
    }


def command() -> str:
    """The command of this process, to be run in the repository."""
    main = sys.modules["__main__"]
    module = main.__spec__.name.removesuffix(".__main__") if main.__spec__ else Path(sys.argv[0]).name
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def allocator(options: argparse.Namespace, device: torch.device) -> str:
    if device.type == "cuda":
        return "CUDA caching allocator, " + (os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default settings")
    return "glibc, heap pages kept, for all forms" if options.heap_kept else "the system's default, for all forms"


def report(
    options: argparse.Namespace, head: Mapping[str, Any], measured: Iterable[Row], not_measured: Iterable[str] = ()
) -> dict[str, Any]:
    """Print the table; write the JSON file if one is asked for."""
    found = _found(head, measured) | {"not_measured": list(not_measured)}
    print(text(found))
    if options.json:
        write_json(options.json, found)
    return found


def finished(options: argparse.Namespace, head: dict[str, Any], measured: Iterable[Row]) -> None:
    """Write the times before the long processes that measure memory, and note in ``head`` what a GPU did not replay."""
    if head["device"] == "cuda":
        reasons = "; ".join(sorted(capture.launched_anew)) or "nothing"
        head["launched_anew"] = "everything: --no-record" if options.no_record else reasons
    if options.json:
        write_json(options.json, _found(head, measured) | {"not_measured": ["peak memory: was being measured"]})


def _found(head: Mapping[str, Any], measured: Iterable[Row]) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "header": dict(head), "rows": [asdict(row) for row in measured]}


COLUMNS = (
    "form",
    "median ms",
    "speed-up (least, greatest)",
    "peak MiB",
    "GFLOP/s",
    "of ceiling",
    "first call s",
    "rounds x calls",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as the table shows it."""

    def shown(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[key] is None else format(row[key] * scale, form)

    spread = "-"
    if row["speedup_median"] is not None:
        spread = f"{row['speedup_median']:.2f} ({row['speedup_min']:.2f}, {row['speedup_max']:.2f})"
    return [
        row["name"],
        shown("median_ms", ".4g"),
        spread,
        shown("peak_bytes", ".0f", 2**-20),
        shown("flops_per_second", ".4g", 1e-9),
        shown("ceiling_share", ".0%"),
        shown("first_call_seconds", ".1f"),
        "-" if row["rounds"] is None else f"{row['rounds']} x {row['calls_per_round']}",
    ]


def text(found: Mapping[str, Any]) -> str:
    """The report as Markdown: what was measured where, then one table per part."""
    head = found["header"]
    lines = [f"- {key.replace('_', ' ')}: {plain(value)}" for key, value in head.items() if value is not None]
    parts = list(dict.fromkeys(row["part"] for row in found["rows"]))
    for part in parts:
        members = [row for row in found["rows"] if row["part"] == part]
        lines += ["", f"## {part}", "", *table(COLUMNS, [cells(row) for row in members]), ""]
        for note in dict.fromkeys(row["note"] for row in members if row["note"]):
            lines.append(f"- {', '.join(row['name'] for row in members if row['note'] == note)}: {note}")
        lines += [f"- {row['name']}: {plain(row['extra'])}" for row in members if row["extra"]]
    if found["not_measured"]:
        lines += ["", "## Not yet measured", "", *(f"- {name}" for name in found["not_measured"])]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with padded columns, so that it is readable in a terminal."""
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]

    def padded(values: Sequence[str]) -> str:
        first, *others = zip(values, widths, strict=True)
        return " | ".join(["| " + first[0].ljust(first[1]), *(v.rjust(w) for v, w in others)]) + " |"

    rule = "|".join(["-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)])
    return [padded(columns), f"|{rule}|", *(padded(line) for line in lines)]


def plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        inner = [
            f"{key.replace('_', ' ')} " + (f"({plain(item)})" if isinstance(item, Mapping) else plain(item))
            for key, item in value.items()
        ]
        return ", ".join(inner)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
