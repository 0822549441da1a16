"""Launchers, which run a sweep's runs as processes on this machine, a Ray cluster or SLURM.

A launcher is a generator function ``launch(tasks, settings)`` that yields one outcome per task, in the order in which
they end. Closing it stops the runs, so that the same sweep can continue later, and returns once all have ended.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
from collections.abc import Generator, Iterator, Sequence

from hmn.config import LauncherConfig
from hmn.stop import handled_by
from hmn.sweeps.attempt import Outcome, Task

Launched = Generator[Outcome, None, None]


def launch(tasks: Sequence[Task], settings: LauncherConfig) -> Launched:
    """Run the launcher that ``settings`` belong to. Only the module named after it imports its engine."""
    return importlib.import_module(f"{__name__}.{settings.name}").launch(tasks, settings)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay a stop signal until after the block, so that none arrives between starting runs and recording them.

    If the block fails, the signal is dropped. Blocking the signal would not be enough: another thread may receive it,
    and its handler runs in this thread.
    """
    came: list[int] = []
    with handled_by(lambda signum, _frame: came.append(signum)):
        yield
    for signum in came[:1]:
        signal.raise_signal(signum)
