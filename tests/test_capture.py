"""Recording a step: warming up leaves no trace, and a step that cannot be recorded runs all the same."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from hmn import capture
from hmn.capture import Replay, optimizer_tensors, warm_up
from hmn.compute import choose
from hmn.config import ComputeConfig
from hmn.errors import HmnError
from hmn.realside import update_of
from hmn.seeding import set_deterministic
from tests.small_matching import config, make_run


class Walk:
    """A step with every kind of state: a parameter, moments that the first step creates, and a random stream."""

    def __init__(self) -> None:
        self.parameter = nn.Parameter(torch.ones(3))
        self.adam = torch.optim.Adam([self.parameter], lr=0.1)
        self.stream = torch.Generator().manual_seed(7)

    def step(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.parameter.grad = inputs["gradient"] + torch.rand(3, generator=self.stream)
        self.adam.step()
        return {"value": self.parameter.detach().clone()}

    def state(self) -> list[Tensor]:
        return optimizer_tensors(self.adam)


INPUTS = {"gradient": torch.tensor([1.0, -2.0, 0.5])}


@pytest.mark.parametrize("steps_before", [0, 2])
def test_warming_up_leaves_no_trace(steps_before: int):
    warmed, plain = Walk(), Walk()
    for walk in (warmed, plain):
        for _ in range(steps_before):
            walk.step(INPUTS)
    warm_up(warmed.step, INPUTS, warmed.state, [warmed.stream])
    for _ in range(3):
        assert torch.equal(warmed.step(INPUTS)["value"], plain.step(INPUTS)["value"])


def cannot_record(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Warm up without a GPU's streams and make every recording fail with ``error``."""

    def fail(self: Replay, inputs: dict[str, Tensor]) -> None:
        raise error

    monkeypatch.setattr(Replay, "_warm_up", lambda s, inputs: warm_up(s.function, inputs, s.state, s.generators))
    monkeypatch.setattr(Replay, "_record", fail)
    monkeypatch.setattr(capture, "RECOVERS", "0")  # whichever PyTorch is installed
    monkeypatch.setattr(capture, "launched_anew", set())


def test_a_step_that_cannot_be_recorded_is_called_as_it_is_and_says_so_once(capsys, monkeypatch):
    cannot_record(monkeypatch, RuntimeError("operation not permitted\nwhen stream is capturing"))
    walk, plain = Walk(), Walk()
    replay = Replay(walk.step, walk.state, [walk.stream])
    for _ in range(2):
        assert torch.equal(replay(INPUTS)["value"], plain.step(INPUTS)["value"])
    assert capsys.readouterr().err.splitlines() == [
        "a step cannot be recorded as a CUDA graph, so it runs without one: operation not permitted"
    ]


def test_a_gpu_that_is_full_is_not_called_unable_to_record(monkeypatch, capsys):
    cannot_record(monkeypatch, torch.cuda.OutOfMemoryError("CUDA out of memory"))
    walk = Walk()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Replay(walk.step, walk.state, [walk.stream])(INPUTS)
    assert capsys.readouterr().err == ""


def test_the_first_of_the_errors_of_a_recording_is_the_one_that_counts(monkeypatch, capsys):
    """Ending a recording that has failed raises a second error."""

    def failed(first: Exception) -> RuntimeError:
        ending = RuntimeError("capture invalidated")
        ending.__context__ = first
        return ending

    cannot_record(monkeypatch, failed(RuntimeError("operation not permitted")))
    Replay(Walk().step, list, [])(INPUTS)
    assert capsys.readouterr().err.endswith("runs without one: operation not permitted\n")
    full = torch.cuda.OutOfMemoryError("CUDA out of memory")
    full.__context__ = KeyError("what was not there yet and was to be made")
    cannot_record(monkeypatch, failed(full))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Replay(Walk().step, list, [])(INPUTS)


