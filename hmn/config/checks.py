"""Range checks of fields, whose messages name dotted key, value and rule; and which fields enter the run id."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import Field, field
from typing import Any

from hmn.errors import ConfigError

STRATEGY_OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")


def require(key: str, holds: bool, value: object, rule: str) -> None:
    """Raise :class:`ConfigError` naming ``key``, ``value`` and ``rule`` unless ``holds``."""
    if not holds:
        raise ConfigError(f"{key}={value}: must be {rule}")


def one_of(key: str, value: str, choices: Sequence[str]) -> None:
    require(key, value in choices, value, f"one of {', '.join(choices)}")


def at_least(section: str, least: float, config: object, *names: str) -> None:
    """Require every field in ``names`` to be null or at least ``least``."""
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value is None or value >= least, value, f"at least {least}")


def positive(section: str, config: object, *names: str) -> None:
    """Require every field in ``names`` to be null or above 0."""
    for name in names:
        value = getattr(config, name)
        require(f"{section}.{name}", value is None or value > 0, value, "positive")


def check_strategy(key: str, value: str) -> None:
    ops = () if value == "none" else tuple(value.split("_"))
    known = len(set(ops)) == len(ops) and set(ops) <= set(STRATEGY_OPS)
    require(key, known, value, f"none, or some of {', '.join(STRATEGY_OPS)} joined by _")


def unscientific(default: Any) -> Any:
    """A field that changes how or where a run is computed, not what it computes: it stays out of the run id."""
    return field(default=default, metadata={"scientific": False})


def newer(default: Any, **metadata: Any) -> Any:
    """A field added after run ids were in use: at its default it stays out of the id, so that old ids remain valid."""
    return field(default=default, metadata={"newer": True, **metadata})


def in_identity(item: Field, value: Any) -> bool:
    """Whether a result depends on the field's ``value``."""
    return is_scientific(item) and not (item.metadata.get("newer", False) and value == item.default)


def read_by(item: Field, kind: str) -> bool:
    """Whether this ``kind`` of run reads the field, if it reads its section."""
    return kind in item.metadata.get("modes", (kind,))


def is_scientific(item: Field) -> bool:
    return item.metadata.get("scientific", True)


def identity_of(section: object, kind: str | None = None) -> dict[str, Any]:
    """The plain values of ``section`` that a result depends on, among the fields that this ``kind`` of run reads."""
    values = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if in_identity(item, value) and (kind is None or read_by(item, kind)):
            values[item.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return values
