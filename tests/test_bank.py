"""The snapshot bank: what it holds, who shares it, and a run that reads it."""

from __future__ import annotations

import dataclasses
import re
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hmn import bank
from hmn.bank import BankSide, build, network_bytes, require_room, snapshot_steps
from hmn.build import condensation
from hmn.checkpoint import Checkpoints
from hmn.config import BankConfig, GradientMatchingConfig
from hmn.config.identity import bank_identity
from hmn.errors import ArtifactError, ConfigError, Interrupted
from hmn.files import held
from hmn.matching import ClassMatching
from hmn.network_update import training_step
from hmn.networks import initialise
from hmn.objectives.gradient import matching_step, real_gradients, stored_step
from hmn.realside import LiveSide
from hmn.seeding import generator
from hmn.stop import Stop
from tests.command import configured
from tests.small_matching import CLASSES, CPU, REAL, SEED, assert_same, config, make_container, workshop
from tests.small_matching import build as build_network

SETTINGS = config(inner_steps=4, bank=BankConfig(networks=2, snapshots=2))


def live(number: int, settings: GradientMatchingConfig = SETTINGS) -> LiveSide:
    return LiveSide(
        REAL,
        settings,
        build=build_network,
        train=training_step(build_network(), CPU),
        compute=CPU,
        seed=0,
        flip=True,
        stream=f"bank/{number}",
    )


def make_bank(
    folder: Path,
    settings: GradientMatchingConfig = SETTINGS,
    *,
    fingerprint: str = REAL.fingerprint,
    stop: Stop | None = None,
    chunk: int = 3,
) -> list[Path]:
    gradients = real_gradients(build_network(), CPU)
    options = {"classes": CLASSES, "fingerprint": fingerprint, "chunk": chunk, "stop": stop or Stop()}
    return build(folder, partial(live, settings=settings), gradients, settings, **options)