def test_a_step_whose_recording_failed_half_way_starts_from_no_gradient(monkeypatch):
    """The failed recording has not run the step, but the gradients that the step was to fill exist."""
    plain, failed = make_run(config()), make_run(config())
    failed.replay = Replay(failed._whole_step, failed._state_tensors, [failed.generators["rows"]])

    def fail(self: Replay, inputs: dict[str, Tensor]) -> None:
        for parameter in failed.optimizer.parameters:
            parameter.grad = torch.full_like(parameter, 1e3)
        raise RuntimeError("no")

    monkeypatch.setattr(Replay, "_warm_up", lambda self, inputs: None)
    monkeypatch.setattr(Replay, "_record", fail)
    monkeypatch.setattr(capture, "RECOVERS", "0")
    for _ in range(2):
        assert torch.equal(plain.run_step()[0], failed.run_step()[0])
    for one, other in zip(plain._state_tensors(), failed._state_tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("changes", [{"step_policy": "per_class"}, {"classes_per_step": 2}])
def test_where_a_whole_step_is_not_recorded_the_networks_update_can_be(monkeypatch, changes):
    """It is warmed up, everything that this changed is restored, and it is then called without a recording."""
    cannot_record(monkeypatch, RuntimeError("no"))
    plain, tried = make_run(config(**changes)), make_run(config(**changes))
    tried.update = update_of(tried.side, tried.decoded, record=True)
    for _ in range(4):
        assert torch.equal(plain.run_step()[0], tried.run_step()[0])
    for one, other in zip(plain._state_tensors(), tried._state_tensors(), strict=True):
        assert torch.equal(one, other)


def test_what_is_recorded_reads_the_tensors_that_it_was_warmed_up_with_and_never_the_callers(monkeypatch):
    """A caller's tensor may have another layout than its copy, for which compiled code would compile again."""
    seen = []
    monkeypatch.setattr(Replay, "_warm_up", lambda self, inputs: seen.append(inputs["gradient"]))
    monkeypatch.setattr(Replay, "_record", lambda self, inputs: seen.append(inputs["gradient"]) or self._give_up("no"))
    monkeypatch.setattr(capture, "RECOVERS", "0")
    monkeypatch.setattr(capture, "launched_anew", set())
    Replay(Walk().step, list, [])(INPUTS)
    warmed, recorded = seen
    assert warmed is recorded is not INPUTS["gradient"]
    assert torch.equal(warmed, INPUTS["gradient"])


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_while_a_step_is_recorded(enabled: bool):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(RuntimeError), capture._uncollected():
            assert not gc.isenabled()
            raise RuntimeError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_an_older_pytorch_cannot_go_on_after_a_recording_that_fails(monkeypatch):
    cannot_record(monkeypatch, RuntimeError("operation not permitted"))
    monkeypatch.setattr(capture, "RECOVERS", "2.13.0a0")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    walk = Walk()
    with pytest.raises(HmnError) as told:
        Replay(walk.step, walk.state, [walk.stream])(INPUTS)
    assert str(told.value) == (
        "a step cannot be recorded as a CUDA graph, and PyTorch 2.11.0+cu130 cannot continue: "
        "set compute.record=false to run without graphs (operation not permitted)"
    )


def test_nothing_is_recorded_where_that_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(capture, "_enabled", True)  # so that monkeypatch restores it afterwards
    choose(ComputeConfig(device="cpu", record=False), 0.0, 10)
    monkeypatch.setattr(Replay, "_warm_up", None)
    walk, plain = Walk(), Walk()
    replay = Replay(walk.step, walk.state, [walk.stream])
    for _ in range(2):
        assert torch.equal(replay(INPUTS)["value"], plain.step(INPUTS)["value"])
    assert capsys.readouterr().err == ""
    choose(ComputeConfig(device="cpu"), 0.0, 10)
    assert not Replay(walk.step, walk.state, [walk.stream]).plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_recorded_step_does_not_wait_for_the_device_and_equals_the_launched_one(monkeypatch):
    set_deterministic(True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    runs = [make_run(config(inner_steps=3), device="cuda") for _ in range(2)]
    runs[1].replay = None
    for _ in range(7):
        found = [run.run_step()[0] for run in runs]
        torch.testing.assert_close(*found, rtol=1e-4, atol=0)
    assert len(runs[0].replay.recorded) == 1 and not runs[0].replay.plain
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs[0].run_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
