"""Atomic files, and folders that one process holds at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hmn import files
from hmn.errors import HmnError
from hmn.files import atomic_write, exclusive, write_text

ROOT = Path(__file__).parents[1]


# Atomic files


def test_a_file_is_replaced_once_the_block_succeeds(tmp_path: Path):
    path = tmp_path / "new" / "file.json"
    write_text(path, "old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # on the same file system, so replacing is one rename
        assert temporary.suffix == ".json"  # some savers go by the suffix
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half"), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("half")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_block_that_never_had_a_file_leaves_none(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file.txt"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_was_written(tmp_path: Path):
    write_text(tmp_path / "file.txt", "é")
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "file.txt").read_bytes() == "é".encode()


# Locks


def python(script: str, *arguments: str | Path) -> subprocess.Popen:
    """Start ``script`` in a process of its own that can import the package."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


HOLD = """
import sys, pathlib, time
from hmn.files import exclusive
with exclusive(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_belongs_to_one_process_until_it_ends_however_it_ends(tmp_path: Path):
    folder = tmp_path / "run"
    with python(HOLD, folder) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(HmnError) as raised, exclusive(folder):
                pass
            assert str(raised.value) == f"{folder}: another process is working on this run; wait for it or stop it"
        finally:
            holder.kill()
    with exclusive(folder):
        pass
    with exclusive(folder):  # leaving the block has released the lock
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_in_one_line(tmp_path: Path, monkeypatch, number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    told = r"its file system has no locks: choose another one with paths\.runs_dir"
    with pytest.raises(HmnError, match=told), exclusive(tmp_path):
        pass


def test_a_look_at_who_holds_a_folder_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The look itself holds the lock for an instant."""
    now, looked_at = [1000.0], iter([False, False, True])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(files.time, "sleep", sleep)
    monkeypatch.setattr(files, "_taken", lambda _lock, _kind: next(looked_at))
    with exclusive(tmp_path):
        assert list(looked_at) == []
