"""Settings and fixtures that several test files share."""

from __future__ import annotations

import os
import tempfile

import hypothesis
import pytest
import torch

# Triton, which reads this when it is imported, then computes what kernels do on any machine.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One cache for all tests: each run has a folder of its own, and would compile anew.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"hmn-tests-{os.getuid()}"))

# A slow machine must not fail a test.
hypothesis.settings.register_profile("hmn", deadline=None)
hypothesis.settings.load_profile("hmn")

# Longest first: a long file that starts late leaves the other processes idle at the end.
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
    """Put the longest files first; with ``--no-loadscope-reorder``, processes take them in this order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture
def double():
    """Run in float64, so that comparisons with an oracle need no slack for rounding in float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
