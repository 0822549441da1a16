"""Runs as jobs of a SLURM cluster through submitit, whose local executor stands in for a cluster to try it out.

This uses submitit directly instead of Hydra's launcher (hydra-submitit-launcher), which reports nothing before all jobs
have ended, lets the first failed job hide the others, and composes in the job, where a signal to save reaches no run.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hmn.config.sweeps import FINISH_TIMEOUT, SubmititConfig
from hmn.errors import ConfigError
from hmn.stop import STOP_SIGNALS
from hmn.sweeps.attempt import Outcome, Task, attempt, lost
from hmn.sweeps.launchers import Launched, uninterrupted

# The signal by which SLURM announces a time limit or pre-emption to all processes of a job: one that runs handle, too.
os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # for the jobs
try:
    import submitit

    submitit.JobEnvironment.USR_SIG = "USR1"  # in case it was already imported
except ImportError:
    raise ConfigError("launcher=submitit: submitit is not installed: pip install -e '.[slurm]'") from None

POLL_SECONDS = 0.5  # between looks at the files that jobs write
QUEUE_SECONDS = 15.0  # between queries to SLURM, which all its users share
ARRAY_JOBS = 1000  # of one job array; SLURM's own limit on their indices, MaxArraySize, is 1001 by default
TIME_LIMITS = 100  # that one run may reach before it counts as failed
CLOSED = "closed"  # the file that tells jobs to stop


class Run(submitit.helpers.Checkpointable):
    """One run in its job. At its time limit or when pre-empted, it saves its state, and the same job is requeued."""

    def __call__(self, task: Task, environment: Mapping[str, str], closed: Path) -> Outcome:
        requeue = signal.getsignal(signal.SIGUSR1)  # submitit's handler, which does not return
        asked: set[int] = set()
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(signum, lambda signum, _frame: asked.add(signum))  # only add: interrupted code may hold locks
        with _watching(lambda: asked or closed.exists()) as stop:
            outcome = attempt(task, environment, stop)
        if outcome.status != "stopped" or closed.exists():
            return outcome
        if signal.SIGUSR1 in asked:
            requeue(signal.SIGUSR1, None)
        sys.exit(128 + signal.SIGTERM)  # without a result: SLURM has requeued the job, or it was cancelled


@contextlib.contextmanager
def _watching(asked: Callable[[], object]) -> Iterator[threading.Event]:
    """Yield an event that is set once ``asked()`` is true."""
    stop, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not stop.is_set() and not over.wait(POLL_SECONDS):
            if asked():
                stop.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield stop
    finally:
        over.set()
        watcher.join()


def launch(tasks: Sequence[Task], settings: SubmititConfig) -> Launched:
    """One SLURM job per run, in arrays; a process each if ``launcher.cluster`` is local."""
    if not tasks:
        return
    runs_dir = Path(tasks[0].directory, tasks[0].folder).parent
    runs_dir.mkdir(parents=True, exist_ok=True)
    # submitit exchanges data through files. Every launch has its own folder, as the local executor reuses job ids.
    folder = Path(tempfile.mkdtemp(prefix="submitit-", dir=runs_dir))
    lost_any = False
    try:
        jobs = _Jobs(folder, settings, tasks)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        while jobs.left():
            for job, task in jobs.ended():
                outcome = _outcome(job, task)
                lost_any |= outcome is None
                yield outcome or lost(task, f"its {settings.cluster} job {job.job_id} ended early: {job.paths.stderr}")
    finally:
        jobs.close()
        if not lost_any:
            shutil.rmtree(folder, ignore_errors=True)


def _outcome(job: submitit.Job, task: Task) -> Outcome | None:
    """The outcome of an ended job, or ``None`` if it left no result."""
    if not job.paths.result_pickle.exists():
        return None
    try:
        return job.result()
    except submitit.core.utils.FailedJobError as error:
        return lost(task, _last_line(str(error).split("-" * 22)[1]))  # the trace is between lines of dashes


class _Jobs:
    """The jobs of one launch, of which ``at_once`` run.

    SLURM gets them in arrays, one after another, as it counts the running jobs of each array separately. The local
    executor would run all jobs that it has.
    """

    def __init__(self, folder: Path, settings: SubmititConfig, tasks: Sequence[Task]) -> None:
        self._closed = folder / CLOSED
        self._environment = _environment(settings)
        self._executor = _executor(folder, settings)
        self._slurm = settings.cluster == "slurm"
        self._at_once = settings.at_once
        self._waiting = deque(tasks)
        self._running: dict[submitit.Job, Task] = {}
        self._unknown: set[submitit.Job] = set()  # jobs that SLURM did not list when last asked
        self._ask_at = 0.0

    def left(self) -> bool:
        return bool(self._waiting or self._running)

    def ended(self) -> list[tuple[submitit.Job, Task]]:
        """Jobs that have ended since the last call; an empty list, after a short wait, if there are none."""
        self._submit()
        found = self._ended()
        if not found:
            time.sleep(POLL_SECONDS)
        return [(job, self._running.pop(job)) for job in found]

    def close(self) -> None:
        """Make running jobs save their state and end, and let no other begin."""
        self._closed.touch()
        while self._present():
            if self._slurm:
                subprocess.run(["scancel", "--state=PENDING", *{_array(job) for job in self._running}], check=False)
            time.sleep(POLL_SECONDS)

    def _submit(self) -> None:
        room = self._at_once - len(self._running)
        if self._slurm:
            room = 0 if self._running else ARRAY_JOBS
        count = min(room, len(self._waiting))
        if count <= 0:
            return
        tasks = [self._waiting.popleft() for _ in range(count)]
        # Ctrl-C is for the launcher, but the terminal sends it to the local executor's processes, too, unless it is
        # blocked. sbatch must finish what it began, so all stop signals are blocked for it.
        blocked = set(STOP_SIGNALS) if self._slurm else {signal.SIGINT}
        with uninterrupted():
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
            try:
                jobs = self._executor.map_array(Run(), tasks, [self._environment] * count, [self._closed] * count)
                self._running.update(zip(jobs, tasks, strict=True))
            except (submitit.core.utils.FailedJobError, OSError) as error:
                raise ConfigError(f"launcher: the jobs cannot be submitted: {_last_line(str(error))}") from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _ended(self) -> list[submitit.Job]:
        if not self._slurm:
            return [job for job in self._running if job.done()]
        with_result = [job for job in self._running if job.paths.result_pickle.exists()]
        if with_result or time.monotonic() < self._ask_at:
            return with_result
        self._ask_at = time.monotonic() + QUEUE_SECONDS
        # A result may become visible on a network file system only after a while.
        unknown = set(self._running).difference(self._present())
        gone, self._unknown = unknown & self._unknown, unknown
        return list(gone)

    def _present(self) -> list[submitit.Job]:
        """Jobs that wait or run. submitit's own query is not used, as only clusters with accounting can answer it."""
        if not self._slurm:
            return [job for job in self._running if not job.done()]
        answer = subprocess.run(
            ["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True
        )
        known = set(answer.stdout.split())
        return [job for job in self._running if answer.returncode or job.job_id in known]


def _array(job: submitit.Job) -> str:
    return job.job_id.partition("_")[0]


def _environment(settings: SubmititConfig) -> dict[str, str]:
    """The environment of a run. SLURM sets the GPUs of a job itself, but may hide none from a job without GPUs."""
    hidden = {} if settings.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    # A job that still runs when its notice is over cannot be requeued. W&B must be given its time limit before it is
    # known how a run ends, so it holds for finished runs, too: what is not uploaded by then waits for `wandb sync`.
    upload = str(settings.notice_seconds / 2)
    return {"OMP_NUM_THREADS": str(settings.cpus), FINISH_TIMEOUT: upload, **hidden}


def _executor(folder: Path, settings: SubmititConfig) -> submitit.Executor:
    """submitit's executor. Raises ``ConfigError`` if there is no such cluster or submitit does not know an option."""
    if settings.cluster == "local":
        executor = submitit.LocalExecutor(folder, max_num_timeout=TIME_LIMITS)
        executor.update_parameters(timeout_min=settings.timeout_minutes, signal_delay_s=settings.notice_seconds)
        return executor
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=TIME_LIMITS)
    except RuntimeError as error:
        raise ConfigError(f"launcher.cluster=slurm: {_last_line(str(error))}") from None
    parameters = {
        "job_name": "hmn",
        "time": settings.timeout_minutes,
        "signal_delay_s": settings.notice_seconds,
        "array_parallelism": settings.at_once,
        "cpus_per_task": settings.cpus,
        "gpus_per_node": settings.gpus or None,
        "mem": f"{math.ceil(1024 * settings.memory_gb)}M",
        "partition": settings.partition,
        "additional_parameters": {"requeue": True},
        "srun_args": [f"--cpus-per-task={settings.cpus}"],  # no longer inherited by a job's step since SLURM 22.05
    }
    try:
        executor.update_parameters(**parameters | settings.options)
    except ValueError as error:
        raise ConfigError(f"launcher.options: {str(error).splitlines()[0]}") from None
    return executor


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
