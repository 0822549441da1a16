"""The search: its space, its selection criterion, and that a kill never changes its proposals."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hmn import results
from hmn.config import Config
from hmn.errors import Busy, ConfigError, HmnError
from hmn.files import exclusive
from hmn.sweeps import planning
from hmn.sweeps import search as searching
from hmn.sweeps.attempt import FAILURE, Outcome, Task
from hmn.sweeps.search import JOURNAL, search
from hmn.tracking import read_metrics
from tests.command import ROOT, TINY, WAIT_SECONDS, processes, serve

FIXED = (*TINY, "evaluation.curve_points=2", "evaluation.curve_epochs=1")
SPACE = ("objective.memory_lr=tag(log,interval(1e-3,1e-1))", "pruning.beta=choice(0.0,0.5,1.0)")

# The space


def parsed(line: str) -> Any:
    return searching.distribution(OverridesParser.create().parse_override(line))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.b=choice(8,16,32)", CategoricalDistribution(["8", "16", "32"])),
        ("container=hmn,image", CategoricalDistribution(["hmn", "image"])),
        ("a=choice([1,2],'x y',true,1e-3)", CategoricalDistribution(["[1,2]", r"x\ y", "True", "0.001"])),
        ("a=interval(0,1)", FloatDistribution(0.0, 1.0)),
        ("a=tag(log,interval(1e-3,1e-1))", FloatDistribution(1e-3, 1e-1, log=True)),
        ("a=int(interval(1,64))", IntDistribution(1, 64)),
        ("a=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("a=range(4)", IntDistribution(0, 3)),
        ("a=range(1,10,3)", IntDistribution(1, 7, step=3)),
        ("a=range(10,0,-3)", IntDistribution(1, 10, step=3)),
    ],
)
def test_the_space_is_what_the_grammar_says(line, expected):
    found = parsed(line)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("a=range(0,1,0.1)", "a=range(0,1,0.1): must be choice(...) or interval(...)"),
        ("a=range(3,3)", "a=range(3,3): must be a range with a value"),
        ("a=shuffle(range(4))", "without shuffle"),
        ("a=tag(log,choice(1,2))", "a=tag(log,choice(1,2)): must be without tags"),
        ("a=tag(fast,interval(1,2))", "without tags except tag(log, ...)"),
        ("a=choice(1,2,1)", "different values"),
        ("a=glob(*)", "a=glob(*): must be written out as choice(...)"),
        ("a=interval(2,1)", "a=interval(2,1): "),
        ("a=tag(log,interval(0,1))", "a=tag(log,interval(0,1)): "),
        ("a=tag(log,range(1,9,2))", "a=tag(log,range(1,9,2)): "),
    ],
)
def test_what_has_no_meaning_in_a_search_is_refused_in_a_line(line, why):
    with pytest.raises(ConfigError) as caught:
        parsed(line)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


# What is refused before anything runs


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """The folder in which a test's searches run."""
    monkeypatch.chdir(tmp_path)
    for module in (searching, planning):
        monkeypatch.setattr(module, "compose", compose_quickly)
    return tmp_path


@functools.cache
def compose_quickly(overrides: tuple[str, ...]) -> Config:
    """Compose once for all values of the searched settings: each call of Hydra takes a tenth of a second."""
    given = dict(override.split("=", 1) for override in overrides)
    rate, share = given.pop("objective.memory_lr", None), given.pop("pruning.beta", None)
    config = composed(tuple(sorted("=".join(item) for item in given.items())))
    if rate is not None:
        config = replace(config, objective=replace(config.objective, memory_lr=float(rate)))
    return config if share is None else replace(config, pruning=replace(config.pruning, beta=float(share)))


