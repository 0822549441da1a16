"""Saved condensed sets: tensors in ``condensed.safetensors``, everything else in ``card.json`` beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from hmn.containers import rebuild
from hmn.containers.base import Container, decode_all
from hmn.errors import ArtifactError
from hmn.files import write_json, write_tensors

SCHEMA_VERSION = 1
TENSORS, CARD = "condensed.safetensors", "card.json"
LARGEST_SIDE = 4096  # of the images of a set that is loaded, in pixels
NUMBERS = {"float32": torch.float32, "float16": torch.float16}  # formats in which parameters are saved


class CondensedSet(Dataset):
    """The decoded images of a saved container, as a map-style dataset of (image, label).

    Images are float32 (channels, H, W), 0 black and 1 white; with most containers they may exceed that range slightly.
    Normalise them by the card's ``data.mean`` and ``data.std`` to train a network on them. ``card`` records budget,
    shapes, preprocessing, measured accuracy and provenance.
    """

    def __init__(self, container: Container, card: dict[str, Any]) -> None:
        self.container = container
        self.card = card
        self._images, self._labels = decode_all(container)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], int(self._labels[index])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images (N, channels, H, W) float32, ordered by class, and their labels (N,) int64."""
        return self._images, self._labels


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def round_to(container: Container, number: str) -> None:
    """Round every parameter in place to the format ``number``. Raises ``ArtifactError`` if one is out of its range."""
    for name, parameter in container.named_parameters():
        parameter.copy_(parameter.to(NUMBERS[number]))
        if not parameter.isfinite().all():
            raise ArtifactError(f"{name}: has values too large for memory.number={number}; use float32")


def save(folder: Path, container: Container, card: dict[str, Any], number: str = "float32") -> dict[str, Any]:
    """Write the tensors, then the card; return the full card.

    To ``card`` are added the checksum of the tensors, the container's shape, and the count and bytes of its numbers.
    :func:`round_to` must have rounded the parameters.
    """
    parameters = dict(container.named_parameters())
    tensors = {
        name: value.to(NUMBERS[number] if name in parameters else value.dtype)
        for name, value in container.state_dict().items()
    }
    write_tensors(folder / TENSORS, tensors)
    card = {
        "schema_version": SCHEMA_VERSION,
        "sha256": sha256(folder / TENSORS),
        "container": container.specification(),
        "number": number,
        "stored_floats": container.storage_floats(),
        "stored_bytes": _bytes_of(container, number),
        **card,
    }
    write_json(folder / CARD, card)
    return card


def load_condensed(path: str | Path) -> CondensedSet:
    """Load the condensed set saved at ``path``: a run folder, or a ``condensed.safetensors`` with its card beside it.

    Raises ``ArtifactError`` for a missing file, another schema version, a wrong checksum, anything but plain tensors of
    the card's shapes, or more floats than the card's budget.
    """
    tensors_path = tensors_file(path)
    card = read_card(tensors_path)
    if sha256(tensors_path) != card["sha256"]:
        raise ArtifactError(
            f"{tensors_path}: its SHA-256 is not the card's: the file was modified or truncated; fetch it again"
        )
    try:
        tensors = load_file(tensors_path)
    except safetensors.SafetensorError as error:
        raise ArtifactError(
            f"{tensors_path}: not a safetensors file ({error}); pickled tensors are never loaded"
        ) from None
    try:
        shape = card["container"]
        side, depth = shape["image_size"], shape.get("depth", 0)
        if not 0 < side <= LARGEST_SIDE or depth > len(tensors):  # not every container has a tensor that confirms them
            raise ValueError(f"image_size {side}, depth {depth}")
        with torch.device("meta"):  # a wrong card may ask for any amount of memory
            empty = rebuild(card["container"])
        shapes, parameters = empty.state_dict(), dict(empty.named_parameters())
        number = NUMBERS[card.get("number", "float32")]  # older cards lack this key
        for name in shapes.keys() & tensors.keys():
            kept, found = number if name in parameters else shapes[name].dtype, tensors[name].dtype
            if found != kept:
                raise TypeError(f"{found} instead of {kept}")  # the budget counts numbers of one format
            if tensors[name].shape != shapes[name].shape:
                raise ValueError(f"{name}: {list(tensors[name].shape)} instead of {list(shapes[name].shape)}")
        if shapes.keys() != tensors.keys():
            raise KeyError(f"{', '.join(sorted(shapes.keys() ^ tensors.keys()))}: not in both the card and the file")
        described = empty.specification()
        empty.finish()
        if empty.specification() != described:
            raise ValueError("they are not in the finished form, the only one that stores what the budget counts")
        container = rebuild(card["container"])
        container.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(f"{tensors_path}: its tensors do not match the container in its card: {reason}") from None
    if container.storage_floats() > card["budget"]["floats"]:
        raise ArtifactError(
            f"{tensors_path}: stores {container.storage_floats()} floats, over the budget of {card['budget']['floats']}"
        )
    try:
        return CondensedSet(container, card)
    except (RuntimeError, IndexError) as error:  # positions that point outside an image
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{tensors_path}: its tensors do not decode to images: {reason}") from None


