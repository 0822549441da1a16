"""The real side of class matching: the networks and the real batches that a step uses, drawn during the run.

For each step a side first makes its choice, on the host, and passes it on as tensors. All that follows from the choice
is device work only, so that it can be replayed as one CUDA graph. Sides differ in what their networks train on: real
images (IDC), synthetic images (DC and DSA), or nothing (DM).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hmn.capture import Replay
from hmn.compute import Compute
from hmn.config import GradientMatchingConfig
from hmn.config.objectives import ClassMatchingConfig, SyntheticGradientConfig
from hmn.data import augment
from hmn.data.datasets import RealData
from hmn.data.kmeans import nearest_to_centres
from hmn.data.preprocess import Normalise
from hmn.data.sampling import per_class, permutations, whole_split
from hmn.network_update import NetworkUpdate, TrainingStep, UpdateRecipe
from hmn.networks import Builder, initialise
from hmn.objectives.distance import Parameters
from hmn.seeding import derived_seed, generator
from hmn.training import features_of

Choice = dict[str, Tensor]
Synthetic = Callable[[], tuple[Tensor, Tensor]]  # all decoded images (N, channels, H, W) and labels (N,), detached


class RealSide(ABC):
    """What a condensation needs from the real images. By default, the device draws nothing and no network trains."""

    USES_IMAGES: ClassVar[bool] = True  # whether each step reads real images; if not, they were used beforehand

    @abstractmethod
    def begin(self, step: int) -> None:
        """Prepare the network of matching step ``step``, which never decreases from one call to the next."""

    @abstractmethod
    def choose(self, classes: Tensor) -> Choice:
        """Choose what the next match of ``classes`` (k,), a tensor on the host, uses."""

    @abstractmethod
    def parameters(self, choice: Choice) -> Parameters:
        """The parameters of the matched network."""

    @abstractmethod
    def draw(self, choice: Choice, count: int) -> augment.Draw:
        """One siamese augmentation for each of the chosen classes, (k,)."""

    @abstractmethod
    def real(self, choice: Choice, drawn: augment.Draw, part: slice) -> Tensor | Parameters:
        """The real side of the chosen classes ``part``: augmented images (k, B, ...), or tensors (k, ...) by name."""

    def choose_update(self) -> Choice:
        """Choose what the update after the step's last match uses."""
        return {}

    def update(self, choice: Choice, synthetic: Synthetic | None = None) -> None:
        """Update the network before the next step; ``synthetic`` is called if it trains on the synthetic set."""
        return

    def generators(self) -> list[torch.Generator]:
        """Generators that the device draws from after a choice."""
        return []

    def state_tensors(self) -> list[Tensor]:
        """Tensors that an update changes in place."""
        return []

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def update_of(side: RealSide, synthetic: Synthetic | None = None, *, record: bool) -> Callable[[Choice], Choice]:
    """``side.update`` as a function of the choice. With ``record``, a GPU replays it; ``synthetic`` must then be device
    work only, too."""

    def update(choice: Choice) -> Choice:
        side.update(choice, synthetic)
        return {}

    return Replay(update, side.state_tensors, side.generators()) if record else update


