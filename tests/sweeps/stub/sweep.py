"""sweep.py whose runs are processes of the stub beside this file and whose clock jumps by JUMP hours."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from pathlib import Path

from hmn.sweeps import sweep
from hmn.sweeps.attempt import Task
from hmn.sweeps.cli import main

PROGRAM = Path(__file__).with_name("run.py")


def through_stub(task: Task) -> Task:
    return dataclasses.replace(task, program=str(PROGRAM))


def jumping(hours: float, real=time.time):
    """A clock that jumps forward or back by ``hours`` between any two readings."""
    signs = itertools.cycle((1, -1))
    return lambda: real() + next(signs) * hours * 3600


if __name__ == "__main__":
    real_task = sweep._task
    sweep._task = lambda *arguments: through_stub(real_task(*arguments))
    if "JUMP" in os.environ:
        time.time = jumping(float(os.environ["JUMP"]))
    main()
