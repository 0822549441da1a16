"""Peak memory of an outer step against classes, images per class and image side, with and without a memory limit.

``python -m benchmarks.chunks [--width 32] [--real 16] [--limit 2] [--json FILE]``

Every row is a process of its own: one plain matching step of HMN with the preset for that data, on noise. With a limit,
classes are decoded in the chunks that ``compute.memory_limit`` chooses; the peak shows whether its estimate holds.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import torch

from benchmarks import memory, problem, reports, settings, timing
from benchmarks.reports import Row
from hmn.chunks import classes_per_chunk
from hmn.compute import Compute
from hmn.config import HmnConfig
from hmn.containers import presets, storage
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape
from hmn.data.datasets import RealData
from hmn.data.splits import Split
from hmn.matching import ClassMatching
from hmn.network_update import training_step
from hmn.networks.convnet import ConvNet, default_depth
from hmn.objectives.gradient import matching_step
from hmn.realside import LiveSide
from hmn.seeding import generator

PART = "memory: chunks"
# (classes, side, synthetic images per class and step): each line grows one of them
CASES = ((10, 32, 16), (10, 32, 64), (100, 32, 16), (100, 32, 64), (200, 64, 16), (10, 128, 8), (10, 224, 4))


LIMIT = 2.0  # GiB


def jobs(limit: float) -> list[tuple[tuple[int, int, int], float | None]]:
    """Every case, without a limit and with it."""
    return [(case, given) for case in CASES for given in (None, limit)]


def name(case: tuple[int, int, int], limit: float | None) -> str:
    classes, side, synthetic = case
    return f"{classes} classes, {side} px, {synthetic} images" + (f", limit {limit:g} GiB" if limit else "")


def noise(classes: int, side: int, per_class: int) -> RealData:
    labels = torch.arange(classes).repeat_interleave(per_class)
    stream = generator(0, "noise")
    train = Split(torch.randint(256, (len(labels), 3, side, side), generator=stream, dtype=torch.uint8), labels)
    return problem.of_noise(train, classes)


def child(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One step of one case; ``options.case`` is (classes, side, synthetic)."""
    classes, side, synthetic = options.case
    data = {"classes": classes, "channels": 3, "image_size": side}
    real = noise(classes, side, options.real).to(device)
    shape = HmnShape.of(presets.fill(HmnConfig(name="hmn"), images_per_class=10, **data), **data)
    container = HierarchicalMemory(shape, storage(shape, 10, 0.0).images_per_class).to(device)
    container.initialise(generator(0, "container", device=device), HmnConfig(name="hmn"), None)
    build = partial(ConvNet, 3, classes, side, width=options.width, depth=default_depth(side))
    config = problem.matching_config(options, network_samples=0, synthetic_batch=synthetic)
    compute = Compute(device)
    network = build().to(device)
    limited = {"limit": options.limit, "strategy": config.strategy}
    chunk = classes_per_chunk(container, network, config, compute, **limited)
    live = LiveSide(
        real, config, build=build, train=training_step(network, compute), compute=compute, seed=0, flip=True
    )
    idle = compute.current_bytes()
    run = ClassMatching(
        container,
        live,
        config,
        match=matching_step(network, config.metric, compute),
        normalise=live.normalise,
        compute=compute,
        seed=0,
        chunk=chunk,
    )
    if device.type == "cuda":  # launched instead of replayed; the first step chooses algorithms
        run.replay = None
        run.run_step()
        timing.wait(device)
    start = time.perf_counter()
    run.run_step()
    timing.wait(device)
    seconds = time.perf_counter() - start
    peak, reserved = memory.used(device)
    return {"chunk": chunk, "idle": idle, "peak": peak, "reserved": reserved, "seconds": seconds}


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict, list[Row]]:
    head = reports.header(options, device, "uniform noise; no real images")
    rows = []
    for case, limit in timing.progress(jobs(options.limit), PART, "case"):
        given = ("--child", "--case", *map(str, case), "--limit", str(limit or "inf"))
        try:
            found = settings.in_a_process(PART, "benchmarks.chunks", *given, *settings.shape_arguments(options))
        except SystemExit as failed:  # such as for want of memory, which is a result
            rows.append(Row(part=PART, name=name(case, limit), note=f"failed: {str(failed).splitlines()[-1]}"))
            continue
        row = Row(part=PART, name=name(case, limit), extra={"classes_per_chunk": found["chunk"]})
        row.note = f"{found['chunk']} classes a chunk"
        row.peak_bytes, row.idle_bytes, row.reserved_bytes = found["peak"], found["idle"], found["reserved"]
        row.median_ms = row.min_ms = row.max_ms = 1000 * found["seconds"]
        row.rounds = 1
        rows.append(row)
    return head, rows


def main() -> None:
    parser = settings.parser(__doc__, rounds=1)
    parser.set_defaults(width=32, real=16)
    parser.add_argument("--limit", type=float, default=LIMIT, help="memory limit of the limited rows, in GiB")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = settings.prepare(options)
    if options.child:
        options.limit = None if options.limit == float("inf") else options.limit
        print(json.dumps(child(options, device)))
        return
    head, rows = measure(options, device)
    reports.report(options, head, rows)


if __name__ == "__main__":
    main()
