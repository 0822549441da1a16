"""A whole outer step with HMN: sampling, decoding, augmentation, matching of all classes, Adam, and network update.

``python -m benchmarks.outer_step [--images-per-class 1] [--json FILE]``

Both sides start from the same container and network, but draw their own random numbers. With stored real gradients
there is no network update: the networks were trained when the bank was made, which is not timed here. The share of the
matching part that decoding and its backward pass take is measured, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import forms, memory, problem, reference, reports, settings, timing
from benchmarks.forms import REFERENCE, Form
from benchmarks.problem import Problem, work
from benchmarks.reports import Row
from benchmarks.timing import Times, Variant
from hmn import bank
from hmn.build.matching import kept_on
from hmn.capture import Replay
from hmn.chunks import classes_per_chunk
from hmn.compute import Compute
from hmn.config import BankConfig, GradientMatchingConfig
from hmn.containers.hierarchical import HierarchicalMemory
from hmn.matching import ClassMatching
from hmn.network_update import training_step
from hmn.objectives.gradient import matching_step, real_gradients, stored_step
from hmn.realside import LiveSide
from hmn.stop import Stop

PART = "outer_step"
DECODING = "HMN decoding and its backward pass"
MATCHING_PART = "without network update"


def planned(kind: str, options: argparse.Namespace) -> list[Form]:
    return forms.outer_step(kind, options.classes)


def condensation(
    form: Form,
    at: Problem,
    config: GradientMatchingConfig,
    container: HierarchicalMemory,
    *,
    chunk: int | None,
    bank_compute: Compute | None = None,
) -> ClassMatching:
    """Our run, which decodes ``chunk`` classes at a time; by default, as many as a run without a memory limit.

    The bank of a form that stores real gradients is made here, by ``bank_compute`` if that is given.
    """
    compute = form.compute(at.device)
    network = at.network(channels_last=True)
    shared = {"normalise": at.normalise, "compute": compute, "seed": 0}
    if chunk is None:
        chunk = classes_per_chunk(container, network, config, compute, limit=None, strategy=config.strategy)
    shared["chunk"] = chunk

    def live(compute: Compute, stream: str) -> LiveSide:
        train = training_step(network, compute)
        return LiveSide(at.data, config, build=at.build, train=train, compute=compute, seed=0, flip=True, stream=stream)

    if not form.stored:
        step = matching_step(network, config.metric, compute)
        return ClassMatching(container, live(compute, "condense"), config, match=step, **shared)
    making = bank_compute or compute
    folder = tempfile.TemporaryDirectory()
    paths = bank.build(
        Path(folder.name),
        lambda number: live(making, f"bank/{number}"),
        real_gradients(network, making),
        config,
        classes=at.classes,
        fingerprint=at.data.fingerprint,
        chunk=at.classes,
        stop=Stop(),
    )
    keep = kept_on(at.device)
    side = bank.BankSide(paths, config.bank, config.strategy, at.device, 0, keep_bytes=keep)
    side.folder = folder  # deleted together with the side that reads it
    return ClassMatching(container, side, config, match=stored_step(network, config.metric, compute), **shared)


def variants(chosen: Sequence[Form], at: Problem, options: argparse.Namespace) -> list[Variant]:
    """One whole outer step of each form, each with its own container."""
    config = problem.matching_config(options, bank=BankConfig(networks=1, snapshots=2), inner_steps=100)
    needed = work(at.build)

    def variant(form: Form) -> Variant:
        container = at.container(options.images_per_class)
        synthetic = min(options.synthetic, container.images_per_class)
        flops = needed.matching_step(real=0 if form.stored else options.real, synthetic=synthetic) * at.classes
        if not form.stored:
            batches = math.ceil(config.network_samples / config.network_batch)
            flops += batches * config.network_batch * needed.training
        if form == REFERENCE:
            run = reference.Condensation(container, at.data, config, at.build, seed=0)
            precision = timing.reference_precision(at.device)
            return Variant(form.name, run.run_step, flops, precision)
        # A bank that only serves timing is made by the plain loop, with as few steps as possible.
        quick = dataclasses.replace(config, inner_steps=config.bank.snapshots) if form.stored else config
        run = condensation(form, at, quick, container, chunk=options.chunk, bank_compute=Compute(at.device))
        return Variant(form.name, run.run_step, flops, form.precision, form.note)

    return [variant(form) for form in chosen]


def decoding_variants(form: Form, at: Problem, options: argparse.Namespace) -> list[Variant]:
    """The matching part of ``form``'s outer step, and the decoding in it alone."""
    config = problem.matching_config(options, network_samples=0)
    container = at.container(options.images_per_class)
    run = condensation(form, at, config, container, chunk=options.chunk)
    synthetic = min(options.synthetic, container.images_per_class)
    flops = work(at.build).matching_step(real=options.real, synthetic=synthetic) * at.classes

    alone = at.container(options.images_per_class)
    firsts = torch.arange(at.classes, device=at.device)[:, None] * alone.images_per_class
    index = (firsts + torch.arange(synthetic, device=at.device)).flatten()
    chunks = index.split(run.chunk * synthetic)  # as many classes at a time as the run decodes
    pixel_gradients = [torch.randn_like(alone.decode(chunk)) for chunk in chunks]

    def decode() -> None:
        for chunk, pixel_gradient in zip(chunks, pixel_gradients, strict=True):
            alone.decode(chunk).backward(pixel_gradient)
        for parameter in alone.parameters():
            parameter.grad = None

    with FlopCounterMode(display=False) as counter:
        decode()
    # Recorded on a GPU, as is the step that it is a part of.
    recorded = Replay(lambda _: decode() or {}, lambda: [], []) if at.device.type == "cuda" else None
    return [
        Variant(f"{form.name}, {MATCHING_PART}", run.run_step, flops, form.precision),
        Variant(DECODING, partial(recorded, {}) if recorded else decode, counter.get_total_flops(), form.precision),
    ]


