"""What every benchmark shares: options, rounds in turns, ratios to the reference, ceilings, provenance and tables."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hmn import capture
from hmn.compute import bf16_pays, keep_heap_pages
from hmn.files import write_text
from hmn.results import cpu_name, provenance
from hmn.seeding import set_deterministic

SCHEMA_VERSION = 1
COMPILE_CACHE = "HMN_BENCHMARK_COMPILE_CACHE"  # the variable in which `make bench` describes the cache of its parts
DEFAULT = "default"  # a GPU's precision by PyTorch's own choice: tf32 in convolutions, fp32 in matrix products


# Options


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
        raise SystemExit(f"{title}: its process failed\n{done.stderr[-2000:]}")
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


# Timing


@dataclass(frozen=True)
class Variant:
    """One form, ready to be timed. ``flops`` is what the job needs, the same for all forms, not what one spends."""

    name: str
    call: Callable[[], object]
    flops: float
    precision: str = "fp32"
    note: str = ""


@dataclass(frozen=True)
class Times:
    """Seconds per call of every round and of the very first call, which compiles; the result of a warm call."""

    first: float
    rounds: list[float]
    calls: int  # per round
    result: object = None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def use_precision(precision: str, device: torch.device) -> None:
    """Set a GPU's tf32 switches for ``precision``, so that the modes of other forms do not leak into this one."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision in ("tf32", DEFAULT)
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def reference_precision(device: torch.device) -> str:
    return DEFAULT if device.type == "cuda" else "fp32"


def timed(variant: Variant, device: torch.device, calls: int = 1) -> tuple[float, object]:
    """Wall seconds per call and the last result, the device's work included: calls are queued, then waited for once."""
    use_precision(variant.precision, device)
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        result = variant.call()
    wait(device)
    return (time.perf_counter() - start) / calls, result


def interleave(
    variants: Sequence[Variant], device: torch.device, *, rounds: int, least_seconds: float, title: str
) -> dict[str, Times]:
    """Time ``variants`` in turns: a first call, a warm-up that also decides how many calls fill a round, then rounds.

    Other work on the machine slows neighbours alike, so ratios within a round hold even if times across rounds do not.
    Each round starts one variant later, so that no variant always follows the same one.
    """
    first, calls, results = {}, {}, {}
    with progress(None, title, "turn", total=len(variants) * (rounds + 2)) as bar:
        for variant in variants:
            bar.set_postfix_str(f"first call, {variant.name}")
            first[variant.name], _ = timed(variant, device)
            bar.update()
        for variant in variants:
            bar.set_postfix_str(f"warm-up, {variant.name}")
            warm, results[variant.name] = timed(variant, device)
            calls[variant.name] = calls_per_round(warm, least_seconds)
            bar.update()
        own: dict[str, list[float]] = {variant.name: [] for variant in variants}
        for turn in range(rounds):
            start = turn % len(variants)
            for variant in [*variants[start:], *variants[:start]]:
                bar.set_postfix_str(f"round {turn + 1}, {variant.name}")
                own[variant.name].append(timed(variant, device, calls[variant.name])[0])
                bar.update()
    return {name: Times(first[name], own[name], calls[name], results[name]) for name in own}


def progress(items: Iterable[Any] | None, title: str, unit: str, *, total: int | None = None) -> tqdm:
    """A progress bar on a terminal; elsewhere a line now and then."""
    if sys.stderr.isatty():
        return tqdm(items, desc=title, unit=unit, total=total)
    return _Lines(items, desc=title, unit=unit, total=total, mininterval=30, ascii=True)


class _Lines(tqdm):
    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)


def calls_per_round(warm_seconds: float, least_seconds: float, most: int = 500) -> int:
    """How many calls of ``warm_seconds`` each fill ``least_seconds``; at least one."""
    return min(most, max(1, math.ceil(least_seconds / max(warm_seconds, 1e-9))))


# Rows


