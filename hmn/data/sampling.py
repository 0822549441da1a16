"""Batches of real images, drawn without replacement per class or from the whole split, with resumable state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hmn.errors import DataError


class GroupSampler:
    """Draws ``batch`` indices per group without replacement; a group with too few left is reshuffled.

    ``sizes`` (groups,) are the lengths of consecutive index ranges: the classes of a split ordered by class, or a
    single range for the whole split. As in IDC's loader, the end of a pass that is smaller than ``batch`` is dropped.
    """

    def __init__(self, sizes: Tensor, batch: int, generator: torch.Generator) -> None:
        self.batch = batch
        self.generator = generator
        self.sizes = sizes.cpu()  # on the host, as the cursors: deciding what to shuffle must not wait for a device
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.groups = torch.repeat_interleave(torch.arange(len(sizes)), self.sizes).to(generator.device)
        self.order = self._shuffled()
        self.cursors = torch.zeros_like(self.sizes)
        self._offsets = torch.arange(batch, device=generator.device)

    def draw(self, groups: Tensor) -> Tensor:
        """Draw indices (k, batch) into the split for ``groups`` (k,), a CPU tensor."""
        runs_short = self.cursors[groups] + self.batch > self.sizes[groups]
        if runs_short.any():
            short = torch.zeros(len(self.sizes), dtype=torch.bool)
            short[groups] = runs_short
            # A sort by (group, random key) permutes within each group, so replacing one group's range keeps the others.
            replaced = short.to(self.order.device, non_blocking=True)[self.groups]
            self.order = torch.where(replaced, self._shuffled(), self.order)
            self.cursors[short] = 0
        first = (self.starts + self.cursors)[groups].to(self.order.device, non_blocking=True)
        self.cursors[groups] += self.batch
        return self.order[first[:, None] + self._offsets]

    def batches(self, count: int) -> Tensor:
        """Draw ``count`` batches (count, batch) of the only group, the same as from repeated calls of :meth:`draw`.

        Between two shuffles they are contiguous, so a GPU makes one copy instead of running three kernels per batch.
        """
        found, size = [], int(self.sizes[0])
        while count:
            cursor = int(self.cursors[0])
            if cursor + self.batch > size:
                self.order, cursor = self._shuffled(), 0
            here = min(count, (size - cursor) // self.batch)
            self.cursors[0] = cursor + here * self.batch
            found.append(self.order[cursor : cursor + here * self.batch].view(here, self.batch))
            count -= here
        return torch.cat(found)

    def _shuffled(self) -> Tensor:
        keys = torch.rand(len(self.groups), generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return torch.argsort(self.groups + keys)

    def state_dict(self) -> dict[str, Tensor]:
        return {"order": self.order, "cursors": self.cursors.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.order = state["order"].to(self.generator.device)
        self.cursors = state["cursors"].clone()
        self.generator.set_state(state["generator"].cpu())


def permutations(groups: Sequence[int], n: int, generator: torch.Generator) -> Tensor:
    """Random permutations (*groups, n) of 0 .. n - 1, one per group; without ``groups``, one permutation (n,)."""
    if not groups:
        return torch.randperm(n, generator=generator, device=generator.device)
    # float64 makes equal keys, whose order would not be random, practically impossible.
    keys = torch.rand(*groups, n, generator=generator, device=generator.device, dtype=torch.float64)
    return keys.argsort(-1)


def per_class(labels: Tensor, class_names: tuple[str, ...], batch: int, generator: torch.Generator) -> GroupSampler:
    """A sampler of single-class batches. ``labels`` (N,) must be ordered by class.

    Raises ``DataError`` naming the first class that has fewer than ``batch`` images.
    """
    return GroupSampler(class_sizes(labels, batch, class_names, "objective.real_batch"), batch, generator)


def whole_split(images: int, batch: int, generator: torch.Generator) -> GroupSampler:
    """A sampler of batches from all ``images`` as one group; a larger ``batch`` is cut to their number."""
    return GroupSampler(torch.tensor([images]), min(batch, images), generator)


def class_sizes(labels: Tensor, least: int, class_names: Sequence[str], key: str = "memory.images_per_class") -> Tensor:
    """The number of images of every class, (C,) on the CPU.

    Raises ``DataError`` naming the first class that has fewer than ``least``, the value of the setting ``key``.
    """
    sizes = torch.bincount(labels.cpu(), minlength=len(class_names))
    if (sizes < least).any():
        short = int((sizes < least).nonzero()[0])
        raise DataError(
            f"{key}={least}: class {class_names[short]} has only {int(sizes[short])} training images; "
            f"set it to at most {int(sizes.min())}"
        )
    return sizes


def random_subset(
    labels: Tensor, per_class_count: int, class_names: Sequence[str], generator: torch.Generator
) -> Tensor:
    """Indices (C * per_class_count,), ordered by class, drawn uniformly without replacement from every class."""
    sizes = class_sizes(labels, per_class_count, class_names)
    sampler = GroupSampler(sizes, per_class_count, generator)
    return sampler.draw(torch.arange(len(sizes))).flatten()


def repeated_subset(
    labels: Tensor, per_class_count: int, class_names: tuple[str, ...], generator: torch.Generator
) -> Tensor:
    """Like :func:`random_subset`, but a class with too few images gives all of them and then repeats them."""
    sizes = torch.bincount(labels.cpu(), minlength=len(class_names))
    sampler = GroupSampler(sizes, 1, generator)  # its order is shuffled within each class
    positions = sampler.starts[:, None] + torch.arange(per_class_count) % sizes[:, None]
    return sampler.order[positions.flatten().to(sampler.order.device)]
