"""Fixtures of tests in several files."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# A slow machine is no failure.
hypothesis.settings.register_profile("hmn", deadline=None)
hypothesis.settings.load_profile("hmn")

# By the minutes they take. Files that start late leave the other processes idle at the end.
LONG = (
    "test_smoke.py",
    "test_table_files.py",
    "test_launchers.py",
    "test_bad_luck.py",
    "test_shared_condensed.py",
    "test_distributed.py",
    "test_cli.py",
    "test_search.py",
    "test_unroll.py",
    "test_planning.py",
    "test_plan.py",
    "test_resume.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; with ``--no-loadscope-reorder`` processes take them in this order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture
def double():
    """The whole loop in float64, so that an oracle need not be forgiven anything."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
