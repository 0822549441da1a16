"""What a sweep starts, what it leaves alone, and its exit codes. test_sweep_texts.py tests what it prints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hmn import files, results
from hmn.checkpoint import Checkpoints
from hmn.config import sections
from hmn.config.sweeps import LocalConfig
from hmn.data import datasets
from hmn.errors import ConfigError, Interrupted
from hmn.files import exclusive, write_text
from hmn.stop import STOP_SIGNALS
from hmn.sweeps import cli, planning
from hmn.sweeps import sweep as sweep_module
from hmn.sweeps.cells import Cell
from hmn.sweeps.launchers import local
from hmn.sweeps.planning import Planned
from hmn.sweeps.sweep import of_arguments
from tests.command import compose
from tests.sweeps.launched import SETTINGS, STEPS, THREE, Launched, described

ALL = list(range(STEPS))
ORIGIN = {"data": "d", "device": "cpu"}


def begins(sweep: Launched) -> dict[str, int]:
    return {seed: sweep.events(seed).count("begin") for seed in "012"}


# What is started


def test_a_sweep_makes_each_run_and_a_second_launch_none(sweep, here):
    ended = here(sweep)
    assert (ended.code, ended.err) == (0, "")
    told = f"runs left: 3 of 3; their progress: {shlex.join(['python', 'sweep.py', 'status', *sweep.settings])}"
    assert ended.out.splitlines()[0] == told  # before the first run has ended
    done = [f"done     seed={seed}: {100 * sweep.table()[seed][0]:.2f} %" for seed in "012"]
    assert sorted(ended.lines) == sorted([*done, "3 runs: 3 done"])
    assert sweep.steps() == dict.fromkeys("012", ALL)
    before = sweep.ledger()
    again = here(sweep)
    assert (again.code, again.out, again.err) == (0, "3 runs: 3 done\n", "")
    assert sweep.ledger() == before


def test_more_seeds_are_another_sweep_that_makes_only_what_is_new(sweep, here, known):
    here(sweep)
    more = Launched(sweep.where, known, (*SETTINGS, "seed=0,1,2,3"))
    assert more.folder != sweep.folder
    ended = here(more)
    assert (ended.code, ended.lines[-1]) == (0, "4 runs: 4 done")
    assert begins(sweep) == {"0": 1, "1": 1, "2": 1}
    assert more.steps()["3"] == ALL


def test_the_launchers_own_settings_are_not_of_the_sweep():
    name = described(*SETTINGS, THREE).name
    assert described("launcher.slots=5", *SETTINGS[:2], THREE, "sweep.on_failure=stop").name == name
    assert described(*reversed(SETTINGS), THREE).name == name
    assert described(*SETTINGS, "seed=0,1").name != name


def test_the_sweeps_folder_says_what_was_asked_for(sweep, here):
    here(sweep)
    told = json.loads((sweep.folder / "sweep.json").read_text())
    assert (told["name"], told["title"], told["code"]) == (sweep.folder.name, sweep.folder.name, results.code_version())
    assert told["command"] == "python sweep.py " + " ".join((*SETTINGS, THREE))
    assert [cell["name"] for cell in told["cells"]] == ["seed=0", "seed=1", "seed=2"]
    for seed, cell in zip("012", told["cells"], strict=True):
        assert cell["labels"] == {"seed": seed}
        assert cell["overrides"] == [*SETTINGS[:2], f"seed={seed}"]
        assert sweep.where / cell["folder"] == sweep.folders[seed]
        assert cell["run_id"] == sweep.folders[seed].name


def arguments(sweep: Launched, seed: str) -> str:
    log = (sweep.folders[seed] / "log.txt").read_text()
    return log[log.index("$ ") :].splitlines()[0]


def test_a_sweeps_runs_are_one_group_of_w_and_b(sweep, here):
    here(sweep)
    labels = shlex.quote("++tracking.labels={seed:'1'}")
    command = " ".join(("$ python run.py", *SETTINGS[:2], "seed=1", f"tracking.group={sweep.folder.name}", labels))
    assert arguments(sweep, "1") == command


def test_another_group_of_w_and_b_is_kept(tmp_path, here):
    sweep = Launched(tmp_path, "", (*SETTINGS, "seed=0,1", "tracking.group=mine"))
    here(sweep)
    assert arguments(sweep, "1").count("tracking.group=") == 1
    assert "tracking.group=mine" in arguments(sweep, "1")


# Failures


def test_a_run_that_fails_once_is_tried_again(sweep, here):
    sweep.order({"1": {"fail": [2, "bad luck", 1], "times": 1}})
    ended = here(sweep)
    assert (ended.code, ended.err, ended.lines[-1]) == (0, "", "3 runs: 3 done")
    assert begins(sweep) == {"0": 1, "1": 2, "2": 1}
    assert sweep.steps()["1"] == ALL


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_run_that_fails_each_time_fails_alone_and_is_repeated_by_the_next_launch(sweep, here, retries):
    sweep.order({"1": {"fail": [2, "bad luck", 1]}})
    ended = here(sweep, f"sweep.max_retries={retries}")
    assert (ended.code, ended.lines[-1]) == (1, "3 runs: 2 done, 1 failed")
    assert "failed   seed=1: bad luck" in ended.lines
    assert begins(sweep) == {"0": 1, "1": 1 + retries, "2": 1}
    status = here(sweep, command="status")
    assert [line.split() for line in status.lines[2:5]] == [
        ["seed=1", "failed", "bad", "luck"],
        *([f"seed={seed}", "done", f"{100 * sweep.table()[seed][0]:.2f}", "%"] for seed in "02"),
    ]
    assert status.lines[-2:] == ["to repeat failed runs by hand:", f"seed=1: {arguments(sweep, '1')[2:]}"]
    sweep.order({})
    ended = here(sweep, f"sweep.max_retries={retries}")
    assert (ended.code, ended.lines[-1]) == (0, "3 runs: 3 done")
    assert begins(sweep) == {"0": 1, "1": 2 + retries, "2": 1}
    assert sweep.steps()["1"] == ALL


def test_with_on_failure_stop_nothing_starts_after_a_failure(sweep, here):
    sweep.order({"0": {"fail": [1, "bad luck", 1]}})
    ended = here(sweep, "launcher.slots=1", "sweep.on_failure=stop", "sweep.max_retries=0")
    assert (ended.code, ended.lines) == (1, ["failed   seed=0: bad luck", "3 runs: 2 waiting, 1 failed"])
    assert begins(sweep) == {"0": 1, "1": 0, "2": 0}


def test_with_on_failure_stop_what_runs_is_stopped_and_goes_on_later(sweep, here):
    def fail_once_the_other_hangs() -> None:
        while "hangs" not in sweep.events("0"):
            time.sleep(0.005)
        (sweep.stub / "go-1").touch()

    sweep.order({"0": {"hang": 1}, "1": {"hang": 2, "fail": [3, "bad luck", 1]}})
    threading.Thread(target=fail_once_the_other_hangs, daemon=True).start()
    ended = here(sweep, "sweep.on_failure=stop", "sweep.max_retries=0")
    assert (ended.code, ended.lines[-1]) == (1, "3 runs: 1 waiting, 1 interrupted, 1 failed")
    assert sweep.events("0")[-1] == "exit 143"
    sweep.nothing_is_left_behind()
    sweep.order({})
    assert here(sweep).code == 0
    assert sweep.steps() == dict.fromkeys("012", ALL)


def test_a_run_that_ends_well_without_a_result_has_failed(sweep, here):
    sweep.order({"1": {"fail": [2, "", 0]}})
    ended = here(sweep)
    assert ended.code == 1
    (failed,) = [line for line in ended.lines if line.startswith("failed")]
    assert failed.startswith(f"failed   seed=1: it ended without an error but left no result in {Path('runs')}")
    assert begins(sweep)["1"] == 1


def test_what_goes_wrong_with_the_slots_ends_the_sweep(sweep, here):
    """An error in the launcher itself must not make the sweep wait forever."""
    slots = sweep.temporary / f"hmn-slots-{os.getuid()}"
    slots.write_text("")
    ended = here(sweep)
    assert ended.code == 1 and ended.err.splitlines()[-1].startswith(f"{slots}: File exists: ")
    assert sweep.ledger() == []


# Other sources


@pytest.fixture
def mixed(sweep, here) -> Launched:
    """A sweep of which only run 1 is finished, by another code version."""
    sweep.order({"0": {"fail": [0, "later", 2]}, "1": {"code": "0123456789ab"}, "2": {"fail": [0, "later", 2]}})
    here(sweep, "sweep.other_code=keep")
    sweep.order({})
    return sweep


def test_results_of_other_sources_are_refused(mixed, here):
    before = mixed.ledger()
    ended = here(mixed)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        f"finished runs are from other code versions (1 from 0123456789ab, now {results.code_version()}): "
        "sweep.other_code=keep keeps them beside new ones, sweep.other_code=repeat measures them again\n"
    )
    assert mixed.ledger() == before


def test_a_result_that_other_sources_began_is_one_of_theirs(mixed, here):
    result = results.read(mixed.folders["1"])
    codes = ["0123456789ab", results.code_version()]
    results.write(mixed.folders["1"], result | {"code": codes[-1], "codes": codes})
    assert f"(1 from 0123456789ab+{codes[-1]}, now {codes[-1]})" in here(mixed).err


def test_results_of_other_sources_are_kept_if_told_to(mixed, here):
    ended = here(mixed, "sweep.other_code=keep")
    assert (ended.code, ended.lines[-1]) == (0, "3 runs: 3 done")
    assert mixed.events("1").count("done") == 1
    assert results.read(mixed.folders["1"])["code"] == "0123456789ab"


def test_results_of_other_sources_are_measured_anew_if_told_to(mixed, here):
    left = mixed.folders["1"] / "checkpoints" / "evaluate.pt"  # left by a run that was killed after its result
    write_text(left, "")
    ended = here(mixed, "sweep.other_code=repeat")
    assert (ended.code, ended.lines[-1], left.exists()) == (0, "3 runs: 3 done", False)
    assert mixed.events("1").count("done") == 2
    assert results.read(mixed.folders["1"])["code"] == results.code_version()
    aside = json.loads((mixed.folders["1"] / "result-0123456789ab.json").read_text())
    assert aside["code"] == "0123456789ab"
    assert here(mixed).code == 0


def test_what_other_sources_began_is_not_gone_on_with_where_all_is_measured_anew(sweep, monkeypatch):
    monkeypatch.chdir(sweep.where)
    begun = {}
    for seed, code in (("0", "0123456789ab"), ("2", results.code_version())):
        checkpoints = sweep.folders[seed] / "checkpoints"
        Checkpoints(checkpoints, 0, origin=ORIGIN | {"code": code}).save("condense", {"step": 1})
        begun[seed] = checkpoints / "condense.pt"
    for other_code, left in (("keep", [True, True]), ("repeat", [False, True])):
        asked = of_arguments([*sweep.settings, f"sweep.other_code={other_code}"], "")
        assert not sweep_module._set_aside_others(asked, asked.plan())
        assert [path.exists() for path in begun.values()] == left


def test_a_sweep_ends_where_sources_change_while_it_runs(sweep, here):
    sweep.order({"1": {"code": "0123456789ab"}})
    ended = here(sweep)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("seed=1: the sources changed while the sweep ran (now 0123456789ab, ")
    assert here(sweep, "sweep.other_code=keep").code == 0


# Cells that read others' kept sets

TABLE = """
title: Made and evaluated
reproduces: nothing
kind: table
expects: {hours: 0, device: one CPU, memory_gb: 1}
rows: [network]
columns: [half]
shows: [accuracy]
base: [compute.device=cpu, tracking=disabled]
axes:
  network: {wide: [mode=evaluate, network.width=8], own: []}
  half: {A: [memory=ipc1, seed=0], B: [memory=ipc10, seed=1]}
