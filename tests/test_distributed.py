"""One run in several processes gives the numbers of one process and one set of outputs, and ends when one is lost."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hmn import bank, compute, distributed
from hmn.checkpoint import Checkpoints
from hmn.compute import Compute
from hmn.condense import condense
from hmn.config import BankConfig, ComputeConfig, GradientMatchingConfig, HmnConfig
from hmn.config.objectives import SyntheticGradientConfig
from hmn.containers.base import decode_all
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.data.splits import Split
from hmn.errors import Busy, ConfigError, Lost
from hmn.evaluate import Judge, evaluate
from hmn.matching import ClassMatching
from hmn.network_update import training_step
from hmn.networks.convnet import ConvNet
from hmn.objectives.distance import all_weights
from hmn.objectives.gradient import matching_step, real_gradients, stored_step
from hmn.prune import area_under_margin
from hmn.realside import LiveSide, SyntheticSide
from hmn.stop import Stop
from hmn.training import Recipe, train_networks
from tests.command import (
    ROOT,
    TINY,
    WAIT_SECONDS,
    Command,
    meeting,
    processes,
    run,
    run_several,
    serve,
    start,
    start_several,
)

CPU = Compute(torch.device("cpu"))
LOST = "another process of this run was lost; the same command resumes from the last checkpoint"
STEPS = 5  # steps 2 and 4 renew the network


# The same numbers. Two processes split 5 classes into 3 + 2 and 3 classes into 2 + 1; four split 5 into 2 + 1 + 1 + 1.


def real(classes: int) -> RealData:
    stream = torch.Generator().manual_seed(9)
    labels = torch.arange(classes).repeat_interleave(12)
    noise = torch.randint(-40, 41, (len(labels), 3, 8, 8), generator=stream)
    images = (50 + 40 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8)
    split = Split(images, labels)
    return RealData(
        name="tiny",
        class_names=tuple(f"class {label}" for label in range(classes)),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        train=split,
        held_out=Split(images[:0], labels[:0]),
        test=split,
        notes=(),
        fingerprint="f" * 64,
    )


def settings_of(dc: bool, changes: dict[str, Any]) -> GradientMatchingConfig | SyntheticGradientConfig:
    values = {"outer_steps": 3, "inner_steps": 2, "real_batch": 4, "network_batch": 8}
    if not dc:
        return GradientMatchingConfig(name="gradient_matching", **values | {"network_samples": 16} | changes)
    values |= {"network_epochs": 1, "optimizer": "adam", "memory_lr": 0.01, "weights_lr": 0.001}
    return SyntheticGradientConfig(name="dc", **values | changes)


def condensation(
    classes: int, penalty: float = 0.0, banked: bool = False, dc: bool = False, **changes: Any
) -> ClassMatching:
    settings = settings_of(dc, changes)
    shape = HmnShape(
        classes=classes,
        channels=3,
        image_size=8,
        latent_side=4,
        dataset_channels=2,
        feature_channels=2,
        feature_kernel=3,
        class_channels=1,
        instance_channels=1,
        decoder_width=4,
    )
    container = HierarchicalMemory(shape, 3)
    container.initialise(torch.Generator().manual_seed(0), HmnConfig(name="hmn"), None)
    if penalty:  # over the memories of all classes, as in SPEED
        container.penalty = lambda: penalty * container.instances.abs().sum()
    build, data = network_of(classes), real(classes)
    shared = {"compute": CPU, "seed": 4}
    made = {"build": build, "train": training_step(build(), CPU), "flip": True, **shared}
    if dc:
        side, parts = SyntheticSide(data, settings, count=3 * classes, **made), 3  # two convolutions, one classifier
        match = matching_step(build(), settings.metric, CPU, all_weights)
    else:
        side, parts = LiveSide(data, settings, **made), None
        match = matching_step(build(), settings.metric, CPU)
    normalise = side.normalise
    if banked:  # each process makes the same bank
        options = {"classes": classes, "fingerprint": data.fingerprint, "chunk": classes, "stop": Stop()}
        paths = bank.build(Path(tempfile.mkdtemp()), lambda _: side, real_gradients(build(), CPU), settings, **options)
        side = bank.BankSide(paths, settings.bank, settings.strategy, CPU.device, 4)
        match = stored_step(build(), settings.metric, CPU)
    return ClassMatching(container, side, settings, match=match, parts=parts, normalise=normalise, **shared)


def network_of(classes: int) -> Callable[[], nn.Module]:
    return lambda: ConvNet(3, classes, 8, width=4, depth=2)


def condensed(classes: int, changes: dict[str, Any]) -> dict[str, Any]:
    """What ``STEPS`` steps report, and the state that they leave."""
    work = condensation(classes, **changes)
    said = [work.run_step() for _ in range(STEPS)]
    return {"said": said, "state": work.state_dict()}


def curve(folder: Path) -> list[Tensor]:
    """All images at three points of a curve, with no checkpoint between them."""
    work, seen = condensation(5), []

    def on_curve(_step: int) -> float:
        seen.append(decode_all(work.container)[0])
        return 0.0

    checkpoints, points = Checkpoints(folder, 1e9), {"curve_points": 3, "on_curve": on_curve}
    condense(work, checkpoints, log_every_steps=1, on_report=lambda _: None, **points)
    return seen


VARIANTS = {
    "accumulate": (5, {"average": 0.9}),
    "part_of_each_class": (5, {"synthetic_batch": 2, "metric": "cosine"}),
    "per_class": (5, {"step_policy": "per_class"}),
    "groups": (5, {"classes_per_step": 2, "average": 0.5}),
    "groups_per_class": (5, {"classes_per_step": 3, "step_policy": "per_class"}),
    "three_classes": (3, {}),
    "penalty": (5, {"penalty": 0.3}),
    "bank": (5, {"banked": True, "bank": BankConfig(networks=1, snapshots=2)}),
    "dc": (5, {"dc": True}),  # its networks train on the images of all classes
    "dc_groups": (5, {"dc": True, "classes_per_step": 2}),
}


def judge(folder: Path) -> tuple[Judge, Split]:
    data = real(5)
    shared = {"momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine", "strategy": "flip", "cutmix": 0.5}
    recipe = Recipe(epochs=4, batch=16, lr=0.02, **shared)
    build, normalise = network_of(5), Normalise(data.mean, data.std, CPU.device)
    made = Judge(
        build=build,
        step=training_step(build(), CPU),
        normalise=normalise,
        recipe=recipe,
        seed=1,
        checkpoints=Checkpoints(folder, 0),
    )
    return made, Split(data.train.images, data.train.labels)


def judged(folder: Path) -> dict[str, Any]:
    """Evaluate three networks: of two processes, the last trains one; of four, the last trains none."""
    made, images = judge(folder)
    accuracies = evaluate(made, images, images, networks=3, points=2, stream="evaluate")
    return {
        "accuracies": accuracies.by_network,
        "margins": area_under_margin(made, images, "logit_margin", networks=3, epochs=2),
        "dealt out": dealt_out(folder),
        "read back": evaluate(made, images, images, networks=3, points=2, stream="evaluate").by_network,
    }


class OneEpoch:
    """A training of ``networks`` for one epoch, in which they learn nothing."""

    recipe, epoch = SimpleNamespace(epochs=1), 0

    def __init__(self, networks: range) -> None:
        self.networks = networks

    @property
    def finished(self) -> bool:
        return self.epoch == 1

    def run_epoch(self) -> list[float]:
        self.epoch = 1
        return [0.0] * len(self.networks)

    def state_dict(self) -> dict[str, Any]:
        return {}


def dealt_out(folder: Path) -> list[float]:
    """How often each of five networks is trained when only the first process had saved, while it trained a pair."""
    checkpoints, trained = Checkpoints(folder, 0), {"times": torch.zeros(5)}
    if distributed.first() and distributed.world() > 1:
        begun = {"index": 0, "stop": 2, "together": 2, "training": None, "memo": {"times": torch.zeros(5)}}
        checkpoints.save("dealt", begun, own=True)

    def observe(networks: range, training: OneEpoch, memo: dict[str, Tensor]) -> None:
        memo["times"][list(networks)] += 1

    return train_networks(5, OneEpoch, observe, trained, checkpoints, "dealt")["times"].tolist()


def exchanged(here: Path, alone: Path) -> dict[str, Any]:
    """Save two steps ``here`` for others, and take three more from what one process saved after two.

    Every process has a folder of its own, so that the files show which process wrote and which read.
    """
    work = condensation(5, classes_per_step=2)
    for _ in range(2):
        work.run_step()
    Checkpoints(here / f"process-{distributed.rank()}", 0).save("condense", work.state_dict())
    return continued(alone / "process-0" if distributed.first() else here / "nothing")


def continued(folder: Path) -> dict[str, Any]:
    work = condensation(5, classes_per_step=2)
    work.container.initialise(torch.Generator().manual_seed(99), HmnConfig(name="hmn"), None)
    work.load_state_dict(Checkpoints(folder, 0).load("condense"))
    for _ in range(STEPS - 2):
        work.run_step()
    return work.state_dict()


def told() -> dict[str, Any]:
    number = distributed.rank()
    rows = [(label, torch.full((2,), 10.0 * label + number)) for label in range(5)]
    distributed.gather_rows(rows, distributed.owned(5))
    tensors = [torch.tensor([1.0, number]), torch.tensor([[2.0]])]
    distributed.sum_(tensors)
    copied, positions = torch.full((2, 2), float(number)).T, torch.tensor([number, -7 - number], dtype=torch.int16)
    distributed.copy_first_([copied, positions, torch.tensor(number)])
    called = []
    first = distributed.from_first(lambda: called.append(number) or {"number": number})
    return {
        "owned": [list(distributed.owned(classes)) for classes in (4, 5, 10)],
        "rows": [row[0].item() for _, row in rows],
        "sums": [tensor.tolist() for tensor in tensors],
        "largest": distributed.agree(number, -number, 7),
        "first": first,
        "called": called,
        "copied": [copied.tolist(), positions.tolist()],
    }


def everything(folder: Path, alone: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"told": told()} if distributed.world() > 1 else {}
    for name, (classes, changes) in VARIANTS.items():
        if classes >= distributed.world():
            found[name] = condensed(classes, changes)
    found |= {"judged": judged(folder / "judged"), "curve": curve(folder / "curve")}
    return found | {"exchanged": exchanged(folder, alone), "folder": folder}


def _one_of_several(environment: dict[str, str], folder: Path, alone: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that only the order of sums can make a difference
    distributed.start(CPU.device)
    torch.save(everything(folder, alone), folder / f"found-{distributed.rank()}.pt")
    distributed.finish()


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Callable[[int], list[dict[str, Any]]]:
    """Return a function that gives what each of ``count`` processes finds; it starts them once per count."""
    alone = tmp_path_factory.mktemp("processes-1")

    @functools.cache
    def find(count: int) -> list[dict[str, Any]]:
        folder = alone if count == 1 else tmp_path_factory.mktemp(f"processes-{count}")
        with meeting(count) as environments:
            arguments = [(environment, folder, alone) for environment in environments]
            workers = [processes.Process(target=_one_of_several, args=each, daemon=True) for each in arguments]
            serve()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(WAIT_SECONDS)
        assert [worker.exitcode for worker in workers] == [0] * count
        return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(count)]

    return find


@pytest.fixture
def alone(several) -> dict[str, Any]:
    return several(1)[0]


def assert_close(one: Any, other: Any, at: str = "found") -> None:
    """Compare nested lists and dictionaries to float64 accuracy, except time and memory, which differ between runs."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one.keys() - {"seconds", "peak_bytes"}:
            assert_close(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, f"{at}[{index}]")
    elif isinstance(one, Tensor) and one.dtype == torch.float64:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text: f"{at}: {text}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), at
    else:
        assert one == other, at