def stored_bytes(card: dict[str, Any]) -> int:
    """Bytes of the numbers that the budget counts."""
    return card.get("stored_bytes", card["stored_floats"] * NUMBERS[card.get("number", "float32")].itemsize)


def _bytes_of(container: Container, number: str) -> int:
    """Bytes of the stored numbers; two positions count as one float, and ``number`` does not change their size."""
    numbers = sum(parameter.numel() for parameter in container.parameters())
    return numbers * NUMBERS[number].itemsize + (container.storage_floats() - numbers) * torch.float32.itemsize


def joined(sets: Sequence[CondensedSet], class_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """All images (N, channels, H, W) of ``sets``, ordered by class, and labels (N,) that index ``class_names``.

    The classes of every set must be among ``class_names``.
    """
    images, labels = [], []
    for kept in sets:
        numbers = torch.tensor([class_names.index(name) for name in kept.card["data"]["class_names"]])
        own_images, own_labels = kept.tensors()
        images.append(own_images)
        labels.append(numbers[own_labels])
    order = torch.cat(labels).argsort(stable=True)
    return torch.cat(images)[order], torch.cat(labels)[order]


def check_together(cards: Mapping[str, dict[str, Any]]) -> None:
    """Refuse sets, given as path: card, that share a class or are normalised differently: they cannot be joined."""
    owners: dict[str, str] = {}
    for path, card in cards.items():
        for name in card["data"]["class_names"]:
            if (owner := owners.setdefault(name, path)) != path:
                raise ArtifactError(f"artifact={path}: has class {name}, as does artifact={owner}; leave one out")
        for key in ("mean", "std"):
            first, found = next(iter(cards.values()))["data"][key], card["data"][key]
            if found != first:
                rule = f"that of the sets before it is {first}: join sets condensed with the same dataset.{key}"
                raise ArtifactError(f"artifact={path}: its {key} is {found}, but {rule}")


def tensors_file(path: str | Path, key: str = "artifact") -> Path:
    """``path`` itself, or the tensors file in the folder ``path``; ``key`` is the setting that named it.

    Raises ``ArtifactError`` if there is none.
    """
    path = Path(path).expanduser()
    found = path / TENSORS if path.is_dir() else path
    if not found.exists():
        raise ArtifactError(f"{key}={path}: no {TENSORS} there; give a finished run's folder")
    if found.suffix != Path(TENSORS).suffix:
        raise ArtifactError(f"{key}={path}: not a .safetensors file; give its folder, or {TENSORS} in it")
    return found


def card_file(path: str | Path) -> Path:
    """The card of the folder or tensors file ``path``, whether or not it exists."""
    path = Path(path).expanduser()
    return path / CARD if path.is_dir() else path.with_name(CARD)


def read_card(artifact: str | Path) -> dict[str, Any]:
    """Read the card in the folder ``artifact``, or beside that tensors file; the tensors themselves are not needed.

    Raises ``ArtifactError`` if it is missing, incomplete or of another version.
    """
    path = card_file(artifact)
    if path == Path(artifact).expanduser():
        tensors_file(artifact)  # raises: a card is no artifact
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        tensors_file(artifact)  # raises first if the tensors are missing, too
        raise ArtifactError(f"{path}: missing; {TENSORS} and its card belong in one folder") from None
    except ValueError:
        raise ArtifactError(f"{path}: not JSON; fetch it again") from None
    version = card.get("schema_version") if isinstance(card, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}")
    if missing := [key for key in ("sha256", "container", "budget", "data") if key not in card]:
        raise ArtifactError(f"{path}: lacks {', '.join(missing)}; fetch it again")
    if damaged := [key for key in ("container", "budget", "data") if not isinstance(card[key], dict)]:
        raise ArtifactError(f"{path}: {', '.join(damaged)} is not a JSON object; fetch it again")
    if not isinstance(card["budget"].get("floats"), int):
        raise ArtifactError(f"{path}: budget has no number of floats; fetch it again")
    return card
