"""Errors that a user can fix, explained: the one line to print, and the exit code."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import hydra
import torch
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hmn import distributed
from hmn.config import CONF
from hmn.config.overrides import key_of
from hmn.errors import ConfigError, HmnError

T = TypeVar("T")
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
FULL = re.compile("No space left|quota exceeded")  # in the text of errors that libraries make of the system's


def in_one_line(program: Callable[[], T]) -> T:
    """Return ``program()``; an error that a user can fix ends the process, or all those of a run, with one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the output is not UTF-8, as stderr already does
    try:
        with ended_by_the_person():
            return program()
    except Exception as error:
        line, code = explain(error)
        if line is None:
            raise
        distributed.exit_with(line, code)


@contextlib.contextmanager
def ended_by_the_person() -> Iterator[None]:
    """End the process silently at Ctrl-C, or when a reader of its output, such as ``head``, closes the pipe."""
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the rest of the buffer
        sys.exit(128 + signal.SIGPIPE)


def explain(error: BaseException, overrides: Sequence[str] | None = None) -> tuple[str | None, int]:
    """The line to print for an error that a user can fix, and the exit code; ``(None, 1)`` for any other.

    ``overrides`` are those that were composed; ``None`` means those of the command line.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HmnError):
            return str(cause), cause.exit_code
        cause = cause.__cause__ or cause.__context__
    overrides = sys.argv[1:] if overrides is None else overrides
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(error, overrides), ConfigError.exit_code
    if isinstance(error, ValueError) and "Config group override" in str(error):
        return _no_option(overrides), ConfigError.exit_code
    return _lack(error), 1


def _lack(error: BaseException) -> str | None:
    """The line for an error of disk space, file access or memory; ``None`` for any other."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or FULL.search(text):
        return "no space left on the disk: free some, and the same command resumes from the last checkpoint"
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        places = "paths.runs_dir, paths.data_dir, paths.cache_dir or dataset.root"
        return f"{error.filename}: {error.strerror}: fix that, or choose another place with {places}"
    out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    said = re.search(
        r"can't allocate memory|not enough memory|bad_alloc|CUDA error: out of memory|_STATUS_ALLOC_FAILED", text
    )
    if out or (isinstance(error, RuntimeError) and said):
        steps = "set compute.memory_limit, or a lower compute.classes_per_call or compute.networks_together"
        batches = "lower container.fit_batch, objective.real_batch or evaluation.batch (that makes it another run)"
        return f"out of memory: {steps}, and the same command resumes from the last checkpoint; or {batches}"
    return None


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], overrides)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        return _unknown_option(group, option)
    if match := re.search(r"Multiple values for (\w+)", text):
        return f"{match[1]}: chosen twice: write {match[1]}=NAME without the +"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: a run takes one value: add -m to run each of them, or write [...] for a list"
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        quoted = f"{key}='\"{value}\"'" if value else "KEY='\"VALUE\"'"
        return f"{error.override}: cannot be read as a setting; quote a value that has special characters: {quoted}"
    # The reason is the first line of Hydra's message, or the one after it, or that of its cause.
    first, second, *_ = [*text.splitlines(), "", ""]
    reason = str(error.__cause__).splitlines()[0] if error.__cause__ else second if first.endswith(":") else ""
    first = first.removesuffix(":")
    return ": ".join(filter(None, (first, reason)))


def _unknown_option(group: str, option: str) -> str:
    known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if group == "experiment" and (CONF.parent / "experiments" / "tables" / f"{option}.yaml").exists():
        return f"experiment={option}: this is a table of many runs; start it with python sweep.py experiment={option}"
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
    return f"{group}={option}: must be one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def _no_option(overrides: Sequence[str]) -> str:
    """The line for a group's option that reads as a number, true or null: Hydra does not say which one it was."""
    for argument in overrides:
        group, _, option = argument.lstrip("+").partition("=")
        if (CONF / group).is_dir() and not (CONF / group / f"{option}.yaml").exists():
            return _unknown_option(group, option)
    return "the option of a config group must be the name of one of its files in conf/"


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """The line for an unknown dotted key: it names the valid keys, and the nearest of them."""
    # The valid keys depend on the chosen options of the groups.
    chosen = [argument for argument in overrides if (CONF / key_of(argument)).is_dir()]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        node = hydra.compose("config", overrides=[argument for argument in chosen if "," not in argument])
    *parents, last = key.split("@")[0].split(".")
    path = []
    for parent in parents:
        if not isinstance(node, DictConfig) or parent not in node:
            last = parent
            break
        node = node[parent]
        path.append(parent)
    known = [str(name) for name in node] if isinstance(node, DictConfig) else []
    known += ["experiment", "debug"] if not path else []
    if last in known:  # Hydra refuses to replace a mapping
        return f"{key}: is a mapping: +{key}.NAME=VALUE adds to it"
    near = difflib.get_close_matches(last, known, n=1)
    hint = f"; did you mean {'.'.join([*path, near[0]])}?" if near else ""
    if not known:
        return f"{key}: {'.'.join(path)} has no keys yet: +{key}=VALUE adds one"
    return f"{key}: unknown key; {'.'.join(path) or 'the top level'} has {', '.join(known)}{hint}"
