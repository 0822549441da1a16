"""State that survives kill -9, and stopping on a signal."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hmn import checkpoint
from hmn.checkpoint import Checkpoints, clear, codes_of
from hmn.errors import ArtifactError, ConfigError, DataError, Interrupted
from hmn.stop import STOP_SIGNALS, Stop

ROOT = Path(__file__).parents[1]


class Clock:
    """A stand-in for ``time.monotonic`` that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(checkpoint.time, "monotonic", lambda: self.now)


# Slots

STATE = {"step": 3, "values": [torch.arange(4), {"rate": 0.5}], "curve": {0: 0.25, 10: 0.5}, "none": None}


def test_a_slot_gives_back_what_was_saved(tmp_path: Path):
    Checkpoints(tmp_path / "slots", 60).save("condense", STATE)
    found = Checkpoints(tmp_path / "slots", 60).load("condense")
    assert torch.equal(found["values"].pop(0), STATE["values"][0])
    assert found == {**STATE, "values": [{"rate": 0.5}]}


def test_an_unused_slot_is_none(tmp_path: Path):
    assert Checkpoints(tmp_path / "slots", 60).load("condense") is None


def test_a_failing_save_leaves_the_earlier_state(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, 60)
    checkpoints.save("condense", {"step": 1})
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoints.save("condense", {"step": 2, "bad": lambda: None})
    assert checkpoints.load("condense") == {"step": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clock.pt", "condense.pt"]


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_it(tmp_path: Path, damage: str):
    checkpoints = Checkpoints(tmp_path, 60)
    checkpoints.save("condense", STATE)
    path = tmp_path / "condense.pt"
    path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-100], "text": b"not a checkpoint"}[damage])
    with pytest.raises(ArtifactError) as raised:
        checkpoints.load("condense")
    assert str(raised.value).startswith(f"{path}: not a checkpoint of this program")
    assert str(raised.value).endswith("remove it")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