artifacts: [{when: {network: wide}, from: {network: own}}]
"""


@pytest.fixture
def reading(tmp_path, monkeypatch) -> Launched:
    """Two cells that make kept sets and two that evaluate them; those of A have seed 0, those of B seed 1."""
    (tmp_path / "reading.yaml").write_text(TABLE)
    monkeypatch.setattr("hmn.sweeps.table.TABLES", tmp_path)
    described.cache_clear()
    sweep = Launched(tmp_path / "here", "", ("experiment=reading", "launcher.slots=2"))
    sweep.environment["STUB_KEPT"] = kept_set("SUM")
    yield sweep
    described.cache_clear()


def kept_set(sha256: str) -> str:
    """The files of a kept set as a stub leaves them; it replaces SUM by the checksum of what it computed."""
    config = {"kind": "digits", "name": None, "image_size": 8, "channels": 1, "test_fraction": 0.2}
    data = {"class_names": ["0", "1"], "mean": [0.0], "std": [1.0], "channels": 1, "image_size": 8, "config": config}
    card = {"schema_version": 1, "sha256": sha256, "container": {}, "budget": {"floats": 640}, "data": data}
    return json.dumps({"condensed.safetensors": "", "card.json": json.dumps(card)})


def test_cells_that_read_kept_sets_follow_them_in_one_launch(reading, here):
    reading.order({"1": {"fail": [1, "bad luck", 1], "times": 1}})
    plan = here(reading, command="plan")
    assert plan.code == 0
    assert [line.split()[1:4] for line in plan.lines[2:4]] == [
        ["wide/A", "after", "own/A"],
        ["wide/B", "after", "own/B"],
    ]
    assert plan.lines[7] == "4 runs: 4 waiting"
    ended = here(reading)
    assert (ended.code, ended.err, ended.lines[-1]) == (0, "", "4 runs: 4 done")
    order = [line.split()[1].rstrip(":") for line in ended.lines[:-1]]
    assert sorted(order[:2]) == ["own/A", "own/B"]
    assert sorted(order[2:]) == ["wide/A", "wide/B"]
    told = {cell["name"]: cell for cell in json.loads((reading.folder / "sweep.json").read_text())["cells"]}
    assert told["wide/A"]["overrides"][-1] == f"artifact={told['own/A']['folder']}"
    assert told["wide/A"]["run_id"].startswith("digits-evaluate-")
    before = reading.ledger()
    assert here(reading).out == "4 runs: 4 done\n"
    assert reading.ledger() == before


def test_a_cell_whose_kept_set_fails_waits_for_it(reading, here):
    reading.order({"0": {"fail": [1, "bad luck", 2]}})
    ended = here(reading)
    assert (ended.code, ended.lines[-1]) == (1, "4 runs: 2 done, 1 waiting, 1 failed")
    status = here(reading, command="status")
    assert ["wide/A", "waiting", "for", "own/A"] in [line.split() for line in status.lines]
    reading.order({})
    ended = here(reading)
    assert (ended.code, ended.lines[-1]) == (0, "4 runs: 4 done")


def test_a_kept_set_that_is_made_anew_is_evaluated_anew(reading, here):
    """The evaluation of the previous kept set has another run id and is not reused."""
    reading.order({"0": {"code": "0123456789ab"}, "1": {"code": "0123456789ab"}})
    assert here(reading, "sweep.other_code=keep").code == 0
    first = run_ids(reading)
    reading.order({})
    reading.environment["STUB_KEPT"] = kept_set("another-SUM")
    ended = here(reading, "sweep.other_code=repeat")
    assert (ended.code, ended.lines[-1]) == (0, "4 runs: 4 done")
    again = run_ids(reading)
    assert {name for name in first if again[name] == first[name]} == {"own/A", "own/B"}
    assert begins(reading) == {"0": 4, "1": 4, "2": 0}  # each set was made and evaluated twice


def run_ids(sweep: Launched) -> dict[str, str]:
    return {cell["name"]: cell["run_id"] for cell in json.loads((sweep.folder / "sweep.json").read_text())["cells"]}


# Refusals


def test_a_sweep_that_cannot_run_leaves_nothing_behind(tmp_path, here):
    sweep = Launched(tmp_path / "here", "", (*SETTINGS[:2], "seed=0,x,-1"))
    (sweep.folder / "plan.json").unlink()
    sweep.folder.rmdir()
    ended = here(sweep)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "seed=x: seed=x: must be at least 0\nseed=-1: seed=-1: must be at least 0\n"
    assert not sweep.folder.exists()


def test_a_sweep_that_another_process_has_is_refused(sweep, here, monkeypatch):
    monkeypatch.setattr(files, "LOOK_SECONDS", 0)
    with exclusive(sweep.folder):
        ended = here(sweep)
    assert (ended.code, ended.out) == (75, "")
    assert len(ended.err.splitlines()) == 1
    assert ended.err.endswith("; its progress: python sweep.py status " + " ".join((*SETTINGS, THREE)) + "\n")
    assert sweep.ledger() == []


def stop_while_omegaconf_composes(stop):
    OmegaConf.register_new_resolver("stop", lambda: stop(), replace=True)
    OmegaConf.to_container(OmegaConf.create({"key": "${stop:}"}), resolve=True)


# The last two stop inside code that wraps any exception as an error of its own.
WHERE = {
    "compose": lambda stop: (planning, "compose", lambda overrides: stop()),
    "OmegaConf": lambda stop: (planning, "compose", lambda overrides: stop_while_omegaconf_composes(stop)),
    "data": lambda stop: (datasets, "peek", lambda *_: stop()),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_planning_can_be_stopped_too(sweep, here, monkeypatch, signum, where):
    """Planning may take minutes. Stopping it blames no cell and prints the same line as any stop."""
    if where != "data":  # an earlier plan is compared with the data
        (sweep.folder / "plan.json").unlink()
    planning._plan.cache_clear()
    monkeypatch.setattr(*WHERE[where](lambda: os.kill(os.getpid(), signum)))
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    ended = here(sweep)
    assert (ended.code, ended.out) == (128 + signum, "")
    again = "python sweep.py " + " ".join((*SETTINGS, THREE))
    assert ended.err == f"stopped by {signum.name}; the same command resumes: {again}\n"
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


def test_a_signal_while_runs_save_comes_after_them():
    saved = []

    def launched():
        try:
            yield "an outcome"
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            saved.append("all")

    stopped = pytest.raises(Interrupted, match="stopped by SIGINT")
    with stopped, sweep_module._stoppable(), sweep_module._closing(launched()) as outcomes:
        next(outcomes)
    assert saved == ["all"]


# Slots


def test_a_slurm_job_shares_its_slots_with_no_other(tmp_path, monkeypatch):
    """Both jobs may have a GPU 0 on the same node, each its own."""
    monkeypatch.setattr(local.tempfile, "tempdir", str(tmp_path))
    slot = local.Slot("gpu0-0", {})

    def taken(job: str) -> contextlib.AbstractContextManager[int | None]:
        """The slot, or ``None`` if it is not free within half a second."""
        monkeypatch.setenv("SLURM_JOB_ID", job)
        stop = threading.Event()
        threading.Timer(0.5, stop.set).start()
        return slot.taken(stop)

    with taken("11") as first, taken("11") as again, taken("12") as other:
        assert first is not None and again is None and other is not None


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    """Otherwise the sweep would use the GPUs that exist, and the CPU if the driver is broken."""
    monkeypatch.setattr(local, "_gpus", lambda: ["0"])
    with pytest.raises(ConfigError, match=r"^launcher.gpus=2: must be at most 1, what this machine has$"):
        list(local.launch([], LocalConfig(gpus=2)))


def test_slots_without_a_gpu_share_the_machines_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    found = local.slots(LocalConfig(gpus=0, slots=3))
    assert [slot.name for slot in found] == ["cpu-0", "cpu-1", "cpu-2"]
    assert [slot.environment for slot in found] == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "5"}] * 3
    assert local.slots(LocalConfig(gpus=0, threads=9))[0].environment["OMP_NUM_THREADS"] == "9"
    assert local.slots(LocalConfig(gpus=0, slots=40))[0].environment["OMP_NUM_THREADS"] == "1"


def test_each_gpu_has_its_slots_and_each_is_taken_once_before_any_twice(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 2)
    found = local.slots(LocalConfig(slots_per_gpu=2, threads=1))
    assert [(slot.name, slot.environment["CUDA_VISIBLE_DEVICES"]) for slot in found] == [
        *(("gpu3-0", "3"), ("gpu7-0", "7"), ("gpu3-1", "3"), ("gpu7-1", "7")),
    ]
    assert [slot.name for slot in local.slots(LocalConfig(gpus=1, threads=1))] == ["gpu3-0"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [slot.name for slot in local.slots(LocalConfig(threads=1))] == ["gpu0-0", "gpu1-0"]


@pytest.mark.parametrize(
    ("gpus", "given", "other"), [(["0"], "slots", "slots_per_gpu"), ([], "slots_per_gpu", "slots")]
)
def test_slots_of_the_other_kind_of_machine_are_refused(monkeypatch, gpus, given, other):
    monkeypatch.setattr(local, "_gpus", lambda: gpus)
    with pytest.raises(ConfigError, match=rf"^launcher.{given}=2: must be 1 with(out)? GPUs: set launcher.{other}$"):
        local.slots(LocalConfig(**{given: 2}))


@pytest.mark.parametrize(
    ("asked", "gpus", "given"),
    [
        ([], 2, True),
        ([], 0, False),
        (["launcher.gpus=0"], 2, False),
        (["compute.device=cpu"], 2, False),
        (["launcher=ray", "launcher.gpus=0.5"], 0, True),
        (["launcher=submitit"], 2, False),
        (["launcher=submitit", "launcher.gpus=1", "compute=cpu"], 0, False),
    ],
)
def test_a_run_that_is_given_a_gpu_is_told_to_use_it(monkeypatch, asked, gpus, given):
    """If the GPU is broken by then, the run fails at once instead of computing for days on the CPU."""
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: gpus)
    sweep = of_arguments([*asked, "seed=0,1"], "")
    (cell, _) = sweep.cells
    task = sweep_module._task(sweep, Planned(cell, cell.overrides, "run", Path("runs/run")))
    assert ("compute.device=cuda" in task.arguments) is given


def test_a_gpu_is_only_asked_for_where_the_runs_are_to_be(tmp_path, monkeypatch):
    """A cluster's login node has no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local.torch.cuda, "is_available", lambda: False)
    asked = ["compute.device=cuda", "seed=0,1"]
    sweep = of_arguments([*asked, "launcher=submitit", "launcher.gpus=1"], "")
    assert all(one.run_id for one in sweep.plan())
    here = of_arguments(asked, "")
    assert all(one.run_id for one in here.plan())  # what was made elsewhere is listed here
    with pytest.raises(ConfigError, match="^compute.device=cuda: must be cpu or auto: this machine has no such GPU"):
        sweep_module.launch(here)
    assert not list((tmp_path / "runs").rglob("sweep.json"))