COUNTS = pytest.mark.parametrize("count", [2, 4])


@pytest.mark.parametrize(
    ("variant", "count"), [(name, count) for name in VARIANTS for count in (2, 4) if VARIANTS[name][0] >= count]
)
def test_condensing_in_several_processes_is_that_of_one(alone, several, variant: str, count: int):
    """Losses, gradient norms, parameters, Adam's moments and the streams agree in every process."""
    for found in several(count):
        assert_close(found[variant], alone[variant])


@COUNTS
def test_every_process_has_all_images_of_a_curves_points(alone, several, count: int):
    assert not torch.allclose(alone["curve"][0], alone["curve"][2])
    for found in several(count):
        assert_close(found["curve"], alone["curve"])


@COUNTS
def test_a_checkpoint_goes_on_in_another_number_of_processes(alone, several, double, count: int):
    for found in several(count):
        assert_close(found["exchanged"], alone["exchanged"])
    folder = several(count)[0]["folder"]
    assert_close(continued(folder / "process-0"), alone["exchanged"])
    assert not list(folder.glob("process-[1-9]"))


@COUNTS
def test_networks_are_dealt_out_and_their_measurements_meet_again(alone, several, count: int):
    for found in several(count):
        assert_close(found["judged"], alone["judged"])
        assert found["judged"]["dealt out"] == [1] * 5
    kept = {path.stem for path in (several(count)[0]["folder"] / "judged").iterdir()}
    own = {f"{slot}-{rank}of{count}" for slot in ("dealt", "evaluate", "score") for rank in range(count)}
    assert kept == {"clock", "dealt", "evaluate", "score"} | own


