"""The one trainer of networks: network updates while matching, AUM scoring, evaluation and full-data references."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from tqdm import tqdm

from hmn import distributed
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.errors import Diverged
from hmn.networks import Builder, initialise

# (parameters, images, labels, partners' labels, own share, weights) -> loss, gradients by name
TrainingStep = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def training_step(network: nn.Module, compute: Compute) -> TrainingStep:
    """Mixed cross entropy of one batch and its gradients; ``weights`` (n,) are 0 for the padding of a short batch.

    ``network`` gives the architecture; its own parameters are never read. Nothing in our networks looks across a batch,
    so padding leaves the gradients of the others exactly as they were, and every batch has one compiled shape.
    """

    def loss(
        parameters: dict[str, Tensor], images: Tensor, labels: Tensor, partners: Tensor, share: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = functional_call(network, (parameters,), (images,)).float()
        own = F.cross_entropy(logits, labels, reduction="none")
        other = F.cross_entropy(logits, partners, reduction="none")
        value = ((share * own + (1 - share) * other) * weights).sum() / weights.sum()
        return value, value

    def step(parameters: dict[str, Tensor], *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with compute.autocast():
            gradients, value = grad(loss, has_aux=True)(parameters, *batch)
        return value, gradients

    return compute.maybe_compile(step)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained from scratch; names as in :class:`hmn.config.EvaluationConfig`."""

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    strategy: str
    cutmix: float


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """``cosine``: annealed to 0, stepped per epoch; ``multistep``: x 0.2 at 2/3 and 5/6 of the epochs, rounded down."""
    if recipe.schedule == "cosine":
        return recipe.lr * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    passed = sum(epoch >= milestone for milestone in (2 * recipe.epochs // 3, 5 * recipe.epochs // 6))
    return recipe.lr * 0.2**passed


class NetworkUpdate:
    """SGD with momentum on augmented, mixed batches: what happens to a network, wherever its images come from."""

    def __init__(
        self,
        network: nn.Module,
        step: TrainingStep,
        normalise: Normalise,
        generator: torch.Generator,
        *,
        batch: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        strategy: str,
        cutmix: float,
    ) -> None:
        self.network = network
        self.step = step
        self.normalise = normalise
        self.generator = generator
        self.batch = batch
        self.strategy = strategy
        self.cutmix = cutmix
        self.optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step on at most ``batch`` images (n, channels, H, W), uint8 or in [0, 1]; returns the loss, unread."""
        n, missing = len(images), self.batch - len(images)
        weights = torch.ones(self.batch, device=images.device)
        if missing:
            # Copies of the first image: any valid image does, its weight is 0.
            fill = torch.zeros(missing, dtype=torch.int64, device=images.device)
            images, labels = torch.cat([images, images[fill]]), torch.cat([labels, labels[fill]])
            weights[n:] = 0
        drawn = augment.draw(self.strategy, self.batch, images.shape[-1], self.generator)
        inputs = augment.apply(self.normalise(images), drawn)
        partners, share = labels, torch.ones((), device=images.device)
        if self.cutmix:
            inputs, partners, share = augment.cutmix(inputs, labels, self.cutmix, self.generator, real=n)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        parameters = {name: value.detach() for name, value in self.network.named_parameters()}
        loss, gradients = self.step(parameters, inputs, labels, partners, share, weights)
        for name, parameter in self.network.named_parameters():
            parameter.grad = gradients[name]
        self.optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class Training:
    """One network trained from scratch on a fixed set, epoch by epoch, resumable between epochs.

    ``images`` (N, channels, H, W) uint8 or float in [0, 1] and ``labels`` (N,) lie on the compute device.
    """

    def __init__(
        self,
        build: Builder,
        images: Tensor,
        labels: Tensor,
        recipe: Recipe,
        normalise: Normalise,
        step: TrainingStep,
        generator: torch.Generator,
    ) -> None:
        network = build().to(images.device, memory_format=torch.channels_last)
        self.network = initialise(network, generator)
        self.images, self.labels, self.recipe, self.generator = images, labels, recipe, generator
        shared = ("batch", "lr", "momentum", "weight_decay", "strategy", "cutmix")
        options = {name: getattr(recipe, name) for name in shared}
        options["batch"] = min(recipe.batch, len(images))  # a set smaller than a batch needs no padding
        self.update = NetworkUpdate(network, step, normalise, generator, **options)
        self.epoch = 0

    @property
    def finished(self) -> bool:
        return self.epoch >= self.recipe.epochs

    def run_epoch(self) -> float:
        """One pass in random order; returns the last batch's loss. Raises ``Diverged`` if that is not finite."""
        for group in self.update.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.epoch)
        order = torch.randperm(len(self.images), generator=self.generator, device=self.generator.device)
        for index in order.split(self.recipe.batch):
            loss = self.update(self.images[index], self.labels[index])
        self.epoch += 1
        value = float(loss)
        if not math.isfinite(value):
            raise Diverged(
                f"the training loss of a network is {value} after epoch {self.epoch}: lower its learning rate"
            )
        return value

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "update": self.update.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.update.load_state_dict(state["update"])
        self.generator.set_state(state["generator"])


def train_networks(
    count: int,
    make: Callable[[int], Training],
    observe: Callable[[int, Training, dict[str, Tensor]], None],
    memo: dict[str, Tensor],
    checkpoints: Checkpoints,
    slot: str,
    label: str,
) -> dict[str, Tensor]:
    """Train networks 0 .. count - 1 one after another, calling ``observe`` after every epoch; returns ``memo``.

    ``observe`` writes what it measures into the tensors of ``memo``, which are checkpointed with the training in
    ``slot``: an interrupted call that is made again goes on where it was. Several processes deal the networks out among
    themselves and sum their memos, which start from zero.
    """
    first, resumed = distributed.rank(), None
    state = checkpoints.load(slot)
    dealt_out = distributed.world() > 1 and (state is None or state["index"] < count)
    if dealt_out:
        state = checkpoints.load(slot, own=True)
    if state is not None:
        first, resumed = state["index"], state["training"]
        for name, value in state["memo"].items():
            memo[name].copy_(value)
    for index in range(first, count, distributed.world()):
        training = make(index)
        if resumed is not None:
            training.load_state_dict(resumed)
            resumed = None

        def state_now(index: int = index, training: Training = training) -> dict[str, Any]:
            return {"index": index, "training": training.state_dict(), "memo": memo}

        title, epochs, hidden = f"{label} {index + 1}/{count}", training.recipe.epochs, not distributed.first()
        with tqdm(total=epochs, initial=training.epoch, desc=title, unit="epoch", leave=False, disable=hidden) as bar:
            while not training.finished:
                loss = training.run_epoch()
                observe(index, training, memo)
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()
                checkpoints.tick(slot, state_now, own=True)
    # A finished stage is kept too: a later interruption must not repeat it.
    finished = {"index": count, "training": None, "memo": memo}
    if dealt_out:
        checkpoints.save(slot, finished, own=True)  # nor what is done of it, should another process not get this far
        for value in memo.values():
            distributed.sum_([value])
    checkpoints.save(slot, finished)
    return memo


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor, normalise: Normalise, batch: int = 500) -> Tensor:
    """Logits (N, classes) of un-augmented images, in fp32."""
    network.eval()
    chunks = [network(normalise(chunk).contiguous(memory_format=torch.channels_last)) for chunk in images.split(batch)]
    network.train()
    return torch.cat(chunks)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, normalise: Normalise) -> Tensor:
    """Share of images whose largest logit is the label's, a scalar in [0, 1]."""
    return (logits_of(network, images, normalise).argmax(1) == labels).float().mean()
