"""``sweep.py``: plan, launch and watch the runs of a table file or of a grid of settings."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hmn import distributed
from hmn.config import LauncherConfig, require
from hmn.config.sweeps import LocalConfig
from hmn.errors import ConfigError
from hmn.explain import in_one_line
from hmn.report import text_table
from hmn.sweeps import state, table
from hmn.sweeps.attempt import end_with_parent
from hmn.sweeps.launchers import local
from hmn.sweeps.pace import flops_per_second
from hmn.sweeps.planning import Planned, by_run, work
from hmn.sweeps.search import search
from hmn.sweeps.sweep import Sweep, accuracy_text, counts, launch, of_arguments, status_command, varied_not_read

COMMANDS = ("launch", "plan", "status", "results", "search", "tables")
DAY_SECONDS = 86400
ORDER = ("failed", "running", "interrupted", "damaged", "waiting", "done")


def main() -> None:
    end_with_parent()
    in_one_line(lambda: sys.exit(run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Run the command and return the exit code: 1 if a run failed or if ``results`` finds none."""
    given = _parser().parse_intermixed_args(_with_command(arguments))
    require("--json", not given.json or given.command == "results", "given", "left out except for results")
    require("--every", given.every is None or given.command == "status", given.every, "left out except for status")
    every = given.every
    require("--every", every is None or 0 < every <= DAY_SECONDS, every, "above 0 and at most 86400 seconds")
    if given.command == "search":
        return search(given.settings)
    if given.command == "tables":
        require("tables", not given.settings, " ".join(given.settings), "given without settings: it lists all tables")
        print(table.listed())
        return 0
    settings, plans = _without_plan(given.settings)
    sweep = of_arguments(settings, shlex.join(["python", "sweep.py", *settings]))
    if given.command == "plan" or plans:
        print(plan_text(sweep, sweep.plan()))
        return 0
    if given.command == "status":
        return _status(sweep, given.every)
    if given.command == "results":
        return _results(sweep, given.json)
    return _launch(sweep)


def as_multirun(settings: Sequence[str]) -> int:
    """``run.py --multirun SETTINGS``, the same sweep as by sweep.py."""
    if distributed.launched():
        raise ConfigError("--multirun: must be left out under torchrun, which starts the processes of one run")
    settings, plans = _without_plan(settings)
    sweep = of_arguments(settings, shlex.join(["python", "run.py", "-m", *settings]))
    if plans:
        print(plan_text(sweep, sweep.plan()))
        return 0
    return _launch(sweep)


def _without_plan(settings: Sequence[str]) -> tuple[list[str], bool]:
    """The settings without ``mode=plan``, and whether it was among them.

    ``mode=plan`` asks for the plan of the sweep, as it does for one run. It is not a setting of the runs: they are
    planned in their own modes, with their own ids.
    """
    for setting in settings:
        key, _, value = setting.partition("=")
        require(key, key != "plan.format" or value == "text", value, "left out: a sweep's plan is text")
    return [setting for setting in settings if setting != "mode=plan"], "mode=plan" in settings


def _launch(sweep: Sweep) -> int:
    found = launch(sweep, announce=True)
    print(summary(found))
    if found["failed"]:
        print(f"to see what failed: {status_command(sweep)}", file=sys.stderr)
    return int(found["done"] < found.total())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sweep.py", description=__doc__)
    parser.add_argument("command", choices=COMMANDS, help="default: launch")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="experiment=TABLE (`sweep.py tables` lists them), or settings of run.py, with several values as a,b,c",
    )
    parser.add_argument("--every", type=float, metavar="SECONDS", help="status: show it repeatedly")
    parser.add_argument("--json", action="store_true", help="results: everything kept of every run")
    return parser


def _with_command(arguments: Sequence[str]) -> list[str]:
    """Move the command to the front, and add the default one if there is none."""
    named = [argument for argument in arguments if argument in COMMANDS][:1]
    if not named and any(argument in ("-h", "--help") for argument in arguments):
        return [*arguments]
    return [*(named or ["launch"]), *(argument for argument in arguments if argument not in named)]


def plan_text(sweep: Sweep, planned: Sequence[Planned]) -> str:
    """Every cell with its run and expected cost, followed by the expected cost of all runs that are left."""
    runs = by_run(planned)
    states = {run_id: state.read(one.folder) for run_id, one in runs.items()}
    done = {run_id: found.result for run_id, found in states.items() if found.result}
    rate, whence = _rate(sweep, runs, done)
    rows = []
    for number, one in enumerate(planned, start=1):
        found = states[one.run_id].status if one.run_id else "waiting"
        used = f"{one.stored_floats:,} of {one.budget_floats:,}" if one.budget_floats else ""
        cost = [one.steps or "", _shown(one.flops / 1e12), _shown(one.flops / rate / 3600)] if one.flops else [""] * 3
        run = one.run_id or "after " + "; ".join(one.cell.reads)
        name = f"{number:{len(str(len(planned)))}}  {one.cell.name}"
        rows.append([name, run, found, str(one.images_per_class or ""), used, *map(str, cost)])
    header = ["cell", "run", "status", "images/class", "floats", "steps", "TFLOP", "hours"]
    waiting = (one for run_id, one in runs.items() if run_id not in done)
    left = work(waiting, finished=[runs[run_id] for run_id in done]) / rate / 3600
    lines = [text_table(header, rows), "", summary(counts(planned))]
    lines.append(f"left: about {_shown(left)} hours of one slot, at {rate / 1e9:,.1f} GFLOP/s, {whence}")
    if any(one.run_id is None for one in planned):
        lines.append("not counted: runs that read kept sets which do not exist yet")
    lines += [f"varies but is not read: {text}" for text in varied_not_read(planned)]
    if sweep.table is not None:
        expected = ", ".join(f"{key} {value}" for key, value in sweep.table.expects.items())
        lines.append(f"experiments/tables/{sweep.table.name}.yaml expects: {expected}")
    return "\n".join(lines)


