"""A one-node SLURM cluster on this machine, for a test: three daemons in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
WAIT_SECONDS = 60.0


def available() -> bool:
    """Whether Debian's slurm-wlm and munge are installed and slurmd may start jobs."""
    return os.getuid() == 0 and all(shutil.which(program) for program in PROGRAMS)


@contextlib.contextmanager
def running(cpus: int) -> Iterator[None]:
    """Run a cluster within the block, whose node has ``cpus`` CPUs; SLURM's commands address it."""
    # A short path: a socket's has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    for name in ("state", "spool", "log"):
        (folder / name).mkdir()
    try:
        with _daemons(folder, cpus) as conf, _environment("SLURM_CONF", str(conf)):
            yield
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _daemons(folder: Path, cpus: int) -> Iterator[Path]:
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "cgroup.conf").touch()
    conf = folder / "slurm.conf"
    conf.write_text(_conf(folder, cpus))
    munged = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "seed"}
    commands = (
        ["munged", "--foreground", "--force", *(f"--{key}={folder / name}" for key, name in munged.items())],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    )
    with (folder / "log" / "out").open("ab") as out:
        daemons = []
        try:
            for command, ready in zip(commands, (_munge_answers, _controller_answers, _node_is_idle), strict=True):
                daemons.append(subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
                _wait_until(lambda ready=ready: ready(folder), folder)
            yield conf
        finally:
            _says(folder, "scancel", "--user=root")  # jobs that a failed test left
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(WAIT_SECONDS)


def _conf(folder: Path, cpus: int) -> str:
    node = socket.gethostname().partition(".")[0]
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{node}(127.0.0.1)",
        "SlurmctldPort": _free_port(),
        "SlurmdPort": _free_port(),
        "SlurmUser": "root",
        # A requeued job waits until the credential of its first start has expired.
        "AuthInfo": f"socket={folder / 'munge.sock'},cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "log" / "slurmctld",
        "SlurmdLogFile": folder / "log" / "slurmd",
        "ProctrackType": "proctrack/linuxproc",  # a container may have no control groups
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0",
        "ReturnToService": 2,
        "KillWait": 30,
        "NodeName": f"{node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1024",
        "PartitionName": "main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _munge_answers(folder: Path) -> bool:
    return (folder / "munge.sock").exists()


def _controller_answers(folder: Path) -> bool:
    return "UP" in _says(folder, "scontrol", "ping")


def _node_is_idle(folder: Path) -> bool:
    return _says(folder, "sinfo", "--noheader", "--format=%T").strip() == "idle"


def _says(folder: Path, *command: str) -> str:
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _wait_until(ready: Callable[[], bool], folder: Path) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not ready():
        assert time.monotonic() < until, "\n".join(path.read_text() for path in (folder / "log").iterdir())
        time.sleep(0.05)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