class Payload:
    """Would create a file, were it ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("you tried, can't allocate memory")]
)
def test_what_the_machine_lacks_is_not_blamed_on_the_checkpoint(tmp_path: Path, monkeypatch, error: Exception):
    """Otherwise the checkpoint would be removed and its work repeated."""

    def fail(*_: object, **__: object) -> None:
        raise error

    Checkpoints(tmp_path, 0.0).save("condense", {"step": 1})
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as raised:
        Checkpoints(tmp_path, 0.0).load("condense")
    assert raised.value is error


@pytest.mark.parametrize("plain", [False, True])
def test_a_pickle_payload_is_refused_and_never_runs(tmp_path: Path, plain: bool):
    path, evidence = tmp_path / "slots" / "condense.pt", tmp_path / "evidence"
    path.parent.mkdir()
    if plain:
        path.write_bytes(pickle.dumps({"step": Payload(evidence)}, protocol=2))
    else:
        torch.save({"step": Payload(evidence)}, path)
    with pytest.raises(ArtifactError, match="UnpicklingError"):
        Checkpoints(tmp_path / "slots", 60).load("condense")
    assert not evidence.exists()


def test_state_is_saved_at_most_once_in_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    checkpoints = Checkpoints(tmp_path, 60)
    asked = []
    for step, seconds in enumerate([0, 59, 60, 61, 119, 120, 200]):
        clock.now = 1000.0 + seconds
        checkpoints.tick("condense", lambda step=step: asked.append(step) or {"step": step})
    assert asked == [2, 5, 6]  # in between, the state is not even built
    assert checkpoints.load("condense") == {"step": 6}


def test_clearing_removes_every_slot_and_the_folder(tmp_path: Path):
    folder = tmp_path / "slots"
    clear(folder)  # nothing has been saved yet
    for slot in ("condense", "score"):
        Checkpoints(folder, 60).save(slot, {"step": 1})
    (folder / ".score.pt.abc123.pt").touch()  # what a killed process leaves
    clear(folder)
    assert not folder.exists()


# Time


ORIGIN = {"data": "d1", "device": "cpu", "code": "c1"}


def continued(folder: Path, **other: str) -> Checkpoints:
    Checkpoints(folder / "checkpoints", 0, origin=ORIGIN).save("stage", {"step": 1})
    return Checkpoints(folder / "checkpoints", 0, origin=ORIGIN | other)


def test_a_state_of_other_images_or_another_device_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=f"{tmp_path}: its checkpoint was made from other images; move it away"):
        continued(tmp_path, data="d2")
    with pytest.raises(ConfigError) as raised:
        continued(tmp_path, device="cuda")
    rule = f"cpu, on which {tmp_path} was begun; or move it away to start over"
    assert str(raised.value) == f"compute.device=cuda: must be {rule}"


def test_a_state_of_another_precision_is_refused_and_older_ones_tell_none(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    bf16, fp32 = (ORIGIN | {"precision": name} for name in ("bf16", "fp32"))
    Checkpoints(folder, 0, origin=bf16).save("stage", {"step": 1})
    rule = f"bf16, in which {tmp_path} was begun, on a machine that has it; or move it away to start over"
    with pytest.raises(ConfigError) as raised:
        Checkpoints(folder, 0, origin=fp32)
    assert str(raised.value) == f"compute.precision=fp32: must be {rule}"
    Checkpoints(folder, 0, origin=bf16).save("stage", {"step": 2})
    clear(folder)
    Checkpoints(folder, 0, origin=ORIGIN).save("stage", {"step": 1})
    assert Checkpoints(folder, 0, origin=fp32).codes == ["c1"]


def test_the_sources_of_a_state_are_told_without_going_on_with_it(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    assert codes_of(folder) == []
    continued(tmp_path, code="c2").save("stage", {"step": 2})
    assert codes_of(folder) == ["c1", "c2"]
    (folder / "clock.pt").write_bytes(b"cut")
    assert codes_of(folder) == []


def test_what_other_sources_began_goes_on_and_they_are_remembered(tmp_path: Path, capsys):
    assert continued(tmp_path).codes == ["c1"]
    assert capsys.readouterr().out == ""
    continued(tmp_path, code="c2").save("stage", {"step": 2})
    assert capsys.readouterr().out == "continuing from a state of another code version (c1, now c2)\n"
    assert Checkpoints(tmp_path / "checkpoints", 0, origin=ORIGIN | {"code": "c2"}).codes == ["c1", "c2"]
    assert Checkpoints(tmp_path / "checkpoints", 0, origin=ORIGIN).codes == ["c1", "c2", "c1"]


FAILURES = [KeyError("memo"), IndexError(), TypeError(), ValueError("shape"), RuntimeError("size mismatch for w")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_state_of_other_sources_that_cannot_be_restored_is_refused_in_one_line(tmp_path: Path, failure: Exception):
    continued(tmp_path, code="c2").save("stage", {"step": 2})
    for code, before in (("c2", "c1"), ("c3", "c2")):
        checkpoints = Checkpoints(tmp_path / "checkpoints", 0, origin=ORIGIN | {"code": code})
        with pytest.raises(ArtifactError) as raised, checkpoints.restoring():
            raise failure
        told = f"another code version ({before}), which this one cannot continue ({type(failure).__name__})"
        rule = "move it away to start over, or continue with that version"
        assert str(raised.value) == f"{tmp_path}: its checkpoint is of {told}: {rule}"


def test_an_error_of_its_own_sources_or_of_the_machine_is_not_blamed_on_other_sources(tmp_path: Path):
    own = continued(tmp_path)
    with pytest.raises(KeyError), own.restoring():
        raise KeyError("memo")
    other = continued(tmp_path, code="c2")
    for failure in (torch.OutOfMemoryError(), DataError("other images"), OSError(errno.ENOSPC, "full")):
        with pytest.raises(type(failure)) as raised, other.restoring():
            raise failure
        assert raised.value is failure


def test_seconds_add_up_over_sittings_and_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    first = Checkpoints(tmp_path, 60)
    with first.timed("condense"):
        clock.now += 10
        first.save("condense", {})
        clock.now += 5  # lost: the process ends here, and these seconds are spent again
    clock.now += 1000  # time between sittings does not count
    second = Checkpoints(tmp_path, 60)
    assert second.seconds == {"condense": 10.0}
    with second.timed("condense"):
        clock.now += 7
    clock.now += 50  # nor does time outside of all stages
    with second.timed("score"):
        clock.now += 3
        second.save("score", {})
    assert second.seconds == {"condense": 17.0, "score": 3.0}
    assert Checkpoints(tmp_path, 60).seconds == {"condense": 17.0, "score": 3.0}


def test_a_block_that_raises_is_timed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    checkpoints = Checkpoints(tmp_path, 60)
    with pytest.raises(RuntimeError), checkpoints.timed("condense"):
        clock.now += 4
        raise RuntimeError
    assert checkpoints.seconds == {"condense": 4.0}


def test_what_an_interrupted_block_took_is_kept_though_its_state_is_elsewhere(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    checkpoints = Checkpoints(tmp_path / "own", 60)
    shared = checkpoints.beside(tmp_path / "shared")
    checkpoints.stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted), checkpoints.timed("experts"):
        clock.now += 4
        shared.tick("experts-0000", dict)
    assert Checkpoints(tmp_path / "own", 60).seconds == {"experts": 4.0}


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_was_interrupted_before_it_kept_a_state_is_nobodys_yet(tmp_path: Path, begun: bool):
    first = Checkpoints(tmp_path, 60, origin=ORIGIN)
    if begun:
        first.save("fit", {})
    first.stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted), first.timed("experts"):
        first.beside(tmp_path / "shared").tick("experts-0000", dict)
    codes = Checkpoints(tmp_path, 60, origin=ORIGIN | {"code": "c2"}).codes
    assert codes == (["c1", "c2"] if begun else ["c2"])


def test_a_state_of_several_runs_is_named_itself_where_it_cannot_go_on(tmp_path: Path):
    own = Checkpoints(tmp_path / "run" / "checkpoints", 0, origin=ORIGIN)
    own.beside(tmp_path / "experts" / "unfinished").save("stage", {})
    other = Checkpoints(tmp_path / "other" / "checkpoints", 0, origin=ORIGIN | {"device": "cuda"})
    with pytest.raises(ConfigError, match=f"on which {tmp_path}/experts/unfinished was begun"):
        other.beside(tmp_path / "experts" / "unfinished")


def test_the_last_slot_that_is_dropped_takes_the_folder_with_it(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "own", 60)
    for slot in ("one", "other"):
        checkpoints.save(slot, {})
    checkpoints.drop("one")
    assert checkpoints.load("one") is None and checkpoints.load("other") == {}
    (checkpoints.folder / ".other.pt.0a1b2c3d.pt").touch()  # what a kill left half-written
    checkpoints.drop("other")
    assert not checkpoints.folder.exists()


# Signals


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_only_asks_and_the_next_tick_saves_and_stops(tmp_path: Path, signum: int):
    stop = Stop()
    checkpoints = Checkpoints(tmp_path, 1e9, stop)
    with stop.listening():
        checkpoints.tick("condense", lambda: {"step": 1})
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(Interrupted) as raised:
            checkpoints.tick("condense", lambda: {"step": 2})
    assert raised.value.exit_code == 128 + signum
    assert str(raised.value) == f"stopped by {signal.Signals(signum).name}; the same command resumes from here"
    assert checkpoints.load("condense") == {"step": 2}


@pytest.mark.parametrize("fails", [False, True])
def test_listening_gives_the_handlers_back(fails: bool):
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    try:
        with Stop().listening():
            assert all(signal.getsignal(signum) not in before for signum in STOP_SIGNALS)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before


def test_a_second_ctrl_c_ends_the_process_at_once():
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # counts as the first Ctrl-C, whatever was sent before
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# Killed while it saves


def python(script: str, *arguments: str | Path) -> subprocess.Popen:
    """Start ``script`` in a process of its own that can import the package."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


