"""After each kind of bad luck, the same command finishes the sweep as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from hmn import results
from hmn.explain import explain
from hmn.files import held
from hmn.sweeps.launchers import local
from tests.command import ROOT, TINY, Command, Outcome, run
from tests.sweeps.launched import SETTINGS, STEPS, THREE, Launched, alive, complaints, wait_until

AT_STEP_2 = {seed: {"hang": 2} for seed in "012"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, known) -> dict[str, tuple[float, str]]:
    sweep = Launched(tmp_path_factory.mktemp("undisturbed"), known)
    outcome = sweep.finish()
    assert (outcome.code, complaints(outcome)) == (0, "")
    assert outcome.out.splitlines()[-1] == "3 runs: 3 done"
    assert sweep.steps() == {seed: list(range(STEPS)) for seed in "012"}
    return sweep.table()


def finished(sweep: Launched, undisturbed: dict[str, tuple[float, str]], **environment: str) -> Outcome:
    """Repeat the same command: it succeeds with the table of the undisturbed sweep and leaves nothing behind."""
    sweep.go()
    outcome = sweep.finish(**environment)
    assert (outcome.code, complaints(outcome)) == (0, "")
    assert outcome.out.splitlines()[-1] == "3 runs: 3 done"
    assert sweep.table() == undisturbed
    assert "two in a slot" not in [event for _, _, event in sweep.ledger()]
    sweep.nothing_is_left_behind()
    return outcome


# Killed


def test_a_launcher_that_is_killed_takes_its_runs_with_it(sweep, undisturbed):
    sweep.order(AT_STEP_2)
    launcher = sweep.start()
    launcher.wait_for(sweep.hanging("0", "1"))
    launcher.process.kill()
    assert launcher.finish().code == 128 + signal.SIGKILL
    sweep.nothing_is_left_behind()  # though nothing tells the hanging runs to continue
    assert [sweep.events(seed)[-1] for seed in "01"] == [f"exit {128 + signal.SIGTERM}"] * 2
    assert sweep.table() == {}
    finished(sweep, undisturbed)
    assert sweep.steps() == {seed: list(range(STEPS)) for seed in "012"}  # no step twice


def test_a_launcher_that_is_killed_again_and_again(sweep, undisturbed):
    """It is killed at another step each time; by the third time, a run is done."""
    for step in range(STEPS):
        sweep.order({"0": {"hang": step}, "1": {"hang": 3 - step}, "2": {"hang": 1}})
        launcher = sweep.start()
        launcher.wait_for(lambda: len(running(sweep)) == 2)
        launcher.process.kill()
        launcher.finish()
        sweep.nothing_is_left_behind()
    finished(sweep, undisturbed)
    assert sweep.steps() == {seed: list(range(STEPS)) for seed in "012"}


def running(sweep: Launched) -> list[str]:
    """The seeds of the runs that hang now."""
    last = {seed: (pid, event) for seed, pid, event in sweep.ledger()}
    return [seed for seed, (pid, event) in last.items() if event == "hangs" and alive(pid)]


def test_the_next_launcher_need_not_wait_until_all_have_stopped(sweep, undisturbed):
    """It starts while the runs of the killed launcher still save their state and so keep their slots and folders."""
    sweep.order({seed: {"hang": 2, "slow": True} for seed in "012"})
    launcher = sweep.start()
    launcher.wait_for(sweep.hanging("0", "1"))
    launcher.process.kill()
    launcher.finish()
    wait_until(lambda: all(sweep.events(seed)[-1] == "is asked to stop" for seed in "01"))
    before = len(sweep.ledger())
    (sweep.folder / "sweep.json").unlink()
    again = sweep.start()
    again.wait_for((sweep.folder / "sweep.json").exists)
    again.wait_for(lambda: waits_for_slots(again, 2))
    assert len(sweep.ledger()) == before
    sweep.go()
    (sweep.stub / "stop").touch()
    outcome = again.finish()
    assert (outcome.code, complaints(outcome)) == (0, "")
    finished(sweep, undisturbed)


def test_a_launcher_says_what_it_waits_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(local, "PATIENCE_SECONDS", 0.0)
    stop = threading.Event()
    slot = local.Slot("cpu-0", {})
    with slot.taken(stop):
        waiting = threading.Thread(target=lambda: slot.taken(stop).__enter__())
        waiting.start()
        wait_until(lambda: local.WAITING in capsys.readouterr().err)
        stop.set()
        waiting.join()


def waits_for_slots(launcher: Command, count: int) -> bool:
    """Whether the process has the lock files of ``count`` slots open."""
    opened = []
    for link in Path(f"/proc/{launcher.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            opened.append(str(link.readlink()))
    return sum("hmn-slots" in name for name in opened) == count


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(sweep, undisturbed):
    sweep.order({"1": {"hang": 2}})
    launcher = sweep.start()
    launcher.wait_for(sweep.hanging("1"))
    os.kill(pid_of(sweep, "1"), signal.SIGKILL)
    sweep.go()
    outcome = launcher.finish()
    assert (outcome.code, complaints(outcome)) == (0, "")
    assert sweep.table() == undisturbed
    assert sweep.events("1").count("begin") == 2
    assert sweep.steps()["1"] == list(range(STEPS))


def pid_of(sweep: Launched, seed: str) -> int:
    """Id of the last process of this run."""
    return next(pid for of, pid, _ in reversed(sweep.ledger()) if of == seed)


def test_a_run_that_is_killed_without_retries_is_said_and_alone_repeated(sweep, undisturbed):
    sweep.order({"1": {"hang": 2}})
    launcher = sweep.start("sweep.max_retries=0")
    launcher.wait_for(sweep.hanging("1"))
    os.kill(pid_of(sweep, "1"), signal.SIGKILL)
    outcome = launcher.finish()
    assert outcome.code == 1
    assert outcome.complaint == "to see what failed: python sweep.py status " + " ".join(
        (*SETTINGS, THREE, "sweep.max_retries=0")
    )
    reason = "killed by SIGKILL: most often because the machine ran out of memory"
    assert f"failed   seed=1: {reason}" in outcome.out.splitlines()
    assert outcome.out.splitlines()[-1] == "3 runs: 2 done, 1 failed"
    failure = json.loads((sweep.folders["1"] / "failure.json").read_text())
    assert (failure["error"], failure["exit_code"], failure["attempts"]) == (reason, -signal.SIGKILL, 1)
    assert sweep.table().keys() == {"0", "2"}
    finished(sweep, undisturbed)
    assert {seed: sweep.events(seed).count("begin") for seed in "012"} == {"0": 1, "1": 2, "2": 1}
    assert sweep.steps()["1"] == list(range(STEPS))
    assert not (sweep.folders["1"] / "failure.json").exists()


def test_all_killed_at_once(sweep, undisturbed):
    sweep.order(AT_STEP_2)
    launcher = sweep.start()
    launcher.wait_for(sweep.hanging("0", "1"))
    launcher.process.kill()
    for pid in sweep.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.finish()
    sweep.nothing_is_left_behind()
    finished(sweep, undisturbed)
    assert sweep.steps() == {seed: list(range(STEPS)) for seed in "012"}


# Stopped


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_asked_to_stop_stops_its_runs_and_says_how_to_go_on(sweep, undisturbed, signum):
    sweep.order(AT_STEP_2)
    launcher = sweep.start()
    launcher.wait_for(sweep.hanging("0", "1"))
    os.kill(launcher.process.pid, signum)
    outcome = launcher.finish()
    assert outcome.code == 128 + signum
    again = "python sweep.py " + " ".join((*SETTINGS, THREE))
    assert outcome.complaint == f"stopped by {signum.name}; the same command resumes: {again}"
    assert not any(map(alive, sweep.pids()))  # the launcher waited for them
    assert [sweep.events(seed)[-1] for seed in "01"] == [f"exit {128 + signal.SIGTERM}"] * 2  # they ended by themselves
    sweep.nothing_is_left_behind()
    assert all((sweep.folders[seed] / "checkpoints" / "condense.pt").exists() for seed in "01")
    assert not any((folder / "failure.json").exists() for folder in sweep.folders.values())
    finished(sweep, undisturbed)
    assert sweep.steps() == {seed: list(range(STEPS)) for seed in "012"}


def test_a_second_ctrl_c_does_not_leave_runs_behind(sweep, undisturbed):
    sweep.order({seed: {"hang": 2, "slow": True} for seed in "012"})
    launcher = sweep.start()
    launcher.wait_for(sweep.hanging("0", "1"))
    os.kill(launcher.process.pid, signal.SIGINT)
    launcher.wait_for(lambda: all(sweep.events(seed)[-1] == "is asked to stop" for seed in "01"))
    os.kill(launcher.process.pid, signal.SIGINT)
    # Check the sweep's lock only after the signal was delivered, as its pending bit tells.
    launcher.wait_for(lambda: not pending(launcher.process.pid, signal.SIGINT))
    assert held(sweep.folder)
    (sweep.stub / "stop").touch()
    outcome = launcher.finish()
    assert outcome.code == 128 + signal.SIGINT
    assert outcome.complaint.startswith("stopped by SIGINT; the same command resumes: ")
    sweep.nothing_is_left_behind()
    finished(sweep, undisturbed)


def pending(pid: int, signum: int) -> bool:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return any(int(status[name], 16) >> (signum - 1) & 1 for name in ("SigPnd", "ShdPnd"))


# Two launchers


def test_two_launchers_of_one_sweep_at_once(sweep, undisturbed):
    """One is refused, in a line that says how to watch the other; no run is made twice."""
    sweep.order(AT_STEP_2)
    both = [sweep.start(), sweep.start()]
    wait_until(lambda: not all(one.process.is_alive() for one in both))
    (refused,) = [one for one in both if not one.process.is_alive()]
    (other,) = [one for one in both if one is not refused]
    outcome = refused.finish()
    assert outcome.code == 75
    status = "python sweep.py status " + " ".join((*SETTINGS, THREE))
    asked = Path("runs", "sweeps", sweep.folder.name)
    advice = "wait for it or stop it"
    assert outcome.complaint == f"{asked}: another process is working on this sweep; {advice}; its progress: {status}"
    assert outcome.out == ""
    other.wait_for(sweep.hanging("0", "1"))
    sweep.go()
    outcome = other.finish()
    assert (outcome.code, complaints(outcome)) == (0, "")
    assert sweep.table() == undisturbed
    assert [sweep.events(seed).count("begin") for seed in "012"] == [1, 1, 1]


def test_two_sweeps_that_share_a_run_make_it_once(tmp_path, known, undisturbed):
    """Each has slots of its own, as on two machines that share a disk."""
    first, second = (
        Launched(tmp_path / "here", known, (*SETTINGS, seeds), environment={"TMPDIR": str(tmp_path / temporary)})
        for seeds, temporary in (("seed=0,1", "one"), ("seed=1,2", "two"))
    )
    for temporary in ("one", "two"):
        (tmp_path / temporary).mkdir()
    first.order({"1": {"hang": 2}})
    both = [one.start("sweep.max_retries=0") for one in (first, second)]  # finding a run busy is not an attempt
    both[0].wait_for(lambda: "exit 75" in first.events("1"))
    first.go()
    outcomes = [one.finish() for one in both]
    assert [(outcome.code, complaints(outcome)) for outcome in outcomes] == [(0, ""), (0, "")]
    for outcome in outcomes:
        told, *ends, sums = outcome.out.splitlines()
        assert told.startswith("runs left: 2 of 2; ")
        assert (sums, [line.split()[0] for line in ends]) == ("2 runs: 2 done", ["done", "done"])
    assert first.events("1").count("begin") == 1
    assert first.steps() == {seed: list(range(STEPS)) for seed in "012"}
    assert first.table() | second.table() == undisturbed


def test_a_run_that_another_sweep_gave_up_is_taken_over(tmp_path, known, undisturbed):
    """The other launcher is stopped while ours waits for its run."""
    first, second = (
        Launched(tmp_path / "here", known, (*SETTINGS, seeds), environment={"TMPDIR": str(tmp_path / temporary)})
        for seeds, temporary in (("seed=0,1", "one"), ("seed=1,2", "two"))
    )
    for temporary in ("one", "two"):
        (tmp_path / temporary).mkdir()
    first.order({"1": {"hang": 2}})
    giving_up = first.start()
    giving_up.wait_for(first.hanging("1"))
    taking_over = second.start("sweep.max_retries=0")
    taking_over.wait_for(lambda: "exit 75" in first.events("1"))
    first.order({})
    os.kill(giving_up.process.pid, signal.SIGTERM)
    assert giving_up.finish().code == 128 + signal.SIGTERM
    outcome = taking_over.finish()
    assert (outcome.code, complaints(outcome)) == (0, "")
    assert second.table() == {seed: undisturbed[seed] for seed in "12"}
    assert first.steps()["1"] == list(range(STEPS))


def test_two_launchers_share_the_slots_of_one_machine(tmp_path, known):
    """A slot never has two runs, not even of different sweeps: here two slots and six runs."""
    sweeps = [Launched(tmp_path / "here", known, (*SETTINGS, seeds)) for seeds in (THREE, "seed=3,4,5")]
    here = sweeps[0]
    here.order({str(seed): {"hang": 1} for seed in range(6)})
    launchers = [one.start() for one in sweeps]
    for done in range(6):
        wait_until(lambda done=done: len(running(here)) == min(2, 6 - done))
        here.go(running(here)[0])
        wait_until(lambda done=done: [event for _, _, event in here.ledger()].count("done") == done + 1)
    outcomes = [one.finish() for one in launchers]
    assert [(outcome.code, complaints(outcome)) for outcome in outcomes] == [(0, ""), (0, "")]
    assert [event for _, _, event in here.ledger()].count("begin") == 6
    assert "two in a slot" not in [event for _, _, event in here.ledger()]


# A full disk


@pytest.fixture
def small_disk(sweep):
    """A disk of 1 MiB for the sweep's runs; skips the test if none can be mounted."""
    runs, known = sweep.where / "runs", (sweep.folder / "plan.json").read_text()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", runs], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a disk to fill")
    try:
        sweep.folder.mkdir(parents=True)
        (sweep.folder / "plan.json").write_text(known)
        yield runs
    finally:
        subprocess.run(["umount", runs], check=True)


