"""Dataset condensation with Hierarchical Memory Networks: ``hmn.load_condensed(PATH)`` loads a saved set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hmn.artifacts import load_condensed

__all__ = ["load_condensed"]


def __getattr__(name: str) -> Any:
    """Import on first use, to keep ``import hmn`` fast: the command line does that before it checks any setting."""
    if name == "load_condensed":
        from hmn.artifacts import load_condensed

        return load_condensed
    raise AttributeError(f"module 'hmn' has no attribute {name!r}")
