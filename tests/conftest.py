"""Fixtures of tests in several files."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def double():
    """The whole loop in float64, so that an oracle need not be forgiven anything."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
