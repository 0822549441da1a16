"""What every launcher must do with the runs it is given; a new launcher adds one maker."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hmn import results
from hmn.config.sweeps import LauncherConfig, LocalConfig, RayConfig, SubmititConfig
from hmn.errors import ConfigError
from hmn.sweeps import launchers, state
from hmn.sweeps.attempt import FAILURE, LOG, Outcome, Task
from tests import slurm
from tests.command import ROOT, TINY, WAIT_SECONDS, planned, run

ray = pytest.importorskip("ray")
submitit = pytest.importorskip("submitit")
cluster_utils = pytest.importorskip("ray.cluster_utils")

PROGRAM = Path(__file__).with_name("program.py")
STORE = {"object_store_memory": 80 << 20}
LAUNCHERS = ("local", "ray", "submitit")


def wait_until(seen: Callable[[], Any]) -> Any:
    until = time.monotonic() + WAIT_SECONDS
    while not (found := seen()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[cluster_utils.Cluster]:
    """A head that takes no runs, and two nodes with CPUs for two runs of 2 CPUs or for one run of 3."""
    made = cluster_utils.Cluster()
    # At Ray's default niceness, runs take long on a machine with other processes.
    made.add_node(num_cpus=0, include_dashboard=False, _system_config={"worker_niceness": 0}, **STORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # without it, Ray accepts any number of GPUs
        for cpus, gpus in ((3, 2), (2, 0)):
            made.add_node(num_cpus=cpus, num_gpus=gpus, **STORE)
    yield made
    made.shutdown()


@pytest.fixture(params=LAUNCHERS)
def settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """A function that makes the settings of a launcher with ``slots`` runs at a time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # own slots: another test may hold the machine's
    makers = {
        "local": lambda slots: LocalConfig(gpus=0, slots=slots, threads=1),
        "ray": lambda slots: RayConfig(
            address=request.getfixturevalue("cluster").address, cpus={1: 3.0, 2: 2.0}[slots]
        ),
        "submitit": lambda slots: SubmititConfig(cluster="local", at_once=slots, cpus=1),
    }
    return makers[request.param]


def stub(folder: Path, name: str, *arguments: str, retries: int = 0) -> Task:
    return Task(name, f"runs/{name}", (name, *arguments), str(folder), retries, program=str(PROGRAM))


def do(tasks: Sequence[Task], settings: LauncherConfig) -> dict[str, Outcome]:
    outcomes = list(launchers.launch(tasks, settings))
    assert len(outcomes) == len(tasks)
    return {outcome.run_id: outcome for outcome in outcomes}


def events(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    path = folder / "events"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if event in (None, line["event"])]


def most_at_once(folder: Path) -> int:
    running, most = 0, 0
    for line in events(folder):
        running += 1 if line["event"] == "start" else -1
        most = max(most, running)
    return most


@contextlib.contextmanager
def meanwhile(seen: Callable[[], Any], act: Callable[[], Any]) -> Iterator[None]:
    """Call ``act`` as soon as ``seen()`` holds while the block runs, unless the block has failed."""
    failed = threading.Event()

    def watch() -> None:
        wait_until(lambda: failed.is_set() or seen())
        if not failed.is_set():
            act()

    actor = threading.Thread(target=watch)
    actor.start()
    try:
        yield
    except BaseException:
        failed.set()
        raise
    finally:
        actor.join()


class Interruption(Exception):
    """Raised by the signal handler, in whatever call the launcher waits in."""


@contextlib.contextmanager
def interrupted_when(seen: Callable[[], Any]) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise Interruption

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with meanwhile(seen, lambda: os.kill(os.getpid(), signal.SIGUSR1)), pytest.raises(Interruption):
            yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


