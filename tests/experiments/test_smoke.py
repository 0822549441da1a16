"""The smoke variant of every table file, used as a user would: swept, rendered, drawn and shown on a page."""

from __future__ import annotations

import json
import subprocess
import tempfile
from types import SimpleNamespace

import pytest

from experiments import figures, filling, report, tables
from hmn.plan import Plan
from hmn.sweeps import attempt
from hmn.sweeps.sweep import launch, of_arguments
from hmn.sweeps.table import TABLES
from tests.command import Forked

NAMES = sorted(path.stem for path in TABLES.glob("*.yaml"))
SETTINGS = ("debug=smoke", "tracking=disabled", "compute.device=cpu", "launcher.slots=2", "launcher.threads=1")

# The part to run of tables whose other cells take the same code paths with other numbers
PARTS = {
    "q75_main": ["only.profile=hmn_cosine"],
    "q75_main_ipc10": ["only.profile=hmn_cosine"],
    "q75_profiles": ["only.method=HMN,FreD,IDC"],
    "q75_cross_architecture": ["only.method=HMN"],
    "cross_architecture": ["only.method=HMN"],
    "q75_over_budget": ["only.over_budget=0,0.3"],
    "continual": ["only.method=Random,HMN"],
    "q75_continual": ["only.method=Random,HMN"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all tables, which share runs."""
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_variant_of_every_table_runs_and_is_rendered(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))  # slots of its own
    for counted in ("expected_flops", "making_flops"):  # each run counts them itself
        monkeypatch.setattr(Plan, counted, 0.0)
    # Only the launcher's Popen: matplotlib calls fc-list when it is first imported on a machine.
    monkeypatch.setattr(attempt, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))
    settings = [*SETTINGS, *PARTS.get(name, [])]
    sweep = of_arguments([f"experiment={name}", *settings], "")
    counts = launch(sweep)
    told = json.loads((sweep.folder / "sweep.json").read_text())
    assert counts["done"] == counts.total() == len({cell["run_id"] for cell in told["cells"]}), counts
    report.main([str(sweep.folder), "--output", f"{name}.html"])
    assert sweep.table.title in (folder / f"{name}.html").read_text()
    kept = [] if sweep.table.shows[0] == "gallery" else ["--results", "kept"]
    if sweep.table.kind == "table":
        tables.main([name, *settings, "--output", "rendered", *kept])
        text = (folder / "rendered" / f"{name}.md").read_text()
        assert filling.SMOKE in text
        assert "python sweep.py" not in text.split("\n\n")[1], "a cell of the table is missing"
    else:
        figures.main([name, *settings, "--output", "rendered", *kept])
        assert (folder / "rendered" / f"{name}.png").stat().st_size > 5000
    if kept:
        results = {path.parent.name for path in folder.glob("kept/*/result.json")}
        assert results >= {cell["run_id"] for cell in told["cells"]}