composed = functools.cache(planning.compose)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["trials=2"], "study=null: must be a name"),
        (["study=../a", "trials=2"], "study=../a: must be a name"),
        (["study=a"], "trials=null: must be at least 1"),
        (["study=a", "trials=2", "batch=0"], "batch=0: must be at least 1"),
        (["study=a", "trials=2", "evaluation.curve_points=0"], "evaluation.curve_points=0: must be at least 2"),
        (["study=a", "trials=2", "mode=random_subset"], "mode=random_subset: must be run"),
        (["study=a", "trials=2", "container=coreset", "container.method=random"], "mode=run: must be run, with a"),
        (["study=a", "trials=2", "seed=choice(1,2)", "seed=3"], "seed=3: must be given once"),
        (["study=a", "trials=2", "sweep.other_code=repeat"], "sweep.other_code=repeat: must be refuse or keep"),
        (["study=a", "trials=2", "sweep.on_failure=maybe"], "sweep.on_failure=maybe: must be one of"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_a_line(folder, arguments, why):
    given = [argument.partition("=")[0] for argument in arguments]
    fixed = [one for one in FIXED if one.partition("=")[0] not in given]
    space = [] if "container=coreset" in arguments else SPACE[1:]
    with pytest.raises(ConfigError) as caught:
        search([*arguments, *fixed, "objective.memory_lr=choice(0.1,0.2)", *space])
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "runs" / "sweeps").exists()


def test_without_anything_to_choose_there_is_no_search(folder):
    with pytest.raises(ConfigError, match="nothing to search: write a setting as choice"):
        search(["study=a", "trials=2", *FIXED])


def test_without_optuna_the_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(HmnError, match=r"pip install -e '\.\[search\]'"):
        search(["study=a", "trials=2", *FIXED, *SPACE])


def test_a_study_that_another_process_works_on_is_left_alone(folder):
    with exclusive(folder / "runs" / "studies" / "a"), pytest.raises(Busy, match="working on this study"):
        search(["study=a", "trials=2", *FIXED, *SPACE])


# What runs return


class Killed(BaseException):
    """Acts like SIGKILL: no code of ours handles it."""


class Runs:
    """Replaces a launcher's processes: the held-out accuracy of a run is ``held_out`` of its settings.

    Its test accuracy is one minus that. ``kill_at`` is the number of the run that takes everything down with it,
    ``stop_at`` that of the run that is asked to stop, and ``saves`` tells whether that run has saved its state.
    """

    def __init__(self, held_out: Callable[[Mapping[str, str]], float | None]) -> None:
        self.held_out, self.made, self.kill_at, self.stop_at, self.saves = held_out, [], None, None, False
        self.code, self.earlier = results.code_version(), []

    def launch(self, tasks: Sequence[Task], settings: Any) -> Iterator[Outcome]:
        for task in tasks:
            if len(self.made) == self.kill_at:
                raise Killed
            if len(self.made) == self.stop_at:
                if self.saves:
                    (Path(task.folder) / "checkpoints").mkdir(parents=True)
                    (Path(task.folder) / "checkpoints" / "condense.pt").touch()
                yield Outcome(task.run_id, "stopped", 1)
                continue
            self.made.append(task.run_id)
            value = self.held_out(dict(argument.split("=", 1) for argument in task.arguments))
            if value is None:
                failure = {"error": "the loss is not finite", "command": task.command}
                Path(task.folder).mkdir(parents=True)
                (Path(task.folder) / FAILURE).write_text(json.dumps(failure))
                yield Outcome(task.run_id, "failed", 1, failure["error"])
                continue
            accuracy = {"mean": 1 - value, "std": None, "by_network": [[1 - value]]}
            pruning = {"cut_per_class": 1, "held_out_accuracy": value}
            curve = [{"step": 6, "held_out_accuracy": 1 - value}]
            codes = [*self.earlier, self.code]
            found = {"accuracy": accuracy, "pruning": pruning, "curve": curve, "code": self.code, "codes": codes}
            results.write(Path(task.folder), found)
            yield Outcome(task.run_id, "done", 1)


def near_a_hundredth(settings: Mapping[str, str]) -> float:
    """Best at a learning rate of 0.01; ``pruning.beta`` has no effect."""
    return 0.9 / (1 + abs(float(settings["objective.memory_lr"]) - 0.01))


@pytest.fixture
def runs(monkeypatch, folder) -> Runs:
    made = Runs(near_a_hundredth)
    monkeypatch.setattr("hmn.sweeps.launchers.launch", lambda *given: made.launch(*given))
    return made


