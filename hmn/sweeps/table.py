"""Table files, which define the cells of a table or figure and their layout."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hmn.config import one_of, require
from hmn.config.overrides import key_of
from hmn.errors import ConfigError
from hmn.report import text_table
from hmn.results import ROOT
from hmn.sweeps.cells import Cell

TABLES = ROOT / "experiments" / "tables"
KINDS = ("table", "figure")
ONLY = "only."
KEYS = {  # of a table file, and their types; None: a string or null
    **dict.fromkeys(("title", "reproduces", "kind", "reported")),
    **dict.fromkeys(("expects", "axes"), dict),
    **dict.fromkeys(("rows", "columns", "over", "shows", "base"), list),
    **dict.fromkeys(("skip", "adjust", "cells", "artifacts", "smoke"), list),
}
KIND_NAMES = {dict: "mapping", list: "list"}

# The debug option that makes a run with an objective take seconds, by the prefix of its name; for others, debug=smoke.
SMOKE = {
    "dc": "smoke_synthetic",
    "dsa": "smoke_synthetic",
    "distribution_matching": "smoke_distribution",
    "idm": "smoke_distribution",
    "trajectory_matching": "smoke_trajectory",
    "mtt": "smoke_trajectory",
    "bptt": "smoke_bptt",
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or figure: its runs, and how they are laid out in it."""

    name: str
    title: str
    reproduces: str
    kind: str
    expects: dict[str, Any]  # estimates: hours, device, memory_gb
    rows: tuple[str, ...]  # axes
    columns: tuple[str, ...]
    over: tuple[str, ...]  # axes over which mean and spread are taken
    shows: tuple[str, ...]
    reported: str | None
    axes: dict[str, dict[str, list[str]]]  # label -> overrides, by axis
    cells: tuple[Cell, ...]


def table_file(name: str) -> Path:
    return TABLES / f"{name}.yaml"


