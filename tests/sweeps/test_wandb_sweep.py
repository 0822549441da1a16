"""``wandb agent`` on our sweep file: its own loop starts ``run.py``, and W&B's runs get the metric of the sweep."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hmn import results
from hmn.sweeps.sweep import labelled
from tests.command import ROOT, TINY, compose, configured
from tests.wandb_reader import read_offline_run, without_login

SWEEP = yaml.safe_load((ROOT / "experiments" / "wandb_sweep.yaml").read_text())
# Replaces CIFAR-10 in place, because Hydra takes an option only once.
INSTEAD = {"dataset=cifar10": "dataset=digits", "memory=ipc1": "seed=3"}
QUICK = (*(f for f in TINY if not f.startswith("tracking")), "tracking=offline", "evaluation.curve_epochs=1")


@pytest.mark.parametrize(
    "labels",
    [
        {"method": "HMN", "ipc": "10", "seed": "0"},
        {"method": "IDC, f = 2", "objective.memory_lr": "0.01", "share": "{a: [1]}", "name of it": 'Kim\'s \\"one\\" '},
        {"container": "null", "mode": "true", "beta": "", "x/y-z": "[1, 2]"},
    ],
)
def test_labels_of_cells_reach_w_and_b_as_they_are(labels):
    assert compose(*TINY, labelled(labels)).tracking.labels == labels


def some_values() -> dict[str, dict[str, Any]]:
    """One value of each parameter, as W&B's server hands them to an agent."""
    return {
        name: {"value": (given.get("values") or [(given["min"] + given["max"]) / 2])[0]}
        for name, given in SWEEP["parameters"].items()
    }


def test_what_an_agent_starts_is_a_run_that_measures_the_metric_of_the_sweep():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    values = some_values()
    made = create_sweep_command_args({"args": values}) | {"env": [], "interpreter": ["python"], "program": ["run.py"]}
    command = [
        word
        for part in create_sweep_command(list(SWEEP["command"]))
        for word in (made[part[2:-1]] if part.startswith("${") else [part])
    ]
    assert command[:2] == ["python", SWEEP["program"]]
    config = configured(*command[2:])
    assert config.objective.memory_lr == values["objective.memory_lr"]["value"]
    assert config.pruning.beta == values["pruning.beta"]["value"]
    assert (config.dataset.kind, config.memory.images_per_class) == ("cifar10", 1)
    assert config.condenses and config.evaluation.curve_points >= 2
    assert SWEEP["metric"] == {"name": "held_out_accuracy", "goal": "maximize"}


class Server:
    """Answers an agent as W&B's server does: two runs with the same values, one after the other, then the exit."""

    def __init__(self) -> None:
        self.command = [INSTEAD.get(part, part) for part in SWEEP["command"]]
        self.command[-1:] = [*QUICK, SWEEP["command"][-1]]
        self.waiting = [("run", "agents-first"), ("run", "agents-second"), ("exit", None)]

    def sweep(self, _api: Any, _sweep_id: str, _specs: str) -> dict[str, str]:
        return {"config": yaml.safe_dump(SWEEP | {"command": self.command})}

    def register(self, _api: Any, _host: str, sweep_id: str) -> dict[str, str]:
        return {"id": f"agent-of-{sweep_id}"}

    def heartbeat(self, _api: Any, _agent: str, _metrics: dict, running: dict[str, bool]) -> list[dict[str, Any]]:
        if running:
            return []
        kind, run_id = self.waiting.pop(0)
        return [{"type": kind, "run_id": run_id, "program": SWEEP["program"], "args": some_values()}]


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """W&B's own agent with a fake server; whatever it sets in the environment is undone."""
    without_login(monkeypatch, tmp_path / "home")
    import wandb
    from wandb import wandb_agent
    from wandb.apis.public import sweeps

    server = Server()
    monkeypatch.setattr(sweeps, "_sweep_with_runs", server.sweep)
    monkeypatch.setattr(sweeps, "_register_agent", server.register)
    monkeypatch.setattr(sweeps, "_agent_heartbeat", server.heartbeat)
    monkeypatch.setattr(wandb, "Api", object)
    monkeypatch.setattr(wandb_agent.Agent, "POLL_INTERVAL", 0.05)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    os.environ |= {"WANDB_SWEEP_ID": "the-sweep", "WANDB_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return wandb_agent.Agent(object(), multiprocessing.Queue(), sweep_id="the-sweep")


def test_an_agent_s_runs_are_those_of_its_sweep_and_a_finished_run_is_not_repeated(agent, tmp_path):
    agent.run()
    (folder,) = (path for path in (tmp_path / "runs").iterdir())
    kept = results.read(folder)
    wanted = results.summary(kept)
    parts = {run["run"]["id"]: run for run in (read_offline_run(folder, part) for part in (0, 1))}
    assert parts.keys() == {"agents-first", "agents-second"}
    for run in parts.values():
        assert (run["run"]["sweep"], run["run"]["name"], run["exit_code"]) == ("the-sweep", folder.name, 0)
        (shown,) = (row for row in run["history"] if "held_out_accuracy" in row)
        assert shown["held_out_accuracy"] == wanted["held_out_accuracy"] is not None
        assert run["summary"]["accuracy_mean"] == wanted["accuracy_mean"]
        assert run["config"]["objective.memory_lr"] == some_values()["objective.memory_lr"]["value"]
        assert run["config"]["container.name"] == "hmn"
    assert len(parts["agents-first"]["history"]) > len(parts["agents-second"]["history"]) == 1
