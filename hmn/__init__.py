"""Hierarchical Memory Network data set condensation: ``hmn.load_condensed(PATH)`` loads a kept set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hmn.artifacts import load_condensed

__all__ = ["load_condensed"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``import hmn`` alone, as the command line does before it checks anything, stays quick."""
    if name == "load_condensed":
        from hmn.artifacts import load_condensed

        return load_condensed
    raise AttributeError(f"module 'hmn' has no attribute {name!r}")
