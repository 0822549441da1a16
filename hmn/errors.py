"""Errors that a user can fix: each is one line that tells what to do."""


class HmnError(Exception):
    """An error printed as one line, without a traceback; the process ends with ``exit_code``."""

    exit_code = 1


class ConfigError(HmnError, ValueError):
    """A setting that cannot be used: the message names the dotted key, the value and the rule."""

    exit_code = 2


class DataError(HmnError, ValueError):
    """Images that cannot be used: the message names the file, class or split."""

    exit_code = 2


class Unreachable(DataError):
    """Data that may be reachable at the next try, by this command or by the sweep that retries it."""

    exit_code = 1


class ArtifactError(HmnError, ValueError):
    """A saved artifact or checkpoint that must not be loaded."""

    exit_code = 2


class Damaged(ArtifactError):
    """A result that was truncated: the same run measures it again."""


class Diverged(HmnError, ArithmeticError):
    """A loss or parameter that is no longer finite, or a fit that ended worse than it began."""


class Busy(HmnError):
    """Another process is working on the same run or sweep."""

    exit_code = 75  # EX_TEMPFAIL: the same command can succeed later


class Lost(HmnError):
    """Another process of the run is gone: killed, or ended by an error that it has reported itself."""


class Interrupted(HmnError):
    """A signal asked the run to stop; its state is saved. The exit code is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