def _rate(sweep: Sweep, runs: Mapping[str, Planned], done: Mapping[str, dict[str, Any]]) -> tuple[float, str]:
    """Operations per second of one slot, and how they were measured."""
    # Expected costs do not include making a bank, which several runs share.
    walls = (result["wall_seconds"] for result in done.values())
    seconds = sum(value for wall in walls for stage, value in wall.items() if stage != "bank")
    flops = work(runs[run_id] for run_id in done)
    if seconds and flops:
        return flops / seconds, f"measured on finished runs ({len(done)})"
    cuda = sweep.gives_gpus and torch.cuda.is_available()
    with _threads_of(sweep.launcher):
        return flops_per_second(torch.device("cuda" if cuda else "cpu")), "measured on one convolution"


@contextlib.contextmanager
def _threads_of(launcher: LauncherConfig) -> Iterator[None]:
    """Within the block, use as many threads as one slot of ``launcher``, if its runs are on this machine."""
    before = torch.get_num_threads()
    if isinstance(launcher, LocalConfig):
        torch.set_num_threads(int(local.slots(launcher)[0].environment["OMP_NUM_THREADS"]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shown(number: float) -> str:
    if 0 < number < 0.01:
        return "<0.01"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _status(sweep: Sweep, every: float | None) -> int:
    while True:
        planned = sweep.plan()
        text = status_text(planned)
        if every is None:
            print(text)
            return 0
        print(f"\x1b[H\x1b[J{text}", flush=True)  # cursor to the top left, then clear the screen
        if not _may_change(planned):
            return 0
        time.sleep(every)


def _may_change(planned: Sequence[Planned]) -> bool:
    """Whether any run may still change its status: runs that read the set of a failed run will not."""
    status = {one.cell.name: state.read(one.folder).status for one in planned}
    return any(
        status[one.cell.name] not in ("done", "failed") and all(status[name] != "failed" for name in one.cell.reads)
        for one in planned
    )


def status_text(planned: Sequence[Planned]) -> str:
    """Every run with its status and details, unfinished runs first, then the number of runs per status."""
    rows = []
    repeats = []
    names: dict[str, list[str]] = {}
    for one in planned:
        if one.run_id is not None:
            names.setdefault(one.run_id, []).append(one.cell.name)
    for run_id, one in by_run(planned).items():
        found = state.read(one.folder)
        more = f" (+{len(names[run_id]) - 1})" if len(names[run_id]) > 1 else ""
        rows.append([one.cell.name + more, found.status, _detail(found, one)])
        if found.status == "failed":
            repeats.append(f"{one.cell.name}: {found.command}")
    rows += [[one.cell.name, "waiting", "for " + "; ".join(one.cell.reads)] for one in planned if one.run_id is None]
    rows.sort(key=lambda row: ORDER.index(row[1]))
    parts = [text_table(["cell", "status", ""], rows), "", summary(Counter(row[1] for row in rows))]
    return "\n".join([*parts, *(["", "to repeat failed runs by hand:", *repeats] if repeats else [])])


def _detail(found: state.State, one: Planned) -> str:
    if found.status == "done":
        return accuracy_text(found.result)
    if found.error:
        return found.error
    if found.bar and not found.bar.startswith("condense "):
        return found.bar
    if found.stage is None:
        return ""
    if found.stage != "condense":
        return found.stage
    of = f" of {one.steps}" if one.steps else ""
    left = found.seconds_left(one.steps)
    until = f", {_duration(left)} left" if left is not None and found.status == "running" else ""
    return f"{found.stage} {found.step}{of}{until}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def summary(found: dict[str, int]) -> str:
    order = [status for status in reversed(ORDER) if found.get(status)]
    return f"{sum(found.values())} runs: " + ", ".join(f"{found[status]} {status}" for status in order)


def _results(sweep: Sweep, as_json: bool) -> int:
    planned = [one for one in sweep.plan() if one.run_id is not None]
    found = [(one, result) for one in planned if (result := state.read(one.folder).result) is not None]
    if as_json:
        print(
            json.dumps(
                [{"cell": one.cell.name, "labels": one.cell.labels, **result} for one, result in found], indent=2
            )
        )
    else:
        rows = [
            [
                one.cell.name,
                result["images_per_class"],
                f"{result['stored_floats']:,}",
                accuracy_text(result),
                one.run_id,
            ]
            for one, result in found
        ]
        print(text_table(["cell", "images/class", "floats", "test accuracy", "run"], rows))
    return int(not found)