def trials(study: str = "a") -> list[dict[str, Any]]:
    """What the journal holds for each trial, without the times."""
    opened = searching._open(Path("runs/studies", study))
    return [
        {"params": one.params, "state": one.state.name, "value": one.value, **one.user_attrs}
        for one in opened.get_trials()
    ]


def test_held_out_accuracy_alone_decides(runs, capsys):
    assert search(["study=a", "trials=6", *FIXED, *SPACE]) == 0
    found = trials()
    for one in found:
        kept = results.read(Path("runs", one["run_id"]))
        assert one["value"] == kept["pruning"]["held_out_accuracy"] == near_a_hundredth(one["params"])
    best = max(found, key=lambda one: one["value"])
    assert best != min(found, key=lambda one: one["value"])
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index("study a: 6 of 6 trials, 0 of them failed") + 4 :]
    assert table[0].split() == [
        str(found.index(best)),
        f"{100 * best['value']:.2f}",
        f"{best['params']['objective.memory_lr']:.4g}",
        best["params"]["pruning.beta"],
        best["run_id"],
    ]
    (command,) = (line for line in lines if line.startswith("best: python run.py "))
    searched = " ".join(f"{key}={value}" for key, value in sorted(best["params"].items()))
    assert command == f"best: python run.py {' '.join(FIXED)} {searched}"


def test_the_search_comes_near_the_best_and_says_which_setting_mattered(runs, capsys):
    space = ["objective.memory_lr=interval(0.001,0.9)", SPACE[1]]
    assert search(["study=a", "trials=18", "batch=4", *FIXED, *space]) == 0
    found = [one["params"]["objective.memory_lr"] for one in trials()]
    random, proposed = found[:10], found[10:]
    assert sum(proposed) / len(proposed) < sum(random) / len(random) / 2
    table = capsys.readouterr().out.partition("(fANOVA)")[2].splitlines()[2:]
    (first, most), (second, least) = (line.split() for line in table)
    assert (first, second) == ("objective.memory_lr", "pruning.beta")
    assert float(most) > 0.8 > 0.2 > float(least)


@pytest.mark.parametrize("kill_at", [0, 2, 3])
def test_a_killed_study_goes_on_with_the_same_trials(runs, kill_at):
    arguments = ["trials=6", "batch=2", *FIXED, *SPACE]
    assert search(["study=undisturbed", *arguments]) == 0
    undisturbed = trials("undisturbed")
    for run_id in runs.made:
        (Path("runs") / run_id / results.FILE).unlink()
    runs.made, runs.kill_at = [], kill_at
    with pytest.raises(Killed):
        search(["study=a", *arguments])
    assert sum(one["state"] == "RUNNING" for one in trials()) == 2
    runs.kill_at = None
    assert search(["study=a", *arguments]) == 0
    assert trials() == undisturbed
    assert runs.made == [one["run_id"] for one in undisturbed]  # each run once


def test_a_journal_cut_anywhere_goes_on_with_the_same_trials(runs):
    arguments = ["study=a", "trials=4", "batch=2", *FIXED, *SPACE]
    assert search(arguments) == 0
    undisturbed, journal = trials(), Path("runs/studies/a") / JOURNAL
    whole, made = journal.read_bytes(), list(runs.made)
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 9  # one for the study and two per trial
    for cut in (0, ends[0] - 5, ends[0], ends[1], ends[2] - 1, ends[3], ends[5] + 7, ends[8] - 1):
        journal.write_bytes(whole[:cut])
        assert search(arguments) == 0
        assert trials() == undisturbed, cut
    assert runs.made == made  # none again: their results exist


def test_trials_count_over_all_sittings(runs):
    arguments = ["study=a", "batch=2", *FIXED, *SPACE]
    for asked, made in ((3, 3), (5, 5), (5, 5), (2, 5)):
        assert search([f"trials={asked}", *arguments]) == 0
        assert len(trials()) == len(runs.made) == made