@pytest.mark.parametrize("pages", [0, 1, 4, 8])
def test_a_disk_that_is_full_after_so_many_pages(sweep, undisturbed, small_disk, pages):
    """Whatever fails to be written first, one line says so, and nothing else is lost."""
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - pages * 4096)
    outcome = sweep.finish()
    assert outcome.code == 1
    said = outcome.out.splitlines() + outcome.err.splitlines()
    assert not any("Traceback" in line for line in said)
    assert any("no space left on the disk: free some" in line or "No space left on device" in line for line in said)
    ballast.unlink()
    finished(sweep, undisturbed)


@pytest.mark.parametrize("full", ["log.txt", "metrics.jsonl"])
def test_a_file_of_one_run_on_a_full_disk(sweep, undisturbed, here, full):
    """Only that run fails, with a one-line error, and only it is repeated."""
    folder = sweep.folders["1"]
    folder.mkdir()
    (folder / full).symlink_to("/dev/full")
    ended = here(sweep)
    assert (ended.code, ended.lines[-1]) == (1, "3 runs: 2 done, 1 failed")
    (line,) = [line for line in ended.lines if line.startswith("failed")]
    assert line.startswith("failed   seed=1: ")
    assert "no space left on the disk: free some" in line or "No space left on device" in line
    (folder / full).unlink()
    finished(sweep, undisturbed)
    assert {seed: sweep.events(seed).count("done") for seed in "012"} == {"0": 1, "1": 1, "2": 1}


