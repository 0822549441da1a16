"""A fixture that stands in for experiments/reported.csv."""

from __future__ import annotations

import csv

import pytest

from experiments import filling
from tests.experiments.small_table import HEAD


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """A function that replaces the lines of experiments/reported.csv."""

    def write(*lines: str) -> None:
        path = tmp_path / "reported.csv"
        path.write_text("\n".join([HEAD, *lines]) + "\n", encoding="utf-8")
        monkeypatch.setattr(filling, "read_reported", lambda: list(csv.DictReader(path.open(encoding="utf-8"))))

    write()
    return write
