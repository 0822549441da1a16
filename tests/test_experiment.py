"""A run as a whole, where what a machine lacks changes it."""

from __future__ import annotations

import pytest

from hmn import compute, experiment, results
from tests.command import TINY, planned


@pytest.mark.parametrize(("has", "precision"), [(False, "fp32"), (True, "bf16")])
def test_a_machine_without_bf16_says_so_and_keeps_what_it_computed_in(tmp_path, monkeypatch, capsys, has, precision):
    monkeypatch.setattr(compute, "has_bf16", lambda device: has)
    own = (f"paths.runs_dir={tmp_path}/runs", f"paths.cache_dir={tmp_path}/cache")
    plan = planned(*TINY, "mode=random_subset", "compute.precision=bf16", *own)
    experiment.run(plan, command="")
    out = capsys.readouterr().out
    found = results.read(plan.folder)
    assert (found["precision"], found["config"]["compute"]["precision"]) == (precision, "bf16")
    line = "compute.precision=bf16: this machine has no such arithmetic, so fp32 it is"
    assert out.splitlines().count(line) == (not has) and f", {precision}, " in out.splitlines()[0]