def test_processes_share_out_even_what_one_of_them_could_train_at_once(tmp_path, monkeypatch):
    for name, found in {"world": 2, "rank": 1, "agree": [0]}.items():
        monkeypatch.setattr(distributed, name, lambda *_, found=found: found)
    monkeypatch.setattr(distributed, "sum_", lambda _: None)
    monkeypatch.setattr(distributed, "from_first", lambda read: read())
    dealt = []

    def make(networks: range) -> OneEpoch:
        dealt.append(list(networks))
        return OneEpoch(networks)

    train_networks(5, make, lambda *_: None, {}, Checkpoints(tmp_path, 60), "dealt", together=5)
    assert dealt == [[3, 4]]  # the first process trains the other three


def test_what_processes_tell_each_other(several):
    two, four = ([found["told"] for found in several(count)] for count in (2, 4))
    assert [told["owned"] for told in two] == [
        [[0, 1], [0, 1, 2], [0, 1, 2, 3, 4]],
        [[2, 3], [3, 4], [5, 6, 7, 8, 9]],
    ]
    assert [told["owned"][1] for told in four] == [[0, 1], [2], [3], [4]]
    for told in two:
        assert told["rows"] == [0, 10, 20, 31, 41]
        assert told["sums"] == [[2, 1], [[4]]]
        assert told["largest"] == [1, 0, 7]
    assert [told["called"] for told in two + four] == [[0], [], [0], [], [], []]
    for told in two + four:
        assert told["first"] == {"number": 0}
        assert told["copied"] == [[[0, 0], [0, 0]], [0, -7]]


