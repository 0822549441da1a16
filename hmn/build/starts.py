"""What a container starts from: random numbers, real images, a fit to real images, or a kept set."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from hmn import artifacts
from hmn.build.workshop import Workshop
from hmn.config.containers import KEPT, ContainerConfig
from hmn.containers.base import Container
from hmn.containers.fit import fit_real
from hmn.data.training_images import TrainingImages
from hmn.errors import DataError
from hmn.networks import initialise
from hmn.seeding import generator
from hmn.training import features_of


def start(shop: Workshop, container: Container) -> None:
    """Fill ``container`` as ``container.init`` says, except for the fit of ``fit_real``, which :func:`fit` does.

    Raises ``DataError`` for a kept set that has other classes or pixels normalised with other statistics.
    """
    settings, device = shop.config.container, shop.compute.device
    if settings.init == KEPT:
        kept = artifacts.load_condensed(settings.start)
        _check_kept(shop, container, kept.card["data"])
        container.load_state_dict(kept.container.state_dict())
    else:
        real = _training_images(shop, generator(shop.config.seed, "container", "real", device=device))
        container.initialise(generator(shop.config.seed, "container", device=device), settings, real)


def fit(shop: Workshop, container: Container) -> float:
    """Fit ``container`` to real images (``fit_real``); returns the mean squared error of pixels in [0, 1]."""
    settings = shop.config.container
    stream = generator(shop.config.seed, "fit", device=shop.compute.device)
    how = {"random": "random", "k_means": "k_means_of_pixels"}[settings.fit_images]
    index = _training_images(shop, stream).choose(container.images_per_class, how)
    with shop.checkpoints.timed("fit"):
        return fit_real(
            container,
            shop.data.train.images[index],
            steps=settings.fit_steps,
            batch=settings.fit_batch,
            lr=settings.fit_learning_rate,
            weights_lr=settings.fit_weights_lr,
            generator=stream,
            checkpoints=shop.checkpoints,
        )


def how_started(settings: ContainerConfig, artifact: str | None) -> dict[str, Any]:
    """How the container was started, for the card; ``artifact`` is the checksum of a kept set."""
    if settings.init == KEPT:
        return {"init": settings.init, "sha256": artifact}
    fit = dataclasses.asdict(settings) if settings.init == "fit_real" else {}
    return {"init": settings.init} | {name: value for name, value in fit.items() if name.startswith("fit_")}


def _training_images(shop: Workshop, stream: torch.Generator) -> TrainingImages:
    """The real images that containers start from; ``k_means`` clusters a fresh network's features, as in DREAM."""
    train, device = shop.data.train, shop.compute.device

    @functools.cache
    def network() -> nn.Module:
        fresh = generator(shop.config.seed, "container", "features", device=device)
        return initialise(shop.build().to(device), fresh)

    return TrainingImages(
        train.images,
        train.labels,
        shop.data.class_names,
        stream,
        features=lambda images: features_of(network(), images, shop.normalise),
    )


def _check_kept(shop: Workshop, container: Container, kept: dict[str, Any]) -> None:
    """Refuse a set of other classes, or one whose pixels are normalised with statistics other than this dataset's."""
    normalised = getattr(container.shape, "pixel_space", None) == "normalised"
    own = {"class_names": list(shop.data.class_names)}
    own |= {"mean": list(shop.data.mean), "std": list(shop.data.std)} if normalised else {}
    for key, value in own.items():
        if kept[key] != value:
            named = f"container.start={shop.config.container.start}"
            raise DataError(f"{named}: its {key} is {kept[key]}, but this run's dataset has {value}")
