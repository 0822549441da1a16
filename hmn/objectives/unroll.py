"""Train a student on synthetic images, and differentiate a loss of the trained student with respect to those images.

The student takes T steps of SGD with momentum,

    v_{t+1} = mu v_t + (1 - d) g_t,   theta_{t+1} = theta_t - alpha v_{t+1},   v_0 = 0,   g_t = grad CE(theta_t; x_t),

and a loss L depends on theta_T alone: its distance from an expert (MTT, Cazenavette et al., CVPR 2022), or the
student's loss on real images (LinBa, Deng & Russakovsky, NeurIPS 2022). With lambda_t = dL/dtheta_t and
w_{t+1} = mu w_{t+2} + lambda_{t+1}, which is -1/alpha times dL/dv_{t+1}, the backward pass through step t is

    s_t = <g_t, w_{t+1}>,   dL/dx_t = -alpha (1 - d) ds_t/dx_t,   lambda_t = lambda_{t+1} - alpha (1 - d) ds_t/dtheta_t,
    dL/dalpha = -(1 - d) sum_t s_t.

It needs theta_t and x_t, but no velocity and no graph over more than one step: per step, memory grows by the student's
parameters instead of by its activations. dL/dalpha exists at alpha = 0, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value

from hmn.compute import Compute, wide
from hmn.objectives.distance import Parameters

# The student's batch at step t: its input images (n, channels, H, W) and labels (n,). The backward pass asks for it
# again, and it must then be the same; gradients flow to whatever the images were made from.
Batch = Callable[[int], tuple[Tensor, Tensor]]


class Trail(NamedTuple):
    """Kept for the backward pass: parameters and velocity before every ``segment``-th step, and final parameters."""

    kept: dict[int, tuple[Parameters, Parameters | None]]
    steps: int
    end: Parameters


class Unrolled:
    """A student's training and the backward pass through it.

    ``network`` gives the architecture; its own parameters are never read. With ``segment`` k, parameters are kept
    only before every k-th step, and those in between are recomputed in the backward pass: k = sqrt(2 T) needs the least
    memory. Velocities are kept only if segments have more than one step.
    """

    def __init__(
        self, network: nn.Module, compute: Compute, *, momentum: float = 0.0, dampening: float = 0.0, segment: int = 1
    ) -> None:
        self.segment = segment

        def loss(parameters: Parameters, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(wide(functional_call(network, parameters, (images,))), labels)

        def forward(
            theta: Parameters, v: Parameters, images: Tensor, labels: Tensor, lr: Tensor
        ) -> tuple[Parameters, Parameters]:
            with compute.autocast():
                g = grad(loss)(theta, images, labels)
            v = {name: momentum * v[name] + (1 - dampening) * g[name] for name in g}
            return {name: theta[name] - lr * v[name] for name in g}, v

        def slope(theta: Parameters, images: Tensor, labels: Tensor, w: Parameters) -> Tensor:
            return inner(grad(loss)(theta, images, labels), w)

        def vjp(
            theta: Parameters, w: Parameters, lam: Parameters, images: Tensor, labels: Tensor, lr: Tensor
        ) -> tuple[Parameters, Parameters, Tensor, Tensor]:
            w = {name: momentum * w[name] + lam[name] for name in lam}
            with compute.autocast():
                (by_theta, by_images), s = grad_and_value(slope, argnums=(0, 1))(theta, images, labels, w)
            lam = {name: lam[name] - lr * (1 - dampening) * by_theta[name] for name in lam}
            return w, lam, -lr * (1 - dampening) * by_images, -(1 - dampening) * s

        def judge(parameters: Parameters, images: Tensor, labels: Tensor) -> tuple[Tensor, Parameters]:
            with compute.autocast():
                gradient, value = grad_and_value(loss)(parameters, images, labels)
            return value, gradient

        # (theta_t, v_t, images, labels, alpha) -> theta_{t+1}, v_{t+1}
        self.forward = compute.maybe_compile(forward)
        # (theta_t, w_{t+2}, lambda_{t+1}, images, labels, alpha) -> w_{t+1}, lambda_t, dL/dx_t, its part of dL/dalpha
        self.vjp = compute.maybe_compile(vjp)
        # (parameters, images, labels) -> value, its gradient with respect to the parameters
        self.loss_and_gradient = compute.maybe_compile(judge)

    @torch.no_grad()
    def train(self, parameters: Parameters, batch: Batch, steps: int, lr: Tensor) -> Trail:
        """Take ``steps`` steps from ``parameters``, which stay unmodified, at rate ``lr`` (a scalar tensor)."""
        theta, v = parameters, {name: torch.zeros_like(value) for name, value in parameters.items()}
        kept = {}
        for t in range(steps):
            if t % self.segment == 0:
                kept[t] = theta, v if self.segment > 1 else None
            theta, v = self.forward(theta, v, *batch(t), lr)
        return Trail(kept, steps, theta)

    def backward(self, trail: Trail, gradient: Parameters, batch: Batch, lr: Tensor) -> Tensor:
        """Backpropagate dL/dx_t of every step into whatever the images were made from; return dL/dalpha, a scalar.

        ``gradient`` is dL/dtheta_T. The tensors in ``trail`` are released on the way.
        """
        lam, w = gradient, {name: torch.zeros_like(value) for name, value in gradient.items()}
        by_lr = torch.zeros_like(lr)
        while trail.kept:
            start = max(trail.kept)
            thetas = self._thetas(trail, start, batch, lr)
            for t in reversed(range(start, start + len(thetas))):
                images, labels = batch(t)
                w, lam, by_images, by_lr_t = self.vjp(thetas.pop(), w, lam, images.detach(), labels, lr)
                images.backward(by_images)
                by_lr = by_lr + by_lr_t
        return by_lr

    @torch.no_grad()
    def _thetas(self, trail: Trail, start: int, batch: Batch, lr: Tensor) -> list[Parameters]:
        """The parameters before each step of the segment that begins at ``start``."""
        theta, v = trail.kept.pop(start)
        thetas = [theta]
        for t in range(start, min(start + self.segment, trail.steps) - 1):
            theta, v = self.forward(theta, v, *batch(t), lr)
            thetas.append(theta)
        return thetas


def copies(steps: int, segment: int) -> int:
    """The most copies of its parameters that a student's ``steps`` steps keep; a velocity counts as one copy.

    These are the parameters at every segment's start, with a velocity if steps are recomputed, and those within one
    segment.
    """
    return math.ceil(steps / segment) * (1 if segment == 1 else 2) + min(segment, steps)


def inner(one: Parameters, other: Parameters) -> Tensor:
    """The inner product over all parameters, a scalar."""
    return torch.stack([(one[name] * other[name]).sum() for name in one]).sum()


def trajectory_loss(end: Parameters, start: Parameters, target: Parameters) -> tuple[Tensor, Parameters]:
    """MTT's |end - target|^2 / |start - target|^2 over all parameters, and its gradient with respect to ``end``.

    It is 1 for a student that has not moved and 0 for one that has reached the expert's target.
    """
    away = {name: end[name] - target[name] for name in end}
    way = {name: start[name] - target[name] for name in end}
    scale = inner(way, way)
    return inner(away, away) / scale, {name: 2 / scale * value for name, value in away.items()}