def descendants(node: Any) -> set[int]:
    """Process ids of a Ray node and of all their descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    found = {process.process.pid for processes in node.all_processes.values() for process in processes}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_every_run_ends_with_an_outcome_and_output_of_its_own(settings: Callable[..., Any], tmp_path: Path) -> None:
    """One run fails, which does not affect the others."""
    tasks = [stub(tmp_path, name, "pass") for name in "abc"] + [stub(tmp_path, "f", "fail", "no such luck", retries=1)]
    outcomes = do(tasks, settings(2))
    assert {name: outcome.status for name, outcome in outcomes.items()} == dict.fromkeys("abc", "done") | {
        "f": "failed"
    }
    assert outcomes["f"] == Outcome("f", "failed", 2, "ValueError: no such luck")
    assert json.loads((tmp_path / "runs/f" / FAILURE).read_text())["error"] == "ValueError: no such luck"
    for name in "abc":
        assert re.findall("output of .", (tmp_path / "runs" / name / LOG).read_text()) == [f"output of {name}"]
    assert len(events(tmp_path, "start")) == 5


def test_one_slot_takes_one_run_at_a_time(settings: Callable[..., Any], tmp_path: Path) -> None:
    do([stub(tmp_path, name, "pass") for name in "abc"], settings(1))
    assert most_at_once(tmp_path) == 1 and len(events(tmp_path, "stop")) == 3


def test_two_slots_take_two_runs_and_no_third(settings: Callable[..., Any], tmp_path: Path) -> None:
    """Neither of the first two runs ends before both have begun."""
    with meanwhile(lambda: len(events(tmp_path, "start")) == 2, (tmp_path / "go").touch):
        do([stub(tmp_path, name, "wait", "go") for name in "abc"], settings(2))
    assert most_at_once(tmp_path) == 2 and len(events(tmp_path, "stop")) == 3


def test_runs_get_their_threads_and_no_gpu_that_was_not_given_to_them(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    chosen = settings(1)
    do([stub(tmp_path, "a", "pass")], chosen)
    (line,) = events(tmp_path, "stop")
    assert (line["CUDA_VISIBLE_DEVICES"], line["OMP_NUM_THREADS"]) == ("", "3" if chosen.name == "ray" else "1")


def test_a_slurm_job_uploads_for_no_longer_than_its_notice_leaves_it_to_be_queued_again() -> None:
    from hmn.sweeps.launchers.submitit import _environment

    chosen = SubmititConfig(name="submitit", cluster="slurm", notice_seconds=120)
    assert _environment(chosen)["WANDB_FINISH_TIMEOUT"] == "60.0"


def test_a_slurm_job_asks_for_what_its_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hmn.sweeps.launchers.submitit import _executor

    def flags(chosen: SubmititConfig) -> set[str]:
        text = _executor(tmp_path, chosen)._make_submission_file_text("true", "1")
        assert f"--cpus-per-task={chosen.cpus} true" in text  # for the job's step
        return set(re.findall("^#SBATCH (.*)$", text, re.MULTILINE))

    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    more = {"gpus": 2, "partition": "long", "options": {"account": "mine"}}
    found = flags(SubmititConfig(timeout_minutes=90, notice_seconds=45, cpus=6, memory_gb=1.5, **more))
    asked = {"--time=90", "--signal=USR1@45", "--cpus-per-task=6", "--mem=1536M", "--requeue"}
    assert found >= asked | {"--gpus-per-node=2", "--partition=long", "--account=mine"}
    assert not [flag for flag in flags(SubmititConfig()) if flag.startswith(("--gpus", "--partition"))]


class Submitted:
    """A SLURM job that has left no result."""

    job_id = "7_0"

    def __init__(self, folder: Path) -> None:
        self.paths = SimpleNamespace(result_pickle=folder / "none")


def test_a_slurm_job_is_given_up_only_where_two_answers_in_turn_lack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result may become visible late, and a failed squeue says nothing about the jobs."""
    from hmn.sweeps.launchers import submitit as engine

    monkeypatch.setattr(engine, "_executor", lambda *_: None)
    monkeypatch.setattr(engine, "QUEUE_SECONDS", 0.0)
    job, task = Submitted(tmp_path), stub(tmp_path, "a", "pass")
    jobs = engine._Jobs(tmp_path, SubmititConfig(), [task])
    jobs._running[job] = task
    for code, said, ended in (
        *((1, "", []), (1, "", []), (0, "", []), (0, "7_0\n8_1\n", [])),
        *((0, "8_1\n", []), (0, "8_1\n", [job])),
    ):
        answer = subprocess.CompletedProcess("squeue", code, said)
        monkeypatch.setattr(engine.subprocess, "run", lambda *_, answer=answer, **__: answer)
        assert jobs._ended() == ended


def test_what_only_waits_for_a_run_in_a_slurm_job_does_without_torch() -> None:
    code = "import sys, hmn.sweeps.launchers.submitit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_closing_tells_what_runs_to_save_and_waits_for_it(settings: Callable[..., Any], tmp_path: Path) -> None:
    with interrupted_when(lambda: len(events(tmp_path, "start")) == 2):
        do([stub(tmp_path, name, "wait", "go") for name in "abc"], settings(2))
    started, saved = events(tmp_path, "start"), events(tmp_path, "saved")
    assert len(started) == 2  # the third was never started
    assert {line["run"] for line in saved} == {line["run"] for line in started}
    assert not any(alive(line["pid"]) for line in started)


