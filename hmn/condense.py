"""The condensation loop of every objective: steps, reports, curve points, checkpoints, and when to stop."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hmn import distributed
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.containers.base import Container
from hmn.errors import Diverged
from hmn.optimizer import ContainerOptimizer

SLOT = "condense"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Measurements of a logged step: ``losses`` per part, such as a matched layer, and gradient norms per tier."""

    step: int
    losses: list[float]
    gradient_norms: dict[str, float]
    steps_per_second: float
    images_per_second: float
    peak_bytes: int
    learning_rate: float
    measured: dict[str, float]  # by the objective, beside its losses


class Condensation(ABC):
    """One condensation run: its container, optimiser and checkpointed state. Each objective defines what a step is.

    ``step`` counts container steps up to ``total_steps``; ``images_per_step`` only serves the reported rate.
    """

    def __init__(
        self,
        container: Container,
        optimizer: ContainerOptimizer,
        *,
        compute: Compute,
        images_per_step: int,
        gradient_clip: float | None = None,
        average: float | None = None,
    ) -> None:
        self.container, self.optimizer, self.compute = container, optimizer, compute
        self.total_steps = optimizer.total_steps
        self.images_per_step = images_per_step
        self.gradient_clip = gradient_clip
        self.step = 0
        self.seconds = 0.0
        self.peak_bytes = 0  # of the steps, over all restarts: without banks, experts, fits and evaluation
        self.curve: dict[int, float] = {}  # accuracy by step
        self.unreported: list[Tensor] = []  # losses of the steps since the last report, (parts,) each
        self.decay = average
        parameters = [] if average is None else container.parameters()
        self.averages = [parameter.detach().clone() for parameter in parameters]

    def run_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step of the container, then of its averages; return what :meth:`take_step` returns."""
        measured = self.take_step()
        self._move_averages()
        return measured

    @abstractmethod
    def take_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step of the container; return its losses (parts,) and gradient norms per tier, on the device."""

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """State of the objective beside the container and its optimiser."""

    @abstractmethod
    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`own_state` returned."""

    def gather(self) -> None:  # noqa: B027 - most have nothing to gather
        """Bring the rows of all classes up to date in every process."""

    @torch.no_grad()
    def _move_averages(self) -> None:
        if self.averages:
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.averages, list(self.container.parameters()), 1 - decay)

    @torch.no_grad()
    def settle(self, container: Container) -> None:
        """Turn ``container``, this run's or a copy of it, into what would be saved if the run ended here."""
        for parameter, average in zip(container.parameters(), self.averages, strict=False):  # no averages: as it is
            parameter.copy_(average)
        container.finish()

    def averaged_rows(self) -> Iterator[tuple[int, Tensor]]:
        """Each class's rows in the averages of class-owned parameters, as (class, view)."""
        owned = {id(parameter) for parameter in self.container.class_parameters()}
        for parameter, average in zip(self.container.parameters(), self.averages, strict=False):
            if id(parameter) in owned:
                yield from enumerate(average)

    def measured(self) -> dict[str, float]:
        """The objective's own numbers for a report and the result, such as a learned rate."""
        return {}

    def norms(self, squares: dict[int, Tensor]) -> dict[str, Tensor]:
        """Gradient norms per tier, before any clipping, from ``squares``: the squared norm by parameter id."""
        tiers = self.container.tiers().items()
        return {name: torch.stack([squares[id(p)] for p in parameters]).sum().sqrt() for name, parameters in tiers}

    def clip(self, norms: dict[str, Tensor]) -> None:
        """Scale all gradients so that their joint norm is at most ``gradient_clip``, if that is given."""
        if self.gradient_clip is not None:
            scale = (self.gradient_clip / torch.stack(list(norms.values())).norm()).clamp(max=1)
            for parameter in self.optimizer.parameters:
                parameter.grad *= scale

    def state_dict(self) -> dict[str, Any]:
        self.gather()
        return {
            "step": self.step,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "curve": self.curve,
            "unreported": list(self.unreported),
            "container": self.container.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": list(self.averages),
            "own": self.own_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        self.peak_bytes = state.get("peak_bytes", 0)
        self.unreported = [loss.to(self.compute.device) for loss in state["unreported"]]
        self.container.load_state_dict(state["container"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, kept in zip(self.averages, state.get("averages", []), strict=True):
            average.copy_(kept)
        self.load_own_state(state["own"])


def curve_steps(total: int, points: int) -> list[int]:
    """``points`` evenly spaced steps from 0 to ``total``, both included; none for 0 points."""
    return sorted({round(total * point / (points - 1)) for point in range(points)}) if points else []


def condense(
    run: Condensation,
    checkpoints: Checkpoints,
    *,
    log_every_steps: int,
    on_report: Callable[[Report], None],
    curve_points: int = 0,
    on_curve: Callable[[int], float] | None = None,
) -> None:
    """Run ``run`` from its current step to its end. ``on_curve(step)`` measures an accuracy at each curve step.

    Raises ``Diverged`` naming step and tier when a loss or gradient is no longer finite; the checkpoint then holds an
    earlier, finite step.
    """
    due = curve_steps(run.total_steps, curve_points)
    watch = _Stopwatch(run)
    norms: dict[str, Tensor] = {}

    def state_of_finite_run() -> dict[str, Any]:
        _require_finite(run, norms)
        watch.look_at_memory()
        return run.state_dict()

    hidden = not distributed.first()
    with tqdm(total=run.total_steps, initial=run.step, desc="condense", unit="step", disable=hidden) as bar:
        while True:
            if run.step in due and run.step not in run.curve and on_curve is not None:
                with watch.paused():
                    run.gather()
                    run.curve[run.step] = on_curve(run.step)
            if run.step >= run.total_steps:
                break
            loss, norms = run.run_step()
            run.unreported.append(loss)
            watch.lap()
            bar.update()
            if run.step % log_every_steps == 0 or run.step == run.total_steps:
                _require_finite(run, norms)
                report = watch.report(run.unreported, norms)
                run.unreported = []
                on_report(report)
                bar.set_postfix(loss=f"{sum(report.losses):.4g}")
            checkpoints.tick(SLOT, state_of_finite_run)
    watch.lap(finished=True)
    watch.look_at_memory()
    checkpoints.save(SLOT, run.state_dict())


def _require_finite(run: Condensation, norms: dict[str, Tensor]) -> None:
    """Raise ``Diverged`` with the first step whose loss or gradient is not finite, and the tiers it concerns."""
    losses = run.unreported
    if not losses:
        return
    finite = torch.stack([value.isfinite().all() for value in [*losses, *norms.values()]]).tolist()  # one wait for all
    spoilt = [not fine for fine in finite[: len(losses)]]
    broken = [name for name, fine in zip(norms, finite[len(losses) :], strict=True) if not fine]
    spoilt[-1] |= bool(broken)  # a finite loss with such a gradient has spoilt the container already
    if not any(spoilt):
        return
    first = spoilt.index(True)
    where = (
        f"tiers with a non-finite gradient: {', '.join(broken)}" if broken else "no tier's gradient is non-finite yet"
    )
    raise Diverged(
        f"condensing: the matching loss is {float(losses[first].sum())} at step {run.step - len(losses) + first + 1} "
        f"({where}); the last checkpoint is kept; lower objective.memory_lr or objective.weights_lr"
    )


class _Stopwatch:
    """Seconds and memory of condensing over all restarts of a run, without the measurements in between."""

    def __init__(self, run: Condensation) -> None:
        self.run = run
        self.last = time.monotonic()
        self.first_step = run.step  # step since which the current memory peak is measured
        self.reported = (run.step, run.seconds)
        run.compute.begin_peak()

    def lap(self, *, finished: bool = False) -> None:
        """Add the seconds since the last lap; with ``finished``, first wait for the device's queued work."""
        if finished:
            self.run.compute.wait()
        now = time.monotonic()
        self.run.seconds += now - self.last
        self.last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.lap(finished=True)
        self.look_at_memory()
        yield
        self.run.compute.begin_peak()
        self.last, self.first_step = time.monotonic(), self.run.step

    def look_at_memory(self) -> None:
        if self.run.step > self.first_step:  # otherwise the peak belongs to no step
            self.run.peak_bytes = max(self.run.peak_bytes, self.run.compute.recent_peak_bytes())

    def report(self, losses: list[Tensor], norms: dict[str, Tensor]) -> Report:
        run = self.run
        steps, seconds = run.step - self.reported[0], run.seconds - self.reported[1]
        self.reported = (run.step, run.seconds)
        rate = steps / max(seconds, 1e-9)
        return Report(
            step=run.step,
            losses=torch.stack(losses).mean(0).tolist(),
            gradient_norms=dict(zip(norms, torch.stack([*norms.values()]).tolist(), strict=True)),
            steps_per_second=rate,
            images_per_second=rate * run.images_per_step,
            peak_bytes=run.compute.peak_bytes(),
            learning_rate=run.optimizer.learning_rate,
            measured=run.measured(),
        )
