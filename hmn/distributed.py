"""One run in several processes, started by ``torchrun``: who owns which classes, and how they communicate.

In a single process, every function here is the identity and costs nothing. Several processes meet once, in
:func:`start`, and must then make the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hmn.errors import ConfigError, Lost

T = TypeVar("T")

# The end of a process is noticed at once, so this only matters for a machine that vanishes. It must exceed the longest
# wait for a process that works alone: on training a network to its end, or on a snapshot bank.
TIMEOUT = timedelta(days=1)

_store: dist.Store | None = None
_hosts: dist.ProcessGroup | None = None  # for tensors in host memory, whatever backend the devices use


def launched() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0


def start(device: torch.device, at_most: int | None = None) -> None:
    """Meet the other processes, if there are any; ``device`` is the one that this process computes on.

    Raises ``ConfigError`` if there are more than ``at_most``, the number of classes that they divide among them.
    """
    global _store, _hosts
    if not launched():
        return
    count = int(os.environ["WORLD_SIZE"])
    if at_most is not None and count > at_most:
        raise ConfigError(f"--nproc-per-node={count}: must be at most {at_most}, one class for every process")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    with _reaching_others():
        _store, rank, world = next(dist.rendezvous("env://"))
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=TIMEOUT)
        _hosts = dist.new_group(backend="gloo", timeout=TIMEOUT) if on_gpu else dist.group.WORLD


def finish() -> None:
    """Leave the other processes, once all have come this far."""
    global _store, _hosts
    if world() > 1:
        barrier()
        dist.destroy_process_group()
        _store = _hosts = None


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """How many processes have met."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that prints, logs and writes the run's files."""
    return rank() == 0


def owned(classes: int) -> range:
    """Classes of this process; the first processes get one more if the classes do not divide evenly."""
    share, more = divmod(classes, world())
    start = rank() * share + min(rank(), more)
    return range(start, start + share + (rank() < more))


@torch.no_grad()
def sum_(tensors: Sequence[Tensor]) -> None:
    """Sum each of ``tensors`` over the processes, in place. All are on one device and are sent as one message."""
    if world() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _reaching_others():
        dist.all_reduce(flat, group=_group(flat.device))
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


@torch.no_grad()
def gather_rows(rows: Iterable[tuple[int, Tensor]], mine: range) -> None:
    """Give every process the owner's values of all ``rows`` (class, tensor), in place; ``mine`` are its own classes."""
    if world() == 1:
        return
    rows = list(rows)
    for label, row in rows:
        if label not in mine:
            row.zero_()
    sum_([row for _, row in rows])  # the owner's values plus zeros: exact


@torch.no_grad()
def copy_first_(tensors: Iterable[Tensor]) -> None:
    """Overwrite each of ``tensors`` with the first process's values."""
    if world() == 1:
        return
    for tensor in tensors:
        value = tensor.contiguous()
        octets = value.flatten().view(torch.uint8)  # the same memory: gloo and NCCL do not support 16-bit integers
        with _reaching_others():
            dist.broadcast(octets, src=0, group=_group(value.device))
        tensor.copy_(value)


def agree(*values: int) -> list[int]:
    """Maximum of each value over the processes."""
    if world() == 1:
        return list(values)
    largest = torch.tensor(values)
    with _reaching_others():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_hosts)
    return largest.tolist()


def from_first(function: Callable[[], T]) -> T:
    """Return the first process's ``function()`` in all of them; the others wait for it and do not call their own."""
    if world() == 1:
        return function()
    box = [function() if first() else None]
    with _reaching_others():
        dist.broadcast_object_list(box, src=0, group=_hosts)
    return box[0]


def barrier() -> None:
    """Wait until every process has made this call."""
    agree(0)


def first_then_others(function: Callable[[], T]) -> T:
    """Call ``function()`` in every process, in the first one before the others, so they find what it downloads."""
    if first():
        value = function()
        barrier()
        return value
    barrier()
    return function()


@contextlib.contextmanager
def one_output() -> Iterator[None]:
    """Within the block only the first process prints."""
    if _number() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def exit_with(line: str, code: int) -> NoReturn:
    """End this process for an error that ends all of them: the first one to fail prints ``line``, the others do not."""
    if _speaks():
        print(line, file=sys.stderr)
    if world() == 1:
        sys.exit(code)
    _end(code)  # an orderly exit would wait for the lost process's part of pending device work


def leave() -> None:
    """Make this the last call of a process that has done its part: one of several ends here, without an orderly exit.

    During that exit, a gloo thread that outlives its group may abort the process, which torchrun reports as a failure.
    """
    if launched():
        _end(0)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _speaks() -> bool:
    if _store is None:
        return _number() == 0  # before they meet, all processes find the same errors
    try:
        return _store.add("errors", 1) == 1
    except RuntimeError:  # torchrun is gone too
        return True


def _number() -> int:
    return int(os.environ.get("RANK", 0)) if launched() else 0


def _group(device: torch.device) -> dist.ProcessGroup:
    return _hosts if device.type == "cpu" else dist.group.WORLD


@contextlib.contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing narrower
        raise Lost("another process of this run was lost; the same command resumes from the last checkpoint") from error
