"""One run of a sweep as a separate process: its log, its retries, and the error it reports if it fails."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmn.errors import Busy, ConfigError
from hmn.stop import STOP_SIGNALS

# Ray and SLURM use a process per run that only waits for the run. To spare it the time and memory of importing torch,
# modules that need torch are imported where they are used.
PROGRAM = Path(__file__).resolve().parents[2] / "run.py"
LOG = "log.txt"
FAILURE = "failure.json"
PARENT = "HMN_PARENT"  # environment variable: the process that a run must not outlive
POLL_SECONDS = 0.1
GRACE_SECONDS = 600.0  # for a run that is asked to stop, to save its state before it is killed


@dataclass(frozen=True)
class Task:
    """A run to be made, as plain values that can be sent to another machine."""

    run_id: str
    folder: str  # of the run, relative to ``directory``
    arguments: tuple[str, ...]  # of the program
    directory: str  # working directory of the run
    max_retries: int = 0
    program: str = str(PROGRAM)

    @property
    def command(self) -> str:
        """The command that repeats the run by hand."""
        return shlex.join(["python", Path(self.program).name, *self.arguments])


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    run_id: str
    status: str  # done, failed, stopped
    attempts: int
    error: str | None = None  # one line


def attempt(
    task: Task,
    environment: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    keep_open: Sequence[int] = (),
) -> Outcome:
    """Make the run and retry it after a failure, from its checkpoint and at most ``task.max_retries`` times.

    Once ``stop`` is set, the run is asked to save its state and end. It inherits the descriptors ``keep_open``.
    """
    stop = stop or threading.Event()
    folder = Path(task.directory, task.folder)
    attempts = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not stop.is_set():
            (folder / FAILURE).unlink(missing_ok=True)
            attempts += 1
            code = _run(task, folder, environment or {}, stop, keep_open)
            if code == 0:
                return Outcome(task.run_id, "done", attempts)
            # Something else asked it to stop. If the run could handle signals by then, it has saved its state.
            if (-code if code < 0 else code - 128) in STOP_SIGNALS:
                break
            if code == Busy.exit_code:  # another process makes the same run: its result serves as well
                attempts -= 1
                _wait_for_other(folder, stop)
            elif not stop.is_set() and (code == ConfigError.exit_code or attempts > task.max_retries):
                return _failed(task, folder, attempts, _reason(code, folder / LOG), code)
    except OSError as error:  # on a full disk, the log is the first to fail
        return _failed(task, folder, attempts, f"{type(error).__name__}: {error}", None)
    return Outcome(task.run_id, "stopped", attempts)


def end_with_parent() -> None:
    """On Linux, send this process SIGTERM when the process that started it for a sweep ends, in whatever way.

    On other systems a run outlives a killed launcher, and the next launcher waits for it.
    """
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):  # the parent ended before the call above
        os.kill(os.getpid(), signal.SIGTERM)


def _run(
    task: Task, folder: Path, environment: Mapping[str, str], stop: threading.Event, keep_open: Sequence[int]
) -> int:
    """Run one process and return its exit code, negative if a signal killed it."""
    unbuffered = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30", PARENT: str(os.getpid())}
    with (folder / LOG).open("ab") as log:
        log.write(f"\n$ {task.command}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, task.program, *task.arguments],
            cwd=task.directory,
            env={**os.environ, **unbuffered, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes to the launcher alone, which asks its runs to stop
            pass_fds=keep_open,
        )
        try:
            while not stop.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL_SECONDS)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(GRACE_SECONDS)
        finally:  # leave no run behind, whatever happens
            process.kill()
            process.wait()
        return process.returncode


def _wait_for_other(folder: Path, stop: threading.Event) -> None:
    from hmn.files import held

    while held(folder) and not stop.wait(POLL_SECONDS):
        pass


def lost(task: Task, error: str) -> Outcome:
    """Record a run as failed whose worker or job is gone, so that no attempt could report how it ended."""
    return _failed(task, Path(task.directory, task.folder), 1, error, None)


def _failed(task: Task, folder: Path, attempts: int, error: str, code: int | None) -> Outcome:
    from hmn.files import write_json
    from hmn.results import code_version

    kept = {
        "run_id": task.run_id,
        "error": error,
        "exit_code": code,
        "attempts": attempts,
        "command": task.command,
        "code": code_version(),
    }
    try:
        write_json(folder / FAILURE, kept)
    except OSError as unkept:  # most often the disk is full, which the run itself may not have been able to report
        return Outcome(task.run_id, "failed", attempts, f"{error} ({FAILURE} could not be written: {unkept.strerror})")
    return Outcome(task.run_id, "failed", attempts, error)


def _reason(code: int, log: Path) -> str:
    """The reason in the log of a failed process: its last line, or the first line of an unexpected exception."""
    if code < 0:
        known = -code in set(signal.Signals)  # most real-time signals have no name
        name = signal.Signals(-code).name if known else f"signal {-code}"
        return f"killed by {name}" + (": most often because the machine ran out of memory" if name == "SIGKILL" else "")
    _, _, text = log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2].partition("\n")
    _, trace, unforeseen = text.rpartition("Traceback (most recent call last):\n")
    lines = [line for line in re.split(r"[\r\n]", unforeseen if trace else text) if line.strip()]
    if trace:
        lines = [line for line in lines if not line.startswith(" ")][:1]
    return lines[-1].strip() if lines else f"ended with exit code {code} and no output"
