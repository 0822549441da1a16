"""Plan the cells of a sweep before anything runs: compose and check each, and find its run id and cost."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from hmn import config, results, shared_condensed
from hmn.artifacts import CARD, card_file, sha256
from hmn.config import CONF, Config, DatasetConfig, require
from hmn.config.identity import digest, experts_identity
from hmn.data import datasets
from hmn.errors import ArtifactError, ConfigError, Damaged, HmnError
from hmn.explain import explain
from hmn.files import write_text
from hmn.plan import Plan, make_plan
from hmn.sweeps.cells import Cell

SHOWN_NAMES = 5


@dataclass(frozen=True)
class Planned:
    """A cell and the run that it is."""

    cell: Cell
    overrides: tuple[str, ...]  # for run.py, with the kept sets that the cell reads
    run_id: str | None  # None: it depends on the kept sets of unfinished cells
    folder: Path | None
    budget_floats: int | None = None
    stored_floats: int | None = None
    images_per_class: int | None = None
    steps: int | None = None  # of condensing
    flops: float = 0.0  # expected for the whole run
    making_flops: float = 0.0  # the part of them for the set before it is pruned and evaluated
    condensation: str | None = None  # runs with the same value share one condensation
    expert_flops: float = 0.0  # the part of making_flops for experts
    experts: str | None = None  # runs with the same value share experts
    not_read: tuple[str, ...] = ()  # overrides that the run does not read, each with the reason


def composed(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes for ``run.py OVERRIDES``."""
    config.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def compose(overrides: Sequence[str]) -> Config:
    """The checked configuration of ``run.py OVERRIDES``."""
    return config.from_hydra(composed(overrides))


def plan_cells(cells: Sequence[Cell], cache: Path | None = None, kept: Path | None = None) -> list[Planned]:
    """Plan every cell, in the order of ``cells``.

    Plans of earlier calls, with the same sources and ``conf/``, are read from the file ``cache``, as composing takes a
    third of a second per cell. If a run's folder is gone, ``kept / RUN_ID`` may have its result and card, from which
    cells that read its set are planned. Raises ``ConfigError`` that names all cells which cannot be composed, with one
    line per error.
    """
    version = _version()
    known = _cached(cache, version)
    fresh: dict[str, dict[str, Any]] = {}
    outside = functools.cache(_outside)  # looked up once for all cells
    planned: dict[str, Planned] = {}
    complaints: dict[str, list[str]] = {}  # the cells with each error
    for cell in sorted(cells, key=lambda cell: bool(cell.reads)):  # cells that others read come first
        try:
            read = [_source(planned.get(name), kept) for name in cell.reads]
            overrides = (*cell.overrides, *_artifact(read))
            if not all(map(_finished, read)):
                compose(overrides)  # checks its settings; the rest needs the kept sets
                planned[cell.name] = Planned(cell, overrides, None, None)
                continue
            cards = _cards(overrides)
            key = digest({"overrides": list(overrides), "kept": list(cards)})
            if (found := known.get(key)) is not None and _outdated(found, outside):
                _plan.cache_clear()  # which may hold the outdated plan, too
                found = None
            fresh[key] = found = found or _figures(overrides, cards)
            figures = found["figures"]
            own = {"folder": Path(figures["folder"]), "not_read": tuple(figures["not_read"])}
            planned[cell.name] = Planned(cell, overrides, **figures | own)
        except Exception as error:
            line, _ = explain(error, cell.overrides)
            if line is None:
                raise
            complaints.setdefault(line, []).append(cell.name)
    if complaints:
        raise ConfigError("\n".join(map(_complaint, complaints, complaints.values())))
    if cache is not None and any(known.get(key) != found for key, found in fresh.items()):
        with contextlib.suppress(OSError):  # a full disk: planning only takes as long again next time
            write_text(cache, json.dumps({"version": version, "cells": known | fresh}) + "\n")
    return [planned[cell.name] for cell in cells]