def test_a_run_that_is_killed_and_then_interrupted_ends_like_an_undisturbed_one(
    settings: Callable[..., Any], tmp_path: Path, undisturbed: Path
) -> None:
    """The launcher replaces a run's process that was killed by SIGKILL; the new process ends with the launcher."""
    task = real(tmp_path)
    folder, checkpoint = tmp_path / task.folder, tmp_path / task.folder / "checkpoints" / "condense.pt"

    def kill() -> int:
        (pid,) = processes_in(tmp_path)
        os.kill(pid, signal.SIGKILL)
        return checkpoint.stat().st_mtime_ns

    killed_at: list[int] = []
    with (
        meanwhile(checkpoint.exists, lambda: killed_at.append(kill())),
        interrupted_when(lambda: killed_at and checkpoint.stat().st_mtime_ns > killed_at[0]),
    ):
        do([task], settings(1))
    assert state.read(folder).status == "interrupted" and not processes_in(tmp_path)
    assert do([task], settings(1)) == {task.run_id: Outcome(task.run_id, "done", 1)}
    assert (folder / LOG).read_text().count("$ python run.py") == 3
    assert measured(folder) == measured(undisturbed)


REAL = (*TINY, "compute.checkpoint_every_seconds=0", "objective.outer_steps=4")


