"""Where the runs of a sweep are processes.

A launcher is a generator function ``launch(tasks, settings)`` that yields one outcome per task, in the order in which
they end. Closing it stops what runs, so that the same sweep can go on later, and returns once nothing runs any more.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence

from hmn.config import LauncherConfig
from hmn.sweeps.attempt import Outcome, Task

Launched = Generator[Outcome, None, None]


def launch(tasks: Sequence[Task], settings: LauncherConfig) -> Launched:
    """The launcher that ``settings`` are of: the module of its name, which alone imports its engine."""
    return importlib.import_module(f"{__name__}.{settings.name}").launch(tasks, settings)
