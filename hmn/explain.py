"""Errors in words: the one line that a person who can mend one is shown, and the exit code."""

from __future__ import annotations

import difflib
import errno
import re
import sys
from collections.abc import Callable, Sequence

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hmn.config import CONF
from hmn.errors import ConfigError, HmnError


def in_one_line(program: Callable[[], object]) -> None:
    """Do ``program``; what a person can mend ends the process with its one line."""
    try:
        program()
    except Exception as error:
        line, code = explain(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        sys.exit(code)


def explain(error: BaseException, overrides: Sequence[str] | None = None) -> tuple[str | None, int]:
    """The line to print for an error that a person can mend, and the exit code; ``(None, 1)`` for any other.

    ``overrides`` are those that were composed; ``None``: the command's own.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HmnError):
            return str(cause), cause.exit_code
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _one_line(error, sys.argv[1:] if overrides is None else overrides), ConfigError.exit_code
    return _lack(error), 1


def _lack(error: BaseException) -> str | None:
    """The line for what the machine has too little of, if that is what ``error`` is about."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return "no space left on the disk: free some, and the same command goes on from the last checkpoint"
    out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    said = re.search(r"can't allocate memory|not enough memory|bad_alloc", text)
    if out or (isinstance(error, RuntimeError) and said):
        advice = "lower compute.memory_limit or compute.classes_per_call, or compute.networks_together"
        return f"out of memory: {advice}, and the same command goes on from the last checkpoint"
    return None


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], overrides)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        return f"{group}={option}: must be one of {', '.join(known)}"
    if "override_grammar" in text:
        return f"an override cannot be read: {text.splitlines()[0]}"
    # The reason is the first line of Hydra's message, or the one after it, or that of the error it stands for.
    first, second, *_ = [*text.splitlines(), "", ""]
    reason = str(error.__cause__).splitlines()[0] if error.__cause__ else second if first.endswith(":") else ""
    first = first.removesuffix(":")
    return ": ".join(filter(None, (first, reason)))


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """Names the valid keys beside an unknown dotted one, and the nearest of them."""
    # Another option of a group has other keys.
    chosen = [argument for argument in overrides if (CONF / argument.split("=")[0].lstrip("+")).is_dir()]
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
    near = difflib.get_close_matches(last, known, n=1)
    hint = f"; did you mean {'.'.join([*path, near[0]])}?" if near else ""
    return f"{key}: unknown key; {'.'.join(path) or 'the top level'} has {', '.join(known)}{hint}"
