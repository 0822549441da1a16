"""The command line: Hydra composes, the plan is checked, one mode runs; what a person can mend is said in one line."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hmn import config, distributed, experiment
from hmn.errors import ConfigError, HmnError
from hmn.plan import make_plan
from hmn.sweeps.attempt import end_with_parent

CONF = Path(__file__).resolve().parent.parent / "conf"
MULTIRUN = ("-m", "--multirun")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _task(raw: DictConfig) -> float | None:
    """Accuracy in [0, 1] of this run, for a sweeper; ``None`` for a plan."""
    try:
        with distributed.one_output():
            return _run(raw)
    except Exception as error:
        line, code = explain(error)
        if line is None:
            raise
        # Leaving by SystemExit keeps Hydra from printing lines of its own around this one.
        distributed.exit_with(line, code)


def _run(raw: DictConfig) -> float | None:
    plan = make_plan(config.from_hydra(raw), typed=tuple(HydraConfig.get().overrides.task))
    if raw.mode == "plan":
        print(plan.text(raw.plan.format))
        return None
    result = experiment.run(plan, command=experiment.typed_command())
    return result["accuracy"]["mean"]


def _register_resolvers() -> None:
    def planned(root: DictConfig) -> tuple[str, Path]:
        """Run id and folder; a plan has no folder of its own."""
        if root.mode == "plan":
            return ".", Path(".")
        plan = make_plan(config.from_hydra(root), typed=tuple(root.hydra.overrides.task))
        return plan.run_id, plan.folder

    OmegaConf.register_new_resolver("run_name", lambda _root_: planned(_root_)[0], replace=True)
    OmegaConf.register_new_resolver("run_dir", lambda _root_: str(planned(_root_)[1]), replace=True)


def main() -> None:
    from hmn.sweeps.cli import as_multirun  # which needs this module's CONF and explain

    end_with_parent()
    config.register()
    _register_resolvers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on, instead of printing them and exiting with 1
    try:
        if is_sweep(sys.argv[1:]):
            sys.exit(as_multirun([argument for argument in sys.argv[1:] if argument not in MULTIRUN]))
        _task()
    except Exception as error:
        line, code = explain(error)
        if line is None:
            raise
        distributed.exit_with(line, code)
    distributed.leave()


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether it is our own launcher's: a multirun for which nothing is asked of Hydra, another sweeper say."""
    flags = {argument for argument in arguments if argument.startswith("-")}
    return bool(flags) and flags <= set(MULTIRUN) and not any(a.startswith("hydra") for a in arguments)


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
