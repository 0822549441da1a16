"""Sweeps for tests: processes that may be killed and whose runs are stubs, and what they leave behind."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hmn import results
from hmn.sweeps.cells import grid
from hmn.sweeps.launchers import local
from hmn.sweeps.planning import plan_cells
from hmn.sweeps.sweep import PLANS, Sweep, of_arguments
from tests.command import WAIT_SECONDS, Command, Outcome

STUB = Path(__file__).with_name("stub")
SETTINGS = ("compute.device=cpu", "tracking=disabled", "launcher.slots=2")
THREE = "seed=0,1,2"
STEPS = 4  # per stub run


@functools.cache
def described(*settings: str) -> Sweep:
    return of_arguments(settings, "")


@functools.cache
def plans(folder: Path) -> str:
    """The cached plans of all seeds that tests use: composing them in every process would take seconds."""
    path = folder / PLANS
    plan_cells(grid([*SETTINGS[:2], "seed=0,1,2,3,4,5,6,7"]), path)
    return path.read_text()


@dataclass
class Launched:
    """One sweep of stub runs in a folder of its own, which can be started any number of times."""

    where: Path
    known: str  # the text of the cached plans
    settings: tuple[str, ...] = (*SETTINGS, THREE)
    program: Path = STUB / "sweep.py"
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in (self.stub, self.temporary, self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        (self.stub / "ledger").touch()
        (self.folder / PLANS).write_text(self.known)
        if not (self.stub / "orders.json").exists():
            self.order({})
        for name, value in (("STUB", self.stub), ("STUB_CODE", results.code_version()), ("TMPDIR", self.temporary)):
            self.environment.setdefault(name, str(value))

    @property
    def stub(self) -> Path:
        return self.where / "stub"

    @property
    def temporary(self) -> Path:
        return self.where / "tmp"

    @property
    def folder(self) -> Path:
        """The sweep's own folder."""
        return self.where / described(*self.settings).folder

    @property
    def folders(self) -> dict[str, Path]:
        """Folders of its runs, by seed."""
        planned = plan_cells(described(*self.settings).cells)
        return {one.cell.labels["seed"]: self.where / one.folder for one in planned}

    def order(self, orders: dict[str, dict[str, Any]]) -> None:
        """Tell the stubs what to do, by seed."""
        (self.stub / "orders.json").write_text(json.dumps(orders))

    def go(self, seed: str | None = None) -> None:
        """Let the hanging stubs continue: all, or that of ``seed``."""
        (self.stub / ("go" if seed is None else f"go-{seed}")).touch()

    def start(self, *more: str, **environment: str) -> Command:
        return Command(self.where, (*self.settings, *more), self.environment | environment, self.program)

    def finish(self, *more: str, **environment: str) -> Outcome:
        return self.start(*more, **environment).finish()

    def ledger(self) -> list[tuple[str, int, Any]]:
        """All (seed, process id, event) in order."""
        lines = (self.stub / "ledger").read_text().splitlines()
        return [(entry["seed"], entry["pid"], entry["event"]) for entry in map(json.loads, lines)]

    def events(self, seed: str | int) -> list[Any]:
        return [event for of, _, event in self.ledger() if of == str(seed)]

    def pids(self) -> set[int]:
        return {pid for _, pid, _ in self.ledger()}

    def hanging(self, *seeds: str) -> Callable[[], bool]:
        """A condition for ``wait_for``: the runs of these seeds hang now."""
        return lambda: all(self.events(seed)[-1:] == ["hangs"] for seed in seeds)

    def table(self) -> dict[str, tuple[float, str]]:
        """Accuracy and kept set of every finished run, by seed."""
        found = {seed: results.read(folder) for seed, folder in self.folders.items()}
        return {seed: (one["accuracy"]["mean"], one["artifact_sha256"]) for seed, one in found.items() if one}

    def steps(self) -> dict[str, list[int]]:
        """All steps that were computed, by seed."""
        found: dict[str, list[int]] = {}
        for seed, _, event in self.ledger():
            if isinstance(event, int):
                found.setdefault(seed, []).append(event)
        return found

    def nothing_is_left_behind(self) -> None:
        """Wait until all its runs have ended, then check that slots and runs are unlocked."""
        wait_until(lambda: not any(map(alive, self.pids())))
        for lock in (*self.temporary.glob("hmn-slots-*/*"), *self.where.glob("runs/**/.lock")):
            with lock.open() as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is taken


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def complaints(outcome: Outcome) -> str:
    """Its stderr, without the lines about waiting on a busy machine."""
    return "".join(line for line in outcome.err.splitlines(True) if not line.rstrip().endswith(local.WAITING))


def wait_until(seen: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not seen():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
