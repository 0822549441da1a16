"""Expert trajectories: networks trained on real images, each saved at initialisation and after every epoch.

Trajectory matching (MTT, Cazenavette et al., CVPR 2022) starts its students from an expert's parameters and compares
them with the expert's later ones. Experts do not depend on what is condensed, so runs with the same data and network
share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmn.checkpoint import Checkpoints
from hmn.config.objectives import ExpertsConfig
from hmn.errors import Diverged
from hmn.files import exclusive, write_tensors
from hmn.objectives.distance import Parameters
from hmn.precomputed import check_images, read_part
from hmn.stop import Stop
from hmn.training import Recipe, Training, run_epochs

TOGETHER = 10  # most experts trained at once
CHECKPOINT_BYTES = 2 << 30  # most that a checkpoint may take: it holds all snapshots so far of the experts in training


def recipe_of(config: ExpertsConfig, strategy: str) -> Recipe:
    """How experts are trained: plain SGD at a constant learning rate on augmented images, without CutMix."""
    return Recipe(
        epochs=config.epochs,
        batch=config.batch,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule="constant",
        strategy=strategy,
        cutmix=0.0,
        rule=config.augmentation_rule,
    )


def together(network: nn.Module, epochs: int, most: int) -> int:
    """How many experts to train at once, at most ``most``: their checkpoint holds every epoch so far."""
    one = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()) * (epochs + 1)
    return max(1, min(most, TOGETHER, CHECKPOINT_BYTES // one))


def build(
    folder: Path,
    train: Callable[[Sequence[int]], Training],
    count: int,
    *,
    fingerprint: str,
    together: int,
    stop: Stop,
    open_checkpoints: Callable[[], Checkpoints],
) -> list[Path]:
    """Write experts 0 .. ``count`` - 1 into ``folder``, one file each; return their paths.

    Existing files are kept, so an interrupted build continues. ``train(numbers)`` begins the training of these experts,
    at most ``together`` at once. Checkpoints hold the state of those in training, which any run may continue; they are
    opened only if there is something to train. Raises ``ArtifactError`` for a file made from other images, and
    ``Diverged`` for an expert whose loss is not finite.
    """
    paths = [_path(folder, number) for number in range(count)]
    with exclusive(folder, wait=stop):
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        checkpoints = open_checkpoints() if missing else None
        while missing:
            slot = f"experts-{missing[0]:04d}"
            begun = checkpoints.load(slot)
            with checkpoints.restoring():
                numbers = begun["numbers"] if begun else missing[:together]
            made = _record(train(numbers), numbers, begun, checkpoints, slot)
            # The expert that names the slot is written last.
            for number, snapshots in reversed([*zip(numbers, made, strict=True)]):
                write_tensors(_path(folder, number), snapshots, {"data": fingerprint})
            checkpoints.drop(slot)
            missing = [number for number in missing if number not in numbers]
    check_images(paths, fingerprint)
    return paths


def _path(folder: Path, number: int) -> Path:
    return folder / f"expert-{number:04d}.safetensors"


def _record(
    training: Training, numbers: Sequence[int], begun: dict[str, Any] | None, checkpoints: Checkpoints, slot: str
) -> list[dict[str, Tensor]]:
    """Train the experts; return the parameters of each by ``epoch/name``, where epoch 0 is the untrained network."""
    kept: list[dict[str, Tensor]] = [{} for _ in numbers]

    def snapshot() -> None:
        for name, value in training.network.named_parameters():
            copied = value.detach().to("cpu", copy=True)  # a copy even on the host: training works in place
            for expert, own in zip(kept, copied if training.together else [copied], strict=True):
                expert[f"{training.epoch}/{name}"] = own.contiguous()

    def after_epoch(losses: list[float]) -> None:
        if not math.isfinite(total := sum(losses)):
            raise Diverged(
                f"experts: the training loss is {total} after epoch {training.epoch}: lower objective.experts.lr"
            )
        snapshot()
        checkpoints.tick(slot, lambda: {"numbers": [*numbers], "training": training.state_dict(), "kept": kept})

    if begun is None:
        snapshot()
    else:
        with checkpoints.restoring():
            training.load_state_dict(begun["training"])
            kept = begun["kept"]
    title = f"experts {numbers[0] + 1}-{numbers[-1] + 1}" if len(numbers) > 1 else f"expert {numbers[0] + 1}"
    run_epochs(training, title, after_epoch)
    return kept


def read(path: Path, epoch: int, device: torch.device) -> Parameters:
    """An expert's parameters after ``epoch`` epochs."""
    return read_part(path, str(epoch), device)


class Trajectories:
    """Random segments of the trajectories in ``paths``: ``length`` epochs from a start before epoch ``max_start``."""

    def __init__(
        self, paths: list[Path], *, max_start: int, length: int, device: torch.device, generator: torch.Generator
    ) -> None:
        self.paths, self.max_start, self.length, self.device = paths, max_start, length, device
        self.generator = generator  # on the host: it decides what is read

    def draw(self) -> tuple[Parameters, Parameters]:
        """A random expert's parameters at a random start, and ``length`` epochs later."""
        expert = int(torch.randint(len(self.paths), (), generator=self.generator))
        start = int(torch.randint(self.max_start, (), generator=self.generator))
        here, there = (read(self.paths[expert], epoch, self.device) for epoch in (start, start + self.length))
        return here, there

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
