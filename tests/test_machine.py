"""What is known of a machine, and where it keeps compiled code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmn import machine
from tests.command import ROOT

CPUINFO = "processor : 0\nvendor_id : GenuineIntel\nmodel name : Xeon\nflags : avx2 {}\ncpu MHz : {}\n\nprocessor : 1\n"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch):
    """Where compiled code is kept, if that is asked to be in the folder and the environment says a place or none."""

    def place(folder: Path, cpuinfo: str = CPUINFO.format("", 2000), given: str | None = None) -> str | None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if given is not None:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        monkeypatch.setattr(machine.Path, "read_text", lambda self, encoding: cpuinfo)
        machine.keep_compiled(folder)
        return machine.os.environ.get("TORCHINDUCTOR_CACHE_DIR")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that monkeypatch undoes what is set here
    return place


def test_compiled_code_is_kept_where_asked_unless_the_user_has_said_where(kept, tmp_path: Path):
    place = kept(tmp_path / "here")
    assert Path(place).parent == tmp_path / "here"
    assert kept(tmp_path / "here", given=str(tmp_path / "mine")) == str(tmp_path / "mine")
    # PyTorch has said it, in this process or in one that started it
    assert kept(tmp_path / "here", given="/tmp/torchinductor_somebody") == place


def test_compiled_code_is_kept_apart_for_every_kind_of_processor(kept, tmp_path: Path):
    places = {kept(tmp_path, CPUINFO.format(flags, 2000)) for flags in ("", "avx512f", "avx512f amx_tile")}
    assert len(places) == 3
    assert kept(tmp_path, CPUINFO.format("avx512f", 3999.9)) in places  # today's clock does not make another kind


COMPILED = """
import sys
from hmn import machine
from hmn.compute import Compute
import torch
import torch._dynamo  # sets the variable as it is imported
machine.keep_compiled(machine.Path(sys.argv[1]))
step = Compute(torch.device("cpu"), compiled=True).maybe_compile(lambda a: (a * 2).sin())
step(torch.ones(3))
"""


@pytest.mark.skipif(machine.lacking_to_compile(on_gpu=False) is not None, reason="no compiler")
def test_compiled_code_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    subprocess.run([sys.executable, "-c", COMPILED, str(tmp_path / "kept")], cwd=ROOT, check=True)
    assert list((tmp_path / "kept").rglob("*.so"))
    assert not list((tmp_path / "temporary").rglob("*.so"))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux tells")
def test_a_processor_is_known_by_what_is_said_of_the_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(machine.Path, "read_text", lambda self, encoding: CPUINFO.format("", 1))
    assert machine.cpu_name() == "Xeon, AVX2"


def test_a_cpu_is_named_with_its_threads():
    assert machine.device_name(torch.device("cpu")) == f"{machine.cpu_name()}, {torch.get_num_threads()} threads"


@pytest.mark.parametrize(
    ("capability", "cpuinfo", "pays"),
    [
        ("AVX512", "vendor_id : GenuineIntel", False),
        ("AVX512", "vendor_id : AuthenticAMD", True),
        ("AVX2", "vendor_id : GenuineIntel", True),
        ("DEFAULT", "CPU implementer : 0x41", True),
    ],
)
def test_winograd_s_convolutions_are_not_taken_where_direct_ones_are_as_fast(monkeypatch, capability, cpuinfo, pays):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.Path, "read_text", lambda self, encoding: cpuinfo)
    assert machine.winograd_pays() == pays


# Memory


# Prints the fewest page faults of several equal, large allocations that are freed; each has 16,385 otherwise.
FAULTS = """
import resource
import torch
from hmn.machine import keep_heap_pages
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
    """It runs in its own process, because the setting cannot be undone."""
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10


def test_a_system_without_glibc_is_told_so(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", absent)
    assert machine.keep_heap_pages() is False