# Files cut short


@pytest.mark.parametrize("kept", [0, 1, 0.5, -2])
def test_a_result_that_was_cut_short_is_set_aside_and_measured_anew(sweep, undisturbed, here, kept):
    assert here(sweep).code == 0
    path = sweep.folders["1"] / "result.json"
    text = path.read_text()
    short = text[: int(len(text) * kept) if isinstance(kept, float) else kept]
    path.write_text(short)
    status = here(sweep, command="status")
    assert status.lines[-1] == "3 runs: 2 done, 1 damaged"
    again = here(sweep)
    assert (again.code, again.err, again.lines[-1]) == (0, "", "3 runs: 3 done")
    assert sweep.table() == undisturbed
    assert path.with_name("result.json.damaged").read_text() == short
    assert {seed: sweep.events(seed).count("done") for seed in "012"} == {"0": 1, "1": 2, "2": 1}


@pytest.mark.parametrize("name", ["plan.json", "sweep.json"])
@pytest.mark.parametrize("kept", [0, 1, 0.5])
def test_a_file_of_the_sweep_that_was_cut_short_is_made_anew(sweep, undisturbed, here, name, kept):
    assert here(sweep).code == 0
    path = sweep.folder / name
    text = path.read_text()
    os.truncate(path, int(len(text) * kept) if isinstance(kept, float) else kept)
    again = here(sweep)
    assert (again.code, again.err, again.lines[-1]) == (0, "", "3 runs: 3 done")
    assert json.loads(path.read_text()).keys() == json.loads(text).keys()
    assert sweep.table() == undisturbed
    assert [sweep.events(seed).count("begin") for seed in "012"] == [1, 1, 1]


