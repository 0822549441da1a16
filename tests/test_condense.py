"""The condensing loop: reports, curve points, stopping and resuming, divergence."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hmn import condense as condensing
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.condense import Report, condense, curve_steps
from hmn.errors import Diverged, Interrupted
from hmn.matching import ClassMatching
from hmn.objectives.gradient import matching_step
from hmn.stop import Stop
from tests.small_matching import CPU, TIERS, assert_same, build, clone_of, config, lr_at, make_run


def run_all(run: ClassMatching, checkpoints: Checkpoints, **options: Any) -> list[Report]:
    reports: list[Report] = []
    condense(run, checkpoints, **{"log_every_steps": 1, "on_report": reports.append, **options})
    return reports


def test_reports_tell_what_the_steps_since_the_last_one_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(config(outer_steps=1, inner_steps=5))
    steps: list[tuple[Tensor, dict[str, Tensor]]] = []
    run_step = run.run_step

    def watched() -> tuple[Tensor, dict[str, Tensor]]:
        steps.append(run_step())
        return steps[-1]

    monkeypatch.setattr(run, "run_step", watched)
    reports = run_all(run, Checkpoints(tmp_path, 1e9), log_every_steps=2)
    assert [report.step for report in reports] == [2, 4, 5]
    for report, (first, last) in zip(reports, [(0, 2), (2, 4), (4, 5)], strict=True):
        mean = torch.stack([loss for loss, _ in steps[first:last]]).mean(0)
        assert report.losses == mean.tolist()
        assert report.gradient_norms == {tier: float(norm) for tier, norm in steps[last - 1][1].items()}
        assert tuple(report.gradient_norms) == TIERS
        assert report.learning_rate == pytest.approx(lr_at(last - 1, 5, 0.01, 0.1), rel=1e-9)
        assert report.peak_bytes > 0
    assert len(reports[0].losses) == 2  # matched layers


def test_what_the_device_has_yet_to_do_counts_where_a_watch_is_read(tmp_path, monkeypatch):
    """This holds at both points of the curve and at the end; the time of the points themselves does not count."""
    clock = [0.0]

    def passing(seconds: float) -> float:
        clock[0] += seconds
        return 0.0

    monkeypatch.setattr(condensing.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Compute, "wait", lambda _: passing(100))
    run = make_run(config())
    run_all(run, Checkpoints(tmp_path, 1e9), curve_points=2, on_curve=lambda _: passing(7))
    assert run.seconds == 300


def test_the_finished_state_is_kept_and_not_worked_on_again(tmp_path: Path):
    run = make_run(config())
    run_all(run, Checkpoints(tmp_path, 1e9))
    state = Checkpoints(tmp_path, 1e9).load("condense")
    assert state["step"] == 4
    again = make_run(config(), container_seed=99)
    again.load_state_dict(state)
    assert run_all(again, Checkpoints(tmp_path, 1e9)) == []
    assert_same(clone_of(again.container), clone_of(run.container))


@pytest.mark.parametrize(
    ("total", "points", "steps"),
    [(200, 5, [0, 50, 100, 150, 200]), (10, 4, [0, 3, 7, 10]), (200, 2, [0, 200]), (1, 5, [0, 1]), (200, 0, [])],
)
def test_the_curve_has_evenly_spaced_points_both_ends_included(total: int, points: int, steps: list[int]):
    assert curve_steps(total, points) == steps


def test_the_curve_is_measured_at_its_steps_once_even_by_a_run_that_is_resumed(tmp_path: Path):
    measured: list[tuple[int, Tensor]] = []

    def curve_of(run: ClassMatching):
        def on_curve(step: int) -> float:
            assert step == run.step
            measured.append((step, run.container.instances.detach().clone()))
            return step / 10

        return on_curve

    stop = Stop()
    run = make_run(config())
    start = run.container.instances.detach().clone()

    def stop_at_3(report: Report) -> None:
        stop.signum = signal.SIGTERM if report.step == 3 else None

    with pytest.raises(Interrupted):
        run_all(run, Checkpoints(tmp_path, 1e9, stop), curve_points=3, on_curve=curve_of(run), on_report=stop_at_3)
    rest = make_run(config(), container_seed=99)
    rest.load_state_dict(Checkpoints(tmp_path, 1e9).load("condense"))
    assert rest.step == 3
    run_all(rest, Checkpoints(tmp_path, 1e9), curve_points=3, on_curve=curve_of(rest))
    assert [step for step, _ in measured] == [0, 2, 4]
    assert rest.curve == {0: 0.0, 2: 0.2, 4: 0.4}
    assert torch.equal(measured[0][1], start)
    assert torch.equal(measured[2][1], rest.container.instances)
    assert Checkpoints(tmp_path, 1e9).load("condense")["curve"] == rest.curve
    finished = make_run(config(), container_seed=99)
    finished.load_state_dict(Checkpoints(tmp_path, 1e9).load("condense"))
    run_all(finished, Checkpoints(tmp_path, 1e9), curve_points=3, on_curve=curve_of(finished))
    assert len(measured) == 3


def test_measuring_the_curve_does_not_touch_the_run(tmp_path: Path):
    plain, curved = make_run(config()), make_run(config())
    run_all(plain, Checkpoints(tmp_path / "plain", 1e9))
    run_all(curved, Checkpoints(tmp_path / "curved", 0), curve_points=4, on_curve=lambda step: 0.5, log_every_steps=3)
    assert_same({**curved.state_dict(), "curve": {}}, plain.state_dict())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_run_is_kept_exits_by_its_signal_and_goes_on_bit_for_bit(tmp_path: Path, signum: int):
    whole = make_run(config())
    run_all(whole, Checkpoints(tmp_path / "whole", 1e9))
    stop = Stop()
    run = make_run(config())

    def stop_at_2(report: Report) -> None:
        stop.signum = signum if report.step == 2 else None

    with pytest.raises(Interrupted) as raised:
        run_all(run, Checkpoints(tmp_path / "parts", 1e9, stop), on_report=stop_at_2)
    assert raised.value.exit_code == 128 + signum
    state = Checkpoints(tmp_path / "parts", 1e9).load("condense")
    assert state["step"] == 2
    rest = make_run(config(), container_seed=99)
    rest.load_state_dict(state)
    run_all(rest, Checkpoints(tmp_path / "parts", 1e9))
    assert_same(rest.state_dict(), whole.state_dict())


class Clock:
    """A stand-in for ``time.monotonic`` that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(condensing.time, "monotonic", lambda: self.now)


