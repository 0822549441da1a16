"""The trainer of all networks trained from scratch: AUM scores, evaluation, experts and full-data references."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hmn import distributed
from hmn.capture import Replay
from hmn.checkpoint import Checkpoints
from hmn.compute import at_once
from hmn.data.preprocess import Normalise
from hmn.data.sampling import permutations
from hmn.errors import Diverged
from hmn.network_update import NetworkUpdate, TrainingStep, UpdateRecipe
from hmn.networks import Builder, initialise
from hmn.networks.together import Together


@dataclass(frozen=True, kw_only=True)
class Recipe(UpdateRecipe):
    """How one network is trained from scratch; names as in :class:`hmn.config.EvaluationConfig`."""

    epochs: int
    schedule: str
    even_batches: bool = False


def batches_of(order: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """Split ``order`` (..., N) into the batches of an epoch: ceil(N / batch) of them, (..., n) each.

    All batches but the last are full; the last may be a single image and is still a step of its own. With
    ``even_batches``, sizes differ by at most one instead.
    """
    if recipe.even_batches:
        return order.tensor_split(math.ceil(order.shape[-1] / recipe.batch), -1)
    return order.split(recipe.batch, -1)


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """The learning rate of ``epoch`` in the recipe's schedule.

    ``constant``; ``cosine``: annealed to 0, stepped per epoch; ``multistep``: x 0.2 at 2/3 and 5/6 of the epochs,
    rounded down.
    """
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "cosine":
        return recipe.lr * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    passed = sum(epoch >= milestone for milestone in (2 * recipe.epochs // 3, 5 * recipe.epochs // 6))
    return recipe.lr * 0.2**passed


class Training:
    """One network, or several together, trained from scratch on a fixed set, epoch by epoch, resumable between epochs.

    ``images`` (N, channels, H, W) uint8 or float in [0, 1] and ``labels`` (N,) lie on the compute device. Each network
    draws its initial weights from its own generator. Everything else is drawn from the first generator, for all
    networks at once but separately for each. Training several together therefore differs from training one after
    another only in the random numbers.
    """

    def __init__(
        self,
        build: Builder,
        images: Tensor,
        labels: Tensor,
        recipe: Recipe,
        normalise: Normalise,
        step: TrainingStep,
        *generators: torch.Generator,
    ) -> None:
        self.images, self.labels, self.recipe, self.generator = images, labels, recipe, generators[0]
        networks = [
            initialise(build().to(images.device, memory_format=torch.channels_last), generator)
            for generator in generators
        ]
        self.together = (len(networks),) if len(networks) > 1 else ()  # leading shape of per-network tensors
        self.network = Together(networks) if self.together else networks[0]
        padded = replace(recipe, batch=min(recipe.batch, len(images)))  # a set smaller than a batch needs no padding
        self.update = NetworkUpdate(self.network, step, normalise, self.generator, padded)
        if self.update.fused:
            self.run_batch = Replay(self.run_batch, self.update.tensors, [self.generator])
        self.epoch = 0

    @property
    def finished(self) -> bool:
        return self.epoch >= self.recipe.epochs

    def run_epoch(self) -> list[float]:
        """One pass in random order; returns each network's mean loss over batches, not finite if any batch's is not."""
        self.update.set_learning_rate(learning_rate(self.recipe, self.epoch))
        order = permutations(self.together, len(self.images), self.generator)
        batches = batches_of(order, self.recipe)
        total = torch.zeros(self.together, device=self.images.device)
        for index in batches:
            total = total + self.run_batch({"index": index})["loss"]  # read once, when the epoch is over
        self.epoch += 1
        return (total / len(batches)).view(-1).tolist()

    def run_batch(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update on the images ``index`` (n,), or (m, n) for m networks; returns the ``loss`` on the device.

        It takes and returns tensors and changes all else in place, so that a CUDA graph can replay it.
        """
        index = inputs["index"]
        return {"loss": self.update(self.images[index], self.labels[index])}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "update": self.update.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.update.load_state_dict(state["update"])
        self.generator.set_state(state["generator"])


def run_epochs(training: Training, title: str, after_epoch: Callable[[list[float]], None]) -> None:
    """Train to the last epoch under a progress bar; ``after_epoch`` receives each network's mean loss."""
    count, hidden = training.recipe.epochs, not distributed.first()
    with tqdm(total=count, initial=training.epoch, desc=title, unit="epoch", leave=False, disable=hidden) as bar:
        while not training.finished:
            losses = training.run_epoch()
            after_epoch(losses)
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
            bar.update()