@pytest.mark.parametrize("kept", [0, 1, 0.5])
def test_a_failure_that_was_cut_short_is_still_repeated(sweep, undisturbed, here, kept):
    sweep.order({"1": {"fail": [2, "a line", 1]}})
    assert here(sweep).code == 1
    path = sweep.folders["1"] / "failure.json"
    os.truncate(path, int(path.stat().st_size * kept) if isinstance(kept, float) else kept)
    assert here(sweep, command="status").lines[-1] == "3 runs: 2 done, 1 interrupted"
    sweep.order({})
    finished(sweep, undisturbed)
    assert sweep.steps()["1"] == list(range(STEPS))


# A clock that jumps


@pytest.mark.parametrize("hours", ["5", "-100000"])
def test_a_clock_that_jumps_changes_nothing(sweep, undisturbed, hours):
    """Nor do files dated in the future or the past, even after the launcher was killed under such a clock."""
    sweep.order(AT_STEP_2)
    launcher = sweep.start(JUMP=hours)
    launcher.wait_for(sweep.hanging("0", "1"))
    launcher.process.kill()
    launcher.finish()
    sweep.nothing_is_left_behind()
    for path in sweep.where.rglob("*"):
        os.utime(path, (2**31, 2**31) if "5" in hours else (0, 0))
    finished(sweep, undisturbed, JUMP=hours)
    assert sweep.steps() == {seed: list(range(STEPS)) for seed in "012"}