@dataclass(kw_only=True)
class Row:
    """One measured form. Speed-ups are the reference's seconds over this form's in a round; ``None``: no ratio."""

    part: str
    name: str
    speedup_median: float | None = None
    speedup_min: float | None = None
    speedup_max: float | None = None
    peak_bytes: int | None = None  # in a process of its own; on a GPU the most that was allocated at once
    reserved_bytes: int | None = None  # GPU: the allocator's pool, captured graphs included
    idle_bytes: int | None = None  # the process before its first step: libraries, images, parameters
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    rounds: int | None = None
    calls_per_round: int | None = None
    first_call_seconds: float | None = None
    flops: float | None = None  # of the job, per call
    flops_per_second: float | None = None
    ceiling_flops_per_second: float | None = None
    ceiling_share: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def ratios(reference: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios within rounds."""
    values = [theirs / ours for theirs, ours in zip(reference, own, strict=True)]
    return statistics.median(values), min(values), max(values)


def rows(
    part: str,
    variants: Sequence[Variant],
    times: Mapping[str, Times],
    ceilings: Mapping[str, float],
    baseline: str = "reference",
) -> list[Row]:
    """A row for every variant, in order. ``ceilings`` are FLOP/s by precision."""
    measured = []
    for variant in variants:
        own = times[variant.name]
        middle = statistics.median(own.rounds)
        row = Row(part=part, name=variant.name, note=variant.note)
        if baseline in times:
            values = ratios(times[baseline].rounds, own.rounds)
            row.speedup_median, row.speedup_min, row.speedup_max = values
        row.median_ms, row.min_ms, row.max_ms = (1000 * value for value in (middle, min(own.rounds), max(own.rounds)))
        row.rounds, row.calls_per_round, row.first_call_seconds = len(own.rounds), own.calls, own.first
        row.flops, row.flops_per_second = variant.flops, variant.flops / middle
        precision = "tf32" if variant.precision == DEFAULT else variant.precision
        if ceiling := ceilings.get(precision):
            row.ceiling_flops_per_second, row.ceiling_share = ceiling, row.flops_per_second / ceiling
        measured.append(row)
    return measured


# Equality

EXACT = 1e-9  # of results in float64, relative to the largest number


def difference(expected: Tensor, found: Tensor) -> float:
    """Greatest difference, relative to the largest number expected."""
    return float((expected.detach() - found.detach()).abs().max() / expected.detach().abs().max())


def require_exact(differences: Mapping[str, float]) -> dict[str, float]:
    """Return ``differences`` unchanged. Exits if one is more than rounding."""
    for name, value in differences.items():
        if not value <= EXACT:
            raise SystemExit(f"{name} differs from the reference by {value:.1e} in float64: nothing is timed")
    return dict(differences)


# What the machine can do


def ceilings(device: torch.device) -> dict[str, dict[str, float]]:
    """FLOP/s of one large matrix product and one of the network's convolutions, by precision, on random numbers.

    The convolution is the second layer's on ten batches of 64 (GPU) or on one (CPU), channels_last.
    """
    large, batch = (8192, 640) if device.type == "cuda" else (2048, 64)
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        precisions["tf32"] = torch.float32
    stream = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=stream, device=device)

    factors = normal(large, large), normal(large, large)
    images, weight = normal(batch, 128, 16, 16), normal(128, 128, 3, 3)
    found = {}
    for precision, dtype in precisions.items():
        a, b = (factor.to(dtype) for factor in factors)
        x, w = (value.to(dtype, memory_format=torch.channels_last) for value in (images, weight))
        found[precision] = {
            "matmul": _best(lambda a=a, b=b: a @ b, 2 * large**3, precision, device),
            "convolution": _best(
                lambda x=x, w=w: F.conv2d(x, w, padding=1), 2 * x.numel() * w[0].numel(), precision, device
            ),
        }
    return found


def _best(call: Callable[[], object], flops: float, precision: str, device: torch.device) -> float:
    variant = Variant("ceiling", call, flops, precision)
    with torch.no_grad():
        timed(variant, device, 3)
        calls = calls_per_round(timed(variant, device)[0], 0.1)
        return flops / min(timed(variant, device, calls)[0] for _ in range(5))


def greatest(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The higher of the two ceilings of each precision."""
    return {precision: max(values.values()) for precision, values in measured.items()}


# Reports


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores"


def header(options: argparse.Namespace, device: torch.device, images: str) -> dict[str, Any]:
    """What a reader needs to judge the rows and to measure them again."""
    code = provenance()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "commit": code["commit"],
        "dirty": code["dirty"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": code["python"],
        "platform": code["platform"],
        "device": device.type,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # before the start: how busy other work keeps the machine
        "allocator": allocator(options, device),
        "algorithms": "deterministic" if options.deterministic else "the fastest, chosen by trial",
        "network": f"ConvNet-D3-W{options.width}, instance norm",
        "compile_cache": os.environ.get(COMPILE_CACHE, "the user's: first calls may find their code in it"),
        "memory_format": "reference: contiguous (NCHW); ours: channels_last",
        "images": images,
        "shapes": {name: getattr(options, name) for name in SHAPES},
    }


def command() -> str:
    """The command of this process, to be run in the repository."""
    main = sys.modules["__main__"]
    module = main.__spec__.name.removesuffix(".__main__") if main.__spec__ else Path(sys.argv[0]).name
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def allocator(options: argparse.Namespace, device: torch.device) -> str:
    if device.type == "cuda":
        return "CUDA caching allocator, " + (os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default settings")
    return "glibc, heap pages kept, for all forms" if options.heap_kept else "the system's default, for all forms"


def report(
    options: argparse.Namespace, head: Mapping[str, Any], measured: Iterable[Row], not_measured: Iterable[str] = ()
) -> dict[str, Any]:
    """Print the table; write the JSON file if one is asked for."""
    found = _found(head, measured) | {"not_measured": list(not_measured)}
    print(text(found))
    if options.json:
        write_json(options.json, found)
    return found


def finished(options: argparse.Namespace, head: dict[str, Any], measured: Iterable[Row]) -> None:
    """Write the times before the long processes that measure memory, and note in ``head`` what a GPU did not replay."""
    if head["device"] == "cuda":
        reasons = "; ".join(sorted(capture.launched_anew)) or "nothing"
        head["launched_anew"] = "everything: --no-record" if options.no_record else reasons
    if options.json:
        write_json(options.json, _found(head, measured) | {"not_measured": ["peak memory: was being measured"]})


def _found(head: Mapping[str, Any], measured: Iterable[Row]) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "header": dict(head), "rows": [asdict(row) for row in measured]}


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(found, indent=2) + "\n")