def test_alone_nothing_is_exchanged():
    row = torch.ones(2)
    distributed.gather_rows([(7, row)], range(3))
    distributed.sum_([row])
    distributed.copy_first_([row])
    assert row.tolist() == [1, 1]
    assert (distributed.world(), distributed.rank(), distributed.first()) == (1, 0, True)
    assert distributed.owned(3) == range(3)
    assert distributed.agree(3, -1) == [3, -1]
    assert distributed.from_first(lambda: 5) == distributed.first_then_others(lambda: 5) == 5


@pytest.mark.parametrize(("first", "order"), [(True, ["loads", "meets"]), (False, ["meets", "loads"])])
def test_what_the_first_process_downloads_is_there_before_the_others_look(monkeypatch, first: bool, order: list[str]):
    seen = []
    monkeypatch.setattr(distributed, "first", lambda: first)
    monkeypatch.setattr(distributed, "agree", lambda _value: seen.append("meets"))
    assert distributed.first_then_others(lambda: seen.append("loads") or 5) == 5
    assert seen == order


# Devices


@pytest.mark.parametrize(("given", "taken"), [("auto", "cuda:2"), ("cuda", "cuda:2"), ("cpu", "cpu")])
def test_every_process_takes_the_gpu_of_its_number(monkeypatch, given: str, taken: str):
    four_gpus(monkeypatch, local_rank=2)
    assert compute.device_of(ComputeConfig(device=given)) == torch.device(taken)