# Real runs

REAL = (*TINY, "compute.checkpoint_every_seconds=0", "launcher.slots=2")
JUMPING = """
import itertools, time
real, signs = time.time, itertools.cycle((1, -1))
time.time = lambda: real() + next(signs) * 50000
"""


@pytest.fixture
def real(tmp_path) -> Launched:
    return Launched(tmp_path / "real", "", (*REAL, THREE), ROOT / "sweep.py")


def process_of(folder: Path) -> int | None:
    """Id of the process that writes its log in this folder now."""
    for opened in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):
            if opened.readlink() == folder / "log.txt":
                return int(opened.parts[2])
    return None


def measured(folder: Path) -> tuple[dict[str, list[float]], str]:
    result = results.read(folder)
    return result["accuracy"]["by_network"], result["artifact_sha256"]


@pytest.mark.slow
def test_real_runs_that_are_killed_end_as_if_they_had_not_been(real, tmp_path):
    """A run and the launcher are killed at once, while the clock jumps. Every number equals that of a run by hand."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)

    first = real.folders["0"]
    launcher = real.start(PYTHONPATH=str(tmp_path))
    launcher.wait_for((first / "checkpoints" / "condense.pt").exists)
    os.kill(process_of(first), signal.SIGKILL)
    launcher.process.kill()
    assert launcher.finish().code == 128 + signal.SIGKILL
    wait_until(lambda: not any(map(process_of, real.folders.values())))
    outcome = real.finish(PYTHONPATH=str(tmp_path))
    assert (outcome.code, outcome.err, outcome.out.splitlines()[-1]) == (0, "", "3 runs: 3 done")
    for seed, folder in real.folders.items():
        alone = tmp_path / f"alone-{seed}"
        alone.mkdir()
        assert run(alone, *TINY, f"seed={seed}").code == 0
        assert measured(folder) == measured(alone / "runs" / folder.name)
    assert (first / "log.txt").read_text().count("continuing at step") == 1


@pytest.mark.slow
def test_a_real_run_out_of_memory_fails_alone_and_says_so(tmp_path):
    """A network of petabytes beside one of kilobytes."""
    real = Launched(
        tmp_path / "real", "", (*REAL, "compute.matching=loop", "network.width=4,10000000"), ROOT / "sweep.py"
    )
    outcome = real.finish("sweep.max_retries=0")
    assert outcome.code == 1
    (failed,) = [line for line in outcome.out.splitlines() if line.startswith("failed")]
    assert failed.startswith("failed   network.width=10000000: out of memory: set compute.memory_limit, or ")
    assert outcome.out.splitlines()[-1] == "2 runs: 1 done, 1 failed"
    (log,) = [path for path in real.where.glob("runs/*/log.txt") if path.with_name("failure.json").exists()]
    assert [line for line in log.read_text().splitlines() if "rror" in line] == []  # the log has no other line about it


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=repr,
)
def test_each_way_to_run_out_of_memory_is_said_alike(error):
    line, code = explain(error)
    assert (line.startswith("out of memory: set compute.memory_limit, or "), code) == (True, 1)
    assert explain(RuntimeError("another")) == (None, 1)
