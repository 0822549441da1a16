"""Atomic files, resumable state in one slot per stage, and stopping on a signal."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hmn import distributed
from hmn.config import require
from hmn.errors import STOP_SIGNALS, ArtifactError, Busy, DataError, HmnError, Interrupted

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


class Stop:
    """Records that a signal asked the run to stop; the run then stops at its next step boundary."""

    def __init__(self) -> None:
        self.signum: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Within the block, SIGTERM, SIGUSR1 and Ctrl-C only ask to stop; a second Ctrl-C ends the process at once."""

        def ask(signum: int, _frame: object) -> None:
            if signum == signal.SIGINT and self.signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.signum = signum

        previous = {signum: signal.signal(signum, ask) for signum in STOP_SIGNALS}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def check(self, what_now: str = "the same command resumes from here") -> None:
        """Raise ``Interrupted`` if a signal has asked to stop. Call this where everything that matters is saved."""
        if self.signum is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.signum).name}; {what_now}", self.signum)


class Checkpoints:
    """A run's resumable state: one file per stage in ``folder``, written at most every ``every_seconds``.

    Of several processes, the first one writes and reads, at steps that all agree on. With ``own``, each process saves
    the state of its own part of a stage to its own file, which only a run with as many processes finds again.

    ``origin`` names what the state belongs to. Its ``data``, ``device`` and ``precision`` must be those of the existing
    state, otherwise ``DataError`` or ``ConfigError`` is raised. Its ``code`` may differ, which is printed and recorded
    in ``codes``.
    """

    def __init__(
        self,
        folder: Path,
        every_seconds: float,
        stop: Stop | None = None,
        origin: Mapping[str, str] | None = None,
        whole: Path | None = None,
    ) -> None:
        self.folder = folder
        self.whole = whole or folder.parent  # what to move away to start over
        self.every_seconds = every_seconds
        self.stop = stop or Stop()
        self.saved_at = time.monotonic()
        clock = self._read(self._path("clock"))
        self.seconds: dict[str, float] = clock["seconds"] if clock else {}  # by stage, summed over restarts
        self.origin = dict(origin or {})
        self.codes: list[str] = []  # versions of the code that contributed to the state, in order
        if self.origin:
            self.codes = self._continued(clock) if clock and clock.get("origin") else [self.origin["code"]]
        self._stage: tuple[str, float] | None = None  # the running one, and the time up to which it is counted

    def beside(self, folder: Path) -> Checkpoints:
        """More checkpoints of this run, kept in ``folder``, for a state that other runs may continue from."""
        return Checkpoints(folder, self.every_seconds, self.stop, self.origin, whole=folder)

    def _continued(self, clock: dict[str, Any]) -> list[str]:
        """Code versions of the existing state, then ours. Raises if its images, device or precision are not ours."""
        began = clock["origin"]
        if began["data"] != self.origin["data"]:
            raise DataError(f"{self.whole}: its checkpoint was made from other images; move it away to start over")
        device, now = began["device"], self.origin["device"]
        rule = f"{device}, on which {self.whole} was begun; or move it away to start over"
        require("compute.device", device == now, now, rule)  # a random stream cannot continue on another device
        now = self.origin.get("precision", "fp32")
        begun = began.get("precision", now)  # older checkpoints do not record it
        rule = f"{begun}, in which {self.whole} was begun, on a machine that has it; or move it away to start over"
        require("compute.precision", begun == now, now, rule)
        codes = clock["codes"]
        if codes[-1] != self.origin["code"]:
            if distributed.first():
                print(f"continuing from a state of another code version ({codes[-1]}, now {self.origin['code']})")
            codes = [*codes, self.origin["code"]]
        return codes

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall seconds to ``stage``; if it is killed, those up to its last checkpoint."""
        self._stage = (stage, time.monotonic())
        try:
            yield
        except Interrupted:  # the block may have saved its state elsewhere, not in these checkpoints
            self._count()
            self._keep_clock(begun=bool(self._slots()))
            raise
        finally:
            self._count()
            self._stage = None

    def _count(self) -> None:
        if self._stage is not None:
            (stage, since), now = self._stage, time.monotonic()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
            self._stage = (stage, now)

    def load(self, slot: str, *, own: bool = False) -> dict[str, Any] | None:
        """The slot's state, or ``None`` if there is none: tensors, which are put on the CPU, and plain values only."""
        path = self._path(slot, own)
        return self._read(path) if own else distributed.from_first(lambda: self._read(path))

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if isinstance(error, OSError | MemoryError) or "allocate memory" in str(error):  # not the file's fault
                raise
            raise ArtifactError(
                f"{path}: not a checkpoint of this program ({type(error).__name__}): remove it"
            ) from error

    def save(self, slot: str, state: dict[str, Any], *, own: bool = False) -> None:
        self._count()
        if own or distributed.first():
            self._write(self._path(slot, own), state)
        self._keep_clock()
        self.saved_at = time.monotonic()

    def _keep_clock(self, begun: bool = True) -> None:
        """Write the clock; until a state has ``begun``, nothing belongs to an origin, and none is written."""
        if distributed.first():
            whose = {"origin": self.origin, "codes": self.codes} if begun else {"origin": {}, "codes": []}
            self._write(self._path("clock"), {"seconds": self.seconds, **whose})

    def drop(self, slot: str) -> None:
        """Remove the slot's state and, if it was the last one, the whole folder."""
        self._path(slot).unlink(missing_ok=True)
        if not self._slots():
            clear(self.folder)

    def _slots(self) -> list[Path]:
        """Files of the existing states, without those that a kill left half-written."""
        return [path for path in self.folder.glob("[!.]*.pt") if path != self._path("clock")]

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        written = io.BytesIO()  # torch's own file writer does not report a full disk
        torch.save(state, written)
        with atomic_write(path) as temporary:
            temporary.write_bytes(written.getbuffer())

    def tick(self, slot: str, state: Callable[[], dict[str, Any]], *, own: bool = False) -> None:
        """At a step boundary, save if it is time. If a signal has asked to stop, save and raise ``Interrupted``."""
        signum, due = self.stop.signum or 0, time.monotonic() - self.saved_at >= self.every_seconds
        if not own:
            signum, due = distributed.agree(signum, due)
        if signum or due:
            self.save(slot, state(), own=own)
        if signum:  # the agreed one: a signal that has come since waits for the next step
            self.stop.signum = signum
            self.stop.check()

    def _path(self, slot: str, own: bool = False) -> Path:
        part = f"-{distributed.rank()}of{distributed.world()}" if own and distributed.world() > 1 else ""
        return self.folder / f"{slot}{part}.pt"


def codes_of(folder: Path) -> list[str]:
    """Code versions of the states in ``folder``, in order; an empty list if they cannot be read."""
    try:
        return torch.load(folder / "clock.pt", map_location="cpu", weights_only=True)["codes"]
    except Exception:  # a run that continues from there reports what is wrong
        return []


def clear(folder: Path) -> None:
    """Remove the checkpoints of a finished run, and files that a kill left half-written beside them."""
    for path in folder.glob("*.pt"):
        path.unlink()
    if folder.exists():
        folder.rmdir()