@pytest.mark.parametrize(
    ("given", "number", "complaint"),
    [
        ("auto", 4, "compute.device=cuda:4: must be cpu or auto: this machine has no such GPU"),
        ("cuda:1", 0, "compute.device=cuda:1: must be auto, cuda or cpu: every process takes a GPU of its own"),
    ],
)
def test_a_gpu_that_is_not_there_or_not_its_own_is_refused(monkeypatch, given: str, number: int, complaint: str):
    four_gpus(monkeypatch, local_rank=number)
    with pytest.raises(ConfigError) as raised:
        compute.device_of(ComputeConfig(device=given))
    assert str(raised.value) == complaint


def four_gpus(monkeypatch, local_rank: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"WORLD_SIZE": "5", "RANK": "7", "LOCAL_RANK": str(local_rank)}.items():
        monkeypatch.setenv(name, value)


# The command line, with every stage that has a state, saved at each step

STAGES = (
    *TINY,
    *("container.init=fit_real", "container.fit_steps=4", "evaluation.curve_points=2", "evaluation.curve_epochs=1"),
    *("objective.inner_steps=8", "objective.real_batch=16", "evaluation.networks=3", "pruning.score_networks=2"),
    "compute.checkpoint_every_seconds=0",
)


def folder_of(where: Path) -> Path:
    (folder,) = (where / "runs").iterdir()
    return folder


def seen(where: Path, slot: str) -> Callable[[], bool]:
    return lambda: any(where.glob(f"runs/*/checkpoints/{slot}.pt"))


def assert_same_outcome(where: Path, expected: Path) -> None:
    """Compare tensors, measurements and files of two finished runs; sums in float32 differ in their last bits."""
    one, other = (load_file(folder_of(folder) / "condensed.safetensors") for folder in (where, expected))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=2e-3, msg=lambda text, n=name: f"{n}: {text}")
    one, other = (json.loads((folder_of(folder) / "result.json").read_text()) for folder in (where, expected))
    assert one.keys() == other.keys()
    for name in ("run_id", "stored_floats", "condense_steps", "images_per_class", "config"):
        assert one[name] == other[name], name
    assert one["accuracy"]["seeds"] == other["accuracy"]["seeds"]
    assert one["accuracy"]["mean"] == pytest.approx(other["accuracy"]["mean"], abs=0.02)
    files = [{path.name for path in folder_of(folder).iterdir()} for folder in (where, expected)]
    assert files[0] == files[1]
    one, other = ((folder_of(folder) / "metrics.jsonl").read_text().splitlines() for folder in (where, expected))
    assert [json.loads(line).keys() for line in one] == [json.loads(line).keys() for line in other]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("one_process")
    outcome = run(where, *STAGES)
    assert outcome.code == 0, outcome.err
    return where