def contents(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as kept:
        return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118


def side(paths: list[Path], *, seed: int = SEED, rule: str = "idc") -> BankSide:
    return BankSide(paths, SETTINGS.bank, SETTINGS.strategy, torch.device("cpu"), seed, rule)


def make_run(
    paths: list[Path], settings: GradientMatchingConfig = SETTINGS, *, container_seed: int = 0
) -> ClassMatching:
    return ClassMatching(
        make_container(container_seed),
        side(paths, rule=settings.augmentation_rule),
        settings,
        match=stored_step(build_network(), "mse", CPU),
        normalise=live(0).normalise,
        compute=CPU,
        seed=SEED,
    )


@pytest.mark.parametrize(
    ("snapshots", "inner", "steps"), [(1, 9, [0]), (2, 4, [0, 2]), (3, 10, [0, 3, 6]), (4, 4, [0, 1, 2, 3])]
)
def test_snapshots_are_spread_over_a_network_s_life(snapshots: int, inner: int, steps: list[int]):
    assert snapshot_steps(snapshots, inner) == steps


def test_the_size_of_a_file_is_known_before_it_is_made(tmp_path: Path):
    (path, _) = make_bank(tmp_path)
    with safe_open(path, "pt") as kept:
        stored = {name: kept.get_tensor(name).nbytes for name in kept.keys() if "/draw/" not in name}  # noqa: SIM118
    assert network_bytes(build_network(), SETTINGS.bank, CLASSES) == sum(stored.values())


def test_a_bank_that_the_disk_has_no_room_for_is_refused_before_it_is_made(tmp_path: Path, monkeypatch):
    network, one = build_network(), network_bytes(build_network(), SETTINGS.bank, CLASSES)
    folder, asked = tmp_path / "banks" / "new", []

    def room(free: int, total: int = 1 << 40) -> None:
        usage = SimpleNamespace(free=free, total=total)
        monkeypatch.setattr(bank.shutil, "disk_usage", lambda place: asked.append(place) or usage)

    room(2 * one)
    require_room(folder, network, SETTINGS.bank, CLASSES)
    room(2 * one - 1)
    with pytest.raises(ConfigError, match="^objective.bank.networks=2: must be less, or .* takes 0.0 GB, and .* left$"):
        require_room(folder, network, SETTINGS.bank, CLASSES)
    assert asked == [tmp_path, tmp_path]  # the folder is not there yet
    room(0, total=0)
    require_room(folder, network, SETTINGS.bank, CLASSES)  # the file system does not tell
    make_bank(folder)[1].unlink()
    room(one)
    require_room(folder, network, SETTINGS.bank, CLASSES)  # only what is missing counts
    room(one - 1)
    with pytest.raises(ConfigError, match="^objective.bank.networks=2: "):
        require_room(folder, network, SETTINGS.bank, CLASSES)


def test_a_snapshot_is_the_live_side_at_that_step(tmp_path: Path):
    kept = contents(make_bank(tmp_path)[1])
    reference, gradients = live(1), real_gradients(build_network(), CPU)
    reference.begin(0)
    for step in range(3):
        if step in (0, 2):
            choice = reference.choose(torch.arange(CLASSES))
            drawn = reference.draw(choice, CLASSES)
            images = reference.real(choice, drawn, slice(None))
            parameters = reference.parameters(choice)
            head = f"{step // 2}"
            for name, value in parameters.items():
                assert torch.equal(kept[f"{head}/parameters/{name}"], value)
            for name, value in drawn.tensors().items():
                assert torch.equal(kept[f"{head}/draw/{name}"], value)
            for name, value in gradients(parameters, images, torch.arange(CLASSES)).items():
                assert torch.equal(kept[f"{head}/gradients/{name}"], value)
        reference.update(reference.choose_update())


@pytest.mark.parametrize("rule", ["idc", "vico"])
def test_a_banked_step_is_the_live_step_of_the_same_network_images_and_draw(tmp_path: Path, rule: str):
    settings = dataclasses.replace(SETTINGS, augmentation_rule=rule)
    run = make_run(make_bank(tmp_path, settings), settings)
    run.side.order, run.side.position = torch.tensor([2]), 0  # network 1, untrained
    reference = live(1, settings)
    lively = ClassMatching(
        make_container(),
        reference,
        settings,
        match=matching_step(build_network(), "mse", CPU),
        normalise=reference.normalise,
        compute=CPU,
        seed=SEED,
    )
    (losses, norms), (expected, expected_norms) = run.run_step(), lively.run_step()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for tier, value in expected_norms.items():
        torch.testing.assert_close(norms[tier], value, rtol=1e-4, atol=0)


def test_of_real_images_a_step_counts_none(tmp_path: Path):
    own = CLASSES * make_container().images_per_class
    assert make_run(make_bank(tmp_path)).images_per_step == own
    lively = ClassMatching(
        make_container(),
        live(0),
        SETTINGS,
        match=matching_step(build_network(), "mse", CPU),
        normalise=live(0).normalise,
        compute=CPU,
        seed=SEED,
    )
    assert lively.images_per_step == own + CLASSES * SETTINGS.real_batch


def test_a_draw_that_is_read_has_the_alternatives_of_its_rule(tmp_path: Path):
    reader = side(make_bank(tmp_path), rule="vico")
    reader.begin(0)
    assert reader.draw(reader.choose(torch.arange(2)), 2).alternatives == ("color", "crop", "cutout")


def test_of_some_classes_gradients_and_draws_are_read_in_the_order_they_are_asked_for(tmp_path: Path):
    paths = make_bank(tmp_path)
    reader = side(paths)
    reader.begin(0)
    network, snapshot = divmod(int(reader.order[0]), 2)
    head = f"{snapshot}/"
    kept = {name.removeprefix(head): value for name, value in contents(paths[network]).items() if name.startswith(head)}
    choice = reader.choose(torch.tensor([2, 0]))
    assert choice.keys() == kept.keys()
    for name, value in kept.items():
        expected = value if name.startswith("parameters/") else torch.stack([value[2], value[0]])
        assert torch.equal(choice[name], expected), name


@pytest.mark.parametrize(("fitting", "read"), [(0, 12), (2, 8), (4, 4)])
def test_what_is_read_stays_as_far_as_there_is_room_for_it(tmp_path: Path, monkeypatch, fitting: int, read: int):
    """Three passes over four snapshots, of which ``fitting`` fit in memory."""
    paths, numbers = make_bank(tmp_path), []
    size = sum(value.nbytes for value in side(paths)._read(0, 0).values())
    reader = BankSide(paths, SETTINGS.bank, SETTINGS.strategy, torch.device("cpu"), SEED, keep_bytes=fitting * size + 1)
    reading = reader._read
    monkeypatch.setattr(reader, "_read", lambda *number: numbers.append(number) or reading(*number))
    reference = side(paths)
    for step in range(12):
        reader.begin(step)
        reference.begin(step)
        assert_same(reader.current, reference.current)
    assert len(numbers) == read


def test_the_number_of_classes_taken_at_once_changes_nothing(tmp_path: Path):
    whole, parts = make_bank(tmp_path / "whole")[0], make_bank(tmp_path / "parts", chunk=2)[0]
    assert_same(contents(whole), contents(parts))


def test_every_pass_takes_every_snapshot_once_in_an_order_of_its_own(tmp_path: Path):
    reader = side(make_bank(tmp_path))
    orders = []
    for _ in range(6):
        seen = []
        for step in range(4):
            reader.begin(step)
            seen.append(int(reader.order[reader.position - 1]))
        assert sorted(seen) == [0, 1, 2, 3]
        orders.append(tuple(seen))
    assert len(set(orders)) > 1


def test_a_run_on_a_bank_resumes_bit_for_bit(tmp_path: Path):
    paths = make_bank(tmp_path / "bank")
    whole, half = make_run(paths), make_run(paths)
    expected = [whole.run_step() for _ in range(7)]
    for _ in range(3):
        half.run_step()
    Checkpoints(tmp_path, 0).save("condense", half.state_dict())
    rest = make_run(paths, container_seed=99)
    rest.load_state_dict(Checkpoints(tmp_path, 0).load("condense"))
    assert_same([rest.run_step() for _ in range(4)], expected[3:])
    assert_same(rest.state_dict(), whole.state_dict())


def test_finished_networks_stay_and_a_stopped_bank_goes_on(tmp_path: Path, capsys):
    stop = Stop()
    stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the snapshot bank keeps its finished networks"):
        make_bank(tmp_path, stop=stop)
    assert not list(tmp_path.glob("*.safetensors"))
    first, second = make_bank(tmp_path)
    kept, expected = first.stat().st_mtime_ns, contents(second)
    second.unlink()
    capsys.readouterr()
    assert make_bank(tmp_path) == [first, second]
    bar = re.findall(r"(\d+/\d+) \[", capsys.readouterr().err)
    assert (bar[0], bar[-1]) == ("1/2", "2/2")
    assert first.stat().st_mtime_ns == kept
    assert_same(contents(second), expected)


def test_a_bank_of_other_images_is_refused(tmp_path: Path):
    make_bank(tmp_path)
    with pytest.raises(ArtifactError, match="made from other images; remove"):
        make_bank(tmp_path, fingerprint="0" * 64)


def test_a_damaged_bank_is_named(tmp_path: Path):
    _, second = make_bank(tmp_path)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"^{second}: cut short or damaged .*; remove it to have it made again$"):
        make_bank(tmp_path)


