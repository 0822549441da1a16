"""One run as a process: its log, its retries, its error if it fails, and that it never outlives its launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hmn import results
from hmn.files import exclusive, held
from hmn.sweeps import attempt as attempts
from hmn.sweeps.attempt import FAILURE, LOG, Outcome, Task, attempt
from tests.sweeps.launched import alive, wait_until

HEAD = """
import os, signal, sys, time
from pathlib import Path
tries = Path("tries")
tries.write_text((tries.read_text() if tries.exists() else "") + "x")
number = len(tries.read_text())
"""


@pytest.fixture
def task(tmp_path):
    """A function that makes the task of a program; its lines can read the number of starts as ``number``."""

    def make(lines: str, *arguments: str, **settings) -> Task:
        program = tmp_path / "program.py"
        program.write_text(HEAD + lines)
        return Task("run-1", "runs/run-1", arguments, str(tmp_path), program=str(program), **settings)

    return make


def folder(task: Task) -> Path:
    return Path(task.directory, task.folder)


def starts(task: Task) -> int:
    return len(Path(task.directory, "tries").read_text())


def test_a_run_gets_its_arguments_directory_environment_and_a_log(task):
    lines = "print(sys.argv[1:], os.getcwd(), os.environ['ONE']); print('said', file=sys.stderr); sys.stdin.read()"
    made = task(lines, "seed=1", "memory=ipc1")
    assert attempt(made, {"ONE": "1"}) == Outcome("run-1", "done", 1)
    said = f"['seed=1', 'memory=ipc1'] {made.directory} 1\nsaid\n"
    assert (folder(made) / LOG).read_text() == f"\n$ python program.py seed=1 memory=ipc1\n{said}"
    assert [path.name for path in folder(made).iterdir()] == [LOG]


def test_the_log_shows_what_was_printed_at_once(task, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    made = task("print('here'); time.sleep(1000)")
    stop = threading.Event()
    thread = threading.Thread(target=attempt, args=(made, None, stop))
    thread.start()
    try:
        wait_until(lambda: (folder(made) / LOG).exists() and "here" in (folder(made) / LOG).read_text())
    finally:
        stop.set()
        thread.join()


def test_the_command_that_repeats_a_run_is_quoted(task):
    assert task("", "name=it's", "seed=1").command == """python program.py 'name=it'"'"'s' seed=1"""
    assert Task("", "", (), "").command == "python run.py"


def test_a_run_that_fails_is_tried_again(task):
    made = task("sys.exit(number < 3)", max_retries=2)
    assert attempt(made) == Outcome("run-1", "done", 3)
    assert starts(made) == 3
    assert not (folder(made) / FAILURE).exists()


def test_a_run_that_fails_each_time_is_kept_as_failed(task):
    made = task("print('reason', number, file=sys.stderr); sys.exit(3)", "seed=1", max_retries=1)
    assert attempt(made) == Outcome("run-1", "failed", 2, "reason 2")
    assert json.loads((folder(made) / FAILURE).read_text()) == {
        "run_id": "run-1",
        "error": "reason 2",
        "exit_code": 3,
        "attempts": 2,
        "command": "python program.py seed=1",
        "code": results.code_version(),
    }


def test_a_later_success_removes_the_failure(task):
    made = task("sys.exit(number == 1)")
    assert attempt(made).status == "failed"
    assert (folder(made) / FAILURE).exists()
    assert attempt(made) == Outcome("run-1", "done", 1)
    assert not (folder(made) / FAILURE).exists()


def test_a_setting_that_cannot_be_used_is_not_tried_again(task):
    made = task("print('seed: must be at least 0', file=sys.stderr); sys.exit(2)", max_retries=5)
    assert attempt(made) == Outcome("run-1", "failed", 1, "seed: must be at least 0")
    assert starts(made) == 1


BAR = r"sys.stderr.write('\r 10%|#   |\r 20%|##  |\nout of memory: lower it\n  \n'); sys.exit(1)"
CHAINED = """
try:
    1 / 0
except ZeroDivisionError as error:
    raise OSError('outer') from error
"""
REASONS = {
    "its last line": ("print('first'); print('last', file=sys.stderr); sys.exit(1)", "last"),
    "no bar before it": (BAR, "out of memory: lower it"),
    "an unforeseen error": ("print('first')\n{}['key']", "KeyError: 'key'"),
    "its first line": ("raise ValueError('one\\ntwo\\nthree')", "ValueError: one"),
    "the error, not its cause": (CHAINED, "OSError: outer"),
    "nothing": ("sys.exit(9)", "ended with exit code 9 and no output"),
    "a signal": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "killed by SIGKILL: most often because the machine ran out of memory",
    ),
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "a signal without a name": ("os.kill(os.getpid(), 40)", "killed by signal 40"),
    "bytes": (r"sys.stderr.buffer.write(b'caf\xe9'); sys.stderr.flush(); sys.exit(1)", "caf\N{REPLACEMENT CHARACTER}"),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_error_is_one_line(task, name):
    lines, reason = REASONS[name]
    assert attempt(task(lines)).error == reason


def test_the_error_is_of_the_last_attempt(task):
    made = task("if number == 1: print('early', file=sys.stderr)\nsys.exit(4)", max_retries=1)
    assert attempt(made).error == "ended with exit code 4 and no output"


def test_a_run_that_another_process_makes_is_waited_for(task, monkeypatch):
    """Exit code 75: the other's result is as good as ours, and the start does not count as an attempt."""
    looks = []
    monkeypatch.setattr("hmn.files.held", lambda folder: looks.append(folder) or held(folder))
    made = task("sys.exit(75 if number == 1 else 0)")
    outcomes = []
    with exclusive(folder(made)):
        thread = threading.Thread(target=lambda: outcomes.append(attempt(made)))
        thread.start()
        wait_until(lambda: len(looks) > 2)
        assert starts(made) == 1
    thread.join()
    assert outcomes == [Outcome("run-1", "done", 1)]
    assert starts(made) == 2
    assert set(looks) == {folder(made)}