def end(commands: list[Command]) -> tuple[list[int], list[str]]:
    """Exit codes, and all lines on stderr that are not a progress bar."""
    outcomes = [command.finish() for command in commands]
    lines = [line for outcome in outcomes for line in outcome.err.replace("\r", "\n").splitlines()]
    moving_up = "\x1b[A"
    said = [line for line in lines if line.replace(moving_up, "").strip() and "%|" not in line]
    return [outcome.code for outcome in outcomes], said


@pytest.mark.slow
def test_two_processes_leave_one_set_of_outputs_and_both_end_well(tmp_path, one_process):
    first, second = run_several(tmp_path, 2, *STAGES)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    assert "2 processes" in first.out
    assert "test accuracy" in first.out
    assert_same_outcome(tmp_path, one_process)
    assert json.loads((folder_of(tmp_path) / "result.json").read_text())["processes"] == 2
    first, second = run_several(tmp_path, 2, *STAGES)
    assert (first.code, second.code, second.out) == (0, 0, "")
    assert "is finished: this is its saved result" in first.out


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_says_so_and_the_run_goes_on(tmp_path, one_process, victim: int):
    """Process ``victim`` is killed while condensing, then while evaluating; at last, one process finishes the run."""
    for slot in ("condense", "evaluate-1of2"):
        with start_several(tmp_path, 2, *STAGES) as commands:
            commands[victim].wait_for(seen(tmp_path, slot))
            commands[victim].process.kill()
            codes, lines = end(commands)
        assert codes[victim] == 128 + signal.SIGKILL
        assert codes[1 - victim] == 1
        assert lines == [LOST]
        assert not (folder_of(tmp_path) / "result.json").exists()
    outcome = run(tmp_path, *STAGES)
    assert outcome.code == 0, outcome.err
    assert "continuing at step 16 of 16" in outcome.out
    assert_same_outcome(tmp_path, one_process)
    assert not (folder_of(tmp_path) / "checkpoints").exists()


@pytest.mark.slow
def test_processes_that_one_signal_stops_stop_together_and_go_on_in_as_many(tmp_path, one_process):
    with start_several(tmp_path, 2, *STAGES) as commands:
        commands[1].wait_for(seen(tmp_path, "condense"))
        os.kill(commands[1].process.pid, signal.SIGTERM)
        codes, lines = end(commands)
    assert codes == [128 + signal.SIGTERM] * 2
    assert lines == ["stopped by SIGTERM; the same command resumes from here"]
    first, second = run_several(tmp_path, 2, *STAGES)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "continuing at step" in first.out
    assert_same_outcome(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "count", "complaint"),
    [
        (
            (*TINY, "memory=ipc10", "dataset.class_range=[0,2]"),
            3,
            "--nproc-per-node=3: must be at most 2, one class for every process",
        ),
        (("-m", *TINY, "seed=0,1"), 2, "--multirun: must be left out under torchrun"),
        ((*TINY, "seed=-1"), 2, "seed=-1: must be at least 0"),
        ((*TINY, "memory=ipc7"), 2, "memory=ipc7: must be one of ipc1"),
    ],
    ids=["too many", "multirun", "a value", "an option"],
)
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, arguments: tuple[str, ...], count: int, complaint: str):
    with start_several(tmp_path, count, *arguments) as commands:
        codes, (line,) = end(commands)
    assert set(codes) == {2}
    assert line.startswith(complaint)


@pytest.mark.slow
def test_a_run_that_another_process_works_on_is_refused_once(tmp_path):
    command = start(tmp_path, *STAGES)
    command.wait_for(seen(tmp_path, "condense"))
    os.kill(command.process.pid, signal.SIGSTOP)  # otherwise it might finish before they ask
    with start_several(tmp_path, 2, *STAGES) as commands:
        codes, (line,) = end(commands)
    os.kill(command.process.pid, signal.SIGCONT)
    assert codes == [Busy.exit_code, Lost.exit_code]
    assert line.endswith("another process is working on this run; wait for it or stop it")
    assert command.finish().code == 0


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path, one_process):
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*command, str(ROOT / "run.py"), *STAGES],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert_same_outcome(tmp_path, one_process)
