"""Forms timed in turns, checks that they compute the same, and the speed that the machine can reach."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

DEFAULT = "default"  # a GPU's precision by PyTorch's own choice: tf32 in convolutions, fp32 in matrix products


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
