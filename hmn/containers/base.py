"""What condensing, pruning, evaluation and artifacts need from a data container, and what containers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from hmn.compute import at_once
from hmn.config.containers import ContainerConfig


class RealImages(Protocol):
    """The source of the real images that containers start from."""

    def draw(self, count: int, how: str = "random") -> Tensor:
        """``count`` training images of every class, (C * count, channels, H, W) in [0, 1], by class.

        ``how``: ``random``; ``first`` of the dataset; or ``k_means``, nearest to the centres of a class's clusters in
        an untrained network's features. A class with too few images gives all of them and then repeats them.
        """


def parameter_floats(make: Callable[[], nn.Module]) -> int:
    """How many numbers a module's parameters hold, counted without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


@dataclass(frozen=True, kw_only=True)
class ContainerShape(ABC):
    """Sizes that the dataset fixes; every container's shape adds those that fix the shapes of its parameters.

    Storage is counted in float32 numbers: a container takes ``shared_floats`` however many images it holds, and each
    instance adds ``instance_floats``. From an instance, ``images_per_instance`` images are decoded.
    """

    classes: int
    channels: int
    image_size: int

    @classmethod
    def of(cls, config: ContainerConfig, **data: int) -> Self:
        """The shape for ``data`` (classes, channels, image_size), with values taken by name from a filled ``config``.

        Raises ``ConfigError`` for values that do not suit the data.
        """
        own = {item.name for item in fields(cls)} & vars(config).keys()
        return cls(**data, **{name: getattr(config, name) for name in own})

    @property
    def shared_floats(self) -> int:
        return 0

    @property
    @abstractmethod
    def instance_floats(self) -> int: ...

    @property
    def images_per_instance(self) -> int:
        return 1

    @property
    def tied(self) -> str | None:
        """Why single images cannot be dropped; ``None`` if they can."""
        return None


@dataclass(frozen=True, kw_only=True)
class PixelShape(ContainerShape):
    """A shape with the space of the container's own pixels; ``mean`` and ``std`` are the data's, if normalised."""

    pixel_space: str = "unit"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Container(nn.Module, ABC):
    """A differentiable store of C classes with G images each; image i belongs to class i // G.

    The budget is charged for its parameters: ``instances`` (C, N, ...), one row per instance, and whatever a kind of
    container adds to them. Nothing in a container may normalise over a batch: an image must not change when another
    one is dropped. Fixed transforms are non-persistent buffers.
    """

    NAME: ClassVar[str]

    shape: ContainerShape
    instances: nn.Parameter

    @property
    def classes(self) -> int:
        return self.shape.classes

    @property
    def images_per_class(self) -> int:
        """Images per class, G."""
        return self.instances.shape[1] * self.shape.images_per_instance

    @property
    def tied(self) -> str | None:
        """Why single images cannot be dropped, as :meth:`keep` says when it refuses; ``None`` if they can."""
        return self.shape.tied

    @abstractmethod
    def decode(self, index: Tensor) -> Tensor:
        """Images (n, channels, H, W) of ``index`` (n,), differentiable.

        0 is black and 1 white; containers without bounds may leave that range.
        """

    @property
    def matched_per_class(self) -> int:
        """How many images of each class condensing chooses from; differs from G where it sees other forms of them."""
        return self.images_per_class

    def decode_matched(self, index: Tensor) -> Tensor:
        """Like :meth:`decode`, for the images that condensing sees: ``index`` // ``matched_per_class`` is the class."""
        return self.decode(index)

    def views(self) -> Tensor:
        """Sets of the images that condensing sees, (v, n) on the host; a student's batch is drawn from one set."""
        return torch.arange(self.classes * self.matched_per_class)[None]

    @abstractmethod
    def initialise(self, generator: torch.Generator, config: Any, real: RealImages) -> None:
        """Set all parameters to their starting values by ``config.init``; ``config`` is the container's own section.

        With ``fit_real`` they start at random and are fitted to real images afterwards.
        """

    def tiers(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by tier; logs, gradient norms and learning rates are per tier."""
        return {"instances": [self.instances]}

    def memory_tiers(self) -> frozenset[str]:
        """The tiers that are memories (they take ``memory_lr``); the others are network weights (``weights_lr``)."""
        return frozenset(self.tiers())

    def class_parameters(self) -> list[nn.Parameter]:
        """The parameters whose first axis is the class: a step for one class must not move another class's rows."""
        return [self.instances]

    def penalty(self) -> Tensor | None:
        """A scalar that condensing adds to the loss at every step, or ``None``."""
        return None

    def project(self) -> None:
        """Bring the parameters back to valid values; called before every fresh network."""

    def finish(self) -> None:
        """Bring a condensed container into the form that is kept; called once, before anything judges it."""

    def keep(self, index: Tensor) -> None:
        """Keep only the images ``index`` (n,).

        Raises ``ValueError`` if images are tied, or unless all classes keep equally many, at least one.
        """
        if self.tied is not None:
            raise ValueError(f"{self.NAME}: {self.tied}")
        rows = self.kept_rows(index)
        kept = self.instances.detach().flatten(0, 1)[rows]
        self.instances = nn.Parameter(kept.unflatten(0, (self.classes, -1)).clone())

    def kept_rows(self, index: Tensor) -> Tensor:
        """``index``, sorted and unique. Raises ``ValueError`` unless all classes keep equally many, at least one."""
        index = index.unique()
        counts = torch.bincount(index // self.images_per_class, minlength=self.classes)
        if counts.min() < 1 or counts.min() != counts.max():
            raise ValueError("every class must keep the same number of images, at least one")
        return index

    def tier_floats(self) -> dict[str, int]:
        """The float32 numbers that each tier takes in the form that is kept; by default, all of its parameters."""
        return {name: sum(p.numel() for p in parameters) for name, parameters in self.tiers().items()}

    def storage_floats(self) -> int:
        """The float32 numbers that the budget is charged for."""
        return sum(self.tier_floats().values())

    def specification(self) -> dict[str, Any]:
        """Plain values from which :func:`hmn.containers.rebuild` makes an empty container of the same shape."""
        shape = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.shape).items()}
        return {"name": self.NAME, "images_per_class": self.images_per_class, **shape}


@torch.no_grad()
def decode_all(container: Container) -> tuple[Tensor, Tensor]:
    """All images (N, channels, H, W) of a container, 0 black and 1 white, and their labels (N,), on its device."""
    device = next(container.parameters()).device
    index = torch.arange(container.classes * container.images_per_class, device=device)
    images = torch.cat([container.decode(part) for part in index.split(at_once(1024, container.shape.image_size))])
    return images, index // container.images_per_class


class PixelSpace(nn.Module):
    """The map between a container's own pixels and those of images, where 0 is black and 1 white.

    Normalised pixels are affine in them, with the dataset's constants, which cost no budget.
    """

    def __init__(self, shape: PixelShape) -> None:
        super().__init__()
        self.normalised = shape.pixel_space == "normalised"
        mean, std = (shape.mean, shape.std) if self.normalised else (None, None)
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(-1, 1, 1), persistent=False)

    def to_images(self, pixels: Tensor) -> Tensor:
        return pixels * self.std + self.mean if self.normalised else pixels

    def from_images(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std if self.normalised else images

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """N(0, 1) in normalised space; in [0, 1], clamped N(0.5, 1/16), as in IDC."""
        values = torch.randn(shape, generator=generator, device=generator.device)
        return values if self.normalised else (values / 4 + 0.5).clamp(0, 1)
