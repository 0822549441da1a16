"""What this machine is and has: its processor, what is fast on it, what it lacks, and where it keeps compiled code."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's name, as far as the system reports it, and the instruction set that PyTorch uses."""
    name = _processor().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> dict[str, str]:
    """What Linux says of the first processor, by its own names; empty on other systems."""
    with contextlib.suppress(OSError):
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return {}


def bf16_pays(device: torch.device) -> bool:
    """Whether ``device`` computes convolutions faster in bf16 than in fp32.

    Devices without bf16 instructions emulate it. An Intel CPU that has them in AVX-512 but not in AMX is slower with
    them than in fp32; an AMD CPU is twice as fast (benchmarks/README.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())


def winograd_pays() -> bool:
    """Whether :mod:`hmn.winograd` is faster on this CPU than direct convolutions.

    It is not on Intel's with AVX-512: there a step takes as long with either, and compiling half a minute longer
    (benchmarks/README.md).
    """
    return not (_is_intel() and torch.backends.cpu.get_cpu_capability() == "AVX512")


def _is_intel() -> bool:
    return "GenuineIntel" in _processor().get("vendor_id", platform.processor())


def lacking_to_compile(on_gpu: bool) -> str | None:
    """What ``torch.compile`` needs and this machine lacks; ``None`` if it lacks nothing."""
    if on_gpu:  # Triton's launchers are C
        language, names, paths = "C", [os.environ.get("CC"), "gcc", "clang", "cc"], "C_INCLUDE_PATH"
    else:
        language, names, paths = "C++", [os.environ.get("CXX"), "g++", "clang++", "c++"], "CPLUS_INCLUDE_PATH"
    if not any(shutil.which(name) for name in names if name):
        return f"no {language} compiler was found"
    folders = [sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")]
    folders += [folder for name in ("CPATH", paths) for folder in os.environ.get(name, "").split(os.pathsep)]
    # Only Linux distributions have packages of Python without its headers.
    if sys.platform.startswith("linux") and not any(Path(folder, "Python.h").exists() for folder in folders):
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return f"Python.h was not found (Debian and Ubuntu have it in the package {package})"
    return None


def has_triton() -> bool:
    """Whether Triton is there and lets a kernel have tuples as arguments; PyTorch has such a version since 2.7."""
    try:
        return tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 3)
    except metadata.PackageNotFoundError:
        return False


def keep_compiled(folder: Path) -> None:
    """Cache what torch.compile produces in ``folder``, for later runs; call this before anything is compiled.

    Every kind of processor has a folder of its own in there: code is compiled for its instructions, and torch.compile
    would hand it to other machines that share the folder. A place that the user chose by the environment stays.
    """
    variable = "TORCHINDUCTOR_CACHE_DIR"
    # PyTorch sets it, too, to its default in the temporary folder, for this process and all that it starts.
    if not Path(os.environ.get(variable, "torchinductor_")).name.startswith("torchinductor_"):
        return
    about = ("vendor_id", "model name", "flags", "CPU implementer", "CPU part", "Features")
    said = [_processor().get(name, "") for name in about] + [platform.processor(), platform.machine()]
    kind = hashlib.sha256("\n".join(said).encode()).hexdigest()[:8]
    os.environ[variable] = str(folder.absolute() / kind)


def keep_heap_pages() -> bool:
    """Keep freed pages in the process (Linux, glibc): mapping them again costs more than the arithmetic on them.

    This affects the whole process, so entry points call it, before the first large allocation. Returns whether it took
    effect.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8  # malloc.h's names for mallopt
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 << 20), (arena_max, 1))
    return all([libc.mallopt(parameter, value) for parameter, value in settings])
