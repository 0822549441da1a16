"""The plan of a run, made before any data is read: shapes, storage, counts, cost and run id."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hmn import networks
from hmn.artifacts import check_together, read_card, tensors_file
from hmn.bank import network_bytes
from hmn.compute import device_of
from hmn.config import Config, DatasetConfig, require
from hmn.config.identity import digest, scientific
from hmn.config.objectives import SyntheticGradientConfig
from hmn.config.overrides import key_of
from hmn.config.unread import Condensed, keys_not_read, unread
from hmn.containers import KINDS, Storage, storage
from hmn.containers.base import Container, ContainerShape, PixelShape
from hmn.cost import Step, step_flops, training_flops
from hmn.data import datasets
from hmn.errors import ArtifactError
from hmn.plan_checks import check_networks, check_pairs, check_start

# Training images per class before any are held out. The size of other datasets is unknown until they are read.
TRAIN_IMAGES = {"mnist": 6000, "fashion_mnist": 6000, "svhn": 7326, "cifar100": 500}
TRAIN_IMAGES |= {"tiny_imagenet": 500, "imagenet10": 1300, "digits": 144}
OTHER_TRAIN_IMAGES = 5000  # CIFAR-10's


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked configuration with every automatic choice made."""

    config: Config
    data: datasets.Shape
    storage: Storage | None  # None: the mode stores nothing
    # SHA-256 of the kept tensors that the run evaluates or starts from; several are sorted, as their order does not
    # matter
    artifact: str | list[str] | None = None
    kept_images: int = 0  # number of images, over all classes, in the kept sets that are evaluated
    not_read: tuple[str, ...] = ()  # settings that the user gave but another setting makes unused, each with that one

    @cached_property
    def run_id(self) -> str:
        """A readable prefix and a hash of everything that the result depends on."""
        config = self.config
        # A dataset folder's name may hold characters that file names or W&B do not accept.
        head = [re.sub(r"[^\w.-]", "_", datasets.display_name(config.dataset), flags=re.ASCII)]
        if config.mode in ("run", "random_subset"):
            head.append(f"ipc{config.memory.images_per_class}")
        name = config.container.name if config.mode == "run" else config.mode
        head.append(f"{name}_{config.container.method}" if config.kind == "coreset" else name)
        return "-".join([*head, digest(scientific(config) | {"artifact": self.artifact})])

    @property
    def folder(self) -> Path:
        return Path(self.config.paths.runs_dir) / self.run_id

    @property
    def build(self) -> networks.Builder:
        shape = dataclasses.asdict(self.data)
        return networks.builder(self.config.network, **shape)

    @cached_property
    def shape(self) -> ContainerShape:
        """Shape of the container, without the dataset's statistics."""
        config = self.config.container
        return KINDS[config.name].shape.of(config, **dataclasses.asdict(self.data))

    def container(
        self, instances: int, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> Container:
        """An empty container; one that stores normalised pixels takes the data's ``mean`` and ``std``."""
        shape = self.shape
        if isinstance(shape, PixelShape) and shape.pixel_space == "normalised":
            shape = dataclasses.replace(shape, mean=mean, std=std)
        return KINDS[self.config.container.name].container(shape, instances)

    @property
    def pixels(self) -> tuple[int, int, int]:
        return (self.data.channels, self.data.image_size, self.data.image_size)

    @cached_property
    def training_flops(self) -> int:
        return training_flops(self.build, self.pixels)

    @cached_property
    def step_flops(self) -> Step:
        """FLOPs of one container step, in which the objective sees the images that the container holds over budget."""
        with torch.device("meta"):
            images = self.container(self.storage.over_budget_instances).matched_per_class
        objective, classes = self.config.objective, self.data.classes
        return step_flops(objective, self.build, self.pixels, classes=classes, images_per_class=images)

    @property
    def expert_flops(self) -> int:
        """FLOPs of training the experts that trajectory matching aims at, if none are kept yet."""
        experts = getattr(self.config.objective, "experts", None)
        return int(experts.count * experts.epochs * self.train_images * self.training_flops) if experts else 0

    @property
    def bank_bytes(self) -> int:
        """Size of the snapshot bank on the disk, which other runs of these data may have made; 0 without one."""
        bank = getattr(self.config.objective, "bank", None)
        with torch.device("meta"):
            return bank.networks * network_bytes(self.build(), bank, self.data.classes) if bank else 0

    @property
    def train_images(self) -> float:
        """Expected number of training images over all classes, without those held out."""
        dataset = self.config.dataset
        per_class = TRAIN_IMAGES.get(dataset.kind, OTHER_TRAIN_IMAGES)
        return self.data.classes * per_class * (1 - dataset.held_out_fraction)

    @property
    def matching_steps(self) -> int:
        return self.config.objective.outer_steps * self.config.objective.inner_steps

    @property
    def expected_flops(self) -> float:
        """FLOPs of the whole run without scoring, the beta search and decoders; decides whether compiling pays off."""
        if self.config.mode == "experts":
            return float(self.expert_flops)
        judging = self.config.evaluation.networks * self.epochs * self.judging_images * self.training_flops
        return float(judging + self.making_flops)

    @property
    def making_flops(self) -> float:
        """FLOPs of condensing, or of the networks that choose a coreset, which may train for longer than the judges."""
        if self.config.condenses:
            steps = (self.step_flops.matching + self.step_flops.update) * self.matching_steps
            return float(steps + self.expert_flops)
        if self.storage is None:
            return 0.0
        container = self.config.container
        epochs = (container.networks or 0) * (container.epochs or 0)
        return float(epochs * self.train_images * self.training_flops)

    @property
    def judging_images(self) -> float:
        """Number of images that a judging network sees in an epoch; if several sets are judged, summed over them."""
        config, classes = self.config, self.data.classes
        match config.mode:
            case "run":
                return classes * self.storage.images_per_class
            case "random_subset":
                return classes * config.memory.images_per_class
            case "evaluate":
                return self.kept_images
            case "redundancy":
                return self.kept_images * sum(1 - share for share in config.redundancy.drop)
            case _:
                return self.train_images

    @property
    def epochs(self) -> int:
        evaluation = self.config.evaluation
        if self.config.mode == "full_data" and evaluation.full_data_epochs:
            return evaluation.full_data_epochs
        return evaluation.epochs

    def summary(self) -> dict[str, Any]:
        """The plan as plain values: floats count stored float32 numbers, FLOPs count a multiply-add as 2."""
        stored = self.storage
        with torch.device("meta"):
            container = self.container(stored.instances)
            network = self.build()
        making: dict[str, Any] = {"not_used": "objective, pruning, evaluation.curve_points"}
        if self.config.condenses:
            making = {
                "matching_steps": self.matching_steps,
                "matching_step_flops": self.step_flops.matching,
                "network_update_flops": self.step_flops.update,
                **({"expert_training_flops": self.expert_flops} if self.expert_flops else {}),
                **({"bank_bytes": self.bank_bytes} if self.bank_bytes else {}),
            }
        return {
            "run_id": self.run_id,
            "dataset": {"name": datasets.display_name(self.config.dataset), **dataclasses.asdict(self.data)},
            "network": networks.full_name(self.config.network, self.data.image_size),
            "network_parameters": sum(parameter.numel() for parameter in network.parameters()),
            "container": dataclasses.asdict(self.config.container),
            "budget_floats": stored.budget_floats,
            "shared_floats": stored.shared_floats,
            "instance_floats": stored.instance_floats,
            "stored_floats": stored.stored_floats(self.data.classes),
            "tier_floats": container.tier_floats(),
            "images_per_class": stored.images_per_class,
            "over_budget_images_per_class": stored.over_budget_images_per_class,
            **making,
            **({"not_read": list(self.not_read)} if self.not_read else {}),
            "evaluation_steps_per_network": self.epochs
            * math.ceil(stored.images_per_class * self.data.classes / self.config.evaluation.batch),
        }

    def text(self, style: str) -> str:
        """The summary as ``text``, a line per figure, or as ``json``."""
        summary = self.summary()
        if style == "json":
            return json.dumps(summary, indent=2)
        lines = []
        for key, value in summary.items():
            if isinstance(value, dict):
                value = "  ".join(f"{name}={_number(item)}" for name, item in value.items())
            if isinstance(value, list):
                value = "  ".join(value)
            lines.append(f"{key:30} {_number(value)}")
        return "\n".join(lines)


def make_plan(config: Config, typed: Sequence[str] = (), *, here: bool = True) -> Plan:
    """Fill in presets and count the storage. Raises ``ConfigError`` or ``DataError`` for what cannot be run.

    ``typed`` are the overrides that the user gave. A run that evaluates artifacts uses their dataset, except for what
    ``typed`` overrides. Whether the configured device exists is checked only if the run is to take place ``here``.
    """
    artifact, cards = None, {}
    if config.judges:
        cards = {path: read_card(path) for path in config.artifacts}
        check_together(cards)
        artifact = sorted(card["sha256"] for card in cards.values())
        artifact = artifact if len(artifact) > 1 else artifact[0]
        config = dataclasses.replace(config, dataset=_evaluated_dataset(config.dataset, cards, typed))
    if config.dataset.kind == "imagenet10" and config.mode != "plan":  # a plan knows the shape without the images
        require("dataset.root", bool(config.dataset.root), "null", "given for dataset=imagenet10")
    data = datasets.peek(config.dataset, Path(config.paths.data_dir))
    if config.dataset.channels is None:  # a run is the same, whether the number is given or found
        config = dataclasses.replace(config, dataset=dataclasses.replace(config.dataset, channels=data.channels))
    for path, card in cards.items():
        for name in ("channels", "image_size"):
            found, kept = getattr(data, name), card["data"][name]
            require(f"dataset.{name}", found == kept, found, f"{kept}, as in artifact={path}")
    stored = None
    if config.mode != "plan" and here:
        device_of(config.compute)  # report a missing GPU before making a folder or reading data
    if config.mode in ("run", "plan"):
        ipc, shape = config.memory.images_per_class, dataclasses.asdict(data)
        kind = KINDS[config.container.name]
        # A plan describes the run itself, so it shares the run's id.
        filled = kind.fill(config.container, images_per_class=ipc, **shape)
        config = dataclasses.replace(config, container=filled, mode="run")
        if isinstance(config.objective, SyntheticGradientConfig) and config.condenses:
            config = dataclasses.replace(config, objective=config.objective.with_loops(ipc))
        over_budget = config.pruning.over_budget if config.condenses else 0.0
        stored = storage(kind.shape.of(filled, **shape), ipc, over_budget)
    start = None
    if config.condenses and config.container.start is not None:
        start = read_card(tensors_file(config.container.start, "container.start"))
        artifact = start["sha256"]
    plan = Plan(config, data, stored, artifact, sum(map(_images, cards.values())))
    _ = plan.build  # checks the network's depth against the image size
    condensed = None
    if config.condenses:
        with torch.device("meta"):
            container = plan.container(plan.storage.over_budget_instances)
        networks = bool(container.tiers().keys() - container.memory_tiers())
        condensed = Condensed(networks, container.matched_per_class, cut=plan.storage.cut_per_class)
        check_pairs(config, container)
        if start is not None:
            mean, std = (tuple(start["data"][name]) for name in ("mean", "std"))
            with torch.device("meta"):
                container = plan.container(plan.storage.over_budget_instances, mean, std)
            check_start(config, container, start)
    if config.condenses or config.mode == "experts":
        with torch.device("meta"):
            check_networks(config, plan.build())
    return dataclasses.replace(plan, not_read=keys_not_read(unread(config, condensed), typed))


def _images(card: dict[str, Any]) -> int:
    """Number of images in the set of ``card``; 0 if the card is damaged, which is reported when the set is read."""
    container = card["container"]
    return container.get("classes", 0) * container.get("images_per_class", 0)


def _evaluated_dataset(
    given: DatasetConfig, cards: Mapping[str, dict[str, Any]], typed: Sequence[str]
) -> DatasetConfig:
    """The artifacts' own dataset, with the fields that were ``typed`` replaced.

    For several artifacts its classes run from the first to the last that any of them was condensed from. Raises
    ``ArtifactError`` if they come from different datasets and no dataset was typed.
    """
    typed_keys = list(map(key_of, typed))
    if "dataset" in typed_keys:
        return given
    (first_path, first), *others = ((path, _dataset_of(path, card)) for path, card in cards.items())
    spans = [first.class_range]
    for path, other in others:
        here, there = (dataclasses.replace(config, class_range=None).identity() for config in (first, other))
        if differing := sorted(key for key in here | there if here.get(key) != there.get(key)):
            keys = ", ".join(f"dataset.{key}" for key in differing)
            raise ArtifactError(
                f"artifact={path}: {keys} must match artifact={first_path}; or name the dataset with dataset=NAME"
            )
        spans.append(other.class_range)
    fields = [key.removeprefix("dataset.") for key in typed_keys if key.startswith("dataset.")]
    changes = {name: getattr(given, name) for name in fields}
    whole = [min(span[0] for span in spans), max(span[1] for span in spans)] if all(spans) else None
    return dataclasses.replace(first, **{"class_range": whole} | changes)


def _dataset_of(path: str, card: dict[str, Any]) -> DatasetConfig:
    try:
        return DatasetConfig(**card["data"]["config"])
    except (KeyError, TypeError) as error:
        reason = "from another version of this program; name the dataset with dataset=NAME"
        raise ArtifactError(f"artifact={path}: its data settings ({error}) are {reason}") from None


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
