"""The real side of IDM (Zhao et al., CVPR 2023): a pool of networks that train on real images as the run goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hmn.compute import Compute
from hmn.config.objectives import DistributionMatchingConfig
from hmn.data import augment
from hmn.data.datasets import RealData
from hmn.data.sampling import whole_split
from hmn.network_update import NetworkUpdate, TrainingStep, UpdateRecipe
from hmn.networks import Builder
from hmn.objectives.distance import Parameters
from hmn.objectives.distribution import CE_FACTOR, IMAGES
from hmn.realside import Choice, ImageSide, Synthetic
from hmn.seeding import generator

FIRST = 3  # networks that the pool starts with


class PoolSide(ImageSide):
    """A pool of at most ``pool_networks`` networks: every step matches on a random one, then trains a few random ones.

    Every ``pool_interval`` steps a fresh network joins the pool, replacing the oldest one if the pool is full. Networks
    train on plain real batches, which is all that is known of theirs. ``percent`` is each network's accuracy on the
    batches of its latest training, measured before the updates on them; 0 until it has trained.

    The pool is stacked on the device, (pool_networks, ...) by name. Networks in training take turns in ``network``,
    the one whose memory a captured step uses.
    """

    def __init__(
        self,
        real: RealData,
        config: DistributionMatchingConfig,
        *,
        build: Builder,
        train: TrainingStep,
        compute: Compute,
        seed: int,
        flip: bool,
    ) -> None:
        super().__init__(real, config, build=build, compute=compute, seed=seed, flip=flip)
        device = compute.device
        updating = generator(seed, self.stream, "pool_batches", device=device)
        self.pool_batches = whole_split(len(self.labels), config.pool_batch, updating)
        self.choosing = generator(seed, self.stream, "pool")  # on the host: it decides which networks are used
        recipe = UpdateRecipe(
            batch=self.pool_batches.batch,
            lr=config.pool_lr,
            momentum=config.pool_momentum,
            weight_decay=config.pool_weight_decay,
            strategy="none",
            cutmix=0.0,
        )
        self.updates = NetworkUpdate(self.network, train, self.normalise, self.networks, recipe)
        self.pool = {
            name: value.new_zeros(config.pool_networks, *value.shape) for name, value in self._worker().items()
        }
        self.percent = torch.zeros(config.pool_networks, device=device)
        self.pushed = 0  # number of networks that have joined so far
        self.matched = 0  # place of the matched network in the pool

    def _worker(self) -> dict[str, Tensor]:
        """Parameters and momentum, by name, of the network at work now: what the pool stores of each network."""
        parts = {f"parameters/{name}": value.detach() for name, value in self.network.named_parameters()}
        for name, value in self.network.named_parameters():
            if (state := self.updates.optimizer.state.get(value)) is not None:
                parts[f"momentum/{name}"] = state["momentum_buffer"]
        return parts

    @property
    def count(self) -> int:
        return min(self.pushed, self.config.pool_networks)

    def begin(self, step: int) -> None:
        while self.pushed < FIRST + step // self.config.pool_interval:
            self._push()
        self.matched = int(torch.randint(self.count, (), generator=self.choosing))

    def _push(self) -> None:
        place = self.pushed % self.config.pool_networks  # the oldest network's place, once the pool is full
        self.renew("pool", self.pushed)
        for name, value in self._worker().items():
            if name.startswith("momentum/"):
                value.zero_()
            self.pool[name][place].copy_(value)
        self.percent[place] = 0
        self.pushed += 1

    def choose(self, classes: Tensor) -> Choice:
        matched = torch.tensor([self.matched]).to(self.percent.device, non_blocking=True)
        return super().choose(classes) | {"matched": matched}

    def parameters(self, choice: Choice) -> Parameters:
        return {
            name: self.pool[f"parameters/{name}"].index_select(0, choice["matched"])[0]
            for name, _ in self.network.named_parameters()
        }

    def real(self, choice: Choice, drawn: augment.Draw, part: slice) -> Tensor | Parameters:
        images = super().real(choice, drawn, part)
        if not self.config.ce_weight:
            return images
        factor = self.config.ce_weight * self.percent.index_select(0, choice["matched"])
        return {IMAGES: images, CE_FACTOR: factor.expand(len(images))}

    def choose_update(self) -> Choice:
        steps, trained = self.config.pool_steps, min(self.config.pool_trained, self.count)
        if not steps or not trained:
            return {}
        places = torch.randperm(self.count, generator=self.choosing)[:trained]
        batches = self.pool_batches.batches(trained * steps)
        return {
            "trained": places.to(self.percent.device, non_blocking=True),
            "update": batches.unflatten(0, (trained, steps)),
        }

    def update(self, choice: Choice, synthetic: Synthetic | None = None) -> None:
        if "update" not in choice:
            return
        for place, batches in zip(choice["trained"].split(1), choice["update"], strict=True):
            for name, value in self._worker().items():
                value.copy_(self.pool[name].index_select(0, place)[0])
            percents = [self._train(index) for index in batches]
            for name, value in self._worker().items():
                self.pool[name].index_copy_(0, place, value[None])
            self.percent.index_copy_(0, place, torch.stack(percents).mean()[None])

    def _train(self, index: Tensor) -> Tensor:
        """One update on the images ``index``; returns the accuracy on them before the update, in percent."""
        images, labels = self.images[index], self.labels[index]
        with torch.no_grad():
            right = self.network(self.normalise(images)).argmax(1) == labels
        self.updates(images, labels)
        return 100 * right.float().mean()

    def generators(self) -> list[torch.Generator]:
        return [*super().generators(), self.networks]

    def state_tensors(self) -> list[Tensor]:
        return [*self.updates.tensors(), *self.pool.values(), self.percent]

    def state_dict(self) -> dict[str, Any]:
        own = {
            "pool": {name: value[: self.count] for name, value in self.pool.items()},
            "percent": self.percent,
            "pushed": self.pushed,
            "pool_batches": self.pool_batches.state_dict(),
            "choosing": self.choosing.get_state(),
            "networks": self.networks.get_state(),
        }
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, value in state["pool"].items():
            self.pool[name][: len(value)].copy_(value)
        self.percent.copy_(state["percent"])
        self.pushed = state["pushed"]
        self.pool_batches.load_state_dict(state["pool_batches"])
        self.choosing.set_state(state["choosing"])
        self.networks.set_state(state["networks"])
