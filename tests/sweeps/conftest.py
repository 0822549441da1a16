"""Sweeps of stub runs, in processes of their own or in this one."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hmn.sweeps import cli
from hmn.sweeps import sweep as sweeps
from tests.sweeps.launched import Launched, plans
from tests.sweeps.stub.sweep import through_stub


@pytest.fixture(scope="session")
def known(tmp_path_factory) -> str:
    return plans(tmp_path_factory.mktemp("plans"))


@pytest.fixture
def sweep(tmp_path, known) -> Launched:
    """A sweep of three runs in two slots."""
    return Launched(tmp_path / "here", known)


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it printed, without the line that says how much was left."""
        return [line for line in self.out.splitlines() if not line.startswith("runs left: ")]


@functools.cache
def _common_once(own: tuple[str, ...], shared: tuple[str, ...], real=sweeps._common):
    """``sweeps._common``, cached: composing takes most of the time of an empty sweep."""
    return real(own, shared)


@pytest.fixture
def here(monkeypatch, capsys) -> Callable[..., Ended]:
    """A function that runs ``python sweep.py`` in this process, with the sweep's own settings and ``more``."""

    def run(sweep: Launched, *more: str, command: str = "launch") -> Ended:
        monkeypatch.chdir(sweep.where)
        for name, value in sweep.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["sweep.py", command, *sweep.settings, *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code, *capsys.readouterr())

    real = sweeps._task
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(sweeps, "_task", lambda *arguments: through_stub(real(*arguments)))
    monkeypatch.setattr(sweeps, "_common", lambda own, asked: _common_once(tuple(own), tuple(asked)))
    return run