# Python starts once for many lives: each forked child saves without pause until it is killed.
KILL = """
import json, os, pathlib, random, signal, sys, time
import torch
from hmn.checkpoint import Checkpoints

folder, rounds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork: a child that used two would wait forever
for _ in range(rounds):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(folder, 0)
        step = (checkpoints.load("condense") or {"step": 0})["step"]
        while True:
            step += 1
            checkpoints.save("condense", {"step": step, "values": torch.full((200_000,), step)})
            os.write(writing, step.to_bytes(4, "big"))
    os.close(writing)
    announced = os.read(reading, 4)  # at least one save of its own
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(reading, 1 << 16):
        announced = part[-4:]
    os.close(reading)
    found = Checkpoints(folder, 0).load("condense")
    whole = bool((found["values"] == found["step"]).all())
    print(json.dumps([int.from_bytes(announced, "big"), found["step"], whole]), flush=True)
"""


def test_kill_9_in_the_middle_of_many_saves_always_leaves_the_last_finished_one(tmp_path: Path):
    rounds = 25
    with python(KILL, tmp_path / "slots", rounds) as process:
        lives = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert len(lives) == rounds
    for announced, found, whole in lives:
        assert whole
        assert announced <= found <= announced + 1
    clear(tmp_path / "slots")  # including any temporary files that the killed processes left
    assert not (tmp_path / "slots").exists()
