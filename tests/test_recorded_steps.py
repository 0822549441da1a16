"""Steps that are recorded once and replayed are the steps that are launched anew, whatever changes between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hmn import capture
from hmn.artifacts import TENSORS, load_condensed
from hmn.build import condensation
from hmn.compute import Compute
from hmn.condense import Condensation
from hmn.config.containers import CORESET_METHODS
from tests.command import TINY, planned, session_of
from tests.other_device import other_device
from tests.small_matching import CPU, make_container, workshop
from tests.tape import record_on_a_cpu

STEPS = 5  # of networks that live for two steps, and rates that fall
ALIKE = ["real_batch=6", "final_lr_fraction=0.1"]
TRAINED = ["outer_steps=3", "inner_steps=2", "network_batch=8"]
REAL = [*TRAINED, "network_samples=16"]
OBJECTIVES = {
    "gradient_matching": REAL,
    "idc": REAL,
    "dream": [*REAL, "real_batch=1"],  # the two images of a cluster would be as near to its centre as each other
    "dc": TRAINED,
    "dsa": TRAINED,
    "distribution_matching": ["outer_steps=6"],
    "idm": ["outer_steps=6", "pool_networks=2", "pool_interval=2", "pool_trained=1", "pool_steps=1"],
}
WHOLE, UPDATE = "ClassMatching._whole_step", "update_of.<locals>.update"


def assert_replayed(launched: Condensation, recorded: Condensation, steps: int = STEPS) -> None:
    for _ in range(steps):
        (losses, norms), (others, other_norms) = launched.run_step(), recorded.run_step()
        torch.testing.assert_close([losses, *norms.values()], [others, *other_norms.values()])
    for one, other in zip(launched.container.parameters(), recorded.container.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def made(folder: Path, objective: str, *settings: str, device: torch.device = CPU.device) -> Condensation:
    own = [f"objective.{setting}" for setting in [*ALIKE, *OBJECTIVES[objective], *settings]]
    given = [f"objective={objective}", "memory=ipc10", f"paths.cache_dir={folder}"]
    shop = workshop(folder, *given, *own, compute=Compute(device))
    return condensation(shop, make_container().to(device))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_recorded_step_of_every_objective_is_the_step(objective: str, tmp_path: Path, monkeypatch):
    launched = made(tmp_path, objective, "step_policy=accumulate")
    recordings = record_on_a_cpu(monkeypatch)
    assert_replayed(launched, made(tmp_path, objective, "step_policy=accumulate"))
    assert set(recordings) == {WHOLE}


@pytest.mark.parametrize(
    "settings",
    [
        ["metric=l1"],
        ["metric=cosine"],
        ["class_reduction=sum"],
        ["synthetic_batch=2", "unbiased=true"],
        ["network_cutmix=1"],
        ["network_samples=0"],
        ["optimizer=sgd", "memory_lr=1e-4", "weights_lr=1e-4"],
        ["average=0.9"],
        ["gradient_clip=0.1"],
    ],
    ids=" ".join,
)
def test_a_recorded_step_of_every_kind_is_the_step(settings: list[str], tmp_path: Path, monkeypatch):
    launched = made(tmp_path, "gradient_matching", *settings)
    recordings = record_on_a_cpu(monkeypatch)
    assert_replayed(launched, made(tmp_path, "gradient_matching", *settings))
    assert set(recordings) == {WHOLE}


def test_a_bank_that_is_recorded_and_matched_by_recorded_steps(tmp_path: Path, monkeypatch):
    settings = ["bank.networks=2", "bank.snapshots=2"]
    launched = made(tmp_path / "launched", "gradient_matching", *settings)
    recordings = record_on_a_cpu(monkeypatch)
    recorded = made(tmp_path / "recorded", "gradient_matching", *settings)
    assert recordings == [UPDATE] * 2  # of each network, whose training it is
    assert_replayed(launched, recorded)
    assert set(recordings) == {UPDATE, WHOLE}


@pytest.mark.parametrize("settings", [["step_policy=per_class"], ["classes_per_step=2"]], ids=" ".join)
def test_where_a_whole_step_is_not_recorded_the_networks_update_is(settings: list[str], tmp_path: Path, monkeypatch):
    launched = made(tmp_path, "gradient_matching", *settings)
    recordings = record_on_a_cpu(monkeypatch)
    assert_replayed(launched, made(tmp_path, "gradient_matching", *settings))
    assert set(recordings) == {UPDATE}


def test_a_recorded_run_goes_on_from_its_state(tmp_path: Path, monkeypatch):
    launched = made(tmp_path, "gradient_matching", "average=0.9")
    record_on_a_cpu(monkeypatch)
    first, second = (made(tmp_path, "gradient_matching", "average=0.9") for _ in range(2))
    assert_replayed(launched, first, steps=3)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_replayed(launched, second, steps=2)


def test_a_whole_run_with_recorded_steps_and_trainings_is_the_run(tmp_path: Path, monkeypatch):
    plan = planned(*TINY)
    folders = [tmp_path / "launched", tmp_path / "recorded"]
    recordings: list[str] = []
    results, kept = [], []
    for folder in folders:
        folder.mkdir()
        if folder.name == "recorded":
            recordings = record_on_a_cpu(monkeypatch)
        results.append(session_of(plan, folder).condense_and_evaluate())
        kept.append(load_file(folder / TENSORS))
    torch.testing.assert_close(*kept)
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert set(recordings) == {WHOLE, "Training.run_batch"}


# On a device of its own


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_every_objective_stays_on_its_device(objective: str, tmp_path: Path, monkeypatch):
    here = made(tmp_path, objective, "step_policy=accumulate")
    with other_device(monkeypatch) as device:
        there = made(tmp_path, objective, "step_policy=accumulate", device=device)
        for _ in range(2):
            found, expected = there.run_step(), here.run_step()
            assert {value.device for value in [found[0], *found[1].values()]} == {device}
            torch.testing.assert_close(found[0].cpu(), expected[0])


RUNS = {
    "fit": ["container.init=fit_real", "container.fit_steps=3"],
    "bank": ["objective.bank.networks=1", "pruning=none"],
    "trajectories": ["debug=smoke_trajectory", "objective=trajectory_matching", "pruning=none"],
    "unrolled": ["debug=smoke_bptt", "objective=bptt", "pruning=none"],
}


@pytest.mark.parametrize("run", RUNS)
def test_a_whole_run_stays_on_its_device(run: str, tmp_path: Path, monkeypatch):
    plan = planned(*TINY, f"paths.cache_dir={tmp_path}", *RUNS[run])
    with other_device(monkeypatch) as device:
        found = session_of(plan, tmp_path, device).condense_and_evaluate()
    assert found["accuracy"]["mean"] > 0


@pytest.mark.parametrize("method", CORESET_METHODS)
def test_the_choice_of_real_images_stays_on_its_device(method: str, tmp_path: Path, monkeypatch):
    trained = [] if method == "random" else ["container.networks=1", "container.epochs=2"]
    own = ["container=coreset", f"container.method={method}", "pruning=none", *trained]
    plan = planned(*TINY, "debug=smoke_stages", f"paths.cache_dir={tmp_path}", *own)
    with other_device(monkeypatch) as device:
        session = session_of(plan, tmp_path, device)
        session.choose_and_evaluate()
        labels = session.data.train.labels.tolist()
    index = load_condensed(tmp_path).card["coreset"]["index"]
    assert [labels[image] for image in index] == list(range(10))  # the budget pays for one of every class


# The tape itself: it must notice what a graph could not hold


class Step:
    """A step that changes its weight in the way that a test says."""

    def __init__(self, change: Callable[[Step], None]) -> None:
        self.change = change
        self.weight, self.rate, self.stream = torch.ones(3), 1.0, torch.Generator().manual_seed(7)

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.change(self)
        return {"sum": self.weight.sum()}


def grow(step: Step) -> None:
    step.weight.add_(torch.rand(3, generator=step.stream))


def by_a_number_of_python(step: Step) -> None:
    step.weight.mul_(step.rate)


def by_another_tensor(step: Step) -> None:
    step.weight = 2 * step.weight


def by_what_it_read(step: Step) -> None:
    step.weight.mul_(float(step.weight.sum()))


def by_a_mask(step: Step) -> None:
    step.weight[step.weight > 0] = 2.0


def replayed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Step], None], registered: bool = True) -> list[bool]:
    """Whether each of three steps, between which the rate changes, is the one that is launched."""
    record_on_a_cpu(monkeypatch)
    launched, recorded = Step(change), Step(change)
    replay = capture.Replay(recorded.run, lambda: [recorded.weight], [recorded.stream] if registered else [])
    same = []
    for number in range(3):
        launched.rate = recorded.rate = 1.0 + number
        same.append(torch.equal(launched.run({})["sum"], replay({})["sum"]))
    return same


def test_a_tape_repeats_a_step_as_a_graph_does(monkeypatch):
    assert replayed(monkeypatch, grow) == [True, True, True]


@pytest.mark.parametrize("change", [by_a_number_of_python, by_another_tensor])
def test_what_a_graph_cannot_hold_shows_in_later_steps(monkeypatch, change):
    assert replayed(monkeypatch, change)[1:] == [False, False]


@pytest.mark.parametrize("change", [by_what_it_read, by_a_mask])
def test_a_step_that_waits_for_the_device_cannot_be_recorded(monkeypatch, change):
    with pytest.raises(AssertionError, match="makes the host wait for the device"):
        replayed(monkeypatch, change)


def test_a_generator_that_is_not_registered_cannot_be_recorded(monkeypatch):
    with pytest.raises(AssertionError, match="draws from a generator that is not registered"):
        replayed(monkeypatch, grow, registered=False)


# The other device itself: it must notice what a GPU would


def test_tensors_of_two_devices_do_not_mix(monkeypatch):
    with other_device(monkeypatch) as device:
        there, here = torch.ones(3, device=device), torch.arange(3)
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]  # but for scalars,
        assert there[here].device == device  # and indices
        with pytest.raises(AssertionError, match=r"aten\.add\.Tensor of tensors on two devices"):
            there + here


def by_a_copy(step: Step) -> None:
    step.weight.add_(torch.ones(3).to(step.weight.device))


def by_an_index_of_the_host(step: Step) -> None:
    step.weight[torch.arange(2)] += 1


def by_what_is_on_the_host(step: Step) -> None:
    step.weight.copy_(torch.zeros(3))


@pytest.mark.parametrize(
    "change", [by_what_it_read, by_a_mask, by_a_copy, by_an_index_of_the_host, by_what_is_on_the_host]
)
def test_nothing_passes_between_the_devices_in_a_step_that_is_replayed(monkeypatch, change):
    with other_device(monkeypatch) as device:
        step = Step(change)
        step.weight = step.weight.to(device)
        change(step)  # outside of such a step it does
        with pytest.raises(AssertionError, match="within a step that is to be replayed"):
            capture.Replay(step.run, lambda: [step.weight], [])({})
