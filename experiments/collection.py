"""Read run folders side by side: what each records of its run, how the runs differ, and readable names for them.

Runs may be unfinished and folders damaged. What cannot be read is left out, so that the page still shows the rest.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hmn import results
from hmn.errors import ArtifactError, ConfigError
from hmn.sweeps import state
from hmn.sweeps.attempt import FAILURE, LOG
from hmn.sweeps.sweep import FILE as SWEEP_FILE
from hmn.tracking import METRICS_FILE, read_metrics

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """One run on the page: its place in the sweep, and everything that its folder records."""

    cell: str  # its name in the sweep; the run id for a run outside any sweep
    labels: dict[str, str]  # by axis
    run_id: str | None  # None: it reads condensed sets that do not exist yet
    folder: Path | None
    overrides: tuple[str, ...] = ()
    name: str = ""  # short, and unique on the page

    @cached_property
    def state(self) -> state.State:
        return state.read(self.folder)

    @property
    def result(self) -> dict[str, Any]:
        return self.state.result or {}

    @cached_property
    def config(self) -> dict[str, str]:
        """Settings by dotted key, with values as JSON; empty before the run has started."""
        found = self.result.get("config")
        if found is None and self.folder is not None and (self.folder / CONFIG).exists():
            try:
                found = OmegaConf.to_container(OmegaConf.load(self.folder / CONFIG))
            except (
                OSError,
                ValueError,
                yaml.YAMLError,
                OmegaConfBaseException,
            ):  # cut short: ``state`` tells what became of the run
                found = None
        return dict(flat(found)) if isinstance(found, Mapping) else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        try:
            return read_metrics(self.folder / METRICS_FILE) if self.folder else []
        except ArtifactError:  # one damaged file must not cost the page of the other runs
            return []

    @property
    def command(self) -> str | None:
        """The command that repeats the run."""
        return self.state.command or (shlex.join(["python", "run.py", *self.overrides]) if self.overrides else None)


@dataclass(frozen=True)
class Collection:
    title: str
    runs: list[Run]
    axes: list[str]  # those along which labels differ
    alike: dict[str, str]  # the label of every other axis
    command: str | None = None  # of the sweep


def collect(folder: Path) -> Collection:
    """Collect the runs of a sweep's folder, or of a folder of runs. Raises ``ConfigError`` if there are none."""
    if (folder / SWEEP_FILE).exists():
        return _of_sweep(folder)
    found = sorted(path.parent for name in (results.FILE, CONFIG, FAILURE, LOG) for path in folder.glob(f"*/{name}"))
    runs = [Run(path.name, {}, path.name, path) for path in dict.fromkeys(found)]
    if not runs:
        raise ConfigError(f"{folder}: holds neither {SWEEP_FILE} nor run folders; give runs/sweeps/NAME or runs")
    runs = [replace(run, labels=_labels(run.config)) for run in runs]
    return Collection(f"Runs in {folder.resolve().name}/", *_named(runs))


def _of_sweep(folder: Path) -> Collection:
    try:
        sweep = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
        cells = [_cell(one, folder.resolve().parent.parent) for one in sweep["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{folder / SWEEP_FILE}: damaged ({what}); run the sweep's command to rewrite it") from None
    runs: dict[str, Run] = {}
    for run in cells:
        key = run.run_id or f"cell {run.cell}"
        runs[key] = _joined(runs[key], run) if key in runs else run
    return Collection(sweep.get("title") or sweep["name"], *_named(list(runs.values())), sweep.get("command"))


def _cell(one: Mapping[str, Any], runs_dir: Path) -> Run:
    run_id = one["run_id"]
    # The sweep's folder is RUNS/sweeps/NAME, so its runs are found even after RUNS has been moved.
    folder = None if run_id is None else runs_dir / Path(run_id).name
    return Run(one["name"], dict(one["labels"]), run_id, folder, tuple(one["overrides"]))


def _joined(run: Run, other: Run) -> Run:
    """One run for two cells that share a run id, with the names and labels of both."""
    labels = {
        axis: " = ".join(dict.fromkeys(one.labels[axis] for one in (run, other) if axis in one.labels))
        for axis in dict.fromkeys([*run.labels, *other.labels])
    }
    return replace(run, cell=f"{run.cell} = {other.cell}", labels=labels)


def _labels(config: Mapping[str, str]) -> dict[str, str]:
    """Labels for a run outside any sweep: the settings that tell runs apart at first sight."""
    mode = json.loads(config.get("mode", '"run"'))
    name, kind = (json.loads(config.get(f"dataset.{key}", "null")) for key in ("name", "kind"))
    method = config.get("container.name") if mode == "run" else json.dumps(mode)
    objective = config.get("objective.name") if mode == "run" else None
    chosen = {
        "dataset": json.dumps(name or kind),
        "IPC": config.get("memory.images_per_class"),
        "method": method,
        "objective": objective,
        "seed": config.get("seed"),
    }
    return {axis: bare(value) for axis, value in chosen.items() if value not in (None, "null")}


def _named(runs: Sequence[Run]) -> tuple[list[Run], list[str], dict[str, str]]:
    """The runs with readable names, the axes along which their labels differ, and the labels of the other axes."""
    labels: dict[str, set[str]] = {}
    for axis, label in (item for run in runs for item in run.labels.items()):
        labels.setdefault(axis, set()).add(label)
    axes = [axis for axis, found in labels.items() if len(found) > 1]
    alike = {axis: label for axis, (label, *more) in labels.items() if not more}
    names = [" · ".join(_words(axis, run.labels[axis]) for axis in axes if axis in run.labels) for run in runs]
    twice = {name for name, count in Counter(names).items() if count > 1 or not name}
    shown = [_told_apart(run, name) if name in twice else name for run, name in zip(runs, names, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, shown, strict=True)], axes, alike


def _told_apart(run: Run, name: str) -> str:
    """Tell runs of one name apart: by the hash of the run's settings, or else by the cell's name."""
    return f"{name} · {run.run_id.rpartition('-')[2]}" if name and run.run_id else run.cell


def _words(axis: str, label: str) -> str:
    """The label, with its axis before it if it is a number, which would mean nothing by itself."""
    return f"{axis.rpartition('.')[2]} {label}" if leading_number(label) is not None else label


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield dotted keys and their values as JSON; an empty section counts as a value."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def bare(value: str) -> str:
    """A JSON value as text, without quotes if it is a string."""
    loaded = json.loads(value)
    return loaded if isinstance(loaded, str) else value


def shared_settings(configs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The settings that all configurations share; empty configurations are ignored."""
    configs = [config for config in configs if config]
    if not configs:
        return {}
    return {key: value for key, value in configs[0].items() if all(config.get(key) == value for config in configs)}


def leading_number(text: str | None) -> float | None:
    """The number that ``text`` starts with, such as 36 of "36-40", to sort by; ``None`` if there is none."""
    found = re.match(r"\d+(\.\d+)?(e[+-]?\d+)?(?=$|-)", str(text or ""))
    return float(found[0]) if found else None
