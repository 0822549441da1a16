"""Stand-in for ``run.py`` where only its start and end matter: ``program.py FOLDER WHAT [ARGUMENT]``.

It appends one line per event to the file ``events`` in the folder that all runs are started in.
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
    """Wait until ``path`` exists, or until the parent is gone: another process does the run by then."""
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
time.sleep(0.3)  # long enough to notice a run that should not overlap with this one
print(f"output of {sys.argv[1]}")
note("stop")
