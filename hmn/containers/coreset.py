"""Coresets as containers: raw images that are not learned; :mod:`hmn.coresets` chooses them."""

from __future__ import annotations

from dataclasses import replace

from hmn.config.containers import CoresetConfig


def fill(config: CoresetConfig, **_data: int) -> CoresetConfig:
    """``config`` with a default for every field that the method uses and that is null."""
    defaults = {} if config.method == "random" else {"networks": 1, "epochs": 200}
    if config.method == "ccs":
        defaults |= {"hard_cut": 0.3, "bins": 50}
    return replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})
