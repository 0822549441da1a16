"""The bi-level loop: match a container's images to real ones on fresh networks that train on real images meanwhile."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hmn import distributed
from hmn.capture import Replay, optimizer_tensors
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.config import GradientMatchingConfig
from hmn.containers.base import Container
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.errors import Diverged
from hmn.objectives.distance import convolution_weights
from hmn.objectives.gradient import MatchingStep
from hmn.realside import Choice, RealSide
from hmn.seeding import generator

SLOT = "condense"
MOMENTS = ("exp_avg", "exp_avg_sq")


class ContainerOptimizer:
    """Adam over a container: ``memory_lr`` for memories, ``weights_lr`` for networks, cosine decay over the run.

    With ``by_class`` every class's rows are parameters of their own that share the stacked tensors' storage, so a step
    for some classes leaves the others' rows and moments alone; Adam on the stack would keep moving them.
    """

    def __init__(
        self, container: Container, config: GradientMatchingConfig, total_steps: int, *, by_class: bool
    ) -> None:
        self.total_steps = total_steps
        self.final = config.final_lr_fraction
        self.class_parameters = container.class_parameters()
        owned = {id(parameter) for parameter in self.class_parameters} if by_class else set()
        self.rows: list[tuple[nn.Parameter, list[Tensor]]] = []
        groups = []
        for tier, parameters in container.tiers().items():
            lr = config.memory_lr if tier in container.memory_tiers() else config.weights_lr
            members: list[Tensor] = []
            for parameter in parameters:
                if id(parameter) in owned:
                    rows = [row.requires_grad_() for row in parameter.detach().unbind(0)]
                    self.rows.append((parameter, rows))
                    members += rows
                else:
                    members.append(parameter)
            groups.append({"params": members, "lr": lr, "initial_lr": lr})
        self.parameters = [parameter for tier in container.tiers().values() for parameter in tier]
        # A recorded step reads its rates from the device.
        self.on_gpu = self.parameters[0].is_cuda
        if self.on_gpu:
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=self.parameters[0].device)
        self.adam = torch.optim.Adam(groups, betas=(config.beta1, config.beta2), eps=1e-8, capturable=self.on_gpu)

    def set_rates(self, done: int) -> None:
        """The rates ``done`` steps into the run."""
        decay = self.final + (1 - self.final) * (1 + math.cos(math.pi * done / self.total_steps)) / 2
        for group in self.adam.param_groups:
            rate = group["initial_lr"] * decay
            if self.on_gpu:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, classes: Tensor) -> None:
        """Apply the gradients of ``classes`` (k,), which lie on the host, then clear them."""
        taking_part = set(classes.tolist()) if self.rows else set()
        for parameter, rows in self.rows:
            for index, row in enumerate(rows):
                row.grad = parameter.grad[index] if index in taking_part else None
        self.adam.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        state = self.adam.state_dict()
        groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rates = [group["lr"] for group in self.adam.param_groups]
        groups = [{**group, "capturable": self.on_gpu} for group in state["param_groups"]]
        self.adam.load_state_dict({**state, "param_groups": groups})
        if self.on_gpu:
            for group, rate in zip(self.adam.param_groups, rates, strict=True):
                group["lr"] = rate.fill_(group["lr"])

    def class_rows(self) -> Iterator[tuple[int, Tensor]]:
        """Every class's row of each parameter that classes own, and of its moments, as (class, view)."""
        separate = {id(parameter): rows for parameter, rows in self.rows}
        for parameter in self.class_parameters:
            yield from enumerate(parameter.detach())
            for label, row in enumerate(separate.get(id(parameter), ())):
                for moment in MOMENTS if row in self.adam.state else ():
                    yield label, self.adam.state[row][moment]
            for moment in MOMENTS if parameter in self.adam.state else ():
                yield from enumerate(self.adam.state[parameter][moment])


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a logged step measured: ``losses`` per matched layer, summed over classes; norms of gradients per tier."""

    step: int
    losses: list[float]
    gradient_norms: dict[str, float]
    steps_per_second: float
    images_per_second: float
    peak_bytes: int
    learning_rate: float


class Condensation:
    """One condensation run: its state, its step, and what a checkpoint holds. ``step`` counts matching steps.

    ``chunk`` classes are decoded and matched at a time: what is computed does not depend on it, the memory does.
    Several processes draw alike for all classes, and each decodes and matches only those it owns. What classes share
    is the same everywhere after every step; a class's rows and their moments are right only at its owner, and
    everywhere after :meth:`gather`.
    """

    def __init__(
        self,
        container: Container,
        side: RealSide,
        config: GradientMatchingConfig,
        *,
        match: MatchingStep,
        normalise: Normalise,
        compute: Compute,
        seed: int,
        fingerprint: str,
        chunk: int | None = None,
    ) -> None:
        self.container, self.side, self.config, self.match = container, side, config, match
        self.normalise, self.compute, self.fingerprint = normalise, compute, fingerprint
        self.total_steps = config.outer_steps * config.inner_steps
        self.group = min(config.classes_per_step or container.classes, container.classes)
        self.chunk = chunk or self.group
        self.owned = distributed.owned(container.classes)
        by_class = config.step_policy == "per_class" or self.group < container.classes
        self.optimizer = ContainerOptimizer(container, config, self.total_steps, by_class=by_class)
        self.generators = {
            "rows": generator(seed, SLOT, "rows", device=compute.device),
            "classes": generator(seed, SLOT, "classes"),  # on the host: it steers which calls are made
        }
        self.step = 0
        self.seconds = 0.0
        self.curve: dict[int, float] = {}  # accuracy by step
        self.unreported: list[Tensor] = []  # distances per layer of the steps since the last report
        # What the host decides within a step, as which rows are stepped or what processes sum, is not recorded.
        self.replay = None
        if compute.device.type == "cuda" and not by_class and distributed.world() == 1:
            generators = [self.generators["rows"], *side.generators()]
            self.replay = Replay(self._whole_step, self._state_tensors, generators)

    def run_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One matching step of every class, or of a random group, then the real side's update.

        Returns the distance per layer summed over those classes, and the gradient's norm per tier; neither is read.
        """
        self.side.begin(self.step)
        self.optimizer.set_rates(self.step)
        classes = torch.arange(self.container.classes)
        if self.group < len(classes):
            classes = torch.randperm(len(classes), generator=self.generators["classes"])[: self.group].sort().values
        if self.replay:
            measured = self.replay(self._chosen(classes) | self.side.choose_update())
        else:
            parts = [classes] if self.config.step_policy == "accumulate" else classes.split(1)
            found = [self._match_and_apply(part, self._chosen(part)) for part in parts]
            self.side.update(self.side.choose_update())
            measured = {**found[-1], "losses": torch.stack([one["losses"] for one in found]).sum(0)}
        self.step += 1
        losses = measured.pop("losses")
        return losses, measured

    def _chosen(self, classes: Tensor) -> Choice:
        return self.side.choose(classes) | {"classes": classes.to(self.compute.device, non_blocking=True)}

    def _whole_step(self, choice: Choice) -> dict[str, Tensor]:
        """A step of all classes, as device work alone."""
        measured = self._match_and_apply(torch.arange(self.container.classes), choice)
        self.side.update(choice)
        return measured

    def _match_and_apply(self, classes: Tensor, choice: Choice) -> dict[str, Tensor]:
        """Match ``classes`` (k,), step the optimiser; returns ``losses`` per layer and the gradient norm by tier."""
        losses = self._match(classes, choice)
        norms = self._sum_over_processes(losses)
        self.optimizer.step(classes)
        return {"losses": losses, **norms}

    def _state_tensors(self) -> list[Tensor]:
        return optimizer_tensors(self.optimizer.adam) + self.side.state_tensors()

    def _match(self, classes: Tensor, choice: Choice) -> Tensor:
        """Add to the container the mean gradient over ``classes`` (k,); returns the distances per layer, summed.

        Of classes that other processes own, nothing is added.
        """
        on_device = choice["classes"]
        k, total = len(on_device), self.container.images_per_class
        n = min(self.config.synthetic_batch, total)
        drawn = self.side.draw(choice, k)
        rows = self._rows(on_device, n, total)
        parameters = self.side.parameters(choice)
        distances = []
        first, end = torch.searchsorted(classes, torch.tensor([self.owned.start, self.owned.stop])).tolist()
        for start in range(first, end, self.chunk):
            part = slice(start, min(start + self.chunk, end))
            real = self.side.real(choice, drawn, part)
            decoded = self.normalise(self.container.decode(rows[part].flatten()))
            synthetic = augment.apply(decoded, drawn[part].repeat(n)).unflatten(0, (-1, n))
            layers, pixel_gradients = self.match(parameters, real, synthetic.detach(), on_device[part])
            synthetic.backward(pixel_gradients / k)
            distances.append(layers)
        if not distances:
            return torch.zeros(len(convolution_weights(parameters)), device=self.compute.device)
        return torch.stack(distances).sum(0)

    def _rows(self, classes: Tensor, n: int, total: int) -> Tensor:
        """Container indices (k, n): all images of each class, or a random ``n`` of them."""
        if n == total:
            rows = torch.arange(n, device=classes.device).expand(len(classes), n)
        else:
            keys = torch.rand(len(classes), total, generator=self.generators["rows"], device=classes.device)
            rows = keys.argsort(1)[:, :n]
        return classes[:, None] * total + rows

    def _sum_over_processes(self, layers: Tensor) -> dict[str, Tensor]:
        """Make ``layers`` and the gradients of what classes share those of all classes; returns the norms per tier.

        Of what classes own only the norms are exchanged: the rows' gradients are their owner's business.
        """
        for parameter in self.optimizer.parameters:
            if parameter.grad is None:  # none of these classes is ours
                parameter.grad = torch.zeros_like(parameter)
        squares = {id(p): p.grad.norm().square() for p in self.optimizer.class_parameters}
        shared = [p for p in self.optimizer.parameters if id(p) not in squares]
        distributed.sum_([layers, *squares.values(), *(p.grad for p in shared)])
        squares |= {id(p): p.grad.norm().square() for p in shared}
        tiers = self.container.tiers().items()
        return {name: torch.stack([squares[id(p)] for p in parameters]).sum().sqrt() for name, parameters in tiers}

    def gather(self) -> None:
        """Make the rows of all classes right at every process."""
        distributed.gather_rows(self.optimizer.class_rows(), self.owned)

    def state_dict(self) -> dict[str, Any]:
        self.gather()
        return {
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "unreported": list(self.unreported),
            "data": self.fingerprint,
            "container": self.container.state_dict(),
            "adam": self.optimizer.state_dict(),
            "side": self.side.state_dict(),
            "generators": {name: stream.get_state() for name, stream in self.generators.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        self.unreported = [loss.to(self.compute.device) for loss in state["unreported"]]
        self.container.load_state_dict(state["container"])
        self.optimizer.load_state_dict(state["adam"])
        self.side.load_state_dict(state["side"])
        for name, value in state["generators"].items():
            self.generators[name].set_state(value)


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
    """Run ``run`` to its end from where it is. ``on_curve(step)`` measures an accuracy at each curve step.

    Raises ``Diverged`` naming step and tier when a loss or gradient is no longer finite; the checkpoint is then of an
    earlier, finite step.
    """
    due = curve_steps(run.total_steps, curve_points)
    watch = _Stopwatch(run)
    norms: dict[str, Tensor] = {}

    def state_of_finite_run() -> dict[str, Any]:
        _require_finite(run, norms)
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
    checkpoints.save(SLOT, run.state_dict())


def _require_finite(run: Condensation, norms: dict[str, Tensor]) -> None:
    """Raise ``Diverged`` with the first step whose loss or gradient is not finite, and the tiers it concerns."""
    losses = run.unreported
    if not losses:
        return
    broken = [name for name, value in norms.items() if not value.isfinite()]
    spoilt = [not bool(value.isfinite().all()) for value in losses]
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
    """Seconds of condensing without what is measured in between, over all sittings of a run."""

    def __init__(self, run: Condensation) -> None:
        self.run = run
        self.last = time.monotonic()
        self.reported = (run.step, run.seconds)

    def lap(self) -> None:
        now = time.monotonic()
        self.run.seconds += now - self.last
        self.last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.lap()
        yield
        self.last = time.monotonic()

    def report(self, losses: list[Tensor], norms: dict[str, Tensor]) -> Report:
        run = self.run
        steps, seconds = run.step - self.reported[0], run.seconds - self.reported[1]
        self.reported = (run.step, run.seconds)
        rate = steps / max(seconds, 1e-9)
        per_step = run.group * (run.config.real_batch + min(run.config.synthetic_batch, run.container.images_per_class))
        return Report(
            step=run.step,
            losses=torch.stack(losses).mean(0).tolist(),
            gradient_norms={name: float(value) for name, value in norms.items()},
            steps_per_second=rate,
            images_per_second=rate * per_step,
            peak_bytes=run.compute.peak_bytes(),
            learning_rate=float(run.optimizer.adam.param_groups[0]["lr"]),
        )


def grid_rows(container: Container, per_class: int) -> Iterator[int]:
    """Indices of the first ``per_class`` images of every class, class after class: the rows of an image grid."""
    for label in range(container.classes):
        start = label * container.images_per_class
        yield from range(start, start + min(per_class, container.images_per_class))
