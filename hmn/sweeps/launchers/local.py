"""Runs as processes on this machine, each alone in its device slot.

All sweeps of a user share the slots; within a SLURM job, which has devices of its own, all sweeps of that job.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hmn.config.checks import require
from hmn.config.sweeps import LocalConfig
from hmn.sweeps.attempt import POLL_SECONDS, Task, attempt
from hmn.sweeps.launchers import Launched

PATIENCE_SECONDS = 10.0  # before it is reported what is waited for
WAITING = "waiting for the run in this slot, which is of another sweep or still saving its state"


@dataclass(frozen=True)
class Slot:
    name: str
    environment: dict[str, str]

    @contextlib.contextmanager
    def taken(self, stop: threading.Event) -> Iterator[int | None]:
        """Wait for the slot and yield the descriptor that holds it: the slot is free again once no process has it open.

        Yields ``None`` if ``stop`` is set before the slot is free.
        """
        owner = [str(os.getuid()), *filter(None, [os.environ.get("SLURM_JOB_ID")])]
        folder = Path(tempfile.gettempdir()) / "-".join(["hmn-slots", *owner])
        folder.mkdir(exist_ok=True, mode=0o700)
        with (folder / self.name).open("a") as lock:
            begun, said = time.monotonic(), False
            while not stop.is_set():
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if not said and time.monotonic() - begun > PATIENCE_SECONDS:
                    sys.stderr.write(f"{self.name}: {WAITING}\n")  # in one write, as other slots may print the same
                    said = True
                stop.wait(POLL_SECONDS)
            yield None if stop.is_set() else lock.fileno()


def slots(settings: LocalConfig) -> list[Slot]:
    gpus = _gpus() if settings.gpus is None else _gpus()[: settings.gpus]
    unused, used = ("slots", "slots_per_gpu") if gpus else ("slots_per_gpu", "slots")
    given = getattr(settings, unused)
    require(f"launcher.{unused}", given == 1, given, f"1 {'with' if gpus else 'without'} GPUs: set launcher.{used}")
    names = [(f"gpu{gpu}-{place}", gpu) for place in range(settings.slots_per_gpu) for gpu in gpus]
    names = names or [(f"cpu-{place}", "") for place in range(settings.slots)]
    threads = settings.threads or max(1, _cores() // len(names))
    return [Slot(name, {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}) for name, gpu in names]


def _cores() -> int:
    """The number of cores that this process may use, or of all cores if the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # allocates no memory on them
    return visible.split(",")[:count] if visible is not None else [str(number) for number in range(count)]


def launch(tasks: Sequence[Task], settings: LocalConfig) -> Launched:
    """One thread per slot takes the tasks in order. Raises ``ConfigError`` for GPUs that this machine lacks."""
    has = len(_gpus())
    require("launcher.gpus", (settings.gpus or 0) <= has, settings.gpus, f"at most {has}, what this machine has")
    stop, outcomes, waiting = threading.Event(), queue.SimpleQueue(), deque(tasks)

    def work(slot: Slot) -> None:
        try:
            while waiting and not stop.is_set():
                with slot.taken(stop) as descriptor:
                    if descriptor is None or (task := next_task()) is None:
                        return
                    outcome, seen = attempt(task, slot.environment, stop, keep_open=[descriptor]), threading.Event()
                    outcomes.put((outcome, seen))
                # The outcome may end the sweep, so the next run begins only after it was seen.
                while not stop.is_set() and not seen.wait(POLL_SECONDS):
                    pass
        except Exception as error:  # would otherwise go unnoticed, and the sweep would wait forever
            outcomes.put((error, threading.Event()))

    def next_task() -> Task | None:
        with contextlib.suppress(IndexError):  # another slot took the last one
            return waiting.popleft()
        return None

    threads = [threading.Thread(target=work, args=(slot,)) for slot in slots(settings)]
    try:
        for thread in threads:
            thread.start()
        for _ in tasks:
            outcome, seen = outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
            seen.set()
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:  # a signal may arrive before all are started
                thread.join()