def train_networks(
    count: int,
    make: Callable[[range], Training],
    observe: Callable[[range, Training, dict[str, Tensor]], None],
    memo: dict[str, Tensor],
    checkpoints: Checkpoints,
    slot: str,
    together: int = 1,
) -> dict[str, Tensor]:
    """Train networks 0 .. count - 1, at most ``together`` at once, calling ``observe`` after every epoch.

    ``make`` and ``observe`` receive the range of networks that are trained at once. ``observe`` writes what it measures
    into the tensors of ``memo``, which start from zero and are checkpointed with the training in ``slot``. Repeating an
    interrupted call therefore continues where it stopped. The progress bar and error messages name ``slot``, too.
    Several processes divide the groups among themselves and sum their memos. Returns ``memo``. Raises ``Diverged`` if a
    network's loss is not finite.
    """
    world = distributed.world()
    together = min(together, math.ceil(count / world))
    state = checkpoints.load(slot)
    dealt_out = world > 1 and (state is None or state["index"] < count)
    if dealt_out:
        state = checkpoints.load(slot, own=True)
        # Keep the earlier group size, if any process got to save.
        together = distributed.agree(state["together"] if state else 0)[0] or together
    first, stop, resumed = distributed.rank() * together, 0, None
    if state is not None:
        with checkpoints.restoring():
            first, stop, resumed = state["index"], state["stop"], state["training"]
            for name, value in memo.items():
                value.copy_(state["memo"][name])
    while first < count:
        # Networks that were begun together are finished together, whatever ``together`` is by now.
        networks = range(first, min(first + together, count) if resumed is None else stop)
        training = make(networks)
        if resumed is not None:
            with checkpoints.restoring():
                training.load_state_dict(resumed)
            resumed = None

        def after_epoch(losses: list[float], networks: range = networks, training: Training = training) -> None:
            for index, loss in zip(networks, losses, strict=True):
                if not math.isfinite(loss):
                    raise Diverged(
                        f"{slot} {index + 1}/{count}: the training loss of this network is {loss} after epoch "
                        f"{training.epoch}: lower its learning rate"
                    )
            observe(networks, training, memo)
            group = {"index": networks.start, "stop": networks.stop, "together": together}
            checkpoints.tick(slot, lambda: {**group, "training": training.state_dict(), "memo": memo}, own=True)

        numbers = f"{first + 1}-{networks.stop}" if len(networks) > 1 else f"{first + 1}"
        run_epochs(training, f"{slot} {numbers}/{count}", after_epoch)
        first = networks.stop + (world - 1) * together
    # A finished stage is kept too: a later interruption must not repeat it.
    finished = {"index": count, "stop": count, "together": together, "training": None, "memo": memo}
    if dealt_out:
        checkpoints.save(slot, finished, own=True)  # keep this process's part, should another not get this far
        for value in memo.values():
            distributed.sum_([value])
    checkpoints.save(slot, finished)
    return memo


def logits_of(network: nn.Module, images: Tensor, normalise: Normalise, batch: int | None = None) -> Tensor:
    """Logits (N, classes) of un-augmented images, in fp32; (m, N, classes) for m networks together."""
    return _in_chunks(network, network, images, normalise, batch)


def features_of(network: nn.Module, images: Tensor, normalise: Normalise) -> Tensor:
    """Features (N, f) that the classifier sees of un-augmented images, in fp32."""
    return _in_chunks(network, network.features, images, normalise, None)


@torch.no_grad()
def _in_chunks(
    network: nn.Module, outputs: Callable[[Tensor], Tensor], images: Tensor, normalise: Normalise, batch: int | None
) -> Tensor:
    network.eval()
    batch = batch or at_once(500, images.shape[-1])
    chunks = [outputs(normalise(chunk).contiguous(memory_format=torch.channels_last)) for chunk in images.split(batch)]
    network.train()
    return torch.cat(chunks, -2)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, normalise: Normalise) -> Tensor:
    """Share of images whose largest logit is the label's: a scalar in [0, 1], or (m,) for m networks together."""
    return (logits_of(network, images, normalise).argmax(-1) == labels).float().mean(-1)