def test_an_axis_that_runs_do_not_read_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["compute.device=cpu", "pruning=none", "pruning.beta=0,0.5", "container.fit_steps=7"]
    sweep = of_arguments(asked, "")
    told = "varies but is not read: pruning.beta (pruning.over_budget=0)"
    assert cli.plan_text(sweep, sweep.plan()).splitlines().count(told) == 1
    assert sweep_module.varied_not_read(of_arguments([*asked[:1], "pruning.beta=0,0.5"], "").plan()) == []
    alike = [Planned(Cell(name, {}, ()), (f"seed={name}",), name, None, not_read=("seed (a)",)) for name in "12"]
    assert sweep_module.varied_not_read(alike) == ["seed (a)"]  # also for a table, whose axes have other names
    assert sweep_module.varied_not_read([alike[0], dataclasses.replace(alike[1], not_read=("seed (b)",))]) == []
    other = dataclasses.replace(alike[1], overrides=("seed=2", "artifact=b"))
    assert sweep_module.varied_not_read([alike[0], other]) == []  # they differ in other settings too
    monkeypatch.setattr(sweep_module.launchers, "launch", lambda *_: (outcome for outcome in ()))
    sweep_module.launch(sweep)
    assert capsys.readouterr().out == f"{told}\n"


def test_a_sweep_reads_its_own_settings_from_the_files_that_its_runs_have(monkeypatch):
    asked = []
    monkeypatch.setattr(sweep_module, "composed", lambda overrides: asked.append(list(overrides)) or compose())
    of_arguments(["experiment=demo", "debug=smoke", "launcher.slots=3", "seed=0,1", "network.width=8"], "")
    of_arguments(["experiment=main_table", "compute.device=cpu"], "")
    of_arguments(["experiment=demo,cifar10_q75", "compute.device=cpu"], "")  # several files: none is the sweep's
    one = ["compute.device=cpu"]
    assert asked == [["launcher.slots=3", "experiment=demo", "debug=smoke"], one, one]


