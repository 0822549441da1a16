"""The key and the section of a command-line override ``KEY=VALUE``, without composing it."""

from __future__ import annotations


def key_of(override: str) -> str:
    """The dotted key, or the group, without Hydra's signs for adding and removing."""
    return override.split("=")[0].lstrip("+~")


def section_of(override: str) -> str:
    """The section of the configuration, or its group."""
    return key_of(override).split(".")[0]
