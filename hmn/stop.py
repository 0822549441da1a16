"""Stopping on a signal, at a point where everything that matters is saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from hmn.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block, ``handler`` receives the signals that ask a process to stop."""
    previous = {signum: signal.signal(signum, handler) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)


class Stop:
    """Records that a signal asked the run to stop; the run then stops at its next step boundary."""

    def __init__(self) -> None:
        self.signum: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Within the block, SIGTERM, SIGUSR1 and Ctrl-C only ask to stop; a second Ctrl-C ends the process at once."""

        def ask(signum: int, _frame: FrameType | None) -> None:
            if signum == signal.SIGINT and self.signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.signum = signum

        with handled_by(ask):
            yield self

    def check(self, what_now: str = "the same command resumes from here") -> None:
        """Raise ``Interrupted`` if a signal has asked to stop. Call this where everything that matters is saved."""
        if self.signum is not None:
            raise Interrupted(f"stopped by {signal.Signals(self.signum).name}; {what_now}", self.signum)
