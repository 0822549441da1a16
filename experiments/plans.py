"""Tabulate what every container holds in every budget: ``python -m experiments.plans [--output FILE] [KEY=VALUE ...]``.

Prints a Markdown table of every container's own settings for every official dataset at 1, 10 and 50 images per class,
and of what condensing costs, as counted by ``mode=plan``. No data are read. KEY=VALUE are settings as of run.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from hmn.containers import KINDS
from hmn.errors import ConfigError
from hmn.explain import in_one_line
from hmn.files import write_text
from hmn.plan import Plan, make_plan
from hmn.sweeps.planning import compose

DATASETS = ("mnist", "fashion_mnist", "svhn", "cifar10", "cifar100", "tiny_imagenet", "imagenet10", "digits")
MEMORIES = (1, 10, 50)


def planned(*overrides: str) -> Plan:
    return make_plan(compose(["mode=plan", "pruning=none", *overrides]))


def cells(overrides: Sequence[str]) -> Iterator[list[str]]:
    for dataset in DATASETS:
        for memory in MEMORIES:
            for name in KINDS:
                own = [f"dataset={dataset}", f"memory.images_per_class={memory}", f"container={name}", *overrides]
                try:
                    yield [dataset, str(memory), name, *numbers(planned(*own))]
                except ConfigError as error:
                    if "smallest budget" not in str(error):
                        raise
                    yield [dataset, str(memory), name, "does not fit", "", "", "", ""]


def numbers(plan: Plan) -> list[str]:
    stored, classes = plan.storage, plan.data.classes
    used = stored.stored_floats(classes)
    made = [str(stored.images_per_class), f"{used:,}", f"{100 * used / stored.budget_floats:.2f}"]
    if not plan.config.condenses:
        return [*made, f"{stored.shared_floats:,}", ""]
    step = plan.step_flops
    return [*made, f"{stored.shared_floats:,}", f"{(step.matching + step.update) / 1e12:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="the file to write the table to, instead of printing it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of run.py")
    given = parser.parse_args()
    head = [
        "data set",
        "IPC",
        "container",
        "images per class",
        "floats",
        "% of budget",
        "shared floats",
        "TFLOP per step",
    ]
    lines = ["Made by `python -m experiments.plans`: plans, nothing measured. A multiply-add counts as 2 FLOPs.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell) + " |" for cell in cells(given.overrides)]
    text = "\n".join(lines) + "\n"
    if given.output:
        write_text(given.output, text)
    else:
        print(text, end="")


if __name__ == "__main__":
    in_one_line(main)