STOPPABLE = """
def stop(signum, frame):
    print("stopped", file=sys.stderr)
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, stop)
Path("ready").write_text(str(os.getpid()))
time.sleep(1000)
"""


def stopped(made: Task) -> tuple[Outcome, int]:
    """The outcome of a task that is stopped midway, and the id of its process."""
    stop, outcomes = threading.Event(), []
    ready = Path(made.directory, "ready")
    thread = threading.Thread(target=lambda: outcomes.append(attempt(made, None, stop)))
    thread.start()
    try:
        wait_until(lambda: ready.exists() and ready.read_text())
    finally:
        stop.set()
        thread.join()
    return outcomes[0], int(ready.read_text())


def test_a_run_that_is_stopped_may_save_its_state_and_has_not_failed(task):
    made = task(STOPPABLE, max_retries=3)
    outcome, pid = stopped(made)
    assert outcome == Outcome("run-1", "stopped", 1)
    assert (folder(made) / LOG).read_text().endswith("\nstopped\n")
    assert not (folder(made) / FAILURE).exists()
    assert starts(made) == 1
    assert not alive(pid)


def test_a_run_that_does_not_stop_is_killed_after_a_while(task, monkeypatch):
    monkeypatch.setattr(attempts, "GRACE_SECONDS", 0.05)
    made = task(STOPPABLE.replace("sys.exit(128 + signum)", "return"))
    outcome, pid = stopped(made)
    assert outcome.status == "stopped"
    assert not alive(pid)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_that_somebody_else_stopped_is_not_started_again(task, signum):
    """Whoever stopped the run does not want it to continue now; it can resume later."""
    made = task(f"sys.exit({128 + signum})", max_retries=3)
    assert attempt(made) == Outcome("run-1", "stopped", 1)
    assert starts(made) == 1
    assert not (folder(made) / FAILURE).exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_that_is_stopped_before_it_listens_has_not_failed(task, signum):
    made = task(f"signal.signal({signum}, signal.SIG_DFL); os.kill(os.getpid(), {signum})")
    assert attempt(made) == Outcome("run-1", "stopped", 1)
    assert not (folder(made) / FAILURE).exists()


def test_a_run_that_is_done_when_it_is_asked_to_stop_is_done(task):
    made = task(STOPPABLE.replace("128 + signum", "0"))
    assert stopped(made)[0] == Outcome("run-1", "done", 1)


def test_nothing_starts_after_a_stop(task):
    stop = threading.Event()
    stop.set()
    made = task("")
    assert attempt(made, None, stop) == Outcome("run-1", "stopped", 0)
    assert not Path(made.directory, "tries").exists()


def test_a_run_hears_no_ctrl_c_of_the_terminal(task):
    """Ctrl-C is for the launcher, which asks its runs to stop once, by a signal of its own."""
    made = task("print(os.getsid(0) == os.getpid())")
    attempt(made)
    assert (folder(made) / LOG).read_text().endswith("\nTrue\n")


def test_a_log_that_cannot_be_written_is_a_failure_in_one_line(task):
    made = task("")
    folder(made).mkdir(parents=True)
    (folder(made) / LOG).symlink_to("/dev/full")
    assert attempt(made, None) == Outcome("run-1", "failed", 1, "OSError: [Errno 28] No space left on device")
    assert json.loads((folder(made) / FAILURE).read_text())["exit_code"] is None


def test_a_failure_that_cannot_be_kept_is_said_too(task, monkeypatch):
    """On a full disk, a run may not even be able to write the error to its log."""
    made = task("sys.exit(1)")

    def full(path: Path, text: str) -> None:
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr("hmn.files.write_text", full)
    error = "ended with exit code 1 and no output (failure.json could not be written: No space left on device)"
    assert attempt(made) == Outcome("run-1", "failed", 1, error)


PARENT = """
import os, subprocess, sys
from hmn.sweeps.attempt import PARENT
os.environ[PARENT] = sys.argv[1] or str(os.getpid())
child = "import time, hmn.sweeps.attempt as it; it.end_with_parent(); print(1, flush=True); time.sleep(1000)"
started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
started.stdout.readline()
print(started.pid, flush=True)
sys.stdin.read()
"""


def parent(tmp_path: Path, of: str = "") -> subprocess.Popen:
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(results.ROOT)}
    return subprocess.Popen([sys.executable, str(program), of], env=environment, **pipes)


def test_a_run_ends_with_the_process_that_started_it(tmp_path):
    launcher = parent(tmp_path)
    child = int(launcher.stdout.readline())
    assert alive(child)
    launcher.kill()
    wait_until(lambda: not alive(child))
    launcher.communicate()


def test_a_run_whose_parent_ended_before_it_looked_ends_at_once(tmp_path):
    """By then its parent is not the process that it was told."""
    launcher = parent(tmp_path, of="1")
    child = int(launcher.stdout.readline())
    wait_until(lambda: not alive(child))
    assert launcher.poll() is None
    launcher.communicate()


def test_a_process_that_no_sweep_started_lives_on(monkeypatch):
    monkeypatch.delenv(attempts.PARENT, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    attempts.end_with_parent()
    assert signal.getsignal(signal.SIGTERM) == before
