"""Peak memory of every form, each in a process of its own.

``python -m benchmarks.memory [--parts matching outer_step evaluation hmn] [--json FILE]``

``hmn`` is the outer step of HMN in the storage of up to 50 images per class, with up to 128 synthetic images per class
and step. On a CPU the peak is that of the resident set, libraries included. On a GPU it is the most that was allocated
at once, beside the allocator's pool.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import problem, reports, settings, timing
from benchmarks.reports import Row
from hmn.compute import Compute

MODULES = {name: f"benchmarks.{name}" for name in ("matching", "outer_step", "evaluation")}
# Images per class. On a CPU, the row of outer_step covers 1.
MEMORY_SIZES = {"cpu": (10, 50), "cuda": (1, 10, 50)}
HMN_SYNTHETIC = 128
CHUNKED = ", decoding a class at a time"  # which a CPU does anyway


def fill(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Add to ``rows`` the peak memory of their forms."""
    if options.no_memory:
        return
    for row in timing.progress(rows, f"{rows[0].part} memory", "form"):
        found = peak(row.part, row.name, settings.shape_arguments(options))
        row.peak_bytes, row.reserved_bytes, row.idle_bytes = (found[key] for key in ("peak", "reserved", "idle"))


def peak(part: str, form: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The bytes that a process needs to compute ``form`` twice."""
    given = ("--child", part, "--forms", form, *arguments)
    return settings.in_a_process(f"{part}, {form}", "benchmarks.memory", *given)


def child(options: argparse.Namespace, device: torch.device) -> dict[str, int | None]:
    part = importlib.import_module(MODULES[options.child])
    (form,) = (form for form in part.planned(settings.kind_of(options), options) if form.name == options.forms[0])
    (variant,) = part.variants([form], problem.make(options, device), options)
    compute = Compute(device)
    compute.begin_peak()  # what making a bank took does not count for the form
    idle = compute.current_bytes()
    for _ in range(2):
        timing.timed(variant, device)
    _, reserved = used(device)
    return {"idle": idle, "peak": compute.recent_peak_bytes(), "reserved": reserved}


def used(device: torch.device) -> tuple[int, int | None]:
    """Peak bytes so far, and the most that a GPU's allocator has reserved."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Compute(device).peak_bytes(), None


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict, list[Row]]:
    head = reports.header(options, device, problem.describe(options))
    jobs: list[tuple[Row, str, list[str]]] = []
    for part in options.parts:
        arguments = settings.shape_arguments(options)
        if part == "hmn":
            jobs += hmn_jobs(options)
            continue
        for form in settings.chosen(
            importlib.import_module(MODULES[part]).planned(settings.kind_of(options), options), options
        ):
            jobs.append((Row(part=f"memory: {part}", name=form.name, note=form.note), part, arguments))
    for row, part, arguments in timing.progress(jobs, "memory", "form"):
        form = row.extra.pop("form", row.name)
        found = peak(part, form, arguments)
        row.peak_bytes, row.reserved_bytes, row.idle_bytes = (found[key] for key in ("peak", "reserved", "idle"))
    return head, [row for row, _, _ in jobs]


def planned(kind: str, options: argparse.Namespace) -> list[str]:
    """The names of the rows that ``hmn`` adds."""
    forms = ("reference", "r_operator bf16", *([f"r_operator bf16{CHUNKED}"] if kind == "cuda" else []))
    return [f"HMN {size} IPC, {form}" for size in MEMORY_SIZES[kind] for form in forms]


def hmn_jobs(options: argparse.Namespace) -> list[tuple[Row, str, list[str]]]:
    jobs = []
    for name in planned(settings.kind_of(options), options):
        size, form = name.removeprefix("HMN ").split(" IPC, ")
        changes = {"images_per_class": int(size), "synthetic": max(HMN_SYNTHETIC, options.synthetic)}
        if form.endswith(CHUNKED):
            changes["chunk"] = 1
        arguments = settings.shape_arguments(argparse.Namespace(**{**vars(options), **changes}))
        row = Row(part="memory: hmn", name=name, extra={"form": form.removesuffix(CHUNKED)})
        jobs.append((row, "outer_step", arguments))
    return jobs


def main() -> None:
    parser = settings.parser(__doc__, rounds=1)
    parser.add_argument("--parts", nargs="+", choices=(*MODULES, "hmn"), default=[*MODULES, "hmn"])
    parser.add_argument("--child", choices=MODULES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = settings.prepare(options)
    if options.child:
        print(json.dumps(child(options, device)))
        return
    head, rows = measure(options, device)
    reports.report(options, head, rows)


if __name__ == "__main__":
    main()
