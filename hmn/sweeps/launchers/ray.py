"""Runs as tasks of a Ray cluster whose nodes share the file system of the run folders."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future

from hmn.config.checks import require
from hmn.config.sweeps import RayConfig
from hmn.errors import ConfigError
from hmn.sweeps.attempt import GRACE_SECONDS, Outcome, Task, attempt, lost
from hmn.sweeps.launchers import Launched, uninterrupted

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read on import; by default, Ray reports its usage to its makers
try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise ConfigError("launcher=ray: Ray is not installed: pip install -e '.[ray]'") from None

ANSWER_SECONDS = 10.0
NODES_LOST = 10  # at most, while running one run, before it counts as failed
OBJECT_STORE_BYTES = 100 << 20  # for a cluster started here, through which no tensors are sent
# Ray's memory monitor would kill and repeat a run that is out of memory without end; the operating system kills it
# once, which `attempt` reports. Ray would also lower the priority of its workers, for which there is no reason here.
OWN_CLUSTER = {"memory_monitor_refresh_ms": 0, "worker_niceness": 0}


@ray.remote(num_cpus=0)
class _Gate:
    """Lets runs begin until it is closed, and records which did. Cancelling by Ray would not let runs save."""

    def __init__(self) -> None:
        self._closed = asyncio.Event()
        self._begun: set[str] = set()

    async def enter(self, run_id: str) -> bool:
        """Whether the run may begin."""
        if not self._closed.is_set():
            self._begun.add(run_id)
        return not self._closed.is_set()

    async def close(self) -> set[str]:
        """Let no further run begin and return those that have begun, which now save their state."""
        self._closed.set()
        return self._begun

    async def wait(self) -> None:
        await self._closed.wait()


@ray.remote(max_retries=NODES_LOST)  # Ray retries only when a worker is lost; `attempt` retries failures
def _run(task: Task, environment: dict[str, str], gate: ray.actor.ActorHandle) -> Outcome:
    # Never call `ray.get` here: Ray lends the CPUs of a task that blocks in it to another task.
    stop = threading.Event()
    if not gate.enter.remote(task.run_id).future().result():
        stop.set()
    closed = gate.wait.remote()
    closed.future().add_done_callback(lambda _: stop.set())
    try:
        return attempt(task, environment, stop)
    finally:
        ray.cancel(closed)  # the worker is used for further runs


def launch(tasks: Sequence[Task], settings: RayConfig) -> Launched:
    """One Ray task per run; the cluster decides when each begins."""
    with contextlib.ExitStack() as stack:
        # Ray's own calls swallow exceptions that a signal handler raises.
        with uninterrupted():
            stack.enter_context(_connected(settings))
            gate, running = _begin(tasks, settings)
            stack.callback(_end, gate, running)
        ended: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        for future in running:
            future.add_done_callback(ended.put)
        while running:
            future = ended.get()
            yield _outcome(future, running.pop(future))


def _begin(tasks: Sequence[Task], settings: RayConfig) -> tuple[ray.actor.ActorHandle, dict[Future[Outcome], Task]]:
    """Submit all ``tasks``. Returns their gate, on this node, and the future of each."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    gate = _Gate.options(scheduling_strategy=here).remote()
    run = _run.options(num_cpus=settings.cpus, num_gpus=settings.gpus)
    environment = _environment(settings)
    return gate, {run.remote(task, environment, gate).future(): task for task in tasks}


def _end(gate: ray.actor.ActorHandle, running: Mapping[Future[Outcome], Task]) -> None:
    """Make running runs save their state, and wait for them."""
    begun: set[str] = set()  # a run that has not begun may never fit on a node
    with contextlib.suppress(ray.exceptions.RayError):  # if the gate is lost, no run can be told to save
        begun = gate.close.remote().future().result()
    saving = [future for future, task in running.items() if task.run_id in begun]
    futures.wait(saving, GRACE_SECONDS + ANSWER_SECONDS)  # a run whose node was lost may never begin again


def _outcome(future: Future[Outcome], task: Task) -> Outcome:
    try:
        return future.result()
    except ray.exceptions.RayError as error:
        return lost(task, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")


def _environment(settings: RayConfig) -> dict[str, str]:
    """The environment of a run. Ray sets the GPUs of a run itself, but hides none from a run without GPUs."""
    hidden = {} if settings.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {"OMP_NUM_THREADS": str(max(1, int(settings.cpus))), **hidden}


@contextlib.contextmanager
def _connected(settings: RayConfig) -> Iterator[None]:
    """Within the block, be connected to the cluster at ``settings.address`` or, without one, to one started here.

    Raises ``ConfigError`` if the cluster does not answer, or if no run could ever be placed on one started here.
    """
    address = settings.address or os.environ.get("RAY_ADDRESS")
    own = {
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_system_config": OWN_CLUSTER,
    }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address and ":" in address:  # without an answer, Ray would end the whole process after a minute
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        # Runs print to their own logs; Ray's own messages are dropped.
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else own))
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"launcher.address={address}: no Ray cluster of this kind answers: {line}") from None
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:  # Ray has replaced it by its own
            signal.signal(signal.SIGTERM, handler)
    try:
        if not address:
            _check_fits(settings)
        yield
    finally:
        ray.shutdown()


def _check_fits(settings: RayConfig) -> None:
    has = ray.cluster_resources()
    for key, wanted, found in (("cpus", settings.cpus, has.get("CPU", 0)), ("gpus", settings.gpus, has.get("GPU", 0))):
        require(f"launcher.{key}", wanted <= found, f"{wanted:g}", f"at most {found:g}, what this machine has")
