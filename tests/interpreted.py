"""For tests of Triton's kernels on any machine: interpreted, an operation of a program after the other."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton, and no GPU: tests/conftest.py then has kernels interpreted",
)
