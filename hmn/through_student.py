"""Condensing through a student's training: trajectory matching and LinBa's loss, on any container."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hmn.adversary import StyleAdversary
from hmn.compute import Compute
from hmn.condense import SLOT, Condensation
from hmn.config.objectives import UnrolledConfig
from hmn.containers.base import Container
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.data.sampling import GroupSampler, permutations
from hmn.experts import Trajectories
from hmn.networks import initialise
from hmn.objectives.distance import Parameters
from hmn.objectives.unroll import Unrolled, trajectory_loss
from hmn.optimizer import ContainerOptimizer
from hmn.seeding import derived_seed, generator

# Draws a student's batches, one per step, as indices of images: (steps, generator) -> (n,) each
Batches = Callable[[int, torch.Generator], list[Tensor]]


class Goal(Protocol):
    """Where students start, and how they are judged at the end."""

    def begin(self, step: int) -> Parameters:
        """The parameters that the student of container step ``step`` starts from."""

    def judge(self, end: Parameters) -> tuple[Tensor, Parameters]:
        """The loss of a student that ended at ``end``, a scalar, and its gradient with respect to ``end``."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ReachExpert(Trajectories):
    """MTT (Cazenavette et al., CVPR 2022): a student starts where an expert was and aims at where it went."""

    start: Parameters
    target: Parameters

    def begin(self, step: int) -> Parameters:
        self.start, self.target = self.draw()
        return self.start

    def judge(self, end: Parameters) -> tuple[Tensor, Parameters]:
        return trajectory_loss(end, self.start, self.target)


class ClassifyReal:
    """LinBa (Deng & Russakovsky, NeurIPS 2022): a fresh network is to end up classifying a batch of real images.

    ``images`` (N, channels, H, W) and ``labels`` (N,) are the training split, from which ``real`` draws by class. Real
    images are not augmented.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_and_gradient: Callable[[Parameters, Tensor, Tensor], tuple[Tensor, Parameters]],
        images: Tensor,
        labels: Tensor,
        *,
        real: GroupSampler,
        normalise: Normalise,
        seed: int,
    ) -> None:
        self.network, self.loss_and_gradient, self.normalise, self.seed = network, loss_and_gradient, normalise, seed
        self.images, self.labels, self.real = images, labels, real
        self.networks = torch.Generator(images.device)  # reseeded for every student

    def begin(self, step: int) -> Parameters:
        self.networks.manual_seed(derived_seed(self.seed, SLOT, "student", step))
        initialise(self.network, self.networks)
        return {name: value.detach() for name, value in self.network.named_parameters()}

    def judge(self, end: Parameters) -> tuple[Tensor, Parameters]:
        index = self.real.draw(torch.arange(len(self.real.sizes))).flatten()
        return self.loss_and_gradient(end, as_seen(self.normalise(self.images[index])), self.labels[index])

    def state_dict(self) -> dict[str, Any]:
        return self.real.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.real.load_state_dict(state)


def shuffled(views: Tensor, batch: int | None) -> Batches:
    """MTT's batches: consecutive chunks of random orders; without ``batch``, all images.

    The last chunk of an order may be short. Each batch is taken from a random one of ``views`` (v, n), as HaBa shows a
    student one style at a time.
    """

    def draw(steps: int, stream: torch.Generator) -> list[Tensor]:
        n = views.shape[1]
        chunks: list[Tensor] = []
        while len(chunks) < steps:
            chunks += torch.randperm(n, generator=stream).split(batch or n)
        chosen = torch.randint(len(views), (steps,), generator=stream)
        return [views[view, chunk] for view, chunk in zip(chosen, chunks[:steps], strict=True)]

    return draw


def of_every_class(classes: int, images_per_class: int, count: int) -> Batches:
    """LinBa's batches: ``count`` random images of every class, or all if there are fewer, drawn anew for each step."""

    def draw(steps: int, stream: torch.Generator) -> list[Tensor]:
        rows = permutations((steps, classes), images_per_class, stream)[..., :count]
        return list((rows + torch.arange(classes)[:, None] * images_per_class).flatten(1))

    return draw


class LearnedRate:
    """The student's learning rate alpha, a scalar on the device, learned by its own SGD and kept at ``least`` or above.

    With ``lr`` 0 it stays as it is.
    """

    def __init__(self, start: float, *, lr: float, momentum: float, least: float, device: torch.device) -> None:
        self.value = torch.tensor(start, device=device)
        self.least = least
        self.learned = lr > 0
        self.optimizer = torch.optim.SGD([self.value], lr=lr, momentum=momentum)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        if self.learned:
            self.value.grad = gradient
            self.optimizer.step()
            self.value.clamp_(min=self.least)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value.copy_(state["value"])
        self.optimizer.load_state_dict(state["optimizer"])