def _complaint(line: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{'; '.join(names[:SHOWN_NAMES])}{more}: {line}"


def _artifact(folders: Sequence[Path | None]) -> list[str]:
    """The override that names the kept sets of a cell, with placeholders for folders not known yet."""
    names = [_quoted(str(folder or f"not_known_{position}")) for position, folder in enumerate(folders)]
    return [f"artifact={names[0]}" if len(names) == 1 else f"artifact=[{','.join(names)}]"] if names else []


def _quoted(path: str) -> str:
    """``path`` quoted, if necessary, so that Hydra reads it back."""
    return path if re.fullmatch(r"[\w./-]+", path, re.ASCII) else QuotedString(path, Quote.single).with_quotes()


def _source(one: Planned | None, kept: Path | None) -> Path | None:
    """The folder that describes the set of a cell to read; ``None`` if it waits or cannot be composed."""
    if one is None or one.run_id is None or kept is None or _finished(one.folder):
        return one and one.folder
    return kept / one.run_id if (kept / one.run_id / CARD).exists() else one.folder


def _finished(folder: Path | None) -> bool:
    try:
        return folder is not None and results.read(folder) is not None
    except Damaged:
        return False


def _cards(overrides: Sequence[str]) -> tuple[str, ...]:
    """Digests of the cards of the kept sets in ``overrides``, as a set may have been remade under the same name."""
    named = [one for one in overrides if one.lstrip("+").startswith("artifact=")]
    values = [one.value() for one in OverridesParser.create().parse_overrides(named)]
    digests = []
    for path in (path for value in values for path in (value if isinstance(value, list) else [value])):
        with contextlib.suppress(ArtifactError, OSError):  # which the plan reports
            digests.append(sha256(card_file(str(path))))
    return tuple(digests)


def _outdated(found: Mapping[str, Any], outside: Callable[[str], list[Any]]) -> bool:
    """Whether the data behind an earlier plan changed; for a finished run they may also be gone."""
    now = outside(found["read"])
    return now != found["outside"] and not (len(now) == 1 and _finished(Path(found["figures"]["folder"])))


def _outside(where: str) -> list[Any]:
    """What a plan depends on beside its overrides: the shape of its data and the set that its container starts from.

    ``where`` says where they are, in the JSON of :func:`_figures`. A list with a single string is an error message.
    """
    read = json.loads(where)
    try:
        shape = datasets.peek(DatasetConfig(**read["dataset"]), Path(read["data_dir"]))
        start = read["start"] and sha256(card_file(read["start"]))
    except (HmnError, OSError) as error:  # which planning again reports
        return [str(error)]
    return [*dataclasses.astuple(shape), start]


def _figures(overrides: Sequence[str], cards: tuple[str, ...]) -> dict[str, Any]:
    """One cell's figures, where they were read from beside the overrides, and what was found there."""
    seeds = [override.removeprefix("seed=") for override in overrides if override.startswith("seed=")]
    plan = _plan(tuple(override for override in overrides if not override.startswith("seed=")), cards)
    flops = {"flops": plan.expected_flops, "making_flops": plan.making_flops}
    if seeds:
        plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, seed=_whole(seeds[-1])))
    found = {"run_id": plan.run_id, "folder": str(plan.folder), **flops, **_stored(plan)}
    found["not_read"] = list(plan.not_read)
    if plan.config.condenses and plan.config.compute.share_condensed:
        found["condensation"] = digest(shared_condensed.identity_of(plan))
    if plan.expert_flops and (plan.config.condenses or plan.config.mode == "experts"):
        found |= {
            "experts": digest(experts_identity(plan.config, plan.config.compute.precision)),
            "expert_flops": float(plan.expert_flops),
        }
    config = plan.config
    start = getattr(config.container, "start", None) if config.condenses else None
    where = {"dataset": dataclasses.asdict(config.dataset), "data_dir": config.paths.data_dir, "start": start}
    read = json.dumps(where)
    return {"figures": found, "read": read, "outside": _outside(read)}


@functools.lru_cache(maxsize=1024)
def _plan(overrides: tuple[str, ...], cards: tuple[str, ...]) -> Plan:
    """Plan without the seed, in which alone most cells of a table differ: composing takes most of the time of planning.

    ``cards``, the digests of their cards, distinguishes plans that read different sets under the same names.
    """
    return make_plan(compose(overrides), typed=overrides, here=False)


def _whole(text: str) -> int:
    require("seed", text.isdecimal(), text, "at least 0")
    return int(text)


def _stored(plan: Plan) -> dict[str, Any]:
    stored = plan.storage
    if stored is None:
        return {}
    return {
        "budget_floats": stored.budget_floats,
        "stored_floats": stored.stored_floats(plan.data.classes),
        "images_per_class": stored.images_per_class,
        "steps": plan.matching_steps if plan.config.condenses else None,
    }


def work(runs: Iterable[Planned], finished: Iterable[Planned] = ()) -> float:
    """FLOPs of all ``runs``, without condensations and experts that ``finished`` or earlier runs have made already."""
    made: set[str | None] = set()
    trained: dict[str | None, float] = {}  # some runs need more of the same experts than others
    total = 0.0

    def take_note_of(one: Planned) -> None:
        made.add(one.condensation)
        trained[one.experts] = max(one.expert_flops, trained.get(one.experts, 0.0))

    for one in finished:
        take_note_of(one)
    for one in runs:
        if one.condensation is not None and one.condensation in made:
            total += one.flops - one.making_flops
        else:
            total += one.flops - min(one.expert_flops, trained.get(one.experts, 0.0))
            take_note_of(one)
    return total


@functools.cache
def _version() -> str:
    """Digest of the sources and ``conf/``, on which all plans depend."""
    found = hashlib.sha256(results.code_version().encode())
    for path in [Path(__file__), *sorted(CONF.rglob("*.yaml"))]:
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _cached(cache: Path | None, version: str) -> dict[str, dict[str, Any]]:
    if cache is None or not cache.exists():
        return {}
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except ValueError:  # truncated: it is written again
        return {}
    return found["cells"] if isinstance(found, Mapping) and found.get("version") == version else {}


def by_run(planned: Sequence[Planned]) -> dict[str, Planned]:
    """The runs, each once, in the order of their first cells, without runs whose id is not known yet."""
    found: dict[str, Planned] = {}
    for one in planned:
        if one.run_id is not None:
            found.setdefault(one.run_id, one)
    return found