def test_a_proposal_that_was_made_before_is_not_run_again(runs):
    assert search(["study=a", "trials=8", "batch=4", *FIXED, "objective.memory_lr=choice(0.01,0.02)"]) == 0
    found = trials()
    assert len(found) == 8
    assert sorted(runs.made) == sorted({one["run_id"] for one in found})
    assert len(runs.made) == 2
    assert {one["value"] for one in found} == {0.9, 0.9 / 1.01}


def test_failed_runs_are_failed_trials(runs, capsys):
    runs.held_out = lambda settings: near_a_hundredth(settings) if settings["pruning.beta"] == "0.0" else None
    assert search(["study=a", "trials=6", *FIXED, *SPACE]) == 0
    found = trials()
    good = [one["params"]["pruning.beta"] == "0.0" for one in found]
    assert 0 < sum(good) < 6
    assert [one["state"] == "COMPLETE" for one in found] == good
    out = capsys.readouterr().out
    assert f"6 of 6 trials, {6 - sum(good)} of them failed" in out
    assert f"trial {good.index(False)} failed: the loss is not finite" in out


def test_a_search_that_has_measured_nothing_says_so_and_fails(runs, capsys):
    runs.held_out = lambda settings: None
    assert search(["study=a", "trials=2", *FIXED, *SPACE]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "study a: 2 of 2 trials, 2 of them failed"


def test_a_failure_ends_the_search_if_that_is_asked_for(runs):
    runs.held_out = lambda settings: None
    assert search(["study=a", "trials=6", "sweep.on_failure=stop", *FIXED, *SPACE]) == 1
    assert [one["state"] for one in trials()] == ["FAIL"]


@pytest.mark.parametrize("saves", [False, True])
def test_a_run_that_was_stopped_is_a_trial_that_goes_on_with_the_search(runs, saves):
    runs.stop_at, runs.saves = 2, saves
    assert search(["study=a", "trials=6", *FIXED, *SPACE]) == 1
    assert [one["state"] for one in trials()] == ["COMPLETE", "COMPLETE", "RUNNING"]
    stopped, runs.stop_at = trials()[2]["params"], None
    assert search(["study=a", "trials=6", *FIXED, *SPACE]) == 0
    assert [one["state"] for one in trials()] == ["COMPLETE"] * 6 and trials()[2]["params"] == stopped


def test_a_run_that_another_sweep_is_making_is_a_trial_that_goes_on_with_the_search(runs):
    """This search ended with the failure of the batch's other trial and does not wait for that run."""
    first: list[str] = []
    runs.held_out = lambda settings: None
    launch_all = runs.launch

    with contextlib.ExitStack() as another:

        def launch(tasks: Sequence[Task], settings: Any) -> Iterator[Outcome]:
            first.append(tasks[0].run_id)
            another.enter_context(exclusive(Path(tasks[0].folder)))
            yield from launch_all(tasks[1:], settings)

        runs.launch = launch
        search(["study=a", "trials=2", "batch=2", "sweep.on_failure=stop", *FIXED, *SPACE])
        assert [(one["state"], one["run_id"] in first) for one in trials()] == [("RUNNING", True), ("FAIL", False)]


def test_values_that_make_no_run_are_failed_trials_that_start_none(runs, capsys):
    runs.held_out = lambda settings: 0.5
    space = ["container.decoder_width=choice(2,100000)"]  # the second value does not fit the budget
    assert search(["study=a", "trials=6", "batch=2", *FIXED, *space]) == 0
    found = trials()
    failed = [one for one in found if one["state"] == "FAIL"]
    assert 0 < len(failed) < 6
    assert {one["params"]["container.decoder_width"] for one in failed} == {"100000"}
    assert all("container" in one["error"] for one in failed)
    assert len(runs.made) == 1
    assert f"trial {found.index(failed[0])} cannot run: {failed[0]['error']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (["seed=1", *SPACE], "started with no seed, not seed=1: "),
        (SPACE[:1], "started with pruning.beta=CategoricalDistribution(choices=['0.0', '0.5', '1.0']), not no "),
        ([SPACE[0], "pruning.beta=0.0"], "['0.0', '0.5', '1.0']), not pruning.beta=0.0: "),
        ([SPACE[0].replace("1e-1", "1"), SPACE[1]], "high=0.1, log=True), not objective.memory_lr=FloatDistribution"),
    ],
)
def test_a_study_keeps_to_what_it_was_started_with(runs, changed, why):
    assert search(["study=a", "trials=1", *FIXED, *SPACE]) == 0
    with pytest.raises(ConfigError) as caught:
        search(["study=a", "trials=2", *FIXED, *changed])
    assert "study=a was started with" in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_order_of_settings_and_where_runs_are_made_are_no_part_of_a_study(runs):
    assert search(["study=a", "trials=1", *FIXED, *SPACE]) == 0
    assert search(["study=a", "trials=3", *reversed([*FIXED, *SPACE]), "launcher.slots=2"]) == 0
    assert search(["study=undisturbed", "trials=3", *FIXED, *SPACE]) == 0
    assert trials() == trials("undisturbed")