class ImageSide(RealSide):
    """Draws real batches and siamese augmentations during the run, and holds one network.

    Subclasses decide when the network is drawn anew and what it trains on. It always stays in the same memory, because
    a captured graph keeps using that.
    """

    def __init__(
        self,
        real: RealData,
        config: ClassMatchingConfig,
        *,
        build: Builder,
        compute: Compute,
        seed: int,
        flip: bool,
        stream: str = "condense",
    ) -> None:
        self.config, self.seed, self.stream = config, seed, stream
        self.images, self.labels = real.train.images, real.train.labels
        device = compute.device
        self.normalise = Normalise(real.mean, real.std, device)
        self.strategy = augment.usable(config.strategy, flip)
        self.augmenting = generator(seed, stream, "augment", device=device)
        self.real_batches = per_class(
            self.labels, real.class_names, config.real_batch, generator(seed, stream, "real", device=device)
        )
        self.network = build().to(device, memory_format=torch.channels_last)
        self.networks = torch.Generator(device)  # reseeded for every network, for its weights and then its training

    def renew(self, *names: str | int) -> None:
        """Draw the network's weights anew from the random stream ``names``."""
        self.networks.manual_seed(derived_seed(self.seed, self.stream, *names))
        initialise(self.network, self.networks)

    def choose(self, classes: Tensor) -> Choice:
        return {"real": self.real_batches.draw(classes)}

    def parameters(self, choice: Choice) -> Parameters:
        return {name: value.detach() for name, value in self.network.named_parameters()}

    def draw(self, choice: Choice, count: int) -> augment.Draw:
        rule = self.config.augmentation_rule
        return augment.draw(self.strategy, count, self.images.shape[-1], self.augmenting, rule=rule, one_choice=False)

    def real(self, choice: Choice, drawn: augment.Draw, part: slice) -> Tensor | Parameters:
        index = choice["real"][part]
        images = self.normalise(self.images[index].flatten(0, 1))
        return augment.apply(images, drawn[part].repeat(index.shape[1])).unflatten(0, index.shape)

    def generators(self) -> list[torch.Generator]:
        return [self.augmenting]

    def state_dict(self) -> dict[str, Any]:
        return {"augmenting": self.augmenting.get_state(), "real_batches": self.real_batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.augmenting.set_state(state["augmenting"])
        self.real_batches.load_state_dict(state["real_batches"])


class UntrainedSide(ImageSide):
    """A fresh network for every step, which never trains (DM, algorithm 1)."""

    def begin(self, step: int) -> None:
        self.renew("matched_network", step)


class TrainedSide(ImageSide):
    """A fresh network every ``inner_steps`` steps, which ``updates`` trains in between."""

    updates: NetworkUpdate

    def begin(self, step: int) -> None:
        outer, inner = divmod(step, self.config.inner_steps)
        if inner == 0:
            self.renew("matched_network", outer)

    def renew(self, *names: str | int) -> None:
        super().renew(*names)
        for state in self.updates.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def generators(self) -> list[torch.Generator]:
        return [*super().generators(), self.networks]

    def state_tensors(self) -> list[Tensor]:
        return self.updates.tensors()

    def state_dict(self) -> dict[str, Any]:
        own = {"updates": self.updates.state_dict(), "networks": self.networks.get_state()}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.updates.load_state_dict(state["updates"])
        self.networks.set_state(state["networks"])


class LiveSide(TrainedSide):
    """Networks train on real images after every matching step (IDC, algorithm 1).

    With ``k_means_interval``, real batches are not random (DREAM). Every that many steps of a network's life, the
    images of each class are clustered by their features in that network. The batch consists of those nearest to the
    centres.
    """

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
        super().__init__(real, config, build=build, compute=compute, seed=seed, flip=flip, stream=stream)
        device = compute.device
        updating = generator(seed, stream, "network", device=device)
        self.network_batches = whole_split(len(self.labels), config.network_batch, updating)
        self.batches = math.ceil(config.network_samples / self.network_batches.batch)
        recipe = UpdateRecipe(
            batch=self.network_batches.batch,
            lr=config.network_lr,
            momentum=config.network_momentum,
            weight_decay=config.network_weight_decay,
            strategy=augment.usable(config.network_strategy, flip),
            cutmix=config.network_cutmix,
        )
        self.updates = NetworkUpdate(self.network, train, self.normalise, self.networks, recipe)
        self.clustering = generator(seed, stream, "clusters", device=device)
        self.nearest = torch.empty(0, dtype=torch.int64)  # (C, real_batch) indices of training images, on the device

    def begin(self, step: int) -> None:
        super().begin(step)
        interval = self.config.k_means_interval
        if interval is not None and step % self.config.inner_steps % interval == 0:
            self.nearest = self._nearest()

    def _nearest(self) -> Tensor:
        """Indices (C, real_batch) of the images nearest to the centres of ``real_batch`` clusters per class."""
        found = []
        # The split is ordered by class.
        for start, size in zip(self.real_batches.starts.tolist(), self.real_batches.sizes.tolist(), strict=True):
            features = features_of(self.network, self.images[start : start + size], self.normalise)
            found.append(start + nearest_to_centres(features, self.config.real_batch, self.clustering))
        return torch.stack(found)

    def choose(self, classes: Tensor) -> Choice:
        if self.config.k_means_interval is None:
            return super().choose(classes)
        return {"real": self.nearest[classes.to(self.nearest.device, non_blocking=True)]}

    def choose_update(self) -> Choice:
        return {"update": self.network_batches.batches(self.batches)} if self.batches else {}

    def update(self, choice: Choice, synthetic: Synthetic | None = None) -> None:
        if "update" in choice:
            self.updates.on_batches(self.images, self.labels, choice["update"])

    def state_dict(self) -> dict[str, Any]:
        clusters = {"nearest": self.nearest, "clustering": self.clustering.get_state()}
        return super().state_dict() | {"network_batches": self.network_batches.state_dict()} | clusters

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.network_batches.load_state_dict(state["network_batches"])
        self.nearest = state["nearest"].to(self.images.device)
        self.clustering.set_state(state["clustering"])


class SyntheticSide(TrainedSide):
    """Networks train on the synthetic set between the matching steps of an outer step (DC, algorithm 1).

    An update makes ``network_epochs`` passes over all ``count`` synthetic images, by SGD without momentum. There is
    none after the last step, when the network is discarded. DSA augments these images too, each with its own
    parameters.
    """

    def __init__(
        self,
        real: RealData,
        config: SyntheticGradientConfig,
        *,
        count: int,
        build: Builder,
        train: TrainingStep,
        compute: Compute,
        seed: int,
        flip: bool,
    ) -> None:
        super().__init__(real, config, build=build, compute=compute, seed=seed, flip=flip)
        self.count = count
        self.order = generator(seed, self.stream, "network", device=compute.device)
        recipe = UpdateRecipe(
            batch=min(config.network_batch, count),
            lr=config.network_lr,
            momentum=0.0,
            weight_decay=0.0,
            strategy=self.strategy,
            cutmix=0.0,
            rule=config.augmentation_rule,
        )
        self.updates = NetworkUpdate(self.network, train, self.normalise, self.networks, recipe)
        self.last = False

    def begin(self, step: int) -> None:
        super().begin(step)
        self.last = (step + 1) % self.config.inner_steps == 0

    def choose_update(self) -> Choice:
        if self.last or not self.config.network_epochs:
            return {}
        return {"update": permutations([self.config.network_epochs], self.count, self.order)}

    def update(self, choice: Choice, synthetic: Synthetic | None = None) -> None:
        if "update" not in choice:
            return
        images, labels = synthetic()
        for epoch in choice["update"]:
            for index in epoch.split(self.updates.recipe.batch):
                self.updates(images[index], labels[index])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"order": self.order.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.order.set_state(state["order"])
