"""What networks trained on a set of images tell about each of them: how hard it is, and its features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hmn import distributed
from hmn.data.preprocess import Normalise
from hmn.data.splits import Split
from hmn.errors import ArtifactError
from hmn.evaluate import Judge
from hmn.files import exclusive, write_tensors
from hmn.networks import Builder
from hmn.stop import Stop
from hmn.training import Training, features_of, logits_of

SLOT = "coreset"  # default name of the checkpoint slot and of the stream of the networks' seeds


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y - max_{i != y} z_i for every row (..., n); negative where the network is wrong (Pleiss et al., NeurIPS 2020).

    ``logits`` (..., n, classes) may come from several networks; ``labels`` (n,).
    """
    column = labels.expand(logits.shape[:-1])[..., None]
    own = logits.gather(-1, column)[..., 0]
    others = logits.scatter(-1, column, -torch.inf)
    return own - others.max(-1).values


def difficulty(judge: Judge, train: Split, networks: int, epochs: int, stream: str = SLOT) -> dict[str, Tensor]:
    """How hard every image of ``train`` (N,) was for ``networks`` networks, trained on all by the judge's recipe.

    The un-augmented images are measured after each epoch, and the measures are averaged over networks:

    - ``logit_margin``, averaged over epochs (AUM; Pleiss et al., NeurIPS 2020).
    - ``softmax_margin``, of probabilities and summed over epochs (CCS; Zheng et al., ICLR 2023).
    - ``forgetting``, how often an image went from right to wrong. Toneva et al. (ICLR 2019) count the same, but when an
      image is drawn for an update. An image that was never right, which they count as forgotten infinitely often,
      counts as forgotten as often as there are epochs.

    CutMix is left out, because mixed labels have no margin. ``stream`` names the checkpoint slot and the networks'
    seeds.
    """
    n, device = len(train), train.labels.device
    recipe = replace(judge.recipe, epochs=epochs, cutmix=0.0)

    def observe(group: range, training: Training, memo: dict[str, Tensor]) -> None:
        rows = slice(group.start, group.stop)
        logits = logits_of(training.network, train.images, judge.normalise).view(len(group), n, -1)
        memo["logit_margin"] += margins(logits, train.labels).sum(0)
        memo["softmax_margin"] += margins(logits.softmax(-1), train.labels).sum(0)
        right = (logits.argmax(-1) == train.labels).float()
        memo["forgotten"][rows] += memo["right"][rows] * (1 - right)
        memo["learned"][rows] = torch.maximum(memo["learned"][rows], right)
        memo["right"][rows] = right

    summed = {name: torch.zeros(n, device=device) for name in ("logit_margin", "softmax_margin")}
    by_network = {name: torch.zeros(networks, n, device=device) for name in ("right", "learned", "forgotten")}
    memo = judge.train(networks, train, recipe, stream, observe, summed | by_network)
    return {
        "logit_margin": memo["logit_margin"] / (networks * epochs),
        "softmax_margin": memo["softmax_margin"] / networks,
        "forgetting": torch.where(memo["learned"] > 0, memo["forgotten"], epochs).mean(0),
    }


def trained_weights(judge: Judge, train: Split, networks: int, epochs: int) -> dict[str, Tensor]:
    """Weights of ``networks`` networks trained on ``train`` by the judge's recipe, stacked: (networks, ...) by name.

    The recipe's CutMix stays on, as in IDC's training of the network whose features herding takes. Weights are kept
    rather than features, because the features of a whole dataset are far larger.
    """
    empty = judge.build().to(train.images.device).state_dict()

    def observe(group: range, training: Training, memo: dict[str, Tensor]) -> None:
        if training.finished:
            for name, value in training.network.state_dict().items():
                memo[name][group.start : group.stop] = value.view(len(group), *memo[name].shape[1:])

    memo = {name: value.new_zeros(networks, *value.shape) for name, value in empty.items()}
    return judge.train(networks, train, replace(judge.recipe, epochs=epochs), SLOT, observe, memo)


def networks_of(build: Builder, stacked: dict[str, Tensor]) -> list[nn.Module]:
    """The networks whose weights are ``stacked``, on their device."""
    made = []
    for values in zip(*stacked.values(), strict=True):
        network = build().to(values[0].device)
        network.load_state_dict(dict(zip(stacked, values, strict=True)))
        made.append(network)
    return made


def cached(path: Path, make: Callable[[], dict[str, Tensor]], device: torch.device, stop: Stop) -> dict[str, Tensor]:
    """The tensors that ``make`` returns: read from ``path`` if it exists, otherwise made and written there.

    Coresets of other methods and sizes need the same tensors, and their cost is this training on all images. While one
    run makes them, the others wait, until ``stop`` is asked.
    """

    def read() -> dict[str, Tensor] | None:
        try:
            return load_file(path) if path.exists() else None
        except safetensors.SafetensorError as error:
            raise ArtifactError(f"{path}: not a safetensors file ({error}); remove it to have it made again") from None

    with exclusive(path.with_suffix(""), wait=stop):  # not the whole folder: other files in it have their own locks
        if (found := distributed.from_first(read)) is not None:
            print(f"coreset: read {path}")
            return {name: value.to(device) for name, value in found.items()}
        made = make()
        if distributed.first():
            write_tensors(path, made)
    return made


def features(networks: Sequence[nn.Module], images: Tensor, normalise: Normalise) -> Tensor:
    """Inputs to the last layer of each network for un-augmented ``images``, concatenated: (n, len(networks) * d)."""
    return torch.cat([features_of(network, images, normalise) for network in networks], 1)
