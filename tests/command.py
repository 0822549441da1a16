"""The command line for tests: composed, planned, or run as a process of its own that may be killed."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, popen_forkserver
from pathlib import Path
from typing import Any, BinaryIO

import hydra
import torch
from omegaconf import DictConfig
from torch.distributed import TCPStore

from hmn import config
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.config import Config
from hmn.data import datasets
from hmn.plan import Plan, make_plan
from hmn.seeding import generator
from hmn.session import Session
from hmn.sweeps.attempt import PARENT
from hmn.tracking import Tracker

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
WAIT_SECONDS = 120.0  # for what takes a second or two on an idle machine

# All stages of a run, within a second.
TINY = ("debug=smoke", "network.width=4", "compute.threads=1", "compute.device=cpu", "tracking=disabled")

config.register()
# Importing torch takes seconds, so the server that processes are forked from does it once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["hmn.cli", "sklearn.datasets", "torch._dynamo", "tests.warm"])
_started = itertools.count()
_starting = threading.Lock()

_poll, _reading = popen_forkserver.Popen.poll, threading.Lock()


def _poll_in_turn(popen: popen_forkserver.Popen, flag: int = os.WNOHANG) -> int | None:
    """Poll in one thread at a time: every start polls all processes, and the second reader of an exit code got 255."""
    if popen.returncode is None and not connection.wait([popen.sentinel], 0 if flag == os.WNOHANG else None):
        return None
    with _reading:
        return _poll(popen, flag)


popen_forkserver.Popen.poll = _poll_in_turn


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


@functools.cache
def configured(*overrides: str) -> Config:
    return config.from_hydra(compose(*overrides))


def planned(*overrides: str) -> Plan:
    return make_plan(configured(*overrides), typed=overrides)


def session_of(plan: Plan, folder: Path, device: torch.device | str = "cpu") -> Session:
    """The stages of the run of ``plan``, which keep everything in ``folder``."""
    data = datasets.load(plan.config.dataset, Path("absent"), generator(0, "split")).to(torch.device(device))
    compute, checkpoints = Compute(torch.device(device)), Checkpoints(folder / "checkpoints", 60.0)
    return Session(plan, data, compute, checkpoints, Tracker(folder), folder, {"code": "c"})


@dataclass(frozen=True)
class Outcome:
    code: int  # as in a shell: 128 + the signal's number for a killed process
    out: str
    err: str
    files: list[str] = field(repr=False)  # all below the folder it ran in

    @property
    def complaint(self) -> str:
        """The one line on stderr; fails the test unless there is exactly one."""
        (line,) = self.err.splitlines()
        return line


@functools.cache
def _start_server() -> None:
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()


def serve() -> None:
    """Start the server before any process, in the project's folder, where it finds ``tests.warm``."""
    with _starting:
        _start_server()


class Command:
    """A started ``python run.py ARGUMENTS`` in ``folder``, or another ``program``."""

    def __init__(
        self, folder: Path, arguments: Sequence[str], environment: Mapping[str, str], program: Path = ROOT / "run.py"
    ) -> None:
        self.folder = folder
        # Beside the folder, because tests count the files in it.
        self._outputs = folder.with_name(f"{folder.name}.output-{next(_started)}")
        self._outputs.mkdir()
        for name in ("out", "err"):
            (self._outputs / name).touch()
        self.process = processes.Process(
            target=_run,
            args=(str(program), str(folder), list(arguments), str(self._outputs), dict(environment)),
            daemon=True,
        )
        serve()
        self.process.start()

    def finish(self) -> Outcome:
        self.process.join(WAIT_SECONDS)
        assert not self.process.is_alive(), "still running"
        code = self.process.exitcode
        return Outcome(code if code >= 0 else 128 - code, *self.outputs(), files_below(self.folder))

    def outputs(self) -> tuple[str, str]:
        """Its stdout and stderr so far."""
        out, err = ((self._outputs / name).read_text() for name in ("out", "err"))
        return out, err

    def wait_for(self, seen: Callable[[], bool]) -> None:
        """Wait until ``seen()`` holds or the process has ended."""
        until = time.monotonic() + WAIT_SECONDS
        while not seen() and self.process.is_alive():
            assert time.monotonic() < until, "waited in vain"
            time.sleep(0.001)


class Forked:
    """Replaces ``subprocess.Popen`` for a sweep's runs by a fork of a process that has imported torch."""

    def __init__(
        self, command: Sequence[str], *, cwd: str, env: Mapping[str, str], stdout: BinaryIO, **_unused: object
    ) -> None:
        _, program, *arguments = command
        environment = {name: value for name, value in env.items() if os.environ.get(name) != value and name != PARENT}
        self._command, self._log = Command(Path(cwd), arguments, environment, Path(program)), stdout

    @property
    def returncode(self) -> int | None:
        return self._command.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._command.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("run.py", timeout)
        if not self._log.closed:
            self._log.write("".join(self._command.outputs()).encode())
        return self.returncode

    def terminate(self) -> None:
        self._command.process.terminate()

    def kill(self) -> None:
        self._command.process.kill()


def start(folder: Path, *arguments: str, **environment: str) -> Command:
    return Command(folder, arguments, environment)


@contextlib.contextmanager
def meeting(count: int) -> Iterator[list[dict[str, str]]]:
    """The environments that torchrun gives to ``count`` processes; within the block they find each other."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    yield [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@contextlib.contextmanager
def start_several(folder: Path, count: int, *arguments: str) -> Iterator[list[Command]]:
    """Start ``torchrun --nproc-per-node COUNT run.py ARGUMENTS``, without torchrun's own imports and report."""
    with meeting(count) as environments:
        yield [start(folder, *arguments, **environment) for environment in environments]


def run_several(folder: Path, count: int, *arguments: str) -> list[Outcome]:
    with start_several(folder, count, *arguments) as commands:
        return [command.finish() for command in commands]


def run(folder: Path, *arguments: str, **environment: str) -> Outcome:
    return start(folder, *arguments, **environment).finish()


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files and folders below ``folder``."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _run(program: str, folder: str, arguments: list[str], outputs: str, environment: dict[str, str]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(outputs, name), os.O_WRONLY), descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None  # inherited from the server; reset so that TMPDIR counts
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process does not run them
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError):
                stream.flush()


def changed(config: Config, **values: Any) -> Config:
    """``config`` with some values changed; the key ``section__field`` stands for ``section.field``."""
    sections: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.partition("__")
        if name:
            value = dataclasses.replace(sections.get(section, getattr(config, section)), **{name: value})
        sections[section] = value
    return dataclasses.replace(config, **sections)
