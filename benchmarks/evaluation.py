"""Training fresh networks on a condensed set: one epoch on 1,000 images, batches of 64, augmentation and CutMix.

``python -m benchmarks.evaluation [--networks 10] [--json FILE]``

A call is one epoch of every network. The reference trains them one after another; forms that take several at once do
the same work. The 1,000 epochs of an evaluation are extrapolated from it, not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks import forms, memory, problem, reference, reports, settings, timing
from benchmarks.forms import REFERENCE, Form
from benchmarks.problem import Problem, work
from benchmarks.reports import Row
from benchmarks.timing import Variant
from hmn.data.sampling import random_subset
from hmn.network_update import training_step
from hmn.seeding import generator
from hmn.training import Recipe, Training

PART = "evaluation"
BATCH = 64
IMAGES, EPOCHS = 1000, 1000
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
    """How many networks a call trains; on a CPU, which trains them one after another, one is enough."""
    return options.networks or (1 if kind == "cpu" else 10)


def plain_networks(
    at: Problem, images: Tensor, labels: Tensor, recipe: Recipe, count: int
) -> tuple[list[nn.Module], Callable[[], None]]:
    """The reference's networks, and a call that trains each for an epoch."""
    networks = [at.network(channels_last=False, name=number) for number in range(count)]
    random, normalise = reference.random_of(0, at.device), at.normalise
    optimizers = [
        torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        for network in networks
    ]

    def epoch() -> None:
        for network, optimizer in zip(networks, optimizers, strict=True):
            order = torch.randperm(len(images), generator=random.device, device=at.device)
            for index in order.split(recipe.batch):
                reference.training_step(
                    network,
                    optimizer,
                    normalise(images[index]),
                    labels[index],
                    strategy=recipe.strategy,
                    cutmix_probability=recipe.cutmix,
                    random=random,
                )

    return networks, epoch


def our_networks(
    at: Problem, images: Tensor, labels: Tensor, recipe: Recipe, count: int, form: Form
) -> tuple[list[Training], Callable[[], None]]:
    """Our trainings, ``form.networks`` networks at a time with one compiled step, and a call of an epoch of each."""
    step = training_step(at.network(channels_last=True), form.compute(at.device))
    streams = [generator(0, "network", number, device=at.device) for number in range(count)]
    groups = [streams[start : start + form.networks] for start in range(0, count, form.networks)]
    trainings = [Training(at.build, images, labels, recipe, at.normalise, step, *group) for group in groups]

    def epoch() -> None:
        for training in trainings:
            training.run_epoch()

    return trainings, epoch


def variants(chosen: Sequence[Form], at: Problem, options: argparse.Namespace) -> list[Variant]:
    data, count = at.data, networks_of(settings.kind_of(options), options)
    per_class = IMAGES // at.classes
    kept = random_subset(data.train.labels, per_class, data.class_names, generator(0, "set", device=at.device))
    images, labels = data.train.images[kept].float() / 255, data.train.labels[kept]  # as decoded images are
    flops = count * len(images) * work(at.build).training

    def variant(form: Form) -> Variant:
        if form == REFERENCE:
            _, epoch = plain_networks(at, images, labels, RECIPE, count)
            return Variant(form.name, epoch, flops, timing.reference_precision(at.device))
        _, epoch = our_networks(at, images, labels, RECIPE, count, form)
        return Variant(form.name, epoch, flops, form.precision)

    return [variant(form) for form in chosen]


def check(kind: str) -> dict[str, float]:
    """Greatest relative difference of the weights after three epochs, float64, width 8, without random transforms.

    With the whole set in one batch, its order does not matter either; the first epochs' learning rate is constant.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        at = Problem(problem.noise(3, per_class=8), torch.device("cpu"), width=8)
        recipe = dataclasses.replace(RECIPE, strategy="none", cutmix=0.0, batch=24, schedule="multistep")
        images, labels = at.data.train.images / 255, at.data.train.labels
        found = {}
        for together in (1, 3) if kind == "cuda" else (1,):
            networks, plain_epoch = plain_networks(at, images, labels, recipe, together)
            (training,), epoch = our_networks(
                at, images, labels, recipe, together, Form(name="plain", networks=together)
            )
            with torch.no_grad():
                for values, own in weights(networks, training):
                    own.copy_(torch.stack(values).view_as(own))
            for _ in range(3):
                plain_epoch()
                epoch()
            found[f"{together} at a time"] = max(
                timing.difference(torch.stack(values), own.view(together, *values[0].shape))
                for values, own in weights(networks, training)
            )
    finally:
        torch.set_default_dtype(usual)
    return timing.require_exact(found)


def weights(networks: Sequence[nn.Module], training: Training) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Each parameter of all plain networks beside ours, which may be stacked."""
    plain = zip(*(network.parameters() for network in networks), strict=True)
    return list(zip(plain, training.network.parameters(), strict=True))


def measure(options: argparse.Namespace, device: torch.device) -> tuple[dict, list[Row]]:
    at = problem.make(options, device)
    head = reports.header(options, device, problem.describe(options))
    head["float64_differences"] = check(settings.kind_of(options))
    head["ceilings"] = timing.ceilings(device)
    head["evaluated_networks"] = networks_of(settings.kind_of(options), options)
    chosen = settings.chosen(planned(settings.kind_of(options), options), options)
    work_forms = variants(chosen, at, options)
    times = timing.interleave(
        work_forms, device, rounds=options.rounds, least_seconds=options.least_seconds, title=PART
    )
    found = reports.rows(PART, work_forms, times, timing.greatest(head["ceilings"]))
    for row in found:
        row.extra = {f"extrapolated_seconds_of_{EPOCHS}_epochs": row.median_ms / 1000 * EPOCHS}
    reports.finished(options, head, found)
    memory.fill(found, options)
    return head, found


def main() -> None:
    options = settings.parser(__doc__, rounds=5).parse_args()
    head, found = measure(options, settings.prepare(options))
    reports.report(options, head, found)


if __name__ == "__main__":
    main()
