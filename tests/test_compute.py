"""Device, precision and compilation: what is chosen, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hmn import compute, machine, winograd
from hmn.compute import Compute, choose, device_of
from hmn.config import ComputeConfig
from hmn.errors import ConfigError

ROOT = Path(__file__).parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # some sandboxes lack either
peaks_begin_anew = pytest.mark.skipif(
    not (os.access(CLEAR, os.W_OK) and "VmHWM" in STATUS.read_text()), reason="the system's peaks cannot begin anew"
)
CPU = torch.device("cpu")
WINOGRAD_REFUSED = "compute.convolutions=winograd: must be auto or direct, but for compiled fp32 on a CPU"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes torch see ``count`` GPUs; it returns the devices made current, as a list."""
    current: list[torch.device] = []

    def see(count: int, generation: int = 9) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generation))
        return current

    return see


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only file that is found as Python's header."""
    file = tmp_path / "include" / "Python.h"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda *_: str(file.parent))
    for name in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    return file


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch, headers: Path):
    """Return a function that makes only the named programs findable."""

    def see(*names: str) -> None:
        monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}" if name in names else None)

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


def test_a_gpu_that_is_named_is_the_current_one_which_streams_and_graphs_are_made_on(gpus):
    current = gpus(2)
    choose(ComputeConfig(device="cuda:1"), 0, 10)
    assert current == [torch.device("cuda:1")]


# Networks together


@pytest.mark.parametrize(
    ("device", "asked", "of_ten"),
    [("cpu", None, 1), ("cuda", None, 10), ("cuda:1", None, 10), ("cpu", 4, 4), ("cuda", 4, 4), ("cuda", 40, 10)],
)
def test_a_gpu_trains_all_networks_at_once_and_a_cpu_one_after_another_unless_told(gpus, device, asked, of_ten):
    gpus(2)
    chosen = choose(ComputeConfig(device=device, networks_together=asked), 0, 10)
    assert chosen.together(10) == of_ten
    assert chosen.together(1) == 1


# Compiling

WORTH_IT = {"cpu": 600 * 2e11, "cuda": 600 * 1e13}  # ten minutes of eager code: five times what compiling takes


@pytest.mark.parametrize("device", WORTH_IT)
def test_auto_compiles_what_would_run_for_more_than_ten_minutes(gpus, compilers, device: str):
    gpus(1)
    compilers("g++", "gcc")
    config = ComputeConfig(device=device)
    assert not choose(config, 0.99 * WORTH_IT[device], 10).compiled
    assert choose(config, 1.01 * WORTH_IT[device], 10).compiled


@pytest.mark.parametrize("flops", [0.0, 1e20])
def test_a_choice_other_than_auto_is_kept_whatever_it_costs(compilers, flops: float):
    compilers("clang++")
    assert not choose(ComputeConfig(device="cpu", matching="loop"), flops, 10).compiled
    assert choose(ComputeConfig(device="cpu", matching="compiled"), flops, 10).compiled


@pytest.mark.parametrize(("device", "language", "other"), [("cpu", "C++", "gcc"), ("cuda", "C", "g++")])
def test_compiling_without_a_compiler_is_refused_and_auto_does_without(gpus, compilers, device, language, other):
    gpus(1)
    compilers(other)
    with pytest.raises(ConfigError) as raised:
        choose(ComputeConfig(device=device, matching="compiled"), 0, 10)
    assert str(raised.value) == f"compute.matching=compiled: must be loop or auto: no {language} compiler was found"
    found = choose(ComputeConfig(device=device), 1e20, 10)
    assert (found.compiled, found.lacking) == (False, f"no {language} compiler was found")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere Python comes with its headers")
