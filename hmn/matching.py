"""Matching class by class: real and synthetic images of one class go through one network and are compared there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hmn import capture, distributed
from hmn.compute import Compute
from hmn.condense import SLOT, Condensation
from hmn.config.objectives import ClassMatchingConfig
from hmn.containers.base import Container, decode_all
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.objectives.distance import convolution_weights
from hmn.objectives.gradient import MatchingStep
from hmn.optimizer import ContainerOptimizer
from hmn.realside import Choice, RealSide, update_of
from hmn.seeding import generator


class ClassMatching(Condensation):
    """Condensation that matches each class's synthetic images with the real side.

    ``match`` measures their distance as ``parts`` numbers, or as one number per matched layer if ``parts`` is ``None``.
    ``chunk`` classes are decoded and matched at a time, which affects memory use but not the result.

    All processes draw the same random numbers for all classes, and each decodes and matches only the classes it owns.
    Parameters that classes share are identical in every process after every step. A class's rows and their moments are
    up to date only in the process that owns the class, and in all processes after :meth:`gather`.
    """

    def __init__(
        self,
        container: Container,
        side: RealSide,
        config: ClassMatchingConfig,
        *,
        match: MatchingStep,
        parts: int | None = None,
        normalise: Normalise,
        compute: Compute,
        seed: int,
        chunk: int | None = None,
        rate_factor: float = 1.0,
        lr_scale: dict[str, float] | None = None,
    ) -> None:
        self.side, self.config, self.match, self.parts, self.normalise = side, config, match, parts, normalise
        self.group = config.group(container.classes)
        self.chunk = chunk or self.group
        self.owned = distributed.owned(container.classes)
        by_class = config.step_policy == "per_class" or self.group < container.classes
        total = config.outer_steps * config.inner_steps
        optimizer = ContainerOptimizer(
            container, config, total, by_class=by_class, factor=rate_factor, lr_scale=lr_scale
        )
        real_batch = config.real_batch if side.USES_IMAGES else 0
        super().__init__(
            container,
            optimizer,
            compute=compute,
            images_per_step=self.group * (real_batch + config.shown(container.matched_per_class)),
            gradient_clip=config.gradient_clip,
            average=config.average,
        )
        self.generators = {
            "rows": generator(seed, SLOT, "rows", device=compute.device),
            "classes": generator(seed, SLOT, "classes"),  # on the host: it decides which calls are made
        }
        # A recording cannot hold what the host does within a step, such as choosing rows or summing over processes.
        recordable = capture.recordable(compute.device) and distributed.world() == 1
        self.replay = None
        if recordable and not by_class:
            generators = [self.generators["rows"], *side.generators()]
            self.replay = capture.Replay(self._whole_step, self._state_tensors, generators)
        # The networks' update alone, which takes most launches of a step, can be recorded with ``by_class`` too.
        self.update = update_of(side, self.decoded, record=recordable)

    def take_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One matching step of every class, or of a random group, then the real side's update.

        Returns the distance per layer, summed over those classes, and the norm of their gradients per tier. Neither is
        read back from the device.
        """
        if self.step % self.config.inner_steps == 0:
            self.container.project()
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
            if update := self.side.choose_update():
                self.update(update)
            losses = torch.stack([one.pop("losses") for one in found]).sum(0)
            norms = {tier: torch.stack([one[tier] for one in found]).norm() for tier in found[0]}
            measured = {"losses": losses, **norms}
        self.step += 1
        losses = measured.pop("losses")
        return losses, measured

    def _chosen(self, classes: Tensor) -> Choice:
        return self.side.choose(classes) | {"classes": classes.to(self.compute.device, non_blocking=True)}

    def _whole_step(self, choice: Choice) -> dict[str, Tensor]:
        """One step of all classes that consists of device work only."""
        measured = self._match_and_apply(torch.arange(self.container.classes), choice)
        self.side.update(choice, self.decoded)
        return measured

    @torch.no_grad()
    def decoded(self) -> tuple[Tensor, Tensor]:
        """The synthetic set as it is now, (N, channels, H, W), and labels (N,), for networks that train on it."""
        self.gather()
        return decode_all(self.container)

    def _match_and_apply(self, classes: Tensor, choice: Choice) -> dict[str, Tensor]:
        """Match ``classes`` (k,) and step the optimiser; returns ``losses`` per layer and gradient norms per tier."""
        for parameter in self.optimizer.parameters:
            parameter.grad = None  # a step whose recording failed may have left one
        losses = self._match(classes, choice)
        if (penalty := self.container.penalty()) is not None:
            penalty.backward()
        norms = self._sum_over_processes(losses)
        self.clip(norms)
        self.optimizer.step(classes)
        return {"losses": losses, **norms}

    def _state_tensors(self) -> list[Tensor]:
        return capture.optimizer_tensors(self.optimizer.inner) + self.side.state_tensors()

    def _match(self, classes: Tensor, choice: Choice) -> Tensor:
        """Add the mean or summed gradient of ``classes`` (k,) to the container; returns distances per layer, summed.

        Classes that other processes own contribute nothing.
        """
        on_device = choice["classes"]
        k, total = len(on_device), self.container.matched_per_class
        n = self.config.shown(total)
        drawn = self.side.draw(choice, k)
        rows = self._rows(on_device, n, total)
        parameters = self.side.parameters(choice)
        distances = []
        first, end = torch.searchsorted(classes, torch.tensor([self.owned.start, self.owned.stop])).tolist()
        for start in range(first, end, self.chunk):
            part = slice(start, min(start + self.chunk, end))
            real = self.side.real(choice, drawn, part)
            decoded = self.normalise(self.container.decode_matched(rows[part].flatten()))
            synthetic = augment.apply(decoded, drawn[part].repeat(n)).unflatten(0, (-1, n))
            layers, pixel_gradients = self.match(parameters, real, synthetic.detach(), on_device[part])
            synthetic.backward(pixel_gradients / k if self.config.class_reduction == "mean" else pixel_gradients)
            distances.append(layers)
        if not distances:
            return torch.zeros(self.parts or len(convolution_weights(parameters)), device=self.compute.device)
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
        """Sum ``layers`` and the gradients of shared parameters over the processes; returns the norms per tier.

        For parameters that classes own, only norms are exchanged: only the owner needs the gradients of its rows.
        """
        for parameter in self.optimizer.parameters:
            if parameter.grad is None:  # this process owns none of these classes
                parameter.grad = torch.zeros_like(parameter)
        own = slice(self.owned.start, self.owned.stop)  # a penalty adds to all rows in every process
        squares = {id(p): p.grad[own].norm().square() for p in self.optimizer.class_parameters}
        shared = [p for p in self.optimizer.parameters if id(p) not in squares]
        distributed.sum_([layers, *squares.values(), *(p.grad for p in shared)])
        squares |= {id(p): p.grad.norm().square() for p in shared}
        return self.norms(squares)

    def gather(self) -> None:
        """Bring the rows of all classes up to date in every process."""
        distributed.gather_rows([*self.optimizer.class_rows(), *self.averaged_rows()], self.owned)

    def own_state(self) -> dict[str, Any]:
        return {
            "side": self.side.state_dict(),
            "generators": {name: stream.get_state() for name, stream in self.generators.items()},
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.side.load_state_dict(state["side"])
        for name, value in state["generators"].items():
            self.generators[name].set_state(value)
