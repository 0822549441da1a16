"""Training fresh networks on a condensed set: one SGD step of every network, batches of 64, augmentation and CutMix.

``python -m benchmarks.evaluation [--networks 10] [--json FILE]``

The reference trains the networks one after another. A call is one step of each, so forms that take several networks at
once do the same work. A run of 1,000 epochs on 1,000 images is extrapolated from it, not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import forms, harness, matching, memory, problem, reference
from benchmarks.forms import REFERENCE, Form
from benchmarks.harness import Row, Variant
from benchmarks.problem import Problem, work
from hmn.data.sampling import random_subset
from hmn.seeding import generator
from hmn.training import Recipe, Training, training_step

PART = "evaluation"
BATCH = 64
IMAGES, EPOCHS = 1000, 1000  # of the extrapolation
EXACT = 1e-9
RECIPE = Recipe(
    epochs=EPOCHS,
    batch=BATCH,
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    strategy="color_crop_flip_scale_rotate",
    cutmix=0.5,
)


def planned(kind: str, options: argparse.Namespace) -> list[Form]:
    return forms.evaluation(kind, networks_of(kind, options))


def networks_of(kind: str, options: argparse.Namespace) -> int:
    """How many networks a call trains: on a CPU, which takes them one after another, one tells it all."""
    return getattr(options, "networks", None) or (1 if kind == "cpu" else 10)


def plain_networks(
    at: Problem, images: Tensor, labels: Tensor, recipe: Recipe, count: int
) -> tuple[list[torch.nn.Module], Callable[[Tensor], None]]:
    """The reference's networks, and one step of each on the images ``index`` (n,)."""
    networks = [at.network(channels_last=False, name=number) for number in range(count)]
    random = reference.random_of(0, at.device)
    optimizers = [
        torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        for network in networks
    ]

    def step(index: Tensor) -> None:
        for network, optimizer in zip(networks, optimizers, strict=True):
            reference.training_step(
                network,
                optimizer,
                at.normalise(images[index]),
                labels[index],
                strategy=recipe.strategy,
                cutmix_probability=recipe.cutmix,
                random=random,
            )

    return networks, step


def our_networks(
    at: Problem, images: Tensor, labels: Tensor, recipe: Recipe, count: int, form: Form
) -> tuple[list[Training], Callable[[Tensor], None]]:
    """Ours: one compiled step for all, ``form.networks`` networks at a time."""
    compiled = training_step(at.network(channels_last=True), form.compute(at.device))
    streams = [generator(0, "network", number, device=at.device) for number in range(count)]
    groups = [streams[start : start + form.networks] for start in range(0, count, form.networks)]
    trainings = [Training(at.build, images, labels, recipe, at.normalise, compiled, *group) for group in groups]

    def step(index: Tensor) -> None:
        for training, group in zip(trainings, groups, strict=True):
            each = index.expand(len(group), -1) if len(group) > 1 else index
            training.update(images[each], labels[each])

    return trainings, step


def variants(chosen: Sequence[Form], at: Problem, options: argparse.Namespace) -> list[Variant]:
    data, count = at.data, networks_of(harness.kind_of(options), options)
    stream = generator(0, "set", device=at.device)
    kept = random_subset(data.train.labels, IMAGES // at.classes, data.class_names, stream)
    images, labels = data.train.images[kept].float() / 255, data.train.labels[kept]  # as decoded images are
    index = torch.randperm(len(images), generator=stream, device=at.device)[:BATCH]
    flops = count * BATCH * work(at.build).training

    def variant(form: Form) -> Variant:
        if form == REFERENCE:
            _, step = plain_networks(at, images, labels, RECIPE, count)
            precision = harness.reference_precision(at.device)
        else:
            _, step = our_networks(at, images, labels, RECIPE, count, form)
            precision = form.precision
        return Variant(form.name, lambda: step(index), flops, precision)

    return [variant(form) for form in chosen]


def check(kind: str) -> dict[str, float]:
    """Greatest relative difference of the weights after three steps, float64, width 8, without random transforms."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        at = Problem(problem.noise(3, per_class=8), torch.device("cpu"), width=8)
        recipe = dataclasses.replace(RECIPE, strategy="none", cutmix=0.0, batch=24)
        images, labels = at.data.train.images / 255, at.data.train.labels
        index = torch.arange(24)
        found = {}
        for together in (1, 3) if kind == "cuda" else (1,):
            networks, theirs = plain_networks(at, images, labels, recipe, together)
            form = Form(name="plain", networks=together)
            (training,), ours = our_networks(at, images, labels, recipe, together, form)
            plain = [list(network.parameters()) for network in networks]
            with torch.no_grad():
                for values, own in zip(zip(*plain, strict=True), training.network.parameters(), strict=True):
                    own.copy_(torch.stack(values).view_as(own))
            for _ in range(3):
                theirs(index)
                ours(index)
            differences = [
                matching.difference(torch.stack(values).detach(), own.detach().view(together, *values[0].shape))
                for values, own in zip(zip(*plain, strict=True), training.network.parameters(), strict=True)
            ]
            found[f"{together} at a time"] = max(differences)
    finally:
        torch.set_default_dtype(usual)
    for name, value in found.items():
        if not value <= EXACT:
            raise SystemExit(f"{name}: weights differ from the reference's by {value:.1e} in float64: nothing is timed")
    return found


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict, list[Row]]:
    at = problem.make(options, device)
    head = harness.header(options, device, problem.describe(options))
    head["float64_differences"] = check(harness.kind_of(options))
    head["ceilings"] = harness.ceilings(device)
    head["networks_per_call"] = networks_of(harness.kind_of(options), options)
    chosen = harness.chosen(planned(harness.kind_of(options), options), options)
    work_forms = variants(chosen, at, options)
    times = harness.interleave(
        work_forms, device, rounds=options.rounds, least_seconds=options.least_seconds, title=PART
    )
    found = harness.rows(PART, work_forms, times, harness.greatest(head["ceilings"]))
    steps = EPOCHS * -(-IMAGES // BATCH)
    for row in found:
        row.extra = {"extrapolated_seconds_1000_epochs_of_1000_images": row.median_ms / 1000 * steps}
    memory.fill(found, options)
    return head, found


def main() -> None:
    parser = harness.parser(__doc__, rounds=9)
    parser.add_argument("--networks", type=int, help="per call; default: 1 on a CPU, 10 on a GPU")
    options = parser.parse_args()
    head, found = measure(options, harness.prepare(options))
    harness.report(options, head, found)


if __name__ == "__main__":
    main()