@pytest.mark.parametrize(("device", "variable"), [("cpu", "CPLUS_INCLUDE_PATH"), ("cuda", "C_INCLUDE_PATH")])
def test_compiling_needs_pythons_headers_where_a_compiler_looks(
    gpus, compilers, headers, monkeypatch, tmp_path, device, variable
):
    gpus(1)
    compilers("g++", "gcc")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    headers.rename(elsewhere / "Python.h")
    with pytest.raises(ConfigError, match=r"^compute.matching=compiled: must be loop or auto: Python.h was not found"):
        choose(ComputeConfig(device=device, matching="compiled"), 0, 10)
    found = choose(ComputeConfig(device=device), 1e20, 10)
    assert not found.compiled
    assert found.lacking.startswith("Python.h was not found")
    assert choose(ComputeConfig(device=device), 0, 10).lacking is None  # it would not have compiled
    assert choose(ComputeConfig(device=device, matching="loop"), 1e20, 10).lacking is None
    for name in ("CPATH", variable):
        monkeypatch.setenv(name, f"/nowhere:{elsewhere}")
        assert choose(ComputeConfig(device=device), 1e20, 10).compiled
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", name) for name in ("g++", "clang++", "c++")] + [("cuda", name) for name in ("gcc", "clang", "cc")],
)
def test_any_of_the_usual_compilers_will_do(gpus, compilers, device: str, name: str):
    gpus(1)
    compilers(name)
    assert choose(ComputeConfig(device=device), 1e20, 10).compiled


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_the_compiler_that_the_environment_names_will_do(gpus, compilers, monkeypatch, device, variable):
    gpus(1)
    compilers("mine")
    assert not choose(ComputeConfig(device=device), 1e20, 10).compiled
    monkeypatch.setenv(variable, "mine")
    assert choose(ComputeConfig(device=device), 1e20, 10).compiled


def test_only_a_compiling_run_wraps_functions(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    assert Compute(CPU).maybe_compile(len) is len
    Compute(CPU, compiled=True).maybe_compile(len)
    Compute(CPU, compiled=True, winograd=True).maybe_compile(len)
    usual = {"fullgraph": True, "dynamic": False}
    assert asked == [usual, usual | {"backend": winograd.backend}]


def test_the_first_call_of_a_compiled_function_is_timed_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compute, "compile_seconds", seconds := [])
    step = Compute(CPU, compiled=True).maybe_compile(lambda a, b: a - b)
    assert [step(5, 3), step(1, 2)] == [2, -1]
    assert len(seconds) == 1 and seconds[0] >= 0


@pytest.mark.parametrize(("size", "images"), [(8, 500), (32, 500), (64, 125), (224, 10), (2048, 1)])
def test_large_images_go_through_in_smaller_chunks(size: int, images: int):
    assert compute.at_once(500, size) == images


# Classes per call


@pytest.mark.parametrize(
    ("device", "matching", "asked", "width"),
    [
        ("cpu", "compiled", None, 1),
        ("cuda", "compiled", None, 10),
        ("cuda", "loop", None, 1),
        ("cpu", "r_operator", 4, 4),
    ],
)
def test_a_cpu_takes_one_class_per_call_and_a_gpu_many(gpus, compilers, device, matching, asked, width):
    gpus(1)
    compilers("g++", "gcc")
    chosen = choose(ComputeConfig(device=device, matching=matching, classes_per_call=asked), 0, 10)
    assert (chosen.matching, chosen.classes_per_call) == (matching, width)


@pytest.mark.parametrize(("classes", "width"), [(1, 1), (20, 20), (21, 11), (100, 20), (101, 17), (200, 20)])
def test_a_gpu_takes_many_classes_in_as_few_equal_calls_as_its_memory_can_be_trusted_with(
    gpus, compilers, classes, width
):
    gpus(1)
    compilers("g++", "gcc")
    assert choose(ComputeConfig(device="cuda", matching="compiled"), 0, classes).classes_per_call == width


def test_a_gpu_of_several_takes_its_own_classes_in_equal_calls(gpus, compilers, monkeypatch):
    gpus(1)
    compilers("g++", "gcc")
    monkeypatch.setattr(compute.distributed, "world", lambda: 8)
    assert choose(ComputeConfig(device="cuda", matching="compiled"), 0, 200).classes_per_call == 13  # and 12, of its 25


