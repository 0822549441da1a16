"""The matching step of all classes, from augmented images to pixel gradients, in every form.

``python -m benchmarks.matching [--json FILE]``

All forms match the same batches on the same network. Before anything is timed they are compared with the reference in
float64 at width 8; their distances and pixel gradients at full width are compared as they are timed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import forms, memory, problem, reference, reports, settings, timing
from benchmarks.forms import REFERENCE, Form
from benchmarks.problem import Problem, work
from benchmarks.reports import Row
from benchmarks.timing import Times, Variant
from hmn.capture import Replay
from hmn.compute import Compute
from hmn.objectives.gradient import matching_step, real_gradients, stored_step

PART = "matching"
# For the distance at full width, where rounding flips the sign of a few of millions of activations.
TOLERANCE = {"fp32": 0.01, "tf32": 0.03, timing.DEFAULT: 0.03, "bf16": 0.1}


def planned(kind: str, options: argparse.Namespace) -> list[Form]:
    return forms.matching(kind, options.classes)


def variants(chosen: Sequence[Form], at: Problem, options: argparse.Namespace) -> list[Variant]:
    """The forms, ready to be timed on one problem. Stored real gradients are computed here, untimed."""
    real, synthetic = at.batches(options.real, "real"), at.batches(options.synthetic, "synthetic")
    labels = torch.arange(at.classes, device=at.device)
    needed = work(at.build)

    def variant(form: Form) -> Variant:
        network = at.network(channels_last=form != REFERENCE)
        flops = needed.matching_step(real=0 if form.stored else options.real, synthetic=options.synthetic) * at.classes
        if form == REFERENCE:
            precision = timing.reference_precision(at.device)
            return Variant(form.name, lambda: reference.matching_step(network, real, synthetic), flops, precision)
        compute = form.compute(at.device)
        parameters = {name: value.detach() for name, value in network.named_parameters()}
        if form.stored:
            step = stored_step(network, "mse", compute)
            side = real_gradients(network, Compute(at.device))(parameters, real, labels)
        else:
            step, side = matching_step(network, "mse", compute), real

        def match(_: dict[str, Tensor]) -> dict[str, Tensor]:
            distances, gradients = step(parameters, side, synthetic, labels)
            return {"distances": distances, "pixel_gradients": gradients}

        # Recorded on a GPU, as the steps of a run are.
        call = Replay(match, lambda: [], []) if at.device.type == "cuda" else match
        return Variant(form.name, lambda: tuple(call({}).values()), flops, form.precision, form.note)

    return [variant(form) for form in chosen]


def check(at: Problem) -> dict[str, float]:
    """Greatest difference of each form's formula from the reference, float64, width 8, relative to the largest number.

    Uncompiled: compiled code is compared at full width.
    """
    small = dataclasses.replace(at, width=8)
    real, synthetic = (small.batches(count, name).double() for count, name in ((6, "real"), (5, "synthetic")))
    network = small.network(channels_last=False).double()
    expected = reference.matching_step(network, real, synthetic)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    labels = torch.arange(at.classes, device=at.device)
    found = {}
    for matching in ("loop", "compiled", "r_operator"):
        compute = Compute(at.device, matching=matching)
        kept = real_gradients(network, compute)(parameters, real, labels)
        results = {
            matching: matching_step(network, "mse", compute)(parameters, real, synthetic, labels),
            f"{matching} stored": stored_step(network, "mse", compute)(parameters, kept, synthetic, labels),
        }
        if matching != "loop":
            compute = dataclasses.replace(compute, classes_per_call=at.classes)
            together = matching_step(network, "mse", compute)(parameters, real, synthetic, labels)
            results[f"{matching} classes together"] = together
        for name, result in results.items():
            found[name] = max(timing.difference(a, b) for a, b in zip(expected, result, strict=True))
    return timing.require_exact(found)


def compare(chosen: Sequence[Variant], times: dict[str, Times]) -> dict[str, dict[str, float]]:
    """Each form's distance and pixel gradient beside the reference's, at full width and in its own precision."""
    if REFERENCE.name not in times:
        return {variant.name: {} for variant in chosen}
    expected, pixels = times[REFERENCE.name].result
    (theirs,) = (variant.precision for variant in chosen if variant.name == REFERENCE.name)
    found = {}
    for variant in chosen:
        distances, gradients = times[variant.name].result
        relative = abs(float(distances.sum() / expected.sum()) - 1)
        cosine = float(F.cosine_similarity(gradients.flatten().double(), pixels.flatten().double(), dim=0))
        found[variant.name] = {
            "distance": float(distances.sum()),
            "distance_relative_difference": relative,
            "pixel_gradient_cosine": cosine,
        }
        if not relative <= max(TOLERANCE[variant.precision], TOLERANCE[theirs]):
            found[variant.name]["differs"] = f"by more than {variant.precision} explains"
    return found


def deviating(found: Sequence[Row]) -> None:
    """Exit if a form computes something other than the reference; called once everything is written."""
    if differing := [row.name for row in found if "differs" in row.extra]:
        raise SystemExit(f"{', '.join(differing)}: the distance differs from the reference's by more than rounding")


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict, list[Row]]:
    at = problem.make(options, device)
    head = reports.header(options, device, problem.describe(options))
    head["float64_differences"] = check(at)
    head["ceilings"] = timing.ceilings(device)
    chosen = settings.chosen(planned(settings.kind_of(options), options), options)
    work_forms = variants(chosen, at, options)
    times = timing.interleave(
        work_forms, device, rounds=options.rounds, least_seconds=options.least_seconds, title=PART
    )
    found = reports.rows(PART, work_forms, times, timing.greatest(head["ceilings"]))
    for row, extra in zip(found, compare(work_forms, times).values(), strict=True):
        row.extra = extra
    reports.finished(options, head, found)
    memory.fill(found, options)
    return head, found


def main() -> None:
    options = settings.parser(__doc__, rounds=5).parse_args()
    head, found = measure(options, settings.prepare(options))
    reports.report(options, head, found)
    deviating(found)


if __name__ == "__main__":
    main()