SHARED = {
    "seed": 3,
    "objective.metric": "cosine",
    "objective.memory_lr": 0.5,
    "objective.outer_steps": 7,
    "memory.images_per_class": 10,
    "pruning.over_budget": 0.3,
    "evaluation.epochs": 5,
}
OWN = {
    "objective.real_batch": 8,
    "objective.network_lr": 0.5,
    "objective.strategy": "none",
    "objective.augmentation_rule": "vico",
    "objective.inner_steps": 50,
    "objective.bank.seed": 1,
    "objective.bank.networks": 3,
    "network.width": 8,
    "dataset.held_out_fraction": 0.2,
    "compute.precision": "bf16",
}


def _identity(*arguments: str) -> dict[str, object]:
    config = configured(*arguments)
    return bank_identity(config, config.compute.precision)


@pytest.mark.parametrize(("key", "value"), [*SHARED.items(), *OWN.items()])
def test_runs_share_a_bank_unless_what_it_holds_would_differ(key: str, value: object):
    base = ("dataset=cifar10", "objective.bank.networks=2")
    same = _identity(*base) == _identity(*base, f"{key}={value}")
    assert same == (key in SHARED)


def test_a_network_is_never_asked_for_more_snapshots_than_it_has_steps():
    with pytest.raises(Exception, match="objective.bank.snapshots=9: must be at most objective.inner_steps=4"):
        dataclasses.replace(SETTINGS, bank=BankConfig(networks=1, snapshots=9))


