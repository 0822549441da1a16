"""Resumable state of a run, in one slot per stage."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hmn import distributed
from hmn.config import require
from hmn.errors import ArtifactError, DataError, HmnError, Interrupted
from hmn.files import atomic_write
from hmn.stop import Stop


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

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Raise ``ArtifactError`` if the block cannot restore a state that another version of the code has saved."""
        try:
            yield
        except (LookupError, TypeError, ValueError, RuntimeError) as error:  # another key, kind, length or shape
            if len(self.codes) < 2 or isinstance(error, HmnError | torch.OutOfMemoryError):
                raise
            raise ArtifactError(
                f"{self.whole}: its checkpoint is of another code version ({self.codes[-2]}), which this one cannot "
                f"continue ({type(error).__name__}): move it away to start over, or continue with that version"
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