def test_where_nothing_can_be_compiled_it_is_not_advised(compilers):
    compilers()
    with pytest.raises(ConfigError, match="^compute.classes_per_call=4: must be 1 for compute.matching=loop$"):
        choose(ComputeConfig(device="cpu", classes_per_call=4), 0, 10)


def test_several_classes_per_call_of_a_loop_that_nobody_named_are_refused_with_what_to_name(compilers):
    compilers("g++")
    message = "must be 1 for compute.matching=loop, which auto chooses here: set compute.matching=compiled"
    with pytest.raises(ConfigError, match=f"^compute.classes_per_call=4: {message}$"):
        choose(ComputeConfig(device="cpu", classes_per_call=4), 0, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"matching": "loop", "classes_per_call": 2},
            "compute.classes_per_call=2: must be 1 for compute.matching=loop",
        ),
        ({"matching": "compiled", "classes_per_call": 11}, "compute.classes_per_call=11: must be at most 10"),
        ({"precision": "tf32"}, "compute.precision=tf32: must be fp32 or bf16 on a CPU"),
        ({"matching": "loop", "convolutions": "winograd"}, WINOGRAD_REFUSED),
        ({"matching": "r_operator", "blocks": "triton"}, "compute.blocks=triton: must be compiler on a CPU"),
    ],
)
def test_what_does_not_go_together_is_refused(compilers, settings, message):
    compilers("g++")
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose(ComputeConfig(device="cpu", **settings), 0, 10)


@pytest.mark.parametrize(("version", "fits"), [("3.10.0+git1", True), ("3.3.0", True), ("3.2.0", False), (None, False)])
def test_a_gpu_has_kernels_of_its_own_where_triton_can_make_them(gpus, compilers, monkeypatch, version, fits):
    def found(name):
        if version is None:
            raise machine.metadata.PackageNotFoundError(name)
        return {"triton": version}[name]

    gpus(1)
    compilers("gcc")
    monkeypatch.setattr(machine.metadata, "version", found)
    settings = ComputeConfig(device="cuda", matching="r_operator", blocks="triton")
    assert choose(replace(settings, blocks="compiler"), 0, 10).blocks == "compiler"
    if fits:
        assert choose(settings, 0, 10).blocks == "triton"
    else:
        refused = "compute.blocks=triton: must be compiler: Triton 3.3 or newer was not found"
        with pytest.raises(ConfigError, match=f"^{re.escape(refused)}$"):
            choose(settings, 0, 10)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_fp32_is_not_tf32_whatever_cudnn_would_do(gpus, precision):
    gpus(1)
    choose(ComputeConfig(device="cuda", precision=precision), 0, 10)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")


@pytest.mark.parametrize(
    ("device", "matching", "precision", "fits"),
    [
        ("cpu", "compiled", "fp32", True),
        ("cpu", "r_operator", "fp32", True),
        ("cpu", "compiled", "bf16", False),
        ("cpu", "loop", "fp32", False),
        ("cuda", "compiled", "fp32", False),
    ],
)
def test_winograd_s_convolutions_are_for_compiled_fp32_on_a_cpu(
    gpus, compilers, monkeypatch, device, matching, precision, fits
):
    gpus(1)
    compilers("g++", "gcc")
    monkeypatch.setattr(compute, "bf16_pays", lambda device: True)
    settings = ComputeConfig(device=device, matching=matching, precision=precision)
    for pays in (False, True):
        monkeypatch.setattr(compute, "winograd_pays", lambda pays=pays: pays)
        assert choose(settings, 0, 10).winograd == (fits and pays)
    assert not choose(replace(settings, convolutions="direct"), 0, 10).winograd
    asked = replace(settings, convolutions="winograd")
    if fits:
        monkeypatch.setattr(compute, "winograd_pays", lambda: False)  # asked for is asked for
        assert choose(asked, 0, 10).winograd
    else:
        with pytest.raises(ConfigError, match=f"^{re.escape(WINOGRAD_REFUSED)}$"):
            choose(asked, 0, 10)


