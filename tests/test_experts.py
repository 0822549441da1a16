"""Expert trajectories: what they hold, who shares them, and the command that makes them."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hmn import experts
from hmn.checkpoint import Checkpoints
from hmn.config.identity import experts_identity
from hmn.config.objectives import ExpertsConfig
from hmn.data.preprocess import Normalise
from hmn.errors import ArtifactError, ConfigError, Diverged, Interrupted
from hmn.experts import Trajectories, read
from hmn.files import held
from hmn.network_update import training_step
from hmn.seeding import generator
from hmn.stop import Stop
from hmn.training import Training
from tests.command import TINY, configured, run
from tests.small_matching import CPU, MEAN, REAL, STD, assert_same
from tests.small_matching import build as build_network

SETTINGS = ExpertsConfig(count=3, epochs=2, batch=16)
DEVICE = torch.device("cpu")


def train(numbers: Sequence[int], settings: ExpertsConfig = SETTINGS) -> Training:
    step, streams = training_step(build_network(), CPU), [generator(0, "experts", number) for number in numbers]
    recipe = experts.recipe_of(settings, settings.strategy)
    images, labels = REAL.train.images, REAL.train.labels
    return Training(build_network, images, labels, recipe, Normalise(MEAN, STD), step, *streams)


def make(folder: Path, *, count: int = 3, fingerprint: str = REAL.fingerprint, stop: Stop | None = None, **changes):
    stop = stop or Stop()
    options = {"fingerprint": fingerprint, "together": 1} | changes
    opened = partial(Checkpoints, folder / "unfinished", 1e9, stop)
    return experts.build(folder, train, count, stop=stop, open_checkpoints=opened, **options)


def contents(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as kept:
        return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118


def test_an_expert_is_a_network_before_and_after_every_epoch_of_its_training(tmp_path: Path):
    path = make(tmp_path)[1]
    reference = train([1])
    for epoch in range(3):
        assert_same(read(path, epoch, DEVICE), {n: p.detach() for n, p in reference.network.named_parameters()})
        if epoch < 2:
            reference.run_epoch()
    assert len(contents(path)) == 3 * len(list(reference.network.parameters()))


def test_others_wait_while_experts_are_trained(tmp_path: Path, monkeypatch):
    """All runs keep the checkpoints of experts in the same folder."""
    seen, trained = [], train
    monkeypatch.setitem(globals(), "train", lambda numbers: seen.append(held(tmp_path)) or trained(numbers))
    make(tmp_path, count=2)
    assert seen == [True, True] and not held(tmp_path)


def test_several_trained_together_are_files_of_their_own(tmp_path: Path):
    paths = make(tmp_path, together=2)
    reference = train([0, 1])
    weight = reference.network.state_dict()["classifier.weight"].clone()
    reference.run_epoch()
    for number in (0, 1):
        assert torch.equal(read(paths[number], 0, DEVICE)["classifier.weight"], weight[number])
        for name, value in reference.network.named_parameters():
            assert torch.equal(read(paths[number], 1, DEVICE)[name], value.detach()[number])
    assert_same(contents(paths[2]), contents(make(tmp_path / "alone")[2]))


def test_experts_are_trained_at_a_constant_rate_on_one_operator_per_batch_unmixed():
    recipe = experts.recipe_of(ExpertsConfig(), "flip")
    assert (recipe.epochs, recipe.batch, recipe.lr, recipe.momentum, recipe.weight_decay) == (50, 256, 0.01, 0, 0)
    assert (recipe.schedule, recipe.strategy, recipe.cutmix, recipe.rule) == ("constant", "flip", 0, "vico")
    assert train([0]).update.recipe.rule == "vico"


def test_experts_are_trained_as_configured():
    sgd = {"epochs": 7, "batch": 3, "lr": 0.3, "momentum": 0.5, "weight_decay": 0.1}
    recipe = experts.recipe_of(ExpertsConfig(**sgd, augmentation_rule="idc"), "crop")
    assert {name: getattr(recipe, name) for name in sgd} == sgd
    assert (recipe.strategy, recipe.rule) == ("crop", "idc")


@pytest.mark.parametrize(("together", "groups", "stop_in", "finished"), [(1, 3, 3, 1), (2, 2, 1, 0)])
def test_stopped_experts_go_on_from_their_last_epoch(tmp_path, monkeypatch, together, groups, stop_in, finished):
    expected = [contents(path) for path in make(tmp_path / "whole", together=together)]
    stop, epochs = Stop(), []
    run_epoch = Training.run_epoch

    def counted(training: Training) -> list[float]:
        epochs.append(training.epoch)
        if len(epochs) == stop_in:
            stop.signum = signal.SIGTERM
        return run_epoch(training)

    monkeypatch.setattr(Training, "run_epoch", counted)
    with pytest.raises(Interrupted, match="stopped by SIGTERM; the same command resumes from here"):
        make(tmp_path / "halves", together=together, stop=stop)
    assert len(list((tmp_path / "halves").glob("*.safetensors"))) == finished
    found = [contents(path) for path in make(tmp_path / "halves", together=1)]  # begun together, they stay together
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert epochs == [0, 1] * groups
    assert not (tmp_path / "halves" / "unfinished").exists()


@pytest.fixture
def stopped(tmp_path, monkeypatch) -> Path:
    """A folder in which the training of experts 0 and 1, together, was stopped after its first epoch."""
    stop, run_epoch = Stop(), Training.run_epoch

    def stopping(training: Training) -> list[float]:
        stop.signum = signal.SIGTERM
        return run_epoch(training)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Training, "run_epoch", stopping)
        make(tmp_path, together=2, stop=stop)
    return tmp_path


def test_a_run_that_needs_fewer_finishes_all_that_were_begun_together(stopped):
    assert len(make(stopped, count=1)) == 1
    assert len(list(stopped.glob("*.safetensors"))) == 2 and not (stopped / "unfinished").exists()


def test_a_run_that_needs_none_of_those_begun_leaves_them(stopped):
    state = stopped / "unfinished" / "experts-0005.pt"
    state.with_name("experts-0000.pt").rename(state)
    kept = state.read_bytes()
    make(stopped, count=2)
    assert state.read_bytes() == kept


def test_what_ends_while_it_writes_its_experts_goes_on_from_their_state(stopped, monkeypatch):
    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if any(stopped.glob("expert-*.safetensors")):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr("hmn.files.save_file", full)
        make(stopped, count=2)
    trained, run_epoch = [], Training.run_epoch
    monkeypatch.setattr(Training, "run_epoch", lambda training: trained.append(training.epoch) or run_epoch(training))
    make(stopped, count=2)
    assert trained == [1]


@pytest.mark.parametrize("lacks", ["numbers", "training", "kept"])
def test_experts_that_other_sources_began_otherwise_are_refused(stopped, lacks: str):
    opened = Checkpoints(stopped / "unfinished", 1e9)
    state = opened.load("experts-0000")
    del state[lacks]
    opened.save("experts-0000", state)
    opened.codes = ["c1", "c2"]
    with pytest.raises(ArtifactError, match=r"of another code version \(c1\), which this one cannot continue"):
        experts.build(stopped, train, 2, fingerprint="", together=2, stop=Stop(), open_checkpoints=lambda: opened)


def test_finished_experts_need_no_checkpoints(tmp_path: Path):
    """Checkpoints that another device has begun are not opened."""
    make(tmp_path, count=1)
    options = {"fingerprint": REAL.fingerprint, "together": 1, "stop": Stop()}
    experts.build(tmp_path, train, 1, **options, open_checkpoints=pytest.fail)


@pytest.mark.parametrize(("width", "most", "expected"), [(1, 100, 10), (1, 3, 3), (512, 100, 2), (4096, 100, 1)])
def test_so_many_are_trained_together_that_a_checkpoint_stays_small(width: int, most: int, expected: int):
    with torch.device("meta"):
        network = torch.nn.Linear(width, 10_000)
    assert experts.together(network, 50, most) == expected


def test_finished_experts_stay(tmp_path: Path):
    first, second, _ = make(tmp_path)
    kept, expected = first.stat().st_mtime_ns, contents(second)
    second.unlink()
    assert make(tmp_path)[1] == second
    assert first.stat().st_mtime_ns == kept
    assert_same(contents(second), expected)


def test_more_experts_are_added_to_those_that_are_there(tmp_path: Path):
    (first,) = make(tmp_path, count=1)
    kept = first.stat().st_mtime_ns
    assert len(make(tmp_path, count=3)) == 3
    assert first.stat().st_mtime_ns == kept


def test_experts_of_other_images_are_refused(tmp_path: Path):
    make(tmp_path, count=1)
    with pytest.raises(ArtifactError, match="made from other images; remove"):
        make(tmp_path, count=1, fingerprint="0" * 64)


def test_an_expert_that_diverges_is_not_kept(tmp_path: Path):
    def diverging(numbers: Sequence[int]) -> Training:
        training = train(numbers)
        training.run_epoch = lambda: [math.nan]
        return training

    with pytest.raises(Diverged, match="the training loss is nan .*lower objective.experts.lr"):
        opened = partial(Checkpoints, tmp_path, 1e9)
        experts.build(tmp_path, diverging, 1, fingerprint="", together=1, stop=Stop(), open_checkpoints=opened)
    assert not list(tmp_path.glob("*.safetensors"))


def pieces(paths: list[Path], seed: int = 0) -> Trajectories:
    return Trajectories(paths, max_start=2, length=1, device=DEVICE, generator=generator(seed))


def test_pieces_begin_before_the_latest_start_and_have_the_asked_length(tmp_path: Path):
    paths = make(tmp_path, count=2)
    reader, seen = pieces(paths), set()
    known = {(n, e): read(path, e, DEVICE)["classifier.weight"] for n, path in enumerate(paths) for e in range(3)}
    for _ in range(40):
        ends = [next(at for at, w in known.items() if torch.equal(w, p["classifier.weight"])) for p in reader.draw()]
        (expert, start), (other, end) = ends
        assert other == expert
        assert end == start + 1
        seen.add((expert, start))
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_pieces_go_on_as_if_nothing_had_happened(tmp_path: Path):
    paths = make(tmp_path, count=2)
    whole, rest = pieces(paths), pieces(paths, seed=9)
    for _ in range(3):
        whole.draw()
    rest.load_state_dict(whole.state_dict())
    assert_same([whole.draw() for _ in range(5)], [rest.draw() for _ in range(5)])


SHARED = {"seed": 3, "objective.student_steps": 9, "memory.images_per_class": 10, "objective.experts.count": 7}
OWN = {
    "objective.experts.epochs": 40,
    "objective.experts.lr": 0.5,
    "objective.experts.augmentation_rule": "idc",
    "objective.experts.seed": 1,
    "network.width": 8,
    "dataset.held_out_fraction": 0.2,
    "dataset.flip": "false",
    "compute.precision": "bf16",
}


def _identity(*arguments: str) -> dict[str, object]:
    config = configured(*arguments)
    return experts_identity(config, config.compute.precision)


@pytest.mark.parametrize(("key", "value"), [*SHARED.items(), *OWN.items()])
def test_runs_share_experts_unless_these_would_differ(key: str, value: object):
    base = ("dataset=cifar10", "objective=trajectory_matching")
    same = _identity(*base) == _identity(*base, f"{key}={value}")
    assert same == (key in SHARED)


def test_only_trajectory_matching_has_experts():
    with pytest.raises(ConfigError, match="objective.name=bptt: must be trajectory_matching for mode=experts"):
        configured("mode=experts", "objective=bptt")


SMALL = [f"objective.experts.{key}" for key in ("count=2", "epochs=2", "batch=128")]
SMALL += ["objective=trajectory_matching", "objective.max_start_epoch=1"]


def test_a_command_of_their_own_makes_and_tests_experts(tmp_path: Path):
    arguments = [*(argument for argument in TINY if argument != "debug=smoke"), *SMALL, "mode=experts"]
    outcome = run(tmp_path, *arguments)
    assert outcome.code == 0, outcome.err
    assert "experts" in outcome.out
    files = sorted(tmp_path.glob(".cache/experts/*/expert-*.safetensors"))
    assert [path.stem for path in files] == ["expert-0000", "expert-0001"]
    (result,) = tmp_path.glob("runs/digits-experts-*/result.json")
    measured = json.loads(result.read_text())
    assert len(measured["accuracy"]["by_network"]) == 2
    assert measured["accuracy"]["test_epochs"] == [2]
