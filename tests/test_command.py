"""The helper with which tests start processes."""

from __future__ import annotations

from pathlib import Path

from tests.command import ROOT, Command
from tests.conftest import LONG


def test_a_process_is_forked_from_one_that_is_warm(tmp_path: Path):
    program = tmp_path / "tell.py"
    program.write_text("import sys; print('tests.warm' in sys.modules)")
    assert Command(tmp_path, (), {}, program).finish().out == "True\n"


def test_the_files_that_start_first_are_there():
    assert set(LONG) <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