class ThroughStudent(Condensation):
    """Condensation in which each step trains a student on decoded images and learns from its loss how to change them.

    However often the student's steps use an image, it is decoded only twice per container step, ``chunk`` images at a
    time: first without a graph, for the student to train on, then again to pass on the gradient of its pixels.
    """

    def __init__(
        self,
        container: Container,
        goal: Goal,
        config: UnrolledConfig,
        *,
        unrolled: Unrolled,
        batches: Batches,
        rate: LearnedRate,
        normalise: Normalise,
        strategy: str,
        compute: Compute,
        seed: int,
        chunk: int,
        rate_factor: float = 1.0,
        lr_scale: dict[str, float] | None = None,
        adversary: StyleAdversary | None = None,
    ) -> None:
        self.goal, self.config, self.unrolled, self.batches, self.rate = goal, config, unrolled, batches, rate
        self.normalise, self.strategy, self.chunk, self.adversary = normalise, strategy, chunk, adversary
        self.generators = {
            "batches": generator(seed, SLOT, "batches"),  # on the host: it decides what is decoded
            "augment": generator(seed, SLOT, "augment", device=compute.device),
        }
        sizes = [len(index) for index in batches(config.student_steps, torch.Generator())]
        super().__init__(
            container,
            ContainerOptimizer(
                container, config, config.outer_steps, by_class=False, factor=rate_factor, lr_scale=lr_scale
            ),
            compute=compute,
            images_per_step=sum(sizes),
            gradient_clip=config.gradient_clip,
            average=config.average,
        )

    def take_step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Train one student, then step the container and the student's rate; see the base class."""
        self.container.project()
        self.optimizer.set_rates(self.step)
        losses = [self._train_student()]
        if self.adversary is not None:
            losses.append(self.adversary.push(self._seen))
        if (penalty := self.container.penalty()) is not None:
            penalty.backward()
        for parameter in self.optimizer.parameters:
            if parameter.grad is None:  # no batch used it
                parameter.grad = torch.zeros_like(parameter)
        norms = self.norms({id(p): p.grad.norm().square() for p in self.optimizer.parameters})
        self.clip(norms)
        self.optimizer.step()
        if self.adversary is not None:
            self.adversary.learn(self._seen)
        self.step += 1
        return torch.stack(losses), norms

    def _train_student(self) -> Tensor:
        """Add the gradient of the student's loss to the container, step the rate, and return the loss."""
        steps, device = self.config.student_steps, self.compute.device
        start = self.goal.begin(self.step)
        batches = self.batches(steps, self.generators["batches"])
        used, positions = torch.cat(batches).unique(return_inverse=True)  # on the host, as the batches are
        labels = (used // self.container.matched_per_class).to(device)
        rows = positions.to(device).split([len(index) for index in batches])
        draws = [self._draw(len(index)) for index in batches]
        parts = used.to(device).split(self.chunk)
        with torch.no_grad():
            pixels = torch.cat([self.normalise(self.container.decode_matched(part)) for part in parts])
        pixels.requires_grad_()

        def batch(t: int) -> tuple[Tensor, Tensor]:
            return as_seen(augment.apply(pixels[rows[t]], draws[t])), labels[rows[t]]

        trail = self.unrolled.train(start, batch, steps, self.rate.value)
        loss, gradient = self.goal.judge(trail.end)
        by_rate = self.unrolled.backward(trail, gradient, batch, self.rate.value)
        for part, by_pixels in zip(parts, pixels.grad.split(self.chunk), strict=True):
            self.normalise(self.container.decode_matched(part)).backward(by_pixels)
        self.rate.step(by_rate)
        return loss

    def _draw(self, n: int) -> augment.Draw:
        """Augmentation of one batch: all images share the operator, each has its own parameters."""
        rule, size = self.config.augmentation_rule, self.container.shape.image_size
        return augment.draw(self.strategy, n, size, self.generators["augment"], rule=rule)

    def _seen(self, index: Tensor) -> Tensor:
        """The images ``index`` (n,), given on the host, as a student would see them in one batch."""
        decoded = self.normalise(self.container.decode_matched(index.to(self.compute.device)))
        return as_seen(augment.apply(decoded, self._draw(len(index))))

    def measured(self) -> dict[str, float]:
        return {"student_lr": float(self.rate.value)}

    def own_state(self) -> dict[str, Any]:
        return {
            "goal": self.goal.state_dict(),
            "rate": self.rate.state_dict(),
            "generators": {name: stream.get_state() for name, stream in self.generators.items()},
            "adversary": self.adversary.state_dict() if self.adversary is not None else None,
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.goal.load_state_dict(state["goal"])
        self.rate.load_state_dict(state["rate"])
        for name, value in state["generators"].items():
            self.generators[name].set_state(value)
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])


def as_seen(images: Tensor) -> Tensor:
    """``images`` in the memory layout that networks train in."""
    return images.contiguous(memory_format=torch.channels_last)
