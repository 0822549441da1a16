"""Atomic files and folder locks, for everything that runs and sweeps keep on disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save_file
from torch import Tensor

from hmn import distributed
from hmn.errors import Busy, HmnError
from hmn.stop import Stop

LOCK = ".lock"
LOOK_SECONDS = 0.1  # held() takes a free lock for an instant; exclusive() must outlast that


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` once the block succeeds, so ``path`` is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # with mkstemp's 0600, other users could not read the results
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as JSON that people can read."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors``, which may be on any device, to ``path`` as safetensors."""
    with atomic_write(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(folder: Path, *, wait: Stop | None = None, what: str = "this run") -> Iterator[None]:
    """Lock ``folder`` for this process; of several processes of one run, the first locks it for all.

    If another process holds the lock, wait for it until ``wait`` is asked to stop; without ``wait``, raise ``Busy``.
    """
    if not distributed.first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        until = time.monotonic() + LOOK_SECONDS
        while not _taken(lock, fcntl.LOCK_EX):
            if wait is not None:
                _wait_for(lock, folder, wait)
                break
            if time.monotonic() > until:
                raise Busy(f"{folder}: another process is working on {what}; wait for it or stop it")
            time.sleep(LOOK_SECONDS / 20)
        yield


def _wait_for(lock: IO[str], folder: Path, stop: Stop) -> None:
    print(f"{folder}: waiting for the process that is working on it", file=sys.stderr)
    while not _taken(lock, fcntl.LOCK_EX):
        stop.check("it was only waiting; the same command waits again, or finds the result")
        time.sleep(LOOK_SECONDS)


def held(folder: Path) -> bool:
    """Whether a process has locked ``folder``."""
    try:
        with (folder / LOCK).open() as lock:
            return not _taken(lock, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _taken(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise HmnError(
            f"{lock.name}: its file system has no locks: choose another one with paths.runs_dir or paths.cache_dir"
        ) from None
    return True
