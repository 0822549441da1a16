"""Time one class's matching step and one network update in every form this machine has, against the plain loop.

``python benchmarks/matching.py [--width 128] [--real 64] [--synthetic 64] [--keep-heap]``

The forms take turns in one process; what counts is the ratio to the loop within a round: median, least and greatest.
rounds. Compile time is told apart. Peak memory comes from a process of its own for each form. Before anything is timed,
the forms are checked against each other in float64 at width 8, and at full width by their distance.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hmn.compute import Compute, keep_heap_pages
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.gradient import matching_loop, matching_nested, matching_step
from hmn.training import training_step

FORMS = {
    "loop fp32": Compute(torch.device("cpu"), "fp32", compiled=False),
    "loop bf16": Compute(torch.device("cpu"), "bf16", compiled=False),
    "compiled fp32": Compute(torch.device("cpu"), "fp32", compiled=True),
    "compiled bf16": Compute(torch.device("cpu"), "bf16", compiled=True),
}


def problem(width: int, real: int, synthetic: int, dtype: torch.dtype = torch.float32) -> tuple:
    """A network, its parameters, and noise images of one class for both branches, CIFAR-10's shape."""
    generator = torch.Generator().manual_seed(0)
    network = initialise(ConvNet(3, 10, 32, width=width), generator).to(dtype, memory_format=torch.channels_last)
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def images(n: int) -> Tensor:
        return torch.randn(n, 3, 32, 32, generator=generator, dtype=dtype).to(memory_format=torch.channels_last)

    labels = [torch.full((n,), 3) for n in (real, synthetic)]
    return network, (parameters, images(real), labels[0], images(synthetic), labels[1])


def check() -> None:
    network, arguments = problem(8, 6, 5, torch.float64)
    plain = Compute(torch.device("cpu"))
    for metric in ("mse", "l1", "cosine"):
        expected = matching_loop(network, metric, plain)(*arguments)
        found = matching_nested(network, metric, plain)(*arguments)
        error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True))
        print(f"check, float64, width 8, {metric}: greatest relative difference {error:.1e}")


def matching_calls(width: int, real: int, synthetic: int) -> dict[str, Callable[[], object]]:
    network, arguments = problem(width, real, synthetic)
    steps = {name: matching_step(network, "mse", compute) for name, compute in FORMS.items()}
    return {name: lambda step=step: step(*arguments) for name, step in steps.items()}


def training_calls(width: int, batch: int) -> dict[str, Callable[[], object]]:
    network, (parameters, images, labels, _, _) = problem(width, batch, 1)
    batch_arguments = (parameters, images, labels, labels.roll(1), torch.tensor(0.7), torch.ones(batch))
    steps = {name: training_step(network, compute) for name, compute in FORMS.items()}
    return {name: lambda step=step: step(*batch_arguments) for name, step in steps.items()}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(title: str, calls: dict[str, Callable[[], object]], rounds: int) -> None:
    first = {name: seconds(call) for name, call in calls.items()}
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    print(f"\n{title}, {rounds} rounds")
    print(f"{'form':15} {'median ms':>10} {'speed-up (least, greatest)':>28} {'first call s':>13}")
    for name, values in times.items():
        ratios = [loop / own for loop, own in zip(times["loop fp32"], values, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"{name:15} {1000 * statistics.median(values):10.1f} {spread:>28} {first[name]:13.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--real", type=int, default=64)
    parser.add_argument("--synthetic", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep-heap", action="store_true", help="compute.keep_heap's allocator, for all forms")
    parser.add_argument("--only", choices=FORMS, help="run one form's matching step and print its peak memory")
    options = parser.parse_args()
    if options.keep_heap:
        keep_heap_pages()
    if options.only:
        network, arguments = problem(options.width, options.real, options.synthetic)
        step = matching_step(network, "mse", FORMS[options.only])
        for _ in range(3):
            step(*arguments)
        print(f"{options.only:15} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB peak")
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, keep_heap={options.keep_heap}, channels_last")
    check()
    calls = matching_calls(options.width, options.real, options.synthetic)
    shapes = f"width {options.width}, {options.real} real + {options.synthetic} synthetic"
    compare(f"matching step of one class, {shapes}", calls, options.rounds)
    distances = {name: float(call()[0].sum()) for name, call in calls.items()}
    print("distance: " + ", ".join(f"{name} {value:.5g}" for name, value in distances.items()))
    compare(f"training step, width {options.width}, batch 64", training_calls(options.width, 64), options.rounds)
    print("\npeak memory of a process that only matches")
    for name in FORMS:
        print(
            subprocess.run([sys.executable, *sys.argv, "--only", name], capture_output=True, text=True).stdout, end=""
        )


if __name__ == "__main__":
    main()