def table_names() -> list[str]:
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def listed() -> str:
    """A list of all tables with their expected cost."""
    names, rows = table_names(), []
    width = max(map(len, names))
    for name in names:
        with _named(table_file(name)) as path:
            file = _read(path)
            expects = file["expects"]
            rows.append([f"{name:{width}}  {file['title']}", f"{expects['hours']:,}", expects["device"]])
    return text_table(["experiment=", "hours", "on"], rows)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[Path]:
    """Within the block, errors in a file become a ``ConfigError`` of one line that names the file."""
    try:
        yield path
    except KeyError as error:
        raise ConfigError(f"{path}: has no {error.args[0]}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}: line {error.problem_mark.line + 1}: {error.problem}") from None
    except (ConfigError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None


def load_table(path: Path, overrides: Sequence[str] = ()) -> Table:
    """The table of a file, with ``overrides`` added to every cell.

    Among the overrides, ``debug=smoke`` selects the smoke variant and ``only.AXIS=LABEL,LABEL`` a part of the cells.
    Raises ``ConfigError`` naming the file and what is wrong in it.
    """
    smoke = [override for override in overrides if override.lstrip("+") == "debug=smoke"]
    chosen = [override for override in overrides if override.startswith(ONLY)]
    overrides = [override for override in overrides if override not in (*smoke, *chosen)]
    with _named(path):
        only = dict(map(_chosen, chosen))
        file = _read(path)
        _check_added(file, overrides)
        cells = tuple(_cells(file, overrides, only, bool(smoke)))
        table = Table(
            name=path.stem,
            title=file["title"],
            reproduces=file["reproduces"],
            kind=file["kind"],
            expects=file["expects"],
            rows=tuple(file["rows"]),
            columns=tuple(file["columns"]),
            over=tuple(file.get("over", ())),
            shows=tuple(file["shows"]),
            reported=file.get("reported"),
            axes=_axes(file),
            cells=cells,
        )
        one_of("kind", table.kind, KINDS)
    return table


def _chosen(override: str) -> tuple[str, str]:
    """The axis of ``only.AXIS=LABEL,LABEL`` and the labels to keep, as one string."""
    axis, equals, labels = override.removeprefix(ONLY).partition("=")
    if not equals:
        raise ConfigError(f"{override}: must be {ONLY}AXIS=LABEL,LABEL")
    return axis, labels


def _read(path: Path) -> dict[str, Any]:
    """The file as plain values, after checking that every key is known and of the right type."""
    file = OmegaConf.to_container(OmegaConf.load(path))
    require("the file", isinstance(file, dict), type(file).__name__, "a mapping")
    for key, value in file.items():
        one_of("key", key, KEYS)
        if (kind := KEYS[key]) is not None:
            require(key, isinstance(value, kind), "null" if value is None else value, f"a {KIND_NAMES[kind]}")
    for axis, labels in file.get("axes", {}).items():
        require(f"axes.{axis}", isinstance(labels, dict), labels, "a mapping of labels to lists of overrides")
        for label, overrides in labels.items():
            _check_strings(f"axes.{axis}.{label}", overrides, "overrides")
    _check_strings("base", file.get("base", []), "overrides")
    for key in ("rows", "columns", "over", "shows"):
        _check_strings(key, file.get(key, []), "names")
    hours = file.get("expects", {}).get("hours", 0)
    require("expects.hours", isinstance(hours, int | float), hours, "a number")
    for key in ("skip", "adjust", "cells", "artifacts", "smoke"):
        parts = {"skip": (), "cells": ("labels",), "artifacts": ("when", "from")}.get(key, ("when",))
        for rule in file.get(key, ()):
            require(key, isinstance(rule, dict), rule, "a list of mappings")
            for part in parts:
                require(f"{key}.{part}", isinstance(rule.get(part), dict), rule.get(part, "missing"), "a mapping")
            if "set" in rule:
                _check_strings(f"{key}.set", rule["set"], "overrides")
    return file


def _check_strings(key: str, values: object, what: str) -> None:
    right = isinstance(values, list) and all(isinstance(value, str) for value in values)
    require(key, right, values, f"a list of {what}, each a string")


def _check_added(file: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse overrides that would make cells with different labels the same run, or make several runs of one cell."""
    for override in overrides:
        key, value = key_of(override), override.partition("=")[2]
        for axis, labels in _axes(file).items():
            given = {tuple(one for one in settings if key_of(one) == key) for settings in labels.values()}
            if len(given) > 1 and axis not in file.get("over", ()):
                raise ConfigError(
                    f"{override}: is set by the axis {axis}: {ONLY}{axis}=LABEL,LABEL chooses among its labels"
                )
        with contextlib.suppress(HydraException):  # composing the cells reports invalid overrides
            (parsed,) = OverridesParser.create().parse_overrides([override])
            one = not parsed.is_sweep_override()
            require(key, one, value, f"one value: a table's axes are in its file; {ONLY}AXIS=LABEL,LABEL chooses cells")


def _axes(file: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    return {
        axis: {str(label): list(overrides) for label, overrides in labels.items()}
        for axis, labels in file.get("axes", {}).items()
    }


def _cells(file: Mapping[str, Any], overrides: Sequence[str], only: Mapping[str, str], smoke: bool) -> Iterator[Cell]:
    axes = _axes(file)
    known = axes.keys() | {axis for one in file.get("cells", ()) for axis in one["labels"]}
    for key in ("rows", "columns", "over"):
        unknown = set(file.get(key, ())) - known
        require(key, not unknown, ", ".join(sorted(unknown)), f"of {', '.join(sorted(known))}")
    rules = [*file.get("skip", ()), *(one["when"] for key in ("adjust", "smoke") for one in file.get(key, ()))]
    for rule in rules:
        require("skip, adjust, smoke", rule.keys() <= known, ", ".join(rule.keys() - known), f"of {', '.join(known)}")
    made = list(_made(file, axes))
    chosen = {}
    for axis, text in only.items():
        found = {own[axis] for own, _ in made if axis in own}
        chosen[axis] = _split(text, found)
        comma = "; " if any("," in label for label in found) else ", "
        there = comma.join(sorted(found)) if found else f"an axis of the table: {', '.join(sorted(known))}"
        require(f"{ONLY}{axis}", found >= set(chosen[axis]), text, f"of {there}")
    dropped = list(file.get("skip", ()))
    if smoke:
        dropped += [rule["when"] for rule in file.get("smoke", ()) if rule.get("skip")]
        first = {axis: next(iter(axes[axis])) for axis in file.get("over", ()) if axis in axes}
        made = [
            (own, settings) for own, settings in made if all(own.get(axis, one) == one for axis, one in first.items())
        ]
    made = [(own, settings) for own, settings in made if not any(_matches(own, rule) for rule in dropped)]
    names = ["/".join(own.values()) for own, _ in made]
    require("cells", len(set(names)) == len(names), next((n for n in names if names.count(n) > 1), ""), "listed once")
    by_labels = {frozenset(own.items()): name for (own, _), name in zip(made, names, strict=True)}
    cells = []
    for (labels, own), name in zip(made, names, strict=True):
        adjusted = _set(file.get("adjust", ()), labels)
        settings = last_of_each([*file.get("base", ()), *own, *adjusted, *overrides])
        if smoke:
            settings = last_of_each([*smoked(settings), *_set(file.get("smoke", ()), labels)])
        cells.append(Cell(name, labels, tuple(settings), _reads(file, labels, by_labels)))
    wanted = {cell.name for cell in cells if _matches(cell.labels, chosen)}
    wanted |= {name for cell in cells if cell.name in wanted for name in cell.reads}
    return (cell for cell in cells if cell.name in wanted)


def _split(text: str, known: Collection[str]) -> list[str]:
    """The labels of ``A,B``: at each position the longest known label, as labels may contain commas."""
    parts, labels = text.split(","), []
    while parts:
        heads = (",".join(parts[:count]) for count in range(len(parts), 0, -1))
        labels.append(next((head for head in heads if head in known), parts[0]))
        parts = parts[labels[-1].count(",") + 1 :]
    return labels


def _made(
    file: Mapping[str, Any], axes: Mapping[str, Mapping[str, list[str]]]
) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Labels and own overrides of every cell, of the grid and of ``cells``."""
    for values in itertools.product(*axes.values()) if axes else ():
        labels = dict(zip(axes, values, strict=True))
        yield labels, [item for axis, label in labels.items() for item in axes[axis][label]]
    for one in file.get("cells", ()):
        yield {axis: str(label) for axis, label in one["labels"].items()}, list(one["set"])


def _set(rules: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[str]:
    return [item for rule in rules if _matches(labels, rule["when"]) for item in rule.get("set", ())]


def _matches(labels: Mapping[str, str], rule: Mapping[str, Any]) -> bool:
    """Whether the labels match ``rule``, which may list several labels for an axis."""
    return all(
        labels.get(axis) in map(str, wanted if isinstance(wanted, list) else [wanted]) for axis, wanted in rule.items()
    )


def _reads(
    file: Mapping[str, Any], labels: Mapping[str, str], by_labels: Mapping[frozenset[tuple[str, str]], str]
) -> tuple[str, ...]:
    found = []
    for rule in file.get("artifacts", ()):
        if not _matches(labels, rule["when"]):
            continue
        choices = {axis: wanted if isinstance(wanted, list) else [wanted] for axis, wanted in rule["from"].items()}
        for values in itertools.product(*choices.values()):
            wanted = {**labels, **dict(zip(choices, map(str, values), strict=True))}
            name = by_labels.get(frozenset(wanted.items()))
            require("artifacts", name is not None, "/".join(wanted.values()), "a cell of this table")
            found.append(name)
    return tuple(found)


def last_of_each(overrides: Sequence[str]) -> list[str]:
    """Keep the last value of every key, at the position of its first: Hydra accepts an option only once."""
    chosen: dict[str, str] = {}
    for override in overrides:
        chosen[key_of(override)] = override
    return list(chosen.values())


def smoked(overrides: Sequence[str]) -> list[str]:
    """The same run in seconds, on digits with the smoke settings of its objective; its accuracy is meaningless."""
    settings = dict(override.split("=", 1) for override in overrides)
    objective = settings.get("objective", "gradient_matching")
    debug = SMOKE.get(objective, SMOKE.get(objective.split("_")[0], "smoke"))
    kept = []
    for key, value in settings.items():
        section, _, field = key.partition(".")
        if section == "dataset" and field not in ("", "class_order", "class_range"):
            continue  # belongs to the dataset that digits replace
        if key.startswith(("objective.", "evaluation.", "network.", "pruning.score_", "pruning.search_")):
            continue  # replaced by the smoke settings
        if key in ("experiment", "debug") or key.startswith("compute."):
            continue
        if key == "dataset":
            value = "digits"
        if key == "objective" and objective.startswith("mtt_"):
            value = "trajectory_matching"
        kept.append(f"{key}={value}")
    if "dataset" not in settings:
        kept.append("dataset=digits")
    return [*kept, f"debug={debug}"]
