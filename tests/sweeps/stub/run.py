"""Stand-in for run.py in tests of sweeps: its locks, files, signals and exit codes, in a few hundredths of a second.

It finds its folder by its log. It records what it does in ``ledger`` in the folder STUB, and reads from
``orders.json`` there, by its seed, which bad luck it has:

- ``hang``: at this step, wait until the file ``go`` or ``go-SEED`` exists or a signal asks it to stop
- ``deaf``: ignore SIGTERM and SIGINT
- ``slow``: when asked to stop, wait for the file ``stop`` first
- ``fail``: [step, line on stderr, exit code]; with ``times``, only the first ``times`` attempts fail
- ``code``: the code version that its result names
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from hmn.sweeps.attempt import end_with_parent  # noqa: E402  (which imports no torch)

STEPS = 4
FOLDER = Path(os.readlink("/proc/self/fd/1")).parent
STUB = Path(os.environ["STUB"])
SETTINGS = dict(argument.split("=", 1) for argument in sys.argv[1:])
SEED = SETTINGS.get("seed", "0")


def note(event: object) -> None:
    with (STUB / "ledger").open("a") as ledger:  # a single write, so the line is appended whole
        ledger.write(json.dumps({"seed": SEED, "pid": os.getpid(), "event": event}) + "\n")


def replaced(path: Path, kept: object) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(kept))
    temporary.replace(path)


def leave(line: str, code: int) -> None:
    note(f"exit {code}")
    print(line, file=sys.stderr)
    sys.exit(code)


def held(path: Path) -> int | None:
    """The descriptor of a lock that is now ours, or ``None`` if another process holds it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return descriptor


def slot() -> str:
    """The name of the slot whose lock this process inherited."""
    opened = {path.readlink() for path in Path("/proc/self/fd").iterdir() if path.exists()}
    (name,) = {path.name for path in opened if "hmn-slots" in str(path)}
    return name


def main() -> None:
    asked: list[int] = []
    end_with_parent()
    orders = json.loads((STUB / "orders.json").read_text()).get(SEED, {})
    attempts = sum(f'"seed": "{SEED}"' in line and '"begin"' in line for line in (STUB / "ledger").open())
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, _: None if orders.get("deaf") else asked.append(signum))
    if held(FOLDER / ".lock") is None:
        leave(f"{FOLDER}: another process is working on this run; wait for it or stop it", 75)
    if (FOLDER / "result.json").exists():
        leave("is finished: this is its saved result", 0)
    note("begin")
    if held(STUB / f"inside-{slot()}") is None:
        note("two in a slot")
    kept = FOLDER / "checkpoints" / "condense.pt"
    state = json.loads(kept.read_text()) if kept.exists() else {"step": 0, "sum": ""}
    while state["step"] < STEPS:
        step = state["step"]
        if orders.get("hang") == step and not asked:
            note("hangs")
            while not asked and not any((STUB / name).exists() for name in ("go", f"go-{SEED}")):
                time.sleep(0.005)
        if asked:
            if orders.get("slow"):
                note("is asked to stop")
            while orders.get("slow") and not (STUB / "stop").exists():
                time.sleep(0.005)
            leave(f"stopped by {signal.Signals(asked[0]).name}; the same command resumes from here", 128 + asked[0])
        if "fail" in orders and orders["fail"][0] == step and attempts < orders.get("times", 1000):
            leave(*orders["fail"][1:])
        state = {"step": step + 1, "sum": hashlib.sha256(f"{state['sum']} {SEED} {step}".encode()).hexdigest()}
        note(step)
        with (FOLDER / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"condense/step": step + 1, "condense/steps_per_second": 2.0}) + "\n")
        replaced(kept, state)
    for name, text in json.loads(os.environ.get("STUB_KEPT", "{}")).items():  # the files of a kept set
        (FOLDER / name).write_text(text.replace("SUM", state["sum"]))
    result = {
        "schema_version": 1,
        "run_id": FOLDER.name,
        "mode": SETTINGS.get("mode", "run"),
        "accuracy": {"mean": int(state["sum"][:4], 16) / 0x10000, "std": None},
        "images_per_class": "1",
        "stored_floats": 640,
        "wall_seconds": {"condense": 2.0},
        "artifact_sha256": state["sum"],
        "code": orders.get("code", os.environ["STUB_CODE"]),
    }
    replaced(FOLDER / "result.json", result)
    kept.unlink()
    note("done")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        note(f"OSError {error.errno}")
        leave("no space left on the disk: free some, and the same command resumes from the last checkpoint", 1)
