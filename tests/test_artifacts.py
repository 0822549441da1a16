"""Saved sets load bit for bit; files that were changed, truncated or pickled, or are too large, are refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import hmn
from hmn import artifacts
from hmn.artifacts import CARD, TENSORS, load_condensed, sha256
from hmn.config import HmnConfig
from hmn.containers.base import decode_all
from hmn.containers.fred import FredShape, FrequencyMemory
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape
from hmn.containers.image import RawImages, RawShape
from hmn.containers.speed import SparseCodes, SpeedShape
from hmn.errors import ArtifactError
from tests.command import ROOT

SHAPE = {"classes": 3, "channels": 3, "image_size": 8, "latent_side": 2, "dataset_channels": 2, "feature_channels": 2}
SHAPE |= {"feature_kernel": 1, "class_channels": 1, "instance_channels": 2, "decoder_width": 4}


def container(seed: int = 0, **changes: Any) -> HierarchicalMemory:
    made = HierarchicalMemory(HmnShape(**SHAPE | changes), 4)
    made.initialise(torch.Generator().manual_seed(seed), HmnConfig(name="hmn"), None)
    return made


def save(folder: Path, made: HierarchicalMemory | None = None, **card: Any) -> Path:
    made = made or container()
    artifacts.save(folder, made, {"budget": {"floats": made.storage_floats()}, "data": {}, **card})
    return folder


def edit_card(folder: Path, **values: Any) -> None:
    path = folder / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_tensors(folder: Path, data: bytes) -> None:
    """Replace the tensor file and update the card's checksum, so that only the contents can give the change away."""
    (folder / TENSORS).write_bytes(data)
    edit_card(folder, sha256=sha256(folder / TENSORS))


def refused(folder: Path, *parts: str) -> None:
    """Check that loading fails with one line that names the file and contains all ``parts``."""
    with pytest.raises(ArtifactError) as caught:
        load_condensed(folder)
    (line,) = str(caught.value).splitlines()
    for part in (str(folder), *parts):
        assert part in line


# Saving and loading


@pytest.mark.parametrize(
    "changes", [{}, {"channels": 1}, {"feature_channels": 0, "class_channels": 0}, {"decoder": "transposed"}]
)
def test_what_is_saved_loads_bit_for_bit(tmp_path, changes):
    made = container(**changes)
    loaded = load_condensed(save(tmp_path, made))
    expected = made.state_dict()
    found = loaded.container.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    images, labels = decode_all(made)
    assert torch.equal(loaded.tensors()[0], images)
    assert torch.equal(loaded.tensors()[1], labels)


def test_images_come_class_by_class_in_the_range_of_pixels(tmp_path):
    images, labels = load_condensed(save(tmp_path)).tensors()
    assert (images.shape, images.dtype, labels.dtype) == ((12, 3, 8, 8), torch.float32, torch.int64)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert 0 <= images.min() < images.max() <= 1
    assert not images.requires_grad


def test_it_is_a_data_set_for_a_loader(tmp_path):
    condensed = load_condensed(save(tmp_path))
    assert len(condensed) == 12
    image, label = condensed[5]
    assert (label, type(label), torch.equal(image, condensed.tensors()[0][5])) == (1, int, True)
    batches = list(DataLoader(condensed, batch_size=5))
    assert [batch.shape for batch, _ in batches] == [(5, 3, 8, 8), (5, 3, 8, 8), (2, 3, 8, 8)]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), condensed.tensors()[0])
    assert torch.equal(torch.cat([labels for _, labels in batches]), condensed.tensors()[1])


def test_the_order_of_images_does_not_depend_on_how_many_are_decoded_at_once(monkeypatch):
    made = container()
    whole, labels = decode_all(made)
    monkeypatch.setattr("hmn.containers.base.at_once", lambda *_: 5)
    parts, part_labels = decode_all(made)
    torch.testing.assert_close(parts, whole)
    assert torch.equal(labels, part_labels)


def test_the_folder_and_the_file_are_both_its_path(tmp_path):
    save(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / TENSORS):
        assert len(load_condensed(path)) == 12


