"""The command line: Hydra composes, the plan is checked, one mode runs. Errors that a user can fix print one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hmn import config, distributed, experiment, results
from hmn.config.overrides import section_of
from hmn.errors import ConfigError
from hmn.explain import in_one_line
from hmn.plan import make_plan
from hmn.sweeps.attempt import FAILURE, end_with_parent
from hmn.sweeps.cli import as_multirun
from hmn.sweeps.sweep import OWN

MULTIRUN = ("-m", "--multirun")


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def _task(raw: DictConfig) -> float | None:
    """Run one job; return its held-out accuracy in [0, 1] for a sweeper to select by, ``None`` if none was measured."""
    return in_one_line(lambda: _run(raw))  # raises SystemExit: Hydra prints its own lines around other errors


def _run(raw: DictConfig) -> float | None:
    with distributed.one_output():
        plan = make_plan(config.from_hydra(raw), typed=tuple(HydraConfig.get().overrides.task))
        if raw.mode == "plan":
            print(plan.text(raw.plan.format))
            return None
        (plan.folder / FAILURE).unlink(missing_ok=True)  # written by a sweep: what failed there is tried again here
        result = experiment.run(plan, command=_typed_command())
        return results.held_out_accuracy(result)


def _typed_command() -> str:
    """The command of this process without its mode, so that another mode can be appended."""
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("mode=")]
    return shlex.join(["python", Path(sys.argv[0]).name, *arguments])


def _register_resolvers() -> None:
    def planned(root: DictConfig) -> tuple[str, Path]:
        """Run id and folder; a plan has no folder of its own."""
        if root.mode == "plan":
            return ".", Path(".")
        plan = make_plan(config.from_hydra(root), typed=tuple(root.hydra.overrides.task))
        return plan.run_id, plan.folder

    OmegaConf.register_new_resolver("run_name", lambda _root_: planned(_root_)[0], replace=True)
    OmegaConf.register_new_resolver("run_dir", lambda _root_: str(planned(_root_)[1]), replace=True)


def _accept_lazy_help() -> None:
    """Python 3.14's argparse reads a help text as its option is added; one of Hydra's (1.3.8) is not yet text then."""
    check = getattr(argparse.ArgumentParser, "_check_help", None)
    if check is None:  # an older Python
        return

    def check_text(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        if action.help is not None:
            action.help = str(action.help)
        check(parser, action)

    argparse.ArgumentParser._check_help = check_text


def main() -> None:
    end_with_parent()
    config.register()
    _register_resolvers()
    _accept_lazy_help()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them and exiting with 1
    in_one_line(_started)
    distributed.leave()


def _started() -> None:
    arguments = sys.argv[1:]
    if is_sweep(arguments):
        sys.exit(as_multirun([argument for argument in arguments if argument not in MULTIRUN]))
    for argument in arguments:
        if section_of(argument) in OWN:
            raise ConfigError(f"{argument}: a setting of sweeps, not of a run: {_instead(arguments)}")
    _task()


def _instead(arguments: Sequence[str]) -> str:
    if set(MULTIRUN) & set(arguments):
        return "leave it out, or leave out the options for Hydra, which select its own sweeper"
    return "add -m, or use sweep.py"


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether our own launcher takes it: a multirun that sets nothing of Hydra's, such as another sweeper."""
    flags = {argument for argument in arguments if argument.startswith("-")}
    return bool(flags) and flags <= set(MULTIRUN) and not any(a.startswith("hydra") for a in arguments)
