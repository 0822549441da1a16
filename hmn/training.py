"""The one trainer of networks: network updates while matching, AUM scoring, evaluation and full-data references."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

from hmn import distributed
from hmn.capture import Replay, optimizer_tensors
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute, at_once, wide
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.data.sampling import permutations
from hmn.errors import Diverged
from hmn.networks import Builder, has_batch_norm, initialise
from hmn.networks.together import Together

# (parameters, buffers, images, labels, partners' labels, own share, weights) -> loss, gradients by name, buffers
TrainingStep = Callable[..., tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]


def training_step(network: nn.Module, compute: Compute) -> TrainingStep:
    """Mixed cross entropy of one batch, its gradients, and the running statistics after it; none is written to.

    ``network`` gives the architecture; its own parameters and buffers are never read. ``weights`` (n,) are 0 for the
    padding of a short batch: without batch norm nothing looks across a batch, so padding leaves the gradients of the
    others exactly as they were, and every batch has one compiled shape.
    m networks at once take all but ``weights`` with a leading axis m, and give all with one.
    """

    def loss(
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        images: Tensor,
        labels: Tensor,
        partners: Tensor,
        share: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        buffers = {name: value.clone() for name, value in buffers.items()}  # batch norm moves them in place
        logits = wide(functional_call(network, (parameters, buffers), (images,)))
        own = F.cross_entropy(logits, labels, reduction="none")
        other = F.cross_entropy(logits, partners, reduction="none")
        value = ((share * own + (1 - share) * other) * weights).sum() / weights.sum()
        return value, (value, buffers)

    def step(
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        images: Tensor,
        labels: Tensor,
        partners: Tensor,
        share: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        one = grad(loss, has_aux=True)
        each = one if images.ndim == 4 else vmap(one, in_dims=(0, 0, 0, 0, 0, 0, None))
        with compute.autocast():
            gradients, (value, moved) = each(parameters, buffers, images, labels, partners, share, weights)
        return value, gradients, moved

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
    rule: str = "idc"  # how the operators of ``strategy`` are composed, see hmn/data/augment.py
    even_batches: bool = False


def batches_of(order: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """The batches of an epoch, (..., n) each, of all images in ``order`` (..., N): ceil(N / batch) of them.

    Full ones and a rest, which may be a single image and still is a step of its own; or, with ``even_batches``, of
    sizes that differ by one at most.
    """
    if recipe.even_batches:
        return order.tensor_split(math.ceil(order.shape[-1] / recipe.batch), -1)
    return order.split(recipe.batch, -1)


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """The rate of ``epoch``, by the recipe's schedule.

    ``constant``; ``cosine``: annealed to 0, stepped per epoch; ``multistep``: x 0.2 at 2/3 and 5/6 of the epochs,
    rounded down.
    """
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "cosine":
        return recipe.lr * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    passed = sum(epoch >= milestone for milestone in (2 * recipe.epochs // 3, 5 * recipe.epochs // 6))
    return recipe.lr * 0.2**passed


def _replayable(device: torch.device) -> bool:
    """Whether an update may be captured as a CUDA graph: what changes between replays must then be in tensors."""
    return device.type == "cuda"


class NetworkUpdate:
    """SGD with momentum on augmented, mixed batches: what happens to a network, wherever its images come from.

    A :class:`Together` of m networks is updated as one: SGD works element by element. All that an update changes, it
    changes in place, and it never waits for the device, so that a CUDA graph can capture it.
    """

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
        rule: str = "idc",
    ) -> None:
        self.network = network
        self.step = step
        self.normalise = normalise
        self.generator = generator
        self.batch = batch
        self.strategy = strategy
        self.rule = rule
        self.cutmix = cutmix
        self.padding = not has_batch_norm(network)  # batch norm would count what fills a short batch up
        self.fused = _replayable(generator.device)
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            # A captured step reads the tensor anew at every replay; of SGD's forms only the fused one takes it unread.
            lr=torch.tensor(lr, device=generator.device) if self.fused else lr,
            momentum=momentum,
            weight_decay=weight_decay,
            fused=self.fused,
        )
        if momentum:
            # SGD would make them at its first step, which a captured step must not be.
            for parameter in network.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if self.fused:
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step on at most ``batch`` images (n, channels, H, W), uint8 or in [0, 1]; returns the loss, unread.

        m networks together take images (m, n, channels, H, W) and labels (m, n), and give losses (m,).
        """
        n = labels.shape[-1]
        missing = self.batch - n if self.padding else 0
        weights = torch.ones(n + missing, device=images.device)
        if missing:
            # Copies of the first image: any valid image does, its weight is 0.
            fill = torch.zeros(missing, dtype=torch.int64, device=images.device)
            images = torch.cat([images, images.index_select(-4, fill)], -4)
            labels = torch.cat([labels, labels.index_select(-1, fill)], -1)
            weights[n:] = 0
        inputs, partners, share = self._seen(images, labels, *self._draw(labels.shape, images.shape[-1], real=n))
        return self._step(inputs, labels, partners, share, weights)

    def on_batches(self, images: Tensor, labels: Tensor, index: Tensor) -> None:
        """A step on each of the full batches ``index`` (b, n) of ``images`` (N, channels, H, W) and ``labels`` (N,).

        On a GPU, which waits for launches, as many as its memory can be trusted with are augmented and mixed at once,
        by what each would have drawn.
        """
        size = images.shape[-1]
        together = max(1, at_once(2048, size) // index.shape[1]) if self.fused else 1
        for part in index.split(together):
            self._on_batches(images[part], labels[part])

    def _on_batches(self, images: Tensor, labels: Tensor) -> None:
        """A step on each of the batches (b, n, channels, H, W), augmented and mixed at once."""
        drawn, mixing = zip(*(self._draw(batch.shape, images.shape[-1]) for batch in labels), strict=True)
        mix = None
        if self.cutmix:
            mix = augment.MixDraw(*(torch.stack(parts, -1) for parts in zip(*mixing, strict=True)))
            mix = mix._replace(partners=mix.partners.mT)
        weights = torch.ones(labels.shape[1], device=images.device)
        seen = self._seen(images, labels, augment.joined(drawn), mix)
        for batch in zip(seen[0], labels, *seen[1:], strict=True):
            self._step(*batch, weights)

    def _draw(
        self, shape: torch.Size, size: int, real: int | None = None
    ) -> tuple[augment.Draw, augment.MixDraw | None]:
        """For labels of ``shape`` and images of side ``size``; ``real`` of a batch may be mixed."""
        batches, n = math.prod(shape[:-1]), math.prod(shape)
        drawn = augment.draw(self.strategy, n, size, self.generator, rule=self.rule, batches=batches)
        return drawn, augment.draw_mix(shape, size, self.generator, real=real) if self.cutmix else None

    def _seen(
        self, images: Tensor, labels: Tensor, drawn: augment.Draw, mix: augment.MixDraw | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What networks are shown of ``images`` (..., n, channels, H, W), the partners' labels and each own share."""
        inputs = augment.apply(self.normalise(images).flatten(0, -4), drawn).reshape(images.shape)
        if mix is None:
            return inputs, labels, torch.ones(labels.shape[:-1], device=images.device)
        return augment.cutmix(inputs, labels, self.cutmix, mix)

    def _step(self, inputs: Tensor, labels: Tensor, partners: Tensor, share: Tensor, weights: Tensor) -> Tensor:
        """One step on a batch as it is shown, (n, channels, H, W), or (m, n, ...) for m networks; returns the loss."""
        layout = torch.contiguous_format if inputs.ndim > 4 else torch.channels_last  # see Together
        inputs = inputs.contiguous(memory_format=layout)
        parameters = {name: value.detach() for name, value in self.network.named_parameters()}
        buffers = dict(self.network.named_buffers())
        loss, gradients, moved = self.step(parameters, buffers, inputs, labels, partners, share, weights)
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
        """What an update changes in place, the generator aside."""
        return [*optimizer_tensors(self.optimizer), *self.network.buffers()]

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: the optimiser's own way would put other tensors where a captured step reads and writes."""
        self.network.load_state_dict(state["network"])
        saved = state["optimizer"]
        for position, parameter in enumerate(self.network.parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                value.copy_(saved["state"][position][name])
        self.set_learning_rate(float(saved["param_groups"][0]["lr"]))


class Training:
    """One network, or several together, trained from scratch on a fixed set, epoch by epoch, resumable between epochs.

    ``images`` (N, channels, H, W) uint8 or float in [0, 1] and ``labels`` (N,) lie on the compute device. There is a
    generator per network, from which its initial weights are drawn. All else is drawn from the first one, for all
    networks at once but for each its own: several together differ from one after another by their random numbers only.
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
        self.together = (len(networks),) if len(networks) > 1 else ()  # leading shape of what every network has
        self.network = Together(networks) if self.together else networks[0]
        shared = ("batch", "lr", "momentum", "weight_decay", "strategy", "cutmix", "rule")
        options = {name: getattr(recipe, name) for name in shared}
        options["batch"] = min(recipe.batch, len(images))  # a set smaller than a batch needs no padding
        self.update = NetworkUpdate(self.network, step, normalise, self.generator, **options)
        if self.update.fused:
            self.run_batch = Replay(self.run_batch, self.update.tensors, [self.generator])
        self.epoch = 0

    @property
    def finished(self) -> bool:
        return self.epoch >= self.recipe.epochs

    def run_epoch(self) -> list[float]:
        """One pass in random order; each network's loss, the mean over batches: not finite if any batch's is not."""
        self.update.set_learning_rate(learning_rate(self.recipe, self.epoch))
        order = permutations(self.together, len(self.images), self.generator)
        batches = batches_of(order, self.recipe)
        total = torch.zeros(self.together, device=self.images.device)
        for index in batches:
            total = total + self.run_batch({"index": index})["loss"]  # read once, when the epoch is over
        self.epoch += 1
        return (total / len(batches)).view(-1).tolist()

    def run_batch(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update on the images ``index`` (n,), or (m, n) for m networks together; gives the ``loss``, unread.

        A function of tensors that changes all else in place, which is what a CUDA graph can replay.
        """
        index = inputs["index"]
        return {"loss": self.update(self.images[index], self.labels[index])}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "update": self.update.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.update.load_state_dict(state["update"])
        self.generator.set_state(state["generator"])


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

    ``make`` and ``observe`` get the consecutive networks that are trained at once. ``observe`` writes what it measures
    into the tensors of ``memo``, which start from zero and are checkpointed with the training in ``slot``: an
    interrupted call that is made again goes on where it was. Bar and complaints say ``slot``, too. Several processes
    deal the groups out among themselves and sum their memos. Returns ``memo``. Raises ``Diverged`` if a network's loss
    is not finite.
    """
    world = distributed.world()
    together = min(together, math.ceil(count / world))
    state = checkpoints.load(slot)
    dealt_out = world > 1 and (state is None or state["index"] < count)
    if dealt_out:
        state = checkpoints.load(slot, own=True)
        # As the groups were dealt out before, if any process got to save.
        together = distributed.agree(state["together"] if state else 0)[0] or together
    first, stop, resumed = distributed.rank() * together, 0, None
    if state is not None:
        first, stop, resumed = state["index"], state["stop"], state["training"]
        for name, value in state["memo"].items():
            memo[name].copy_(value)
    while first < count:
        # What was begun together is finished together, whatever ``together`` is by now.
        networks = range(first, min(first + together, count) if resumed is None else stop)
        training = make(networks)
        if resumed is not None:
            training.load_state_dict(resumed)
            resumed = None

        def state_now(networks: range = networks, training: Training = training) -> dict[str, Any]:
            group = {"index": networks.start, "stop": networks.stop, "together": together}
            return {**group, "training": training.state_dict(), "memo": memo}

        numbers = f"{first + 1}-{networks.stop}" if len(networks) > 1 else f"{first + 1}"
        title, epochs, hidden = f"{slot} {numbers}/{count}", training.recipe.epochs, not distributed.first()
        with tqdm(total=epochs, initial=training.epoch, desc=title, unit="epoch", leave=False, disable=hidden) as bar:
            while not training.finished:
                losses = training.run_epoch()
                for index, loss in zip(networks, losses, strict=True):
                    if not math.isfinite(loss):
                        raise Diverged(
                            f"{slot} {index + 1}/{count}: the training loss of this network is {loss} after epoch "
                            f"{training.epoch}: lower its learning rate"
                        )
                observe(networks, training, memo)
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
                bar.update()
                checkpoints.tick(slot, state_now, own=True)
        first = networks.stop + (world - 1) * together
    # A finished stage is kept too: a later interruption must not repeat it.
    finished = {"index": count, "stop": count, "together": together, "training": None, "memo": memo}
    if dealt_out:
        checkpoints.save(slot, finished, own=True)  # nor what is done of it, should another process not get this far
        for value in memo.values():
            distributed.sum_([value])
    checkpoints.save(slot, finished)
    return memo


def logits_of(network: nn.Module, images: Tensor, normalise: Normalise, batch: int | None = None) -> Tensor:
    """Logits (N, classes) of un-augmented images, in fp32; (m, N, classes) of networks together."""
    return _in_chunks(network, network, images, normalise, batch)


def features_of(network: nn.Module, images: Tensor, normalise: Normalise) -> Tensor:
    """What the classifier sees (N, f) of un-augmented images, in fp32."""
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
    """Share of images whose largest logit is the label's: a scalar in [0, 1], or (m,) for networks together."""
    return (logits_of(network, images, normalise).argmax(-1) == labels).float().mean(-1)