def test_what_all_runs_have_alike_holds_for_the_sweep():
    own = ("paths.runs_dir=there", "tracking.group=mine", "compute.device=cpu")
    sweep = of_arguments(["experiment=demo,cifar10_q75", "compute.precision=fp32,bf16", *own], "")
    assert (sweep.runs_dir, sweep.group, sweep.launcher.gpus) == (Path("there"), "mine", 0)


def test_a_sweep_asks_for_no_more_of_its_runs_settings_than_it_reads():
    """``mode=evaluate`` needs an artifact, which the file that sets the mode need not name."""
    found = sections(compose("mode=evaluate", "dataset=folder", "paths.runs_dir=there"), ["launcher", "paths"])
    assert found.keys() == {"launcher", "paths"} and found["paths"].runs_dir == "there"


def test_a_numbered_gpu_is_not_for_runs_that_each_get_their_own():
    with pytest.raises(ConfigError, match=r"^compute.device=cuda:1: must be cuda, .* CUDA_VISIBLE_DEVICES=1 chooses"):
        of_arguments(["compute.device=cuda:1", "seed=0,1"], "")


def test_a_plan_is_of_the_runs_in_their_own_modes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["mode=random_subset", "dataset=cifar10", "seed=0,1"]
    planned = []
    for arguments in (["plan", *asked], [*asked, "mode=plan"]):
        assert cli.run(arguments) == 0
        planned.append(re.findall(r"cifar10-ipc1-random_subset-\w{8}", capsys.readouterr().out))
    assert len(planned[0]) == 2 and planned[0] == planned[1]


@pytest.mark.parametrize("settings", [["mode=plan"], ["mode=plan", "plan.format=text"]])
def test_mode_plan_plans_and_starts_nothing(sweep, here, settings):
    sweep.settings = (*sweep.settings, *settings)
    ended = here(sweep)
    assert ended.code == 0 and "3 runs: 3 waiting" in ended.lines
    assert sweep.ledger() == []


def test_a_sweeps_plan_is_text(capsys):
    with pytest.raises(ConfigError, match="^plan.format=json: must be left out: a sweep's plan is text$"):
        cli.run(["mode=plan", "plan.format=json", "seed=0,1"])


def test_a_misspelt_table_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"experiment=main_tabel: .* did you mean main_table\?$"):
        of_arguments(["experiment=main_tabel"], "")
