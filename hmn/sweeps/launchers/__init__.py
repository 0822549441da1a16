"""Where the runs of a sweep are processes.

A launcher is a generator function ``launch(tasks, settings)`` that yields one outcome per task, in the order in which
they end. Closing it stops what runs, so that the same sweep can go on later, and returns once nothing runs any more.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
from collections.abc import Generator, Iterator, Sequence

from hmn.config import LauncherConfig
from hmn.errors import STOP_SIGNALS
from hmn.sweeps.attempt import Outcome, Task

Launched = Generator[Outcome, None, None]


def launch(tasks: Sequence[Task], settings: LauncherConfig) -> Launched:
    """The launcher that ``settings`` are of: the module of its name, which alone imports its engine."""
    return importlib.import_module(f"{__name__}.{settings.name}").launch(tasks, settings)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A signal to stop comes after the block, unless that fails: not between having runs begin and knowing of them.

    Blocking is not enough, as another thread may be given the signal, and its handler runs in this one.
    """
    came: list[int] = []
    handlers = {one: signal.signal(one, lambda signum, _frame: came.append(signum)) for one in STOP_SIGNALS}
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    for signum in came[:1]:
        signal.raise_signal(signum)