# Precision, threads, memory


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_convolutions_and_nothing_stored(monkeypatch, precision: str, dtype: torch.dtype):
    monkeypatch.setattr(compute, "bf16_pays", lambda device: True)
    chosen = choose(ComputeConfig(device="cpu", precision=precision), 0, 10)
    convolution = torch.nn.Conv2d(1, 1, 3)
    with chosen.autocast():
        assert convolution(torch.ones(1, 1, 4, 4)).dtype == dtype
    assert convolution(torch.ones(1, 1, 4, 4)).dtype == convolution.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("amx", "instructions", "cpuinfo", "precision"),
    [
        (True, True, "vendor_id : GenuineIntel", "bf16"),
        (False, True, "vendor_id : GenuineIntel", "fp32"),
        (False, False, "vendor_id : GenuineIntel", "fp32"),
        (False, True, "vendor_id : AuthenticAMD", "bf16"),
        (False, False, "vendor_id : AuthenticAMD", "fp32"),
    ],
)
def test_bf16_is_fp32_on_an_x86_processor_that_is_no_faster_with_it(
    monkeypatch, amx: bool, instructions: bool, cpuinfo: str, precision: str
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.Path, "read_text", lambda self, encoding: cpuinfo)
    assert choose(ComputeConfig(device="cpu", precision="bf16"), 0, 10).precision == precision


@pytest.mark.parametrize(
    ("kind", "supported", "precision"),
    [("arm64", True, "bf16"), ("arm64", False, "fp32"), ("x86_64", False, "fp32")],
)
def test_bf16_needs_onednn_which_is_enough_on_processors_that_are_not_x86(
    monkeypatch, kind: str, supported: bool, precision: str
):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(machine.platform, "machine", lambda: kind)
    assert choose(ComputeConfig(device="cpu", precision="bf16"), 0, 10).precision == precision


@pytest.mark.parametrize(("generation", "precision"), [(7, "fp32"), (8, "bf16")])
def test_bf16_is_fp32_on_a_gpu_that_only_imitates_it(gpus, generation, precision):
    gpus(1, generation)
    assert choose(ComputeConfig(device="cuda", precision="bf16"), 0, 10).precision == precision


def test_the_number_of_threads_is_the_configured_one():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        choose(ComputeConfig(device="cpu", threads=2), 0, 10)
        assert torch.get_num_threads() == 2
        choose(ComputeConfig(device="cpu"), 0, 10)  # null leaves the number as it is
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_peak_bytes_on_a_cpu_are_the_most_this_process_ever_held(monkeypatch):
    monkeypatch.setattr("hmn.compute._highest", {})  # other tests reset the peak, here and in the system
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        pytest.skip("a sandbox that does not tell")
    kilobytes = int(found[1])
    assert Compute(CPU).peak_bytes() == pytest.approx(1024 * kilobytes, rel=0.05)


def test_where_a_sandbox_does_not_tell_the_peak_the_system_does(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "VmRSS: 5 kB")
    assert Compute(CPU).peak_bytes() > 10**7


@peaks_begin_anew
def test_a_peak_begins_anew_and_the_highest_stays_known():
    compute = Compute(torch.device("cpu"))
    large = torch.ones(32 << 20)
    del large
    before = compute.peak_bytes()
    compute.begin_peak()
    assert compute.recent_peak_bytes() < before - (100 << 20)
    assert compute.peak_bytes() == before


KEPT = """
import torch
from hmn.compute import Compute
from hmn.machine import keep_heap_pages
assert keep_heap_pages()
compute = Compute(torch.device("cpu"))
large = torch.ones(32 << 20)
del large
before = compute.peak_bytes()
compute.begin_peak()
print(before - compute.recent_peak_bytes() > 100 << 20)
"""


@peaks_begin_anew
def test_pages_that_are_kept_though_they_were_freed_are_not_of_the_next_peak():
    found = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "True\n"
