"""Condensing from scratch: a process per formulation, compile time and snapshot bank included.

``python -m benchmarks.condensation [--steps 4] [--json FILE]``

Every compiled formulation runs twice: with an empty compile cache (cold), then with the cache that this leaves behind
(warm). The clock starts once libraries are imported and images are loaded. Runs follow one another, so these are single
measurements. Steps are timed apart from what comes before them, and a job of 20,000 steps is extrapolated unless
``--steps`` runs it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import forms, memory, outer_step, problem, reference, reports, settings, timing
from benchmarks.forms import REFERENCE, Form
from benchmarks.reports import Row
from hmn.config import BankConfig

PART = "condensation"
JOB_STEPS = 20_000
# Real runs share a bank of many networks, which train longer between snapshots. With this one, only steps count.
BANK = BankConfig(networks=1, snapshots=5)


def planned(kind: str, options: argparse.Namespace) -> list[Form]:
    """The forms of the outer step; on a CPU, where a run takes a minute, those that ``auto`` chooses from."""
    every = forms.outer_step(kind, options.classes)
    if kind == "cuda":
        return every
    other = forms.other_convolutions().name
    return [form for form in every if form.matching != "r_operator" and form.name != other]


def names(form: Form) -> list[str]:
    return [f"{form.name}, {cache} cache" for cache in ("cold", "warm")] if form.compiled else [form.name]


def child(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of one formulation's run in this process."""
    (form,) = (form for form in planned(settings.kind_of(options), options) if form.name == options.forms[0])
    at = problem.make(options, device)
    precision = timing.reference_precision(device) if form == REFERENCE else form.precision
    timing.use_precision(precision, device)
    timing.wait(device)
    start = time.perf_counter()
    container = at.container(options.images_per_class)
    bank = BANK if form.stored else BankConfig()
    config = problem.matching_config(options, bank=bank, inner_steps=BANK.snapshots if form.stored else 100)
    if form == REFERENCE:
        run = reference.Condensation(container, at.data, config, at.build, seed=0)
    else:
        run = outer_step.condensation(form, at, config, container, chunk=options.chunk)
    timing.wait(device)
    marks = [time.perf_counter()]
    for step in range(options.steps):
        run.run_step()
        if step == 0 or step + 1 == options.steps:
            timing.wait(device)
            marks.append(time.perf_counter())
    return {
        "preparation_seconds": marks[0] - start,  # nearly all of it the bank, if there is one
        "first_step_seconds": marks[1] - marks[0],
        "steady_seconds": (marks[-1] - marks[1]) / (options.steps - 1),
        "total_seconds": marks[-1] - start,
        "memory": memory.used(device),
    }


def run(form: Form, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    given = ("--child", "--forms", form.name, "--steps", str(options.steps), *settings.shape_arguments(options))
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    started = time.perf_counter()
    found = settings.in_a_process(f"{PART}, {form.name}", "benchmarks.condensation", *given, **caches)
    return found | {"process_seconds": time.perf_counter() - started}


def rows(form: Form, runs: list[dict[str, Any]], plain: dict[str, Any] | None, steps: int) -> list[Row]:
    """A row for every run of ``form``; speed-ups are of the whole run, against ``plain``, the reference's."""
    measured = []
    for name, found in zip(names(form), runs, strict=True):
        row = Row(part=PART, name=name, note=form.note, rounds=1, calls_per_round=steps)
        if plain:  # of the few steps that were run, compiling included
            row.speedup_median = row.speedup_min = row.speedup_max = plain["total_seconds"] / found["total_seconds"]
        row.median_ms = row.min_ms = row.max_ms = 1000 * found["steady_seconds"]
        row.first_call_seconds = found["first_step_seconds"]
        row.peak_bytes, row.reserved_bytes = found.pop("memory")
        row.extra = dict(found)
        if plain and form != REFERENCE:
            row.extra["steady_speedup"] = plain["steady_seconds"] / found["steady_seconds"]
        if not form.stored:  # a bank for so many steps needs other, longer trainings
            job = found["preparation_seconds"] + found["first_step_seconds"] + (JOB_STEPS - 1) * found["steady_seconds"]
            row.extra[f"extrapolated_seconds_of_{JOB_STEPS}_steps"] = job
            if plain and form != REFERENCE:
                row.extra["pays_after_steps"] = break_even(found, plain)
        measured.append(row)
    return measured


def break_even(found: dict[str, Any], plain: dict[str, Any]) -> float | None:
    """The number of steps after which preparing and compiling pay off; ``None`` if they never do."""
    ahead, plain_ahead = (run["preparation_seconds"] + run["first_step_seconds"] for run in (found, plain))
    saved = plain["steady_seconds"] - found["steady_seconds"]
    return max(0.0, ahead - plain_ahead) / saved if saved > 0 else None


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict, list[Row]]:
    head = reports.header(options, device, problem.describe(options))
    head["compile_cache"] = "one for each formulation, empty at its cold run"
    head["steps"] = options.steps
    head["bank"] = f"{BANK.networks} network, {BANK.snapshots} snapshots, in preparation_seconds"
    chosen = settings.chosen(planned(settings.kind_of(options), options), options)
    measured: list[Row] = []
    plain = None
    with timing.progress(None, PART, "run", total=sum(len(names(form)) for form in chosen)) as bar:
        for form in chosen:
            found = []
            with tempfile.TemporaryDirectory() as cache:
                for name in names(form):
                    bar.set_postfix_str(name)
                    found.append(run(form, options, Path(cache)))
                    bar.update()
            plain = found[0] if form == REFERENCE else plain
            measured += rows(form, found, plain, options.steps)
    return head, measured


def main() -> None:
    parser = settings.parser(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, help="outer steps of every run; default: 4 on a CPU, 200 on a GPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = settings.prepare(options)
    options.steps = options.steps or (4 if device.type == "cpu" else 200)
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: must be at least 2, as the first one compiles")
    if options.child:
        print(json.dumps(child(options, device)))
        return
    head, measured = measure(options, device)
    reports.report(options, head, measured)


if __name__ == "__main__":
    main()