def real(directory: Path) -> Task:
    plan = planned(*REAL)
    return Task(plan.run_id, str(plan.folder), REAL, str(directory), max_retries=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("undisturbed")
    assert run(where, *REAL).code == 0
    return where / planned(*REAL).folder


def measured(folder: Path) -> tuple[Any, ...]:
    result = results.read(folder)
    return result["accuracy"], result["curve"], (folder / "condensed.safetensors").read_bytes()


def processes_in(directory: Path) -> list[int]:
    """Ids of the ``run.py`` processes that were started in ``directory``."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").resolve() == directory and b"run.py" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


# What applies to a single engine


def test_ray_goes_on_elsewhere_with_the_run_of_a_node_that_is_lost(
    cluster: cluster_utils.Cluster, tmp_path: Path
) -> None:
    def lose() -> None:
        (first,) = events(tmp_path, "start")
        (node,) = (node for node in nodes if first["worker"] in descendants(node))
        cluster.remove_node(node, allow_graceful=False)

    nodes = [cluster.add_node(num_cpus=8, **STORE) for _ in range(2)]
    with (
        meanwhile(lambda: events(tmp_path, "start"), lose),
        meanwhile(lambda: len(events(tmp_path, "start")) == 2, (tmp_path / "go").touch),
    ):
        outcomes = do([stub(tmp_path, "a", "wait", "go")], RayConfig(address=cluster.address, cpus=8))
    assert outcomes["a"].status == "done"
    assert [line["event"] for line in events(tmp_path)] == ["start", "start", "stop"]
    assert len({line["worker"] for line in events(tmp_path, "start")}) == 2


def test_closing_ray_does_not_wait_for_runs_that_no_node_has_room_for(
    cluster: cluster_utils.Cluster, tmp_path: Path
) -> None:
    with interrupted_when(ray.is_initialized):  # while Ray starts, which would swallow what the handler raises
        do([stub(tmp_path, name, "pass") for name in "ab"], RayConfig(address=cluster.address, cpus=100))
    assert events(tmp_path) == []


def test_a_signal_while_ray_takes_runs_has_these_save(
    cluster: cluster_utils.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = importlib.import_module("hmn.sweeps.launchers.ray")

    def begin(*given: Any) -> Any:
        begun = original(*given)
        wait_until(lambda: events(tmp_path, "start"))
        time.sleep(0.5)  # until the signal has arrived
        return begun

    original = engine._begin
    monkeypatch.setattr(engine, "_begin", begin)
    with interrupted_when(lambda: events(tmp_path, "start")):
        do([stub(tmp_path, "a", "wait", "go")], RayConfig(address=cluster.address))
    assert [line["event"] for line in events(tmp_path)] == ["start", "saved"]


def test_ray_names_the_gpus_of_a_run(cluster: cluster_utils.Cluster, tmp_path: Path) -> None:
    with meanwhile(lambda: len(events(tmp_path, "start")) == 2, (tmp_path / "go").touch):
        do([stub(tmp_path, name, "wait", "go") for name in "ab"], RayConfig(address=cluster.address, gpus=1))
    assert {line["CUDA_VISIBLE_DEVICES"] for line in events(tmp_path, "stop")} == {"0", "1"}


def test_more_than_this_machine_has_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^launcher.cpus=1000: must be at most \d+, what this machine has$"):
        do([stub(tmp_path, "a", "pass")], RayConfig(cpus=1000))


def test_ray_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^launcher.address=127.0.0.1:1: no Ray cluster [^\n]+ refused$"):
        do([stub(tmp_path, "a", "pass")], RayConfig(address="127.0.0.1:1"))


def test_a_signal_to_another_thread_comes_after_what_must_not_be_cut_in_two() -> None:
    seen: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("signal"))
    ready, end = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (ready.set(), end.wait()))  # its mask does not block the signal
    other.start()
    ready.wait()
    arrived, told = socket.socketpair()
    told.setblocking(False)
    arrived.settimeout(WAIT_SECONDS)
    wakeup = signal.set_wakeup_fd(told.fileno())
    try:
        with launchers.uninterrupted():
            signal.pthread_kill(other.ident, signal.SIGUSR1)
            assert arrived.recv(1) == bytes([signal.SIGUSR1])
            seen.append("block")
        assert seen == ["block", "signal"]
        with pytest.raises(RuntimeError), launchers.uninterrupted():
            raise RuntimeError
        signal.raise_signal(signal.SIGUSR1)
        assert seen == ["block", "signal", "signal"]
    finally:
        signal.set_wakeup_fd(wakeup)
        arrived.close()
        told.close()
        end.set()
        other.join()
        signal.signal(signal.SIGUSR1, before)


def test_submitit_queues_a_job_again_that_is_cut_off(tmp_path: Path) -> None:
    """At the signal of a time limit or of preemption, the run saves its state and the same job resumes it."""

    def cut_off() -> None:
        (first,) = events(tmp_path, "start")
        os.kill(first["worker"], signal.SIGUSR1)

    with (
        meanwhile(lambda: events(tmp_path, "start"), cut_off),
        meanwhile(lambda: len(events(tmp_path, "start")) == 2, (tmp_path / "go").touch),
    ):
        outcomes = do([stub(tmp_path, "a", "wait", "go")], SubmititConfig(cluster="local"))
    assert outcomes == {"a": Outcome("a", "done", 1)}
    assert [line["event"] for line in events(tmp_path)] == ["start", "saved", "start", "stop"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a"]


def test_submitit_says_which_job_went_without_a_word(tmp_path: Path) -> None:
    def kill() -> None:
        (first,) = events(tmp_path, "start")
        os.kill(first["worker"], signal.SIGKILL)

    with meanwhile(lambda: events(tmp_path, "start"), kill):
        outcomes = do([stub(tmp_path, "a", "wait", "go")], SubmititConfig(cluster="local"))
    assert outcomes["a"].status == "failed"
    (kept,) = (tmp_path / "runs").glob("submitit-*")
    assert re.fullmatch(rf"its local job \d+ ended early: {kept}/\d+_0_log.err", outcomes["a"].error)
    assert state.read(tmp_path / "runs" / "a").error == outcomes["a"].error


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"cluster": "local", "gpus": 1}, "launcher.gpus=1: must be 0 for launcher.cluster=local"),
        ({"cluster": "local", "partition": "p"}, "launcher.partition=p: must be null for launcher.cluster=local"),
        ({"timeout_minutes": 2}, "launcher.notice_seconds=120: must be below launcher.timeout_minutes=2"),
    ],
)
def test_settings_that_submitit_cannot_keep_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SubmititConfig(**values)
    assert str(caught.value) == complaint


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[None]:
    if not slurm.available():
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    with slurm.running(cpus=2):
        yield


@pytest.fixture
def on_slurm(slurm_cluster: None, monkeypatch: pytest.MonkeyPatch) -> SubmititConfig:
    monkeypatch.setattr("hmn.sweeps.launchers.submitit.QUEUE_SECONDS", 0.5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # sbatch passes it on to jobs
    return SubmititConfig(cpus=1, memory_gb=0.25, at_once=2, timeout_minutes=10)


def slurm_jobs() -> list[str]:
    return command_output("squeue", "--noheader", "--array", "--format=%i").split()


def command_output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_slurm_goes_on_with_a_run_that_it_queues_again(on_slurm: SubmititConfig, tmp_path: Path) -> None:
    """First as on preemption, announced by SIGTERM, then as at a time limit, announced by SIGUSR1."""
    ways = {1: ("scontrol", "requeue"), 2: ("scancel", "--signal=USR1")}

    def interrupt(times: int) -> None:
        (job,) = slurm_jobs()
        command_output(*ways[times], job)

    with contextlib.ExitStack() as actors:
        for times in ways:
            seen = lambda times=times: len(events(tmp_path, "start")) == times  # noqa: E731
            actors.enter_context(meanwhile(seen, lambda times=times: interrupt(times)))
        actors.enter_context(meanwhile(lambda: len(events(tmp_path, "start")) == 3, (tmp_path / "go").touch))
        outcomes = do([stub(tmp_path, "a", "wait", "go")], on_slurm)
    assert outcomes == {"a": Outcome("a", "done", 1)}
    assert [line["event"] for line in events(tmp_path)] == ["start", "saved"] * 2 + ["start", "stop"]


def test_slurm_does_so_many_jobs_at_once_and_none_after_the_end(on_slurm: SubmititConfig, tmp_path: Path) -> None:
    with interrupted_when(lambda: len(events(tmp_path, "start")) == 2):
        do([stub(tmp_path, name, "wait", "go") for name in "abc"], on_slurm)
    assert not slurm_jobs()
    assert [line["event"] for line in events(tmp_path)] == ["start", "start", "saved", "saved"]
    assert {(line["CUDA_VISIBLE_DEVICES"], line["OMP_NUM_THREADS"]) for line in events(tmp_path)} == {("", "1")}
    (tmp_path / "go").touch()
    outcomes = do([stub(tmp_path, name, "wait", "go") for name in "abc"], on_slurm)
    assert {outcome.status for outcome in outcomes.values()} == {"done"}


def test_more_runs_than_one_array_may_hold_are_several_arrays(
    on_slurm: SubmititConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmn.sweeps.launchers.submitit.ARRAY_JOBS", 2)
    arrays: list[set[str]] = []

    def release() -> None:
        arrays.append({job.partition("_")[0] for job in slurm_jobs()})
        (tmp_path / f"go{len(arrays)}").touch()

    with contextlib.ExitStack() as actors:
        for number, begun in ((1, 2), (2, 3)):
            seen = lambda number=number, begun=begun: len(events(tmp_path, "start")) == begun  # noqa: E731
            actors.enter_context(meanwhile(seen, release))
        outcomes = do(
            [stub(tmp_path, name, "wait", go) for name, go in zip("abc", ("go1", "go1", "go2"), strict=True)], on_slurm
        )
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    assert [len(one) for one in arrays] == [1, 1] and arrays[0] != arrays[1]


def test_slurm_job_that_is_cancelled_by_hand_is_a_failed_run(on_slurm: SubmititConfig, tmp_path: Path) -> None:
    with meanwhile(lambda: events(tmp_path, "start"), lambda: command_output("scancel", *slurm_jobs())):
        outcomes = do([stub(tmp_path, "a", "wait", "go")], on_slurm)
    assert re.match(r"its slurm job \d+ ended early: ", outcomes["a"].error)
    assert [line["event"] for line in events(tmp_path)] == ["start", "saved"]


def test_what_slurm_refuses_is_said_in_one_line(on_slurm: SubmititConfig, tmp_path: Path) -> None:
    for values, complaint in (
        ({"partition": "none"}, "launcher: the jobs cannot be submitted: sbatch: error: .*Invalid partition.*"),
        ({"options": {"colour": "red"}}, r"launcher.options: Unavailable parameter\(s\): \['colour'\]"),
    ):
        with pytest.raises(ConfigError) as caught:
            do([stub(tmp_path, "a", "pass")], dataclasses.replace(on_slurm, **values))
        assert re.fullmatch(complaint, str(caught.value))


def test_slurm_that_is_not_there_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^launcher.cluster=slurm: Could not detect .srun"):
        do([stub(tmp_path, "a", "pass")], SubmititConfig())
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("settings", [LocalConfig, RayConfig, SubmititConfig])
def test_a_launcher_is_chosen_with_its_own_settings_and_not_by_its_name_alone(settings: type[LauncherConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^launcher\.name=slurm: must be \w+: choose another launcher by launcher="):
        settings(name="slurm")
