"""The real side of gradient matching: networks, and what real images say of them, computed as the run goes.

A side is asked first what it chooses for a step, which the host decides and hands over as tensors, and then for what
follows from that choice, which is device work alone: a step after its choice can be replayed as one CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from hmn.capture import optimizer_tensors
from hmn.compute import Compute
from hmn.config import GradientMatchingConfig
from hmn.data import augment
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.data.sampling import GroupSampler, per_class
from hmn.networks import Builder, initialise
from hmn.objectives.distance import Parameters
from hmn.seeding import derived_seed, generator
from hmn.training import NetworkUpdate, TrainingStep

Choice = dict[str, Tensor]


class RealSide(Protocol):
    """What a condensation needs of the real images."""

    def begin(self, step: int) -> None:
        """Make the network of matching step ``step``, which is at least the one before."""

    def choose(self, classes: Tensor) -> Choice:
        """What the coming match of ``classes`` (k,), on the host, uses."""

    def parameters(self, choice: Choice) -> Parameters:
        """The matched network's."""

    def draw(self, choice: Choice, count: int) -> augment.Draw:
        """One siamese augmentation for each of the chosen classes, (k,)."""

    def real(self, choice: Choice, drawn: augment.Draw, part: slice) -> Tensor | Parameters:
        """For the classes ``part`` of the choice: augmented images (k, B, ...), or gradients {name: (k, ...)}."""

    def choose_update(self) -> Choice:
        """What the update after the step's last match uses."""

    def update(self, choice: Choice) -> None:
        """Move the network on before the next step."""

    def generators(self) -> list[torch.Generator]:
        """Those that the device draws from after a choice."""

    def state_tensors(self) -> list[Tensor]:
        """What an update changes in place."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LiveSide:
    """A fresh network every ``inner_steps``, trained on real images after every matching step (IDC, algorithm 1)."""

    def __init__(
        self,
        real: RealData,
        config: GradientMatchingConfig,
        *,
        build: Builder,
        train: TrainingStep,
        compute: Compute,
        seed: int,
        flip: bool,
        stream: str = "condense",
    ) -> None:
        self.config, self.seed, self.stream = config, seed, stream
        self.images, self.labels = real.train.images, real.train.labels
        device = compute.device
        self.normalise = Normalise(real.mean, real.std, device)
        self.strategy, network_strategy = (
            strategy if flip else augment.without_flip(strategy)
            for strategy in (config.strategy, config.network_strategy)
        )
        self.augmenting = generator(seed, stream, "augment", device=device)
        self.real_batches = per_class(
            self.labels, real.class_names, config.real_batch, generator(seed, stream, "real", device=device)
        )
        whole = torch.tensor([len(self.labels)])
        self.network_batches = GroupSampler(
            whole, min(config.network_batch, int(whole)), generator(seed, stream, "network", device=device)
        )
        self.batches = math.ceil(config.network_samples / self.network_batches.batch)
        self.network = build().to(device, memory_format=torch.channels_last)
        self.networks = torch.Generator(device)  # seeded anew for every network: its weights, then its training
        self.updates = NetworkUpdate(
            self.network,
            train,
            self.normalise,
            self.networks,
            batch=self.network_batches.batch,
            lr=config.network_lr,
            momentum=config.network_momentum,
            weight_decay=config.network_weight_decay,
            strategy=network_strategy,
            cutmix=config.network_cutmix,
        )

    def begin(self, step: int) -> None:
        outer, inner = divmod(step, self.config.inner_steps)
        if inner:
            return
        # In place throughout: a captured graph goes on using the same memory.
        self.networks.manual_seed(derived_seed(self.seed, self.stream, "matched_network", outer))
        initialise(self.network, self.networks)
        for state in self.updates.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def choose(self, classes: Tensor) -> Choice:
        return {"real": self.real_batches.draw(classes)}

    def parameters(self, choice: Choice) -> Parameters:
        return {name: value.detach() for name, value in self.network.named_parameters()}

    def draw(self, choice: Choice, count: int) -> augment.Draw:
        return augment.draw(self.strategy, count, self.images.shape[-1], self.augmenting, one_choice=False)

    def real(self, choice: Choice, drawn: augment.Draw, part: slice) -> Tensor:
        index = choice["real"][part]
        images = self.normalise(self.images[index].flatten(0, 1))
        return augment.apply(images, drawn[part].repeat(index.shape[1])).unflatten(0, index.shape)

    def choose_update(self) -> Choice:
        everything = torch.zeros(1, dtype=torch.int64)
        drawn = [self.network_batches.draw(everything) for _ in range(self.batches)]
        return {"update": torch.cat(drawn)} if drawn else {}

    def update(self, choice: Choice) -> None:
        for index in choice.get("update", ()):
            self.updates(self.images[index], self.labels[index])

    def generators(self) -> list[torch.Generator]:
        return [self.augmenting, self.networks]

    def state_tensors(self) -> list[Tensor]:
        return optimizer_tensors(self.updates.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "updates": self.updates.state_dict(),
            "augmenting": self.augmenting.get_state(),
            "networks": self.networks.get_state(),
            "real_batches": self.real_batches.state_dict(),
            "network_batches": self.network_batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates.load_state_dict(state["updates"])
        self.augmenting.set_state(state["augmenting"])
        self.networks.set_state(state["networks"])
        self.real_batches.load_state_dict(state["real_batches"])
        self.network_batches.load_state_dict(state["network_batches"])
