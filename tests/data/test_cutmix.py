"""CutMix: its boxes against enumeration, its partners, and several batches at once against each alone."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from hmn.data import augment, vision

SIDE = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size, generator=generator(), dtype=torch.float64)


def coded(n: int) -> Tensor:
    """Images whose pixels encode their image and place: value = image * 100 + row * 8 + column."""
    places = torch.arange(SIDE * SIDE, dtype=torch.float32).view(1, 1, SIDE, SIDE)
    return torch.arange(n).view(-1, 1, 1, 1) * 100 + places.expand(n, 3, SIDE, SIDE)


def cutmix(
    images: Tensor, labels: Tensor, probability: float, stream: torch.Generator, *, real: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """CutMix with the random numbers that a training draws."""
    drawn = augment.draw_mix(labels.shape, images.shape[-1], stream, real=real)
    return augment.cutmix(images, labels, probability, drawn)


def mixed(n: int, stream: torch.Generator, probability: float = 1.0) -> tuple[list[int], Tensor | None, float]:
    """Each image's partner, the box (H, W) as booleans, and the share of own pixels, for one call.

    The box is ``None`` if every image is its own partner. Checks that all pixels stay in place and that all images
    have the same box.
    """
    images = coded(n)
    found, partners, share = cutmix(images, torch.arange(n), probability, stream)
    source = (found // 100).long()
    assert torch.equal(found % 100, images % 100)
    boxes = []
    for i, partner in enumerate(partners.tolist()):
        assert set(source[i].unique().tolist()) <= {i, partner}
        assert (source[i] == source[i, 0]).all()
        if partner != i:
            boxes.append(source[i, 0] == partner)
    assert all(torch.equal(box, boxes[0]) for box in boxes)
    return partners.tolist(), boxes[0] if boxes else None, float(share)


def extents(box: Tensor) -> list[tuple[int, int]]:
    """(First, one past the last) row and column of ``box``; checks that it is a rectangle."""
    ends = []
    for axis in (1, 0):
        inside = box.any(axis).nonzero().flatten().tolist()
        ends.append((inside[0], inside[-1] + 1))
    (top, bottom), (left, right) = ends
    assert box.sum() == (bottom - top) * (right - left)
    return ends


def exact_extents() -> dict[tuple[int, int], float]:
    """Probability of every clipped interval along one axis, by enumeration; ``(0, 0)`` is an empty box.

    The side is int(8 sqrt(1 - lambda)) for uniform lambda: half of it is h if (h/4)^2 <= 1 - lambda < ((h+1)/4)^2.
    """
    chances: Counter[tuple[int, int]] = Counter()
    for half, centre in product(range(4), range(SIDE)):
        weight = ((half + 1) ** 2 - half**2) / 16 / SIDE
        low, high = max(centre - half, 0), min(centre + half, SIDE)
        chances[(low, high) if half else (0, 0)] += weight
    return dict(chances)


def exact_own_share() -> float:
    """The mean share of own pixels, over all half sides and centres."""
    total = 0.0
    for half, cy, cx in product(range(4), range(SIDE), range(SIDE)):
        height, width = (min(c + half, SIDE) - max(c - half, 0) for c in (cy, cx))
        total += ((half + 1) ** 2 - half**2) / 16 / SIDE**2 * (1 - height * width / SIDE**2)
    return total


def test_cutmix_boxes_are_idcs_and_the_share_counts_the_clipped_box():
    stream, calls = generator(), 2000
    seen: dict[int, Counter[tuple[int, int]]] = {0: Counter(), 1: Counter()}
    shares = []
    for _ in range(calls):
        _, box, share = mixed(4, stream)
        if box is None:  # all four are their own partner, so the box is not visible
            continue
        shares.append(share)
        assert share == pytest.approx(1 - float(box.sum()) / SIDE**2, abs=1e-6)
        for axis, ends in enumerate(extents(box) if box.any() else [(0, 0)] * 2):
            seen[axis][ends] += 1
    for counts in seen.values():
        assert set(counts) <= set(exact_extents())
        for ends, chance in exact_extents().items():
            assert counts[ends] / len(shares) == pytest.approx(chance, abs=5 * math.sqrt(chance / len(shares)))
    assert sum(shares) / len(shares) == pytest.approx(exact_own_share(), abs=0.02)
    assert seen[0] != seen[1]  # the two centres are drawn separately


def test_cutmix_partners_are_a_uniform_permutation():
    stream = generator()
    counts = Counter(tuple(mixed(3, stream)[0]) for _ in range(900))
    assert len(counts) == 6 and all(abs(count - 150) < 60 for count in counts.values())


def test_cutmix_labels_are_the_partners_own():
    images, labels = coded(6), torch.tensor([4, 4, 7, 1, 0, 7])
    for seed in range(10):
        found, partner_labels, _ = cutmix(images, labels, 1.0, generator(seed))
        source = (found // 100).long()
        for i in range(6):
            others = [s for s in source[i].unique().tolist() if s != i]
            assert all(labels[s] == partner_labels[i] for s in others)


def test_cutmix_mixes_never_always_or_with_its_probability():
    images, labels = coded(4), torch.arange(4)
    for seed in range(50):
        found, _, share = cutmix(images, labels, 0.0, generator(seed))
        assert torch.equal(found, images) and share == 1
    stream = generator()
    for probability in (0.3, 1.0):
        happened = [cutmix(images, labels, probability, stream)[2] < 1 for _ in range(1000)]
        assert sum(happened) / 1000 == pytest.approx(probability * 15 / 16, abs=0.05)  # 1 in 16 boxes is empty


def test_padding_rows_of_a_batch_are_neither_mixed_nor_partners():
    images, labels = coded(7), torch.arange(7)
    stream, moved = generator(), 0
    for _ in range(60):
        found, partners, _ = cutmix(images, labels, 1.0, stream, real=3)
        assert sorted(partners[:3].tolist()) == [0, 1, 2]
        assert torch.equal(found[3:], images[3:]) and torch.equal(partners[3:], labels[3:])
        assert (found[:3] // 100).max() <= 2
        moved += not torch.equal(found[:3], images[:3])
    assert moved > 30


@pytest.mark.parametrize("real", [None, 5])
@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_several_batches_are_mixed_each_as_it_would_be_alone(monkeypatch, probability, real):
    """Records all random numbers of a call; each batch alone, given its share of them, must give the same result."""
    batches, n = 6, 7
    images, labels = noise(batches * n, SIDE).unflatten(0, (batches, n)), torch.arange(batches * n).view(batches, n)
    orders = augment.permutations((batches,), n if real is None else real, generator(1))
    noted = []

    def noting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: noted.append(function(*args, **options)) or noted[-1]

    with monkeypatch.context() as patch:
        for name in ("rand", "randint"):
            patch.setattr(torch, name, noting(getattr(torch, name)))
        patch.setattr(augment, "permutations", lambda *_: orders)
        mixed, partners, shares = cutmix(images, labels, probability, generator(), real=real)
    mixes_and_keeps, centres = noted
    assert mixes_and_keeps.shape == centres.shape == (2, batches)
    assert len(set(shares.tolist())) > 2
    for i in range(batches):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, i=i, **__: mixes_and_keeps[:, i])
            patch.setattr(torch, "randint", lambda *_, i=i, **__: centres[:, i])
            patch.setattr(augment, "permutations", lambda *_, i=i: orders[i])
            alone = cutmix(images[i], labels[i], probability, generator(), real=real)
        for found, expected in zip((mixed[i], partners[i], shares[i]), alone, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_cutmix_is_torchvisions_for_the_same_box(seed):
    """With these seeds, each of the two images is the other's partner."""
    marks = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)]).double()
    mixed, partners, share = cutmix(marks, torch.tensor([0, 1]), 1.0, generator(seed))
    assert partners.tolist() == [1, 0] and 0 < share < 1
    rows, columns = (mixed[0, 0].amax(axis).nonzero().flatten() for axis in (1, 0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    labels, images = torch.tensor([0, 1]), noise(2, 32)
    vision.torchvision()
    theirs = importlib.import_module("torchvision.transforms.v2").CutMix(num_classes=2)
    params = {"labels": labels, "batch_size": 2, "box": box, "lam_adjusted": float(share)}
    found, _, _ = cutmix(images, labels, 1.0, generator(seed))
    assert torch.equal(found, theirs.transform(images, params))
    area = (box[2] - box[0]) * (box[3] - box[1]) / 32**2
    assert float(share) == pytest.approx(1 - area, abs=1e-6)
