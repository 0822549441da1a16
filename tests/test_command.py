"""What tests start processes with."""

from __future__ import annotations

from pathlib import Path

from tests.command import Command


def test_a_process_is_forked_from_one_that_is_warm(tmp_path: Path):
    program = tmp_path / "tell.py"
    program.write_text("import sys; print('tests.warm' in sys.modules)")
    assert Command(tmp_path, (), {}, program).finish().out == "True\n"
