"""The errors a person can mend: one line each, that tells what to do."""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class HmnError(Exception):
    """Printed as one line, without a traceback; ``exit_code`` is the process's."""

    exit_code = 1


class ConfigError(HmnError, ValueError):
    """A setting that cannot be used: names the dotted key, the value and the rule."""

    exit_code = 2


class DataError(HmnError, ValueError):
    """Images that cannot be used: names the file, class or split."""

    exit_code = 2


class Unreachable(DataError):
    """What may be there at the next try, by this command or by the sweep that repeats it."""

    exit_code = 1


class ArtifactError(HmnError, ValueError):
    """A kept artifact or checkpoint that must not be loaded."""

    exit_code = 2


class Damaged(ArtifactError):
    """A result that was cut short: the same run measures it anew."""


class Diverged(HmnError, ArithmeticError):
    """A loss or parameter that is no longer finite, or a fit that ended further off than it began."""


class Busy(HmnError):
    """Another process is at work on the same run or sweep."""

    exit_code = 75  # EX_TEMPFAIL: the same command can succeed later


class Lost(HmnError):
    """Another process of the run is gone: killed, or ended by an error of its own, which it has said itself."""


class Interrupted(HmnError):
    """A signal asked the run to stop; its state is kept. The exit code is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
