"""The options of every benchmark, which forms they choose, and the state of the process before timing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hmn import capture
from hmn.machine import bf16_pays, keep_heap_pages
from hmn.seeding import set_deterministic


def parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share; ``description``'s first line is shown."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options.add_argument("--forms-of", choices=("cpu", "cuda"), help="run the forms of this kind of device instead")
    options.add_argument("--width", type=int, default=128, help="channels of ConvNet-D3")
    options.add_argument("--classes", type=int, default=10, help="number of classes of the noise images")
    options.add_argument("--real", type=int, default=64, help="real images per class and step")
    options.add_argument("--synthetic", type=int, default=64, help="synthetic images per class and step")
    options.add_argument("--samples", type=int, default=2000, help="real images per network update")
    options.add_argument("--images-per-class", type=int, default=1, help="storage that HMN's preset is for")
    options.add_argument("--networks", type=int, help="networks of an evaluation; default: 1 on a CPU, 10 on a GPU")
    options.add_argument("--chunk", type=int, help="classes that our outer step decodes at once; default: as in a run")
    options.add_argument("--data", type=Path, help="a tree of class folders; default: structured noise")
    options.add_argument("--rounds", type=int, default=rounds)
    options.add_argument("--least-seconds", type=float, default=0.5, help="a round repeats a call at least this long")
    options.add_argument("--forms", nargs="+", help="only these rows and the reference")
    options.add_argument("--without-reference", action="store_true", help="with --forms: leave out the reference, too")
    options.add_argument("--no-record", action="store_true", help="GPU: launch steps kernel by kernel, for any form")
    options.add_argument("--deterministic", action="store_true", help="GPU: deterministic algorithms, runs' default")
    options.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    options.add_argument("--system-allocator", action="store_true", help="do not keep heap pages, for any form")
    options.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory, which takes a process per form"
    )
    options.add_argument("--json", type=Path, help="write the rows to this file, too")
    return options


SHAPES = ("width", "classes", "real", "synthetic", "samples", "images_per_class")


def shape_arguments(options: argparse.Namespace) -> list[str]:
    """The options that a child process needs to compute the same."""
    arguments = ["--device", str(device_of(options))]
    for name in SHAPES:
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("forms_of", "chunk", "data", "networks"):
        if value := getattr(options, name):
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    if options.threads:
        arguments += ["--threads", str(options.threads)]
    if options.deterministic:
        arguments.append("--deterministic")
    if options.no_record:
        arguments.append("--no-record")
    return arguments + (["--system-allocator"] if options.system_allocator else [])


def in_a_process(title: str, module: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """What ``python -m MODULE ARGUMENTS`` prints as JSON in its last line. Exits if that fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        told = done.stderr.strip()[-2000:] or f"ended with exit code {done.returncode}"  # -9: killed by signal 9
        raise SystemExit(f"{title}: its process failed\n{told}")
    return json.loads(done.stdout.splitlines()[-1])


def device_of(options: argparse.Namespace) -> torch.device:
    if options.device != "auto":
        return torch.device(options.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kind_of(options: argparse.Namespace) -> str:
    """The kind of device whose forms are run: a GPU's forms batch classes and networks, a CPU's do not."""
    return options.forms_of or device_of(options).type


def chosen(planned: Sequence[Any], options: argparse.Namespace) -> list[Any]:
    """The ``planned`` forms that ``--forms`` names, and the reference; by default, all that suit this machine."""
    if not options.forms:
        left = [form for form in planned if form.precision != "bf16" or bf16_pays(device_of(options))]
        if len(left) < len(planned):
            print("bf16 is left out: it is no faster than fp32 here; --forms runs it anyway", file=sys.stderr)
        return left
    unknown = set(options.forms) - {form.name for form in planned}
    if unknown:
        raise SystemExit(
            f"--forms: unknown {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in planned)}"
        )
    beside = () if options.without_reference else ("reference",)
    return [form for form in planned if form.name in (*options.forms, *beside)]


def prepare(options: argparse.Namespace) -> torch.device:
    """Set allocator, threads and algorithms, the same for all forms, before the first large allocation."""
    options.heap_kept = not options.system_allocator and keep_heap_pages()
    if options.threads:
        torch.set_num_threads(options.threads)
    capture.enable(not options.no_record)
    set_deterministic(options.deterministic)  # off by default, as in IDC's code: it slows all forms down
    # Every form compiles the same functions once more. PyTorch 2.7 also calls this recompile_limit.
    torch._dynamo.config.cache_size_limit = 64
    device = device_of(options)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current device
    return device