def test_rates_count_the_seconds_of_steps_and_not_of_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    run = make_run(config(synthetic_batch=3, classes_per_step=2, network_samples=0))
    run_step = run.run_step

    def slow_step() -> tuple[Tensor, dict[str, Tensor]]:
        clock.now += 2
        return run_step()

    def slow_curve(_step: int) -> float:
        clock.now += 500
        return 0.0

    monkeypatch.setattr(run, "run_step", slow_step)
    reports = run_all(run, Checkpoints(tmp_path, 1e9), log_every_steps=2, curve_points=3, on_curve=slow_curve)
    assert run.seconds == 8.0
    assert [report.steps_per_second for report in reports] == [0.5, 0.5]
    # 2 classes with 6 real and 3 synthetic images each, at half a step per second
    assert [report.images_per_second for report in reports] == [9.0, 9.0]


class Measured(Compute):
    """A process that holds ``held`` bytes, and ``most`` bytes since the peak was last reset."""

    held = most = 0

    def hold(self, held: int) -> None:
        type(self).held, type(self).most = held, max(held, self.most)

    def begin_peak(self) -> None:
        type(self).most = self.held

    def recent_peak_bytes(self) -> int:
        return self.most


def test_memory_is_that_of_steps_over_all_sittings_and_not_of_the_curve(tmp_path: Path, monkeypatch):
    compute = Measured(CPU.device)
    compute.hold(9000)  # making a bank took this much
    compute.hold(10)

    def sitting(per_step: dict[int, int], stop_at: int | None = None) -> ClassMatching:
        run, stop = make_run(config()), Stop()
        run.compute = compute
        if (state := Checkpoints(tmp_path, 1e9).load("condense")) is not None:
            run.load_state_dict(state)
        run_step = run.run_step

        def step() -> tuple[Tensor, dict[str, Tensor]]:
            compute.hold(per_step[run.step])
            compute.hold(10)
            if run.step + 1 == stop_at:
                stop.signum = signal.SIGTERM
            return run_step()

        def curve(_step: int) -> float:
            compute.hold(5000)
            compute.hold(10)
            return 0.0

        monkeypatch.setattr(run, "run_step", step)
        ended = pytest.raises(Interrupted) if stop_at else contextlib.nullcontext()
        with ended:
            run_all(run, Checkpoints(tmp_path, 1e9, stop), curve_points=3, on_curve=curve)
        return run

    assert sitting({0: 100, 1: 300}, stop_at=2).peak_bytes == 300
    assert sitting({2: 200, 3: 100}).peak_bytes == 300
    compute.hold(7000)
    assert sitting({}).peak_bytes == 300  # a sitting without a step has measured nothing