COLUMNS = (
    "form",
    "median ms",
    "speed-up (least, greatest)",
    "peak MiB",
    "GFLOP/s",
    "of ceiling",
    "first call s",
    "rounds x calls",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as the table shows it."""

    def shown(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[key] is None else format(row[key] * scale, form)

    spread = "-"
    if row["speedup_median"] is not None:
        spread = f"{row['speedup_median']:.2f} ({row['speedup_min']:.2f}, {row['speedup_max']:.2f})"
    return [
        row["name"],
        shown("median_ms", ".4g"),
        spread,
        shown("peak_bytes", ".0f", 2**-20),
        shown("flops_per_second", ".4g", 1e-9),
        shown("ceiling_share", ".0%"),
        shown("first_call_seconds", ".1f"),
        "-" if row["rounds"] is None else f"{row['rounds']} x {row['calls_per_round']}",
    ]


def text(found: Mapping[str, Any]) -> str:
    """The report as Markdown: what was measured where, then one table per part."""
    head = found["header"]
    lines = [f"- {key.replace('_', ' ')}: {plain(value)}" for key, value in head.items() if value is not None]
    parts = list(dict.fromkeys(row["part"] for row in found["rows"]))
    for part in parts:
        members = [row for row in found["rows"] if row["part"] == part]
        lines += ["", f"## {part}", "", *table(COLUMNS, [cells(row) for row in members]), ""]
        for note in dict.fromkeys(row["note"] for row in members if row["note"]):
            lines.append(f"- {', '.join(row['name'] for row in members if row['note'] == note)}: {note}")
        lines += [f"- {row['name']}: {plain(row['extra'])}" for row in members if row["extra"]]
    if found["not_measured"]:
        lines += ["", "## Not yet measured", "", *(f"- {name}" for name in found["not_measured"])]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with padded columns, so that it is readable in a terminal."""
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns))]

    def padded(values: Sequence[str]) -> str:
        first, *others = zip(values, widths, strict=True)
        return " | ".join(["| " + first[0].ljust(first[1]), *(v.rjust(w) for v, w in others)]) + " |"

    rule = "|".join(["-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)])
    return [padded(columns), f"|{rule}|", *(padded(line) for line in lines)]


def plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        inner = [
            f"{key.replace('_', ' ')} " + (f"({plain(item)})" if isinstance(item, Mapping) else plain(item))
            for key, item in value.items()
        ]
        return ", ".join(inner)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
