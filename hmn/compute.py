"""Device, precision and compilation: how a run is computed."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmn import capture, distributed, winograd
from hmn.config import ComputeConfig, require
from hmn.machine import bf16_pays, has_triton, lacking_to_compile, winograd_pays

# Classes per call and chunk that fill a GPU. 200 classes of 128 images of side 64 take 50 GiB per feature map.
GPU_CLASSES = 20


@dataclass(frozen=True)
class Compute:
    """How a run computes: its device, precision, compilation, and how much goes into one call."""

    device: torch.device
    precision: str = "fp32"
    matching: str = "loop"  # a key of hmn.objectives.gradient.FORMS
    blocks: str = "compiler"  # triton: the R-operator has hmn.objectives.block_triton between convolutions
    compiled: bool = False  # all steps, both of matching and of training
    classes_per_call: int = 1  # of the matching step
    networks_together: int | None = None  # null: all on a GPU; one on a CPU, where several are no faster
    winograd: bool = False  # of compiled steps on a CPU: 3 x 3 convolutions by hmn.winograd
    lacking: str | None = None  # what auto would have needed to compile; null: nothing, or it would not have

    def together(self, networks: int) -> int:
        """How many of ``networks`` networks to train at once; all are trained on the same images."""
        return min(self.networks_together or (1 if self.device.type == "cpu" else networks), networks)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def maybe_compile(self, function: Callable) -> Callable:
        """``function``, compiled for its fixed input shapes if this run compiles."""
        if not self.compiled:
            return function
        chosen = {"backend": winograd.backend} if self.winograd else {}
        return _timed_once(torch.compile(function, fullgraph=True, dynamic=False, **chosen))

    def wait(self) -> None:
        """Wait until the device has finished all work queued on it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def begin_peak(self) -> None:
        """Reset the peak that :meth:`recent_peak_bytes` returns, where the system can (CUDA, Linux)."""
        _highest[self.device] = self.peak_bytes()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError, AttributeError):  # freed memory that the process keeps would count
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Peak memory in bytes so far: allocated on the device, or on a CPU held by the process."""
        return max(self.recent_peak_bytes(), _highest.get(self.device, 0))

    def recent_peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:  # getrusage's resident peak starts from that of the parent process
            status = Path("/proc/self/status").read_text()
        except OSError:
            status = ""
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):  # some sandboxes leave this line out
            return 1024 * int(found[1])
        units = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units

    def current_bytes(self) -> int:
        """Memory in bytes held now, on the device, or on a CPU by the process (on Linux; elsewhere the peak so far)."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except OSError:
            return self.peak_bytes()
        return pages * resource.getpagesize()


def wide(tensor: Tensor) -> Tensor:
    """``tensor``, in fp32 if autocast made it bf16; call this before it is summed or exponentiated."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


_highest: dict[torch.device, int] = {}  # peaks before the last :meth:`Compute.begin_peak`
compile_seconds: list[float] = []  # of each compiled function's first call in this process, one execution included


def _timed_once(function: Callable) -> Callable:
    called = False

    def call(*arguments: Any) -> Any:
        nonlocal called
        if called:
            return function(*arguments)
        start = time.monotonic()
        result = function(*arguments)
        compile_seconds.append(time.monotonic() - start)
        called = True
        return result

    return call


def forget_compiled() -> None:
    """Drop what this process compiled: other networks and sizes count as recompilations, whose number is limited."""
    torch._dynamo.reset()
    compile_seconds.clear()


def at_once(images_of_32: int, size: int) -> int:
    """How many images of side ``size`` take the memory of ``images_of_32`` of side 32: from 1 to ``images_of_32``."""
    return min(images_of_32, max(1, images_of_32 * 32 * 32 // size**2))


def device_of(config: ComputeConfig) -> torch.device:
    """The configured device, or the best available one; of several processes, each takes the GPU of its local rank.

    Raises ``ConfigError`` for a GPU that this machine lacks.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.launched():
        require("compute.device", ":" not in name, name, "auto, cuda or cpu: every process takes a GPU of its own")
        name = f"cuda:{distributed.local_rank()}" if name == "cuda" else name
    device = torch.device(name)
    if device.type == "cuda":
        available = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        require("compute.device", available, name, "cpu or auto: this machine has no such GPU")
    return device


def choose(config: ComputeConfig, expected_flops: float, classes: int) -> Compute:
    """Decide what ``config`` leaves open; the ``expected_flops`` of the whole run say whether compiling pays off.

    Also set the process's threads, float32 arithmetic, current GPU and whether it records CUDA graphs. Raises
    ``ConfigError`` for what this machine lacks, and for settings that exclude each other.
    """
    device = device_of(config)
    capture.enable(config.record)
    if config.threads:
        torch.set_num_threads(config.threads)
    on_gpu = device.type == "cuda"
    if on_gpu and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current GPU
    require("compute.precision", config.precision != "tf32" or on_gpu, "tf32", "fp32 or bf16 on a CPU")
    # cuDNN's own default is tf32: without this, fp32 would not be fp32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    precision = "fp32" if config.precision == "bf16" and not bf16_pays(device) else config.precision
    lacking = lacking_to_compile(on_gpu)
    if config.matching in ("compiled", "r_operator"):
        require("compute.matching", lacking is None, config.matching, f"loop or auto: {lacking}")
    if config.blocks == "triton":
        require("compute.blocks", on_gpu, "triton", "compiler on a CPU")
        require("compute.blocks", has_triton(), "triton", "compiler: Triton 3.3 or newer was not found")
    # Compiling takes about two minutes; eager code does some 2e11 operations a second on two cores, 1e13 on a GPU.
    pays = expected_flops / (1e13 if on_gpu else 2e11) > 600
    matching = config.matching
    if matching == "auto":
        matching = "compiled" if pays and lacking is None else "loop"
    # A GPU is limited by kernel launches, so it takes many classes at once; a CPU by memory accesses, so it takes one.
    own = math.ceil(classes / distributed.world())
    width = config.classes_per_call or (evenly(own, GPU_CLASSES) if on_gpu and matching != "loop" else 1)
    told = "1 for compute.matching=loop"
    if config.matching == "auto" and lacking is None:
        told += ", which auto chooses here: set compute.matching=compiled"
    require("compute.classes_per_call", width == 1 or matching != "loop", width, told)
    require("compute.classes_per_call", width <= classes, width, f"at most {classes}")
    fits = matching != "loop" and precision == "fp32" and not on_gpu
    kind = config.convolutions
    require("compute.convolutions", kind != "winograd" or fits, kind, "auto or direct, but for compiled fp32 on a CPU")
    return Compute(
        device,
        precision,
        matching,
        blocks=config.blocks,
        compiled=matching != "loop",
        classes_per_call=width,
        networks_together=config.networks_together,
        winograd=fits and (kind == "winograd" or kind == "auto" and winograd_pays()),
        lacking=lacking if pays and config.matching == "auto" else None,
    )


def evenly(count: int, most: int) -> int:
    """Part size, at most ``most``, when ``count`` is divided evenly into as few parts as possible."""
    return math.ceil(count / math.ceil(count / most))