def test_trials_of_other_sources_are_kept_only_if_asked_for(runs):
    runs.code = "0123456789ab"
    assert search(["study=a", "trials=1", "sweep.other_code=keep", *FIXED, *SPACE]) == 0
    with pytest.raises(
        ConfigError, match=r"study=a: trials are from other code versions \(1 from 0123456789ab, now \w+\)"
    ):
        search(["study=a", "trials=2", *FIXED, *SPACE])
    assert search(["study=a", "trials=2", "sweep.other_code=keep", *FIXED, *SPACE]) == 0


def test_a_trial_that_two_versions_of_the_sources_made_is_of_other_sources(runs):
    runs.earlier = ["0123456789ab"]
    assert search(["study=a", "trials=1", *FIXED, *SPACE]) == 0
    with pytest.raises(ConfigError, match=r"trials are from other code versions \(1 from 0123456789ab\+\w+, now \w+\)"):
        search(["study=a", "trials=2", *FIXED, *SPACE])


# Real processes


def test_a_search_killed_for_real_continues_its_run_and_loses_no_trial(tmp_path):
    long = ["objective.outer_steps=6", "tracking.log_every_steps=1"]
    arguments = ["study=a", "trials=2", *FIXED, *long, *SPACE]
    first = start(tmp_path, arguments)
    wait_for(lambda: any(read_metrics(path) for path in tmp_path.glob("runs/*/metrics.jsonl")), first)
    first.kill()
    first.join(WAIT_SECONDS)
    assert first.exitcode == -signal.SIGKILL
    journal = tmp_path / "runs/studies/a" / JOURNAL
    before = journal.read_bytes()
    second = start(tmp_path, arguments)
    second.join(WAIT_SECONDS)
    assert second.exitcode == 0, (tmp_path / "out").read_text()
    assert journal.read_bytes().startswith(before)
    kept = {path.parent.name: results.read(path.parent) for path in tmp_path.glob("runs/*/result.json")}
    found = [(one.user_attrs["run_id"], one.value) for one in searching._open(journal.parent).get_trials()]
    assert found == [(run_id, kept[run_id]["pruning"]["held_out_accuracy"]) for run_id, _ in found]
    assert sorted(run_id for run_id, _ in found) == sorted(kept)
    assert len(kept) == 2
    assert "continuing at step" in (tmp_path / "runs" / found[0][0] / "log.txt").read_text()
    assert "study a: 2 of 2 trials, 0 of them failed" in (tmp_path / "out").read_text()


def start(folder: Path, arguments: Sequence[str]) -> Any:
    process = processes.Process(target=_sweep, args=(str(folder), ["search", *arguments]), daemon=True)
    serve()
    process.start()
    return process


def _sweep(folder: str, arguments: list[str]) -> None:
    os.chdir(folder)
    tempfile.tempdir = folder  # own slots, not those of other sweeps on this machine
    for descriptor in (1, 2):
        os.dup2(os.open("out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = ["sweep.py", *arguments]
    runpy.run_path(str(ROOT / "sweep.py"), run_name="__main__")


def wait_for(seen: Callable[[], bool], process: Any) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not seen():
        assert process.is_alive() and time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
