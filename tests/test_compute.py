"""Device, precision and compilation: what is chosen, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmn import compute
from hmn.compute import Compute, choose, device_of
from hmn.config import ComputeConfig
from hmn.errors import ConfigError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Make torch see so many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch):
    """Make only these programs findable."""

    def see(*names: str) -> None:
        monkeypatch.setattr(compute.shutil, "which", lambda name: f"/bin/{name}" if name in names else None)

    return see


# Devices


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_this_machine_lacks_is_refused(gpus, name: str, count: int):
    gpus(count)
    with pytest.raises(ConfigError) as raised:
        device_of(ComputeConfig(device=name))
    assert str(raised.value) == f"compute.device={name}: must be cpu or auto: this machine has no such GPU"
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "count", "device"),
    [("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cpu", 1, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_auto_takes_a_gpu_where_there_is_one_and_any_other_device_is_taken_at_its_word(gpus, name, count, device):
    gpus(count)
    assert device_of(ComputeConfig(device=name)) == torch.device(device)


# Networks together


@pytest.mark.parametrize(
    ("device", "asked", "of_ten"),
    [("cpu", None, 1), ("cuda", None, 10), ("cuda:1", None, 10), ("cpu", 4, 4), ("cuda", 4, 4), ("cuda", 40, 10)],
)
def test_a_gpu_trains_all_networks_at_once_and_a_cpu_one_after_another_unless_told(gpus, device, asked, of_ten):
    gpus(2)
    chosen = choose(ComputeConfig(device=device, networks_together=asked), 0)
    assert chosen.together(10) == of_ten
    assert chosen.together(1) == 1


# Compiling

WORTH_IT = {"cpu": 600 * 2e11, "cuda": 600 * 1e13}  # ten minutes of eager code: five times what compiling takes


@pytest.mark.parametrize("device", WORTH_IT)
def test_auto_compiles_what_would_run_for_more_than_ten_minutes(gpus, compilers, device: str):
    gpus(1)
    compilers("g++")
    config = ComputeConfig(device=device)
    assert not choose(config, 0.99 * WORTH_IT[device]).compiled
    assert choose(config, 1.01 * WORTH_IT[device]).compiled


@pytest.mark.parametrize("flops", [0.0, 1e20])
def test_a_choice_other_than_auto_is_kept_whatever_it_costs(compilers, flops: float):
    compilers("clang++")
    assert not choose(ComputeConfig(device="cpu", matching="loop"), flops).compiled
    assert choose(ComputeConfig(device="cpu", matching="compiled"), flops).compiled


def test_compiling_without_a_compiler_is_refused_and_auto_does_without(compilers):
    compilers()
    with pytest.raises(ConfigError) as raised:
        choose(ComputeConfig(device="cpu", matching="compiled"), 0)
    assert str(raised.value) == "compute.matching=compiled: must be loop or auto: no C++ compiler was found"
    assert not choose(ComputeConfig(device="cpu"), 1e20).compiled


@pytest.mark.parametrize("name", ["g++", "clang++", "c++"])
def test_any_of_the_usual_compilers_will_do(compilers, name: str):
    compilers(name)
    assert choose(ComputeConfig(device="cpu"), 1e20).compiled


def test_a_gpu_needs_no_cpp_compiler(gpus, compilers):
    gpus(1)
    compilers()
    assert choose(ComputeConfig(device="cuda", matching="compiled"), 0).compiled


def test_only_a_compiling_run_wraps_functions(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or "compiled")
    assert Compute(CPU).maybe_compile(len) is len
    assert Compute(CPU, compiled=True).maybe_compile(len) == "compiled"
    assert asked == [{"fullgraph": True, "dynamic": False}]


# Precision, threads, memory


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_convolutions_and_nothing_stored(precision: str, dtype: torch.dtype):
    chosen = choose(ComputeConfig(device="cpu", precision=precision), 0)
    convolution = torch.nn.Conv2d(1, 1, 3)
    with chosen.autocast():
        assert convolution(torch.ones(1, 1, 4, 4)).dtype == dtype
    assert convolution(torch.ones(1, 1, 4, 4)).dtype == convolution.weight.dtype == torch.float32


def test_the_number_of_threads_is_the_configured_one():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        choose(ComputeConfig(device="cpu", threads=2), 0)
        assert torch.get_num_threads() == 2
        choose(ComputeConfig(device="cpu"), 0)  # null leaves it
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_peak_bytes_on_a_cpu_are_the_most_this_process_ever_held():
    kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    assert Compute(CPU).peak_bytes() == pytest.approx(1024 * kilobytes, rel=0.05)


# The fewest page faults of several equal, large, freed allocations; without the setting each has 16,385.
FAULTS = """
import resource
import torch
from hmn.compute import keep_heap_pages
assert keep_heap_pages()
torch.set_num_threads(1)
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20).add_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_heap_pages_are_used_again_without_a_page_fault():
    """In a process of its own, as the setting cannot be taken back."""
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10


def test_a_system_without_glibc_is_told_so(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(compute.ctypes, "CDLL", absent)
    assert compute.keep_heap_pages() is False