def test_the_card_tells_checksum_shape_and_floats(tmp_path):
    made = container()
    card = artifacts.save(tmp_path, made, {"budget": {"floats": 10**6}, "data": {"name": "toy"}})
    assert json.loads((tmp_path / CARD).read_text()) == card == load_condensed(tmp_path).card
    assert (card["schema_version"], card["sha256"]) == (1, sha256(tmp_path / TENSORS))
    decoder = {"decoder": "upsample", "decoder_norm": False, "output": "sigmoid"}
    assert card["container"] == {"name": "hmn", "images_per_class": 4, **SHAPE, **decoder}
    assert card["stored_floats"] == sum(tensor.numel() for tensor in load_file(tmp_path / TENSORS).values())
    assert card["data"] == {"name": "toy"}


def test_the_same_set_makes_the_same_bytes(tmp_path):
    first, again, other = (save(tmp_path / name, container(seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for name in (TENSORS, CARD):
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


def rounded(seed: int = 0):
    made = container(seed)
    artifacts.round_to(made, "float16")
    return made


def test_halves_are_kept_as_such_and_load_as_the_numbers_that_were_judged(tmp_path):
    before, made = container(), rounded()
    for was, now in zip(before.parameters(), made.parameters(), strict=True):
        assert torch.equal(now, was.half().float()) and now.dtype == torch.float32
    card = artifacts.save(tmp_path, made, {"budget": {"floats": 10**6}, "data": {"name": "toy"}}, "float16")
    assert {tensor.dtype for tensor in load_file(tmp_path / TENSORS).values()} == {torch.float16}
    loaded = load_condensed(tmp_path)
    assert torch.equal(loaded.tensors()[0], decode_all(made)[0])
    assert card["stored_floats"] == made.storage_floats()
    assert artifacts.stored_bytes(card) == 2 * made.storage_floats()
    assert artifacts.stored_bytes({"stored_floats": 5}) == 20  # a card older than memory.number


def test_another_file_of_the_folder_is_no_set(tmp_path):
    artifacts.save(tmp_path, container(), {"budget": {"floats": 10**6}, "data": {"name": "toy"}})
    for load in (load_condensed, artifacts.read_card):
        with pytest.raises(ArtifactError, match="card.json: not a .safetensors file; give its folder, or condensed"):
            load(tmp_path / "card.json")


@pytest.mark.parametrize(("number", "told"), [("float32", "torch.float16 instead of torch.float32"), ("int4", "int4")])
def test_a_card_that_tells_other_numbers_is_refused(tmp_path, number, told):
    artifacts.save(tmp_path, rounded(), {"budget": {"floats": 10**6}, "data": {"name": "toy"}}, "float16")
    card = json.loads((tmp_path / CARD).read_text()) | {"number": number}
    (tmp_path / CARD).write_text(json.dumps(card))
    refused(tmp_path, told)


def test_what_halves_cannot_hold_is_refused():
    made = container()
    with torch.no_grad():
        made.instances[0, 0] = 1e5
    with pytest.raises(ArtifactError, match="instances: has values too large for memory.number=float16"):
        artifacts.round_to(made, "float16")


def test_nothing_but_float32_tensors_is_in_the_file(tmp_path):
    tensors = load_file(save(tmp_path) / TENSORS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    header = json.loads((tmp_path / TENSORS).read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert "__metadata__" not in header


def test_saving_that_fails_leaves_the_kept_set_alone(tmp_path, monkeypatch):
    save(tmp_path)

    def full(_tensors, path, _metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("hmn.files.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, container(1))
    assert torch.equal(load_condensed(tmp_path).tensors()[0], decode_all(container(0))[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, TENSORS]


def test_new_tensors_beside_an_old_card_are_refused(tmp_path, monkeypatch):
    """What a kill between writing the two files leaves must not load as a set."""
    save(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, container(1))
    refused(tmp_path, "SHA-256")


def test_one_line_loads_it_and_importing_the_package_stays_quick(tmp_path):
    assert hmn.load_condensed is load_condensed
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = hmn.load
    code = "import hmn, sys; assert 'torch' not in sys.modules; assert 'load_condensed' in hmn.__all__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# What is refused


def test_a_changed_file_is_refused(tmp_path):
    path = save(tmp_path) / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(tmp_path, TENSORS, "SHA-256", "fetch it again")


def test_a_file_cut_short_is_refused_whatever_its_checksum(tmp_path):
    data = (save(tmp_path) / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(data[:-4])
    refused(tmp_path, "SHA-256")
    for length in (len(data) - 4, 100, 7, 0):
        replace_tensors(tmp_path, data[:length])
        refused(tmp_path, "not a safetensors file")


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_a_pickle_under_its_name_is_refused_and_never_unpickled(tmp_path, dump):
    folder, trap = save(tmp_path / "kept"), tmp_path / "unpickled"
    with (tmp_path / "pickle").open("wb") as file:
        dump({"instances": Bomb(trap)}, file)
    data = (tmp_path / "pickle").read_bytes()
    (folder / TENSORS).write_bytes(data)
    refused(folder, "SHA-256")
    replace_tensors(folder, data)
    refused(folder, "not a safetensors file", "pickled tensors are never loaded")
    assert not trap.exists()


@pytest.mark.parametrize("version", [0, 2, None, "1", 1.5])
def test_another_schema_version_is_refused(tmp_path, version):
    edit_card(save(tmp_path), schema_version=version)
    refused(tmp_path, CARD, f"schema version {version}", "reads 1")


def test_a_card_that_is_missing_or_damaged_is_refused(tmp_path):
    path = save(tmp_path) / CARD
    card = json.loads(path.read_text())
    for text, reason in (("{", "not JSON"), ("\xff", "not JSON"), ("[1]", "schema version None")):
        path.write_text(text, encoding="latin-1")
        refused(tmp_path, CARD, reason)
    for key in ("sha256", "container", "budget", "data"):
        path.write_text(json.dumps({name: value for name, value in card.items() if name != key}))
        refused(tmp_path, CARD, key)
    path.write_text(json.dumps(card | {"container": "hmn"}))
    refused(tmp_path, CARD, "container is not a JSON object")
    for budget in ({}, {"floats": "640"}, {"floats": None}):
        path.write_text(json.dumps(card | {"budget": budget}))
        refused(tmp_path, CARD, "budget has no number of floats")
    path.unlink()
    refused(tmp_path, CARD, "missing")


def test_no_set_at_the_path_is_said(tmp_path):
    refused(tmp_path, f"no {TENSORS} there")
    refused(tmp_path / "absent", f"no {TENSORS} there")


def edited(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors in the saved file and update the checksum; ``None`` removes a tensor."""
    kept = load_file(folder / TENSORS) | tensors
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / TENSORS)
    replace_tensors(folder, (folder / TENSORS).read_bytes())


def test_tensors_that_the_card_does_not_describe_are_refused(tmp_path):
    kept = load_file(save(tmp_path) / TENSORS)
    others = {
        "one more image": {"instances": torch.zeros(3, 5, 2, 2, 2)},
        "missing": {"class_memory": None},
        "extra": {"stowaway": torch.zeros(1000)},
        "double": {"instances": kept["instances"].double()},
        "half": {"instances": kept["instances"].half()},
        "integers": {"instances": kept["instances"].long()},
    }
    for tensors in others.values():
        edited(save(tmp_path), **tensors)
        refused(tmp_path, TENSORS, "do not match the container in its card")


@pytest.mark.parametrize(
    "specification",
    [
        {"name": "pixels"},
        {"classes": 4},
        {"latent_side": 0},
        {"image_size": -8},
        {"image_size": 40000},
        {"depth": 10**9},
        {"classes": "three"},
        {"unknown": 1},
    ],
)
def test_a_card_that_describes_no_container_or_another_is_refused(tmp_path, specification):
    card = json.loads((save(tmp_path) / CARD).read_text())
    edit_card(tmp_path, container=card["container"] | specification)
    refused(tmp_path, "do not match the container in its card")


def test_a_set_over_its_budget_is_refused(tmp_path):
    floats = container().storage_floats()
    save(tmp_path, budget={"floats": floats - 1})
    refused(tmp_path, f"stores {floats} floats", f"over the budget of {floats - 1}")
    assert load_condensed(save(tmp_path, budget={"floats": floats}))


def test_positions_outside_an_image_are_refused(tmp_path):
    shape = FredShape(classes=2, channels=1, image_size=4, coefficients=3)
    made = FrequencyMemory(shape, 1)
    with torch.no_grad():
        made.instances.zero_()
        made.positions.copy_(torch.tensor([[0, 1, 2], [3, 4, 16]]))
    artifacts.save(tmp_path, made, {"budget": {"floats": 6}, "data": {}})
    with pytest.raises(ArtifactError, match="do not decode"):
        artifacts.load_condensed(tmp_path)


def sparse_codes() -> SparseCodes:
    shape = SpeedShape(
        classes=2, channels=1, image_size=8, tokens=4, token_dim=4, depth=1, heads=2, top_k=3, patch=4, l1=0.0
    )
    made = SparseCodes(shape, 2)
    made.initialise(torch.Generator().manual_seed(0), None, None)
    return made


def test_whole_codes_are_refused_that_would_be_charged_as_cut_ones(tmp_path):
    made = sparse_codes()
    assert made.instances.numel() > made.tier_floats()["instances"]
    artifacts.save(tmp_path, made, {"budget": {"floats": made.storage_floats()}, "data": {}})
    with pytest.raises(ArtifactError, match="not in the finished form"):
        artifacts.load_condensed(tmp_path)


def test_a_sparse_code_comes_back_bit_for_bit_with_its_16_bit_positions(tmp_path):
    made = sparse_codes()
    made.finish()
    artifacts.save(tmp_path, made, {"budget": {"floats": made.storage_floats()}, "data": {}})
    kept = artifacts.load_condensed(tmp_path).container
    assert kept.positions.dtype == torch.int16 and torch.equal(kept.positions, made.positions)
    assert torch.equal(kept.instances, made.instances) and kept.shape == made.shape
    with pytest.raises(ArtifactError, match="over the budget"):
        artifacts.save(tmp_path, made, {"budget": {"floats": made.storage_floats() - 1}, "data": {}})
        artifacts.load_condensed(tmp_path)


# Several sets


def raw_set(classes: tuple[str, ...], per_class: int, seed: int = 0, **data: Any) -> artifacts.CondensedSet:
    made = RawImages(RawShape(classes=len(classes), channels=1, image_size=4), per_class)
    made.hold(torch.rand(len(classes) * per_class, 1, 4, 4, generator=torch.Generator().manual_seed(seed)))
    return artifacts.CondensedSet(made, {"data": {"class_names": list(classes), "mean": [0.5], "std": [0.2], **data}})


def test_joined_sets_have_every_image_under_its_class(tmp_path):
    """Compare with a loop over images; the sets differ in their number of images, and their classes are interleaved."""
    sets = [raw_set(("dog", "ant"), 3), raw_set(("cat",), 2, seed=1), raw_set(("fox", "bee"), 1, seed=2)]
    names = ("ant", "bee", "cat", "dog", "fox")
    expected = []
    for label, name in enumerate(names):
        for kept in sets:
            for image, own in kept:
                if kept.card["data"]["class_names"][own] == name:
                    expected.append((label, image.tolist()))
    for given in (sets, sets[::-1]):
        images, labels = artifacts.joined(given, names)
        assert list(zip(labels.tolist(), images.tolist(), strict=True)) == expected


def test_a_single_set_is_joined_to_itself_bit_for_bit():
    kept = raw_set(("a", "b", "c"), 2)
    images, labels = artifacts.joined([kept], ("a", "b", "c"))
    assert torch.equal(images, kept.tensors()[0]) and torch.equal(labels, kept.tensors()[1])


def test_sets_that_share_a_class_are_not_joined():
    first, second = raw_set(("a", "b"), 1).card, raw_set(("c", "d"), 1).card
    artifacts.check_together({"one": first, "two": second})
    shared = raw_set(("c", "b"), 1).card
    with pytest.raises(ArtifactError) as caught:
        artifacts.check_together({"one": first, "two": shared})
    assert str(caught.value) == "artifact=two: has class b, as does artifact=one; leave one out"


@pytest.mark.parametrize(("key", "before"), [("mean", 0.5), ("std", 0.2)])
def test_sets_that_are_normalised_apart_are_not_joined(key, before):
    first, other = raw_set(("a", "b"), 1).card, raw_set(("c", "d"), 1, **{key: [0.4]}).card
    with pytest.raises(ArtifactError) as caught:
        artifacts.check_together({"one": first, "two": other})
    rule = f"that of the sets before it is [{before}]: join sets condensed with the same dataset.{key}"
    assert str(caught.value) == f"artifact=two: its {key} is [0.4], but {rule}"
