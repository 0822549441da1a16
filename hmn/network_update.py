"""One SGD update of a network on augmented and mixed images, the same for matched networks and for all trainings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hmn import capture
from hmn.compute import Compute, at_once, wide
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.networks import has_batch_norm


@dataclass(frozen=True, kw_only=True)
class UpdateRecipe:
    """How a network is updated; names as in :class:`hmn.config.EvaluationConfig`."""

    batch: int
    lr: float
    momentum: float
    weight_decay: float
    strategy: str
    cutmix: float
    rule: str = "idc"  # how the operators of ``strategy`` are composed, see hmn/data/augment.py


class Batch(NamedTuple):
    """What a network sees in one update; for m networks at once, all tensors have a leading axis m."""

    inputs: Tensor  # (n, channels, H, W), normalised, augmented and mixed
    labels: Tensor  # (n,)
    partners: Tensor  # (n,), the labels of the images that were mixed in
    share: Tensor  # (), the own label's share of the loss


# (parameters, buffers, batch, weights (n,)) -> loss, gradients by name, new buffers
TrainingStep = Callable[
    [dict[str, Tensor], dict[str, Tensor], Batch, Tensor], tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
]


def training_step(network: nn.Module, compute: Compute) -> TrainingStep:
    """Make a function that computes the mixed cross entropy of a batch, its gradients and new running statistics.

    It changes none of its inputs. ``network`` gives the architecture; its own parameters and buffers are never read.
    ``weights`` (n,) are 0 for the padding of a short batch. Without batch norm the images of a batch do not interact,
    so padding leaves the gradients of the others exactly as they were, and every batch has one compiled shape.
    For m networks at once, all inputs but ``weights`` have a leading axis m, and so have all outputs.
    """

    def loss(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch, weights: Tensor
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        buffers = {name: value.clone() for name, value in buffers.items()}  # batch norm changes them in place
        logits = wide(functional_call(network, (parameters, buffers), (batch.inputs,)))
        own = F.cross_entropy(logits, batch.labels, reduction="none")
        other = F.cross_entropy(logits, batch.partners, reduction="none")
        value = ((batch.share * own + (1 - batch.share) * other) * weights).sum() / weights.sum()
        return value, (value, buffers)

    def step(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        one = grad(loss, has_aux=True)
        each = one if batch.inputs.ndim == 4 else vmap(one, in_dims=(0, 0, 0, None))
        with compute.autocast():
            gradients, (value, moved) = each(parameters, buffers, batch, weights)
        return value, gradients, moved

    return compute.maybe_compile(step)


class NetworkUpdate:
    """SGD with momentum on augmented, mixed batches: the update of a network, wherever its images come from.

    A :class:`Together` of m networks is updated as one, because SGD works element by element. An update changes
    everything in place and never waits for the device, so that a CUDA graph can capture it.
    """

    def __init__(
        self,
        network: nn.Module,
        step: TrainingStep,
        normalise: Normalise,
        generator: torch.Generator,
        recipe: UpdateRecipe,
    ) -> None:
        self.network = network
        self.step = step
        self.normalise = normalise
        self.generator = generator
        self.recipe = recipe
        self.padding = not has_batch_norm(network)  # batch norm would count the padding of a short batch
        self.fused = capture.recordable(generator.device)
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            # A captured step reads the tensor at every replay. Only the fused SGD takes it without reading it back.
            lr=torch.tensor(recipe.lr, device=generator.device) if self.fused else recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=self.fused,
        )
        if recipe.momentum:
            # Otherwise SGD makes the buffers at its first step, which a captured step must not be.
            for parameter in network.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if self.fused:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step on at most ``recipe.batch`` images (n, channels, H, W), uint8 or in [0, 1].

        Returns the loss on the device. m networks together take images (m, n, channels, H, W) and labels (m, n), and
        return losses (m,).
        """
        n = labels.shape[-1]
        missing = self.recipe.batch - n if self.padding else 0
        weights = torch.ones(n + missing, device=images.device)
        if missing:
            # Pad with copies of the first image: any valid image will do, as its weight is 0.
            fill = torch.zeros(missing, dtype=torch.int64, device=images.device)
            images = torch.cat([images, images.index_select(-4, fill)], -4)
            labels = torch.cat([labels, labels.index_select(-1, fill)], -1)
            weights[n:] = 0
        return self._step(self._seen(images, labels, *self._draw(labels.shape, images.shape[-1], real=n)), weights)

    def on_batches(self, images: Tensor, labels: Tensor, index: Tensor) -> None:
        """A step on each of the full batches ``index`` (b, n) of ``images`` (N, channels, H, W) and ``labels`` (N,).

        A GPU would wait for kernel launches, so there as many batches as safely fit its memory are augmented and mixed
        at once, with the random numbers that each would have drawn by itself.
        """
        size = images.shape[-1]
        together = max(1, at_once(2048, size) // index.shape[1]) if self.fused else 1
        for part in index.split(together):
            self._on_batches(images[part], labels[part])

    def _on_batches(self, images: Tensor, labels: Tensor) -> None:
        """A step on each of the batches (b, n, channels, H, W), augmented and mixed at once."""
        drawn, mixing = zip(*(self._draw(batch.shape, images.shape[-1]) for batch in labels), strict=True)
        mix = None
        if self.recipe.cutmix:
            mix = augment.MixDraw(*(torch.stack(parts, -1) for parts in zip(*mixing, strict=True)))
            mix = mix._replace(partners=mix.partners.mT)
        weights = torch.ones(labels.shape[1], device=images.device)
        for parts in zip(*self._seen(images, labels, augment.joined(drawn), mix), strict=True):
            self._step(Batch(*parts), weights)

    def _draw(
        self, shape: torch.Size, size: int, real: int | None = None
    ) -> tuple[augment.Draw, augment.MixDraw | None]:
        """Draw for labels of ``shape`` and images of side ``size``; only the first ``real`` of a batch are mixed."""
        batches, n = math.prod(shape[:-1]), math.prod(shape)
        drawn = augment.draw(self.recipe.strategy, n, size, self.generator, rule=self.recipe.rule, batches=batches)
        return drawn, augment.draw_mix(shape, size, self.generator, real=real) if self.recipe.cutmix else None

    def _seen(self, images: Tensor, labels: Tensor, drawn: augment.Draw, mix: augment.MixDraw | None) -> Batch:
        """``images`` (..., n, channels, H, W) with ``labels`` (..., n), augmented by ``drawn`` and mixed by ``mix``."""
        inputs = augment.apply(self.normalise(images).flatten(0, -4), drawn).reshape(images.shape)
        if mix is None:
            return Batch(inputs, labels, labels, torch.ones(labels.shape[:-1], device=images.device))
        inputs, partners, share = augment.cutmix(inputs, labels, self.recipe.cutmix, mix)
        return Batch(inputs, labels, partners, share)

    def _step(self, batch: Batch, weights: Tensor) -> Tensor:
        """One step on a batch, or on those of m networks; returns the loss."""
        layout = torch.contiguous_format if batch.inputs.ndim > 4 else torch.channels_last  # see Together
        batch = batch._replace(inputs=batch.inputs.contiguous(memory_format=layout))
        parameters = {name: value.detach() for name, value in self.network.named_parameters()}
        buffers = dict(self.network.named_buffers())
        loss, gradients, moved = self.step(parameters, buffers, batch, weights)
        for name, parameter in self.network.named_parameters():
            gradient = gradients[name]
            if self.fused and gradient.stride() != parameter.stride():  # the fused form pairs numbers by address
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        self.optimizer.step()
        for name, value in moved.items():
            buffers[name].copy_(value)
        return loss

    def tensors(self) -> list[Tensor]:
        """Tensors that an update changes in place; the generator's state is not among them."""
        return [*capture.optimizer_tensors(self.optimizer), *self.network.buffers()]

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load in place: the optimiser's own method would replace the tensors that a captured step reads and writes."""
        self.network.load_state_dict(state["network"])
        saved = state["optimizer"]
        for position, parameter in enumerate(self.network.parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                value.copy_(saved["state"][position][name])
        self.set_learning_rate(float(saved["param_groups"][0]["lr"]))
