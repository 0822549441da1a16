"""Stands in for ``run.py`` where only how it is started and ended matters: ``program.py FOLDER WHAT [ARGUMENT]``.

Leaves a line per event in ``events`` of the folder that all runs are started in.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

NAMES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def note(event: str) -> None:
    known = {name: os.environ.get(name) for name in NAMES}
    line = {"event": event, "run": sys.argv[1], "pid": os.getpid(), "worker": os.getppid(), **known}
    with open("events", "a") as file:
        file.write(json.dumps(line) + "\n")


def wait_for(path: str) -> None:
    """Gives up once its parent is gone: another one does the run by then."""
    while not Path(path).exists() and os.getppid() == int(os.environ["HMN_PARENT"]):
        time.sleep(0.02)


def save_and_end(signum: int, _frame: object) -> None:
    for other in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(other, signal.SIG_IGN)
    note("saved")
    sys.exit(128 + signum)


for stopping in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(stopping, save_and_end)
note("start")
what, *arguments = sys.argv[2:]
if what == "fail":
    raise ValueError(f"{arguments[0]}\nand more")
if what == "wait":
    wait_for(arguments[0])
time.sleep(0.3)  # in which one that should not run beside this one would be seen
print(f"output of {sys.argv[1]}")
note("stop")