def test_a_machine_without_bf16_has_a_bank_of_its_own(tmp_path):
    small = ("bank.networks=1", "bank.snapshots=1", "inner_steps=1", "network_samples=0", "real_batch=6")
    shop = workshop(
        tmp_path, "compute.precision=bf16", f"paths.cache_dir={tmp_path}", *(f"objective.{s}" for s in small)
    )
    for precision in ("fp32", "bf16", "fp32"):
        able = dataclasses.replace(shop, compute=dataclasses.replace(shop.compute, precision=precision))
        condensation(able, make_container())
    assert len(list((tmp_path / "banks").iterdir())) == 2


def test_a_run_reads_a_bank_by_all_its_settings(tmp_path):
    given = ("augmentation_rule=vico", "strategy=flip_crop", "bank.networks=1", "bank.snapshots=2", "bank.seed=5")
    given += ("inner_steps=2", "network_samples=16", "network_batch=8", "real_batch=6")
    other = ("dataset.flip=false", "seed=3", f"paths.cache_dir={tmp_path}")
    work = condensation(workshop(tmp_path, *other, *(f"objective.{one}" for one in given)), make_container())
    assert (work.side.strategy, work.side.rule) == ("crop", "vico")
    assert torch.equal(work.side.choosing.get_state(), generator(3, "condense", "bank").get_state())
    assert len(work.side.paths) == 1 and work.side.snapshots == 2
    assert work.run_step()[0].shape == (2,)


def test_a_run_without_room_for_its_bank_ends_before_it_makes_one(tmp_path, monkeypatch):
    monkeypatch.setattr(bank.shutil, "disk_usage", lambda _: SimpleNamespace(free=0, total=1))
    with pytest.raises(ConfigError, match="^objective.bank.networks=1: "):
        condensation(workshop(tmp_path, "objective.bank.networks=1", f"paths.cache_dir={tmp_path}"), make_container())
    assert not list(tmp_path.glob("banks/*/*.safetensors"))


def test_every_network_of_a_bank_has_streams_of_its_own_whatever_the_seed_of_the_run(tmp_path: Path):
    small = ("bank.networks=2", "bank.snapshots=1", "bank.seed=5", "inner_steps=1", "network_samples=0", "real_batch=6")
    for seed in (0, 3):
        given = (f"seed={seed}", f"paths.cache_dir={tmp_path}/{seed}", *(f"objective.{one}" for one in small))
        paths = condensation(workshop(tmp_path, *given), make_container()).side.paths
        for number, path in enumerate(paths):
            stream = generator(5, f"bank/{number}", "matched_network", 0)
            fresh = initialise(build_network().to(memory_format=torch.channels_last), stream)
            for name, value in fresh.named_parameters():
                assert torch.equal(contents(path)[f"0/parameters/{name}"], value)
        one, other = (contents(path)["0/draw/brightness"] for path in paths)
        assert not torch.equal(one, other)


def test_others_wait_while_a_bank_is_made(tmp_path: Path):
    seen = []

    def watched(number: int) -> LiveSide:
        seen.append(held(tmp_path))
        return live(number)

    options = {"classes": CLASSES, "fingerprint": REAL.fingerprint, "chunk": 3, "stop": Stop()}
    build(tmp_path, watched, real_gradients(build_network(), CPU), SETTINGS, **options)
    assert seen == [True, True] and not held(tmp_path)


@pytest.mark.parametrize(("limit", "kept"), [("null", 123), ("1000", 0)])
def test_a_bank_stays_on_a_gpu_unless_memory_is_limited(tmp_path: Path, monkeypatch, limit: str, kept: int):
    monkeypatch.setattr("hmn.build.matching.kept_on", lambda device: 123)
    small = ("bank.networks=1", "bank.snapshots=1", "inner_steps=1", "network_samples=0", "real_batch=6")
    given = (f"paths.cache_dir={tmp_path}", f"compute.memory_limit={limit}", *(f"objective.{one}" for one in small))
    assert condensation(workshop(tmp_path, *given), make_container()).side.keep_bytes == kept
