"""The stages of one run: condense, prune, evaluate, keep; and the references that skip some of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmn import (
    artifacts,
    build,
    compute,
    coresets,
    distributed,
    experts,
    networks,
    pictures,
    prune,
    tracking,
)
from hmn.checkpoint import Checkpoints
from hmn.config.identity import digest
from hmn.containers.base import Container, decode_all
from hmn.data import datasets
from hmn.data.preprocess import Normalise, unit_range
from hmn.data.sampling import random_subset
from hmn.data.splits import Split, listing
from hmn.errors import DataError
from hmn.evaluate import Accuracies, Judge, evaluate, quick_accuracy, recipe_of, tiny_rest
from hmn.files import atomic_write
from hmn.making import Making
from hmn.network_update import training_step
from hmn.plan import Plan
from hmn.seeding import derived_seed, generator
from hmn.training import accuracy

# What a coreset's card says about the indices of its images.
INDEX_INTO = (
    "the training images, ordered by class and within a class as the data set has them, without those that "
    "dataset.held_out_fraction holds out; data.fingerprint is of these images"
)


class Session:
    """A run in progress: its plan, its data on the device, and where its state and measurements go."""

    def __init__(
        self,
        plan: Plan,
        data: datasets.RealData,
        chosen: compute.Compute,
        checkpoints: Checkpoints,
        tracker: tracking.Tracker,
        folder: Path,
        provenance: dict[str, Any],
    ) -> None:
        self.plan, self.config, self.data, self.compute = plan, plan.config, data, chosen
        self.checkpoints, self.tracker, self.folder, self.provenance = checkpoints, tracker, folder, provenance
        recipe = recipe_of(self.config.evaluation, flip=self.config.dataset.flip)
        self.train_step = training_step(plan.build().to(chosen.device), chosen)
        self.judge = Judge(
            build=plan.build,
            step=self.train_step,
            normalise=Normalise(data.mean, data.std, chosen.device),
            recipe=dataclasses.replace(recipe, epochs=plan.epochs),
            seed=self.config.seed,
            checkpoints=checkpoints,
            together=chosen.together(max(self.config.evaluation.networks, self.config.pruning.score_networks)),
        )
        self.workshop = build.Workshop(
            config=plan.config,
            data=data,
            build=plan.build,
            compute=chosen,
            train_step=self.train_step,
            normalise=self.judge.normalise,
            checkpoints=checkpoints,
        )

    def condense_and_evaluate(self) -> dict[str, Any]:
        """Condense over budget, prune down to the budget, evaluate, keep."""
        config, stored = self.config, self.plan.storage
        mean, std = tuple(self.data.mean), tuple(self.data.std)
        container = self.plan.container(stored.over_budget_instances, mean, std).to(self.compute.device)
        # The later stages record their metrics again, whether they are repeated or read back.
        for step_key in ("prune/step", "prune/candidate"):
            self.tracker.rewind(step_key, -1)
        condensed = self._making().make(container)
        over_budget = Split(*decode_all(container))
        cut = stored.cut_per_class
        pruning = {"over_budget": config.pruning.over_budget, "cut_per_class": cut}
        if cut:
            index, chosen = self._choose(over_budget)
            container.keep(index)
            pruning |= chosen
        artifacts.round_to(container, config.memory.number)
        kept = Split(*decode_all(container))
        if config.evaluation.curve_points:
            pruned = self._held_out_accuracy(kept, "curve_pruned")
            if cut:  # else the last point of the curve has judged this set
                self.tracker.log({"curve/pruned_accuracy": pruned}, step_key="prune/step", step=0)
            pruning["held_out_accuracy"] = pruned
        start = build.how_started(config.container, self.plan.artifact)
        made = {"start": start, "objective": dataclasses.asdict(config.objective), "pruning": pruning}
        return {
            **self._evaluate_and_keep(container, kept, made),
            "over_budget_images_per_class": stored.over_budget_images_per_class,
            "pruning": pruning,
            **condensed,
        }

    def _making(self) -> Making:
        return Making(
            plan=self.plan,
            shop=self.workshop,
            tracker=self.tracker,
            code=self.provenance["code"],
            judged=self._held_out_accuracy,
        )

    def _held_out_accuracy(self, images: Split, stream: str) -> float:
        """Held-out accuracy of ``images``, for the point of the accuracy curve that ``stream`` names."""
        return quick_accuracy(self.judge, images, self.data.held_out, self.config.evaluation.curve_epochs, stream)

    def choose_and_evaluate(self) -> dict[str, Any]:
        """Choose as many real images as the budget pays for, evaluate, keep."""
        settings, count = self.config.container, self.plan.storage.instances
        train = self.data.train
        with self.checkpoints.timed("choose"):
            index = coresets.choose(self.judge, train, self.data.class_names, count, settings, self._scores_folder())
        distributed.copy_first_([index])  # another GPU may not reproduce the features bit for bit
        container = self.plan.container(count).to(self.compute.device)
        container.hold(unit_range(train.images[index]))
        artifacts.round_to(container, self.config.memory.number)
        made = {"coreset": dataclasses.asdict(settings) | {"index_into": INDEX_INTO, "index": index.tolist()}}
        return self._evaluate_and_keep(container, Split(*decode_all(container)), made)

    def _scores_folder(self) -> Path:
        """Folder shared by the runs that learn the same from the full training set."""
        settings, recipe = self.config.container, dataclasses.asdict(self.judge.recipe)
        identity = {
            "data": self.data.fingerprint,
            "mean": self.data.mean,
            "std": self.data.std,
            "network": dataclasses.asdict(self.config.network),
            "recipe": recipe | {"epochs": settings.epochs},
            "networks": settings.networks,
            "seed": self.config.seed,
            "precision": self.compute.precision,
        }
        return Path(self.config.paths.cache_dir) / "coresets" / digest(identity)

    def _evaluate_and_keep(self, container: Container, kept: Split, made: dict[str, Any]) -> dict[str, Any]:
        """Evaluate and keep a container; returns what all results of containers share.

        ``made`` goes into the card and tells how the container was made.
        """
        self._keep_picture(kept.images, kept.labels)
        accuracies = self._evaluate(kept)
        card = self._card(accuracies, made)
        number = self.config.memory.number
        card = distributed.from_first(lambda: artifacts.save(self.folder, container, card, number))
        files = [self.folder / name for name in (artifacts.TENSORS, artifacts.CARD, "condensed.png")]
        self.tracker.log_artifact(self.plan.run_id, files, card)
        return {
            "accuracy": accuracies.as_dict(),
            "images_per_class": str(container.images_per_class),
            "budget_floats": self.plan.storage.budget_floats,
            "stored_floats": container.storage_floats(),
            "stored_bytes": artifacts.stored_bytes(card),
            "tier_floats": container.tier_floats(),
            "artifact_sha256": card["sha256"],
        }

    def _score(self, decoded: Split) -> Tensor:
        """AUM (N,) of the decoded images."""
        settings = self.config.pruning
        with self.checkpoints.timed("score"):
            scores = prune.area_under_margin(
                self.judge, decoded, settings.score, settings.score_networks, settings.score_epochs
            )
        self.tracker.log_histogram("prune/aum", scores, step_key="prune/step", step=0)
        return scores

    def _choose(self, over_budget: Split) -> tuple[Tensor, dict[str, Any]]:
        """Indices of the instances that stay, and a record of how they were chosen."""
        settings, stored = self.config.pruning, self.plan.storage
        scores = self._score(over_budget)
        scores = scores.unflatten(0, (self.plan.data.classes, stored.over_budget_images_per_class))
        chosen: dict[str, Any] = {"score": settings.score, "beta": settings.beta}
        if settings.beta is None:
            with self.checkpoints.timed("search_beta"):
                best, searched = prune.search_beta(
                    self.judge, over_budget, scores, stored.images_per_class, self.data.held_out, settings.search_epochs
                )
            chosen |= {"beta": best, "searched": {str(beta): value for beta, value in searched.items()}}
            for position, (beta, value) in enumerate(searched.items()):
                metrics = {"prune/beta": beta, "prune/held_out_accuracy": value}
                self.tracker.log(metrics, step_key="prune/candidate", step=position)
        self._keep_pruning_picture(over_budget.images, scores, chosen["beta"])
        return prune.kept_images(scores, stored.images_per_class, chosen["beta"]), chosen

    def evaluate_artifacts(self) -> dict[str, Any]:
        """Train fresh networks on a kept set, or on several kept sets that together hold the data's classes."""
        kept, cards = self._kept_images()
        self._keep_picture(kept.images, kept.labels)
        return {
            "accuracy": self._evaluate(kept).as_dict(),
            "images_per_class": _per_class(kept.labels),
            "stored_floats": sum(card["stored_floats"] for card in cards),
            "stored_bytes": sum(map(artifacts.stored_bytes, cards)),
            "artifact_sha256": self.plan.artifact,
        }

    def redundancy(self) -> dict[str, Any]:
        """Test accuracy without the images that networks find easiest (the highest AUM), equally many per class.

        If the accuracy does not change, the images left out were redundant, which is why HMN prunes. Decoded images are
        left out, not instances: the set stores the same, and containers whose images are tied can be measured too.
        """
        kept, (card,) = self._kept_images()
        for step_key in ("prune/step", "redundancy/step"):  # recorded again, whether measured again or read back
            self.tracker.rewind(step_key, -1)
        scores = self._score(kept).unflatten(0, (self.plan.data.classes, -1))
        rows, accuracies = [], []
        for number, share in enumerate(self.config.redundancy.drop):
            count = prune.kept_after(scores.shape[1], share)
            index = prune.kept_images(scores, count, beta=0.0)  # dropped from the easy end only
            found = self._trained_on(kept.select(index), f"keep_{count}")
            metrics = {"redundancy/dropped": share, "redundancy/accuracy": found.mean}
            self.tracker.log(metrics, step_key="redundancy/step", step=number)
            measured = {"mean": found.mean, "std": found.std, "best_mean": found.best_mean, "by_network": found.last}
            rows.append({"dropped": share, "images_per_class": count, **measured})
            accuracies.append(found)
        return {
            "accuracy": accuracies[0].as_dict(),
            "rows": rows,
            "images_per_class": str(rows[0]["images_per_class"]),
            "stored_floats": card["stored_floats"],
            "stored_bytes": artifacts.stored_bytes(card),
            "set": f"coreset {card['coreset']['method']}" if "coreset" in card else card["container"]["name"],
            "artifact_sha256": self.plan.artifact,
        }

    def _kept_images(self) -> tuple[Split, list[dict[str, Any]]]:
        """The images of the artifacts, with the data's labels, and the cards; the judge then normalises as they say."""
        sets = [artifacts.load_condensed(path) for path in self.config.artifacts]
        cards = [kept.card for kept in sets]
        held = {name for card in cards for name in card["data"]["class_names"]}
        if differing := held ^ set(self.data.class_names):
            told = f"only one of the two has {listing(sorted(differing))}"
            paths = ",".join(self.config.artifacts)
            raise DataError(f"artifact={paths}: its classes are not those of {self.data.name}: {told}")
        images, labels = artifacts.joined(sets, self.data.class_names)
        if any(card["data"]["fingerprint"] != self.data.fingerprint_of(card["data"]["class_names"]) for card in cards):
            print(f"{self.data.name} is not bit for bit the data this set was condensed from")
        # The sets were condensed for their own normalisation, whatever statistics the data at hand have.
        mean, std = cards[0]["data"]["mean"], cards[0]["data"]["std"]
        self.judge = dataclasses.replace(self.judge, normalise=Normalise(mean, std, self.compute.device))
        return Split(images, labels).to(self.compute.device), cards

    def experts(self) -> dict[str, Any]:
        """Train the experts of trajectory matching that are not kept yet, and test every expert at its last epoch."""
        settings, test, last = self.config.objective.experts, self.data.test, []
        network = self.plan.build().to(self.compute.device)
        for path in build.experts(self.workshop):
            network.load_state_dict(experts.read(path, settings.epochs, torch.device("cpu")))
            last.append([float(accuracy(network, test.images, test.labels, self.judge.normalise))])
        seeds = [derived_seed(settings.seed, "experts", number) for number in range(settings.count)]
        found = Accuracies(by_network=last, test_epochs=[settings.epochs], seeds=seeds)
        return {"accuracy": found.as_dict(), **self._all_images()}

    def full_data(self) -> dict[str, Any]:
        """Train on all training images except those held out, which are the images that sets are condensed from."""
        return {"accuracy": self._evaluate(self.data.train).as_dict(), **self._all_images()}

    def _all_images(self) -> dict[str, Any]:
        train = self.data.train
        return {"images_per_class": _per_class(train.labels), "stored_floats": train.images.numel()}

    def random_subset(self) -> dict[str, Any]:
        """Train on as many random real images as the budget pays for, drawn uniformly from each class."""
        count = self.config.memory.images_per_class
        stream = generator(self.config.seed, "random_subset", device=self.compute.device)
        index = random_subset(self.data.train.labels, count, self.data.class_names, stream)
        kept = self.data.train.select(index)
        self._keep_picture(unit_range(kept.images), kept.labels)
        return {
            "accuracy": self._evaluate(kept).as_dict(),
            "images_per_class": str(count),
            "stored_floats": kept.images.numel(),
        }

    def _trained_on(self, train: Split, stream: str) -> Accuracies:
        settings = self.config.evaluation
        if (told := tiny_rest(len(train.labels), self.judge.recipe)) and distributed.first():
            print(told)
        with self.checkpoints.timed("evaluate"):
            return evaluate(self.judge, train, self.data.test, settings.networks, settings.test_points, stream)

    def _evaluate(self, train: Split) -> Accuracies:
        found = self._trained_on(train, "evaluate")
        self.tracker.rewind("evaluate/network", -1)
        for index, value in enumerate(found.last):
            self.tracker.log({"evaluate/accuracy": value}, step_key="evaluate/network", step=index)
        return found

    def _card(self, accuracies: Accuracies, made: dict[str, Any]) -> dict[str, Any]:
        config, data = self.config, self.data
        return {
            "run_id": self.plan.run_id,
            "budget": {
                "images_per_class": config.memory.images_per_class,
                "floats": self.plan.storage.budget_floats,
            },
            "data": {
                "name": data.name,
                "class_names": list(data.class_names),
                "channels": self.plan.data.channels,
                "image_size": self.plan.data.image_size,
                "pixels": "float32, 0 black and 1 white; subtract mean and divide by std per channel before use",
                "mean": list(data.mean),
                "std": list(data.std),
                "fingerprint": data.fingerprint,
                "config": dataclasses.asdict(config.dataset),
            },
            **made,
            "evaluation": {
                "network": networks.full_name(config.network, self.plan.data.image_size),
                **dataclasses.asdict(config.evaluation),
                "accuracy": accuracies.as_dict(),
            },
            "provenance": self.provenance,
        }

    def _keep_picture(self, images: Tensor, labels: Tensor) -> None:
        if not distributed.first():
            return
        with atomic_write(self.folder / "condensed.png") as temporary:
            pictures.class_grid(images, labels).save(temporary)

    def _keep_pruning_picture(self, images: Tensor, scores: Tensor, beta: float) -> None:
        """Save a picture of the over-budget set; the dropped images are kept nowhere else."""
        if not distributed.first():
            return
        keep = self.plan.storage.images_per_class
        hardest = prune.hardest_count(beta, scores.shape[1] - keep)
        with atomic_write(self.folder / "over_budget.png") as temporary:
            pictures.pruning_grid(images.unflatten(0, scores.shape), scores.cpu(), keep, hardest).save(temporary)


def _per_class(labels: Tensor) -> str:
    """Number of images per class, or the smallest and the largest number if classes differ."""
    counts = torch.bincount(labels).unique().tolist()
    return str(counts[0]) if len(counts) == 1 else f"{min(counts)}-{max(counts)}"