def decoding_share(times: dict[str, Times], form: Form) -> dict[str, float]:
    """The share of the matching part that decoding takes, within rounds."""
    whole = times[f"{form.name}, {MATCHING_PART}"].rounds
    shares = [own / all_of_it for own, all_of_it in zip(times[DECODING].rounds, whole, strict=True)]
    return {
        "share_of_matching_part_median": statistics.median(shares),
        "share_of_matching_part_min": min(shares),
        "share_of_matching_part_max": max(shares),
    }


def check(at: Problem, options: argparse.Namespace) -> dict[str, float]:
    """Greatest difference from the reference of the distance and of each tier's gradient norm, float64, width 8.

    Whole steps of both programs, container included: without augmentation and with exactly as many real images as a
    batch takes, random draws no longer matter.
    """
    device = torch.device("cpu")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        small = Problem(problem.noise(3, per_class=6), device, width=8)
        changes = {"strategy": "none", "network_samples": 0, "real_batch": 6, "synthetic_batch": 10**6}
        config = problem.matching_config(options, **changes)
        ours = condensation(Form(name="loop fp32"), small, config, small.container(), chunk=None)
        layers, norms = ours.run_step()
        theirs = reference.Condensation(small.container(), small.data, config, small.build, seed=0)
        theirs.network.load_state_dict(ours.side.network.state_dict())
        distance = sum(theirs.class_distance(label) for label in range(small.classes))
        (distance / small.classes).backward()
        tiers = theirs.container.tiers().items()
        expected = {name: torch.stack([p.grad.norm() for p in values]).norm() for name, values in tiers}
        pairs = {"distance": (distance, layers.sum())} | {name: (expected[name], norms[name]) for name in norms}
        found = {name: timing.difference(a, b) for name, (a, b) in pairs.items()}
    finally:
        torch.set_default_dtype(usual)
    return timing.require_exact(found)


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict, list[Row]]:
    at = problem.make(options, device)
    head = reports.header(options, device, problem.describe(options))
    head["float64_differences"] = check(at, options)
    head["ceilings"] = timing.ceilings(device)
    container = at.container(options.images_per_class)
    head["synthetic_images_per_class"] = {
        "decodable": container.images_per_class,
        "per_step": min(options.synthetic, container.images_per_class),
    }
    chosen = settings.chosen(planned(settings.kind_of(options), options), options)
    whole = variants(chosen, at, options)
    ours = [form for form in chosen if not form.stored and form != REFERENCE]
    fastest = max(ours, key=lambda form: form.precision == "bf16", default=None)
    parts = decoding_variants(fastest, at, options) if fastest else []
    times = timing.interleave(
        [*whole, *parts], device, rounds=options.rounds, least_seconds=options.least_seconds, title=PART
    )
    found = reports.rows(PART, whole, times, timing.greatest(head["ceilings"]))
    reports.finished(options, head, found)
    memory.fill(found, options)
    if parts:  # they are less work than the reference's whole step, so there are no ratios to it
        beside = reports.rows(PART, parts, times, timing.greatest(head["ceilings"]), baseline="none")
        beside[-1].extra = decoding_share(times, fastest)
        found += beside
    return head, found


def main() -> None:
    options = settings.parser(__doc__, rounds=5).parse_args()
    head, found = measure(options, settings.prepare(options))
    reports.report(options, head, found)


if __name__ == "__main__":
    main()