# Divergence


def spoilt_from(step: int, what: str):
    """A matching step whose distances, pixel gradient or both stop being finite at ``step``."""
    match, calls = matching_step(build(), "mse", CPU), [0]

    def matching(*arguments: Any) -> tuple[Tensor, Tensor]:
        layers, gradient = match(*arguments)
        calls[0] += 1
        if calls[0] >= step:
            layers = layers * torch.nan if "loss" in what else layers
            gradient = gradient * torch.inf if "gradient" in what else gradient
        return layers, gradient

    return matching


def all_finite(state: dict[str, Any]) -> bool:
    tensors = [
        *state["container"].values(),
        *(value for row in state["optimizer"]["state"].values() for value in row.values()),
    ]
    return all(bool(value.isfinite().all()) for value in tensors)


ALL_TIERS = ", ".join(TIERS)


@pytest.mark.parametrize(
    ("what", "loss", "where"),
    [
        ("loss and gradient", "nan", f"tiers with a non-finite gradient: {ALL_TIERS}"),
        ("loss", "nan", "no tier's gradient is non-finite yet"),
        ("gradient", r"[\d.]+", f"tiers with a non-finite gradient: {ALL_TIERS}"),
    ],
)
def test_what_is_not_finite_stops_the_run_naming_step_and_tier_and_never_reaches_the_checkpoint(
    tmp_path: Path, what: str, loss: str, where: str
):
    settings = config(outer_steps=1, inner_steps=6)
    run = make_run(settings, match=spoilt_from(3, what))
    with pytest.raises(Diverged) as raised:
        run_all(run, Checkpoints(tmp_path, 0), log_every_steps=100)
    pattern = rf"condensing: the matching loss is {loss} at step 3 \({where}\); the last checkpoint is kept; lower .*"
    assert re.fullmatch(pattern, str(raised.value))
    state = Checkpoints(tmp_path, 0).load("condense")
    assert state["step"] == 2
    assert all_finite(state)


def test_the_first_bad_step_is_named_though_it_is_found_later(tmp_path: Path):
    run = make_run(config(outer_steps=1, inner_steps=6), match=spoilt_from(3, "loss"))
    reports: list[Report] = []
    with pytest.raises(Diverged, match=r"is nan at step 3 \("):
        run_all(run, Checkpoints(tmp_path, 1e9), log_every_steps=5, on_report=reports.append)
    assert reports == []
    assert Checkpoints(tmp_path, 1e9).load("condense") is None


def test_a_tier_alone_is_named(tmp_path: Path):
    run = make_run(config())
    run.container.class_memory.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(Diverged, match=r"at step 1 \(tiers with a non-finite gradient: class\)"):
        run_all(run, Checkpoints(tmp_path, 1e9))


def test_a_stop_that_comes_with_a_bad_step_does_not_keep_it(tmp_path: Path):
    stop = Stop()
    run = make_run(config(outer_steps=1, inner_steps=6), match=spoilt_from(2, "loss and gradient"))
    checkpoints = Checkpoints(tmp_path, 1e9, stop)
    checkpoints.save("condense", run.state_dict())
    stop.signum = signal.SIGTERM
    run.run_step()
    with pytest.raises(Diverged, match="at step 2 "):
        run_all(run, checkpoints, log_every_steps=100)
    assert Checkpoints(tmp_path, 1e9).load("condense")["step"] == 0
