"""``container.init=fit_real``: start from an approximation of real images instead of at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hmn import distributed
from hmn.checkpoint import Checkpoints
from hmn.containers.base import Container
from hmn.data.preprocess import unit_range
from hmn.errors import Diverged

SLOT = "fit"


def fit_real(
    container: Container,
    targets: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    weights_lr: float | None = None,
    generator: torch.Generator,
    checkpoints: Checkpoints,
) -> float:
    """Fit image i of ``container`` to ``targets[i]`` (C * G, channels, H, W) uint8; returns the last squared error.

    Runs Adam on random batches with a one-cycle learning rate that peaks at ``lr``, or for network weights at
    ``weights_lr`` if given; resumable from the slot ``fit``. Raises ``Diverged`` if the first batch ends further from
    its targets than it began: at too high a rate a decoder saturates, and no gradient brings it back.
    """
    tiers, memories = container.tiers(), container.memory_tiers()
    peaks = [lr if tier in memories or weights_lr is None else weights_lr for tier in tiers]
    optimizer = torch.optim.Adam([{"params": parameters} for parameters in tiers.values()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=steps)
    everything = torch.arange(len(targets), device=targets.device)

    def draw() -> Tensor:
        if batch >= len(targets):
            return everything
        return torch.randperm(len(targets), generator=generator, device=targets.device)[:batch]

    def squared_error(index: Tensor) -> Tensor:
        return (container.decode(index) - unit_range(targets[index])).square().mean()

    done, error = 0, torch.tensor(float("nan"))
    first, began = everything, error
    if (state := checkpoints.load(SLOT)) is not None:
        with checkpoints.restoring():
            done, error, first, began = (state[key] for key in ("done", "error", "first", "began"))
            container.load_state_dict(state["container"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            generator.set_state(state["generator"])

    def state_now() -> dict[str, Any]:
        return {
            "done": done,
            "error": error.detach(),
            "first": first,
            "began": began,
            "container": container.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": generator.get_state(),
        }

    hidden = not distributed.first()
    with tqdm(total=steps, initial=done, desc="fit real images", unit="step", leave=False, disable=hidden) as bar:
        while done < steps:
            index = draw()
            error = squared_error(index)
            if done == 0:
                first, began = index, error.detach()
            error.backward()
            optimizer.step()
            optimizer.zero_grad()  # after the step: gradients left here would be added to the first matching gradient
            schedule.step()
            done += 1
            bar.update()
            checkpoints.tick(SLOT, state_now)
    with torch.no_grad():
        ended = squared_error(first)
    if not ended <= began:
        raise Diverged(
            f"fitting real images: the squared error went from {float(began):.3g} to {float(ended):.3g}; "
            "lower container.fit_learning_rate or container.fit_weights_lr"
        )
    return float(error.detach())
