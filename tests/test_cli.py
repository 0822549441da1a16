"""The command line end to end: what a run saves and prints. Bad input is tested in test_refusals.py."""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

import hmn
from hmn import cli, experiment, results
from hmn.cli import is_sweep
from hmn.config import Config
from hmn.explain import in_one_line
from hmn.machine import cpu_name
from tests.command import ROOT, TINY, Outcome, compose, planned, run, start
from tests.wandb_reader import read_offline_run, without_login

KEPT = {".lock", "card.json", "condensed.png", "condensed.safetensors", "config.yaml", "metrics.jsonl", "result.json"}
PRUNED = {"over_budget.png"}


def toy(path: Path, classes: int = 3) -> str:
    """Save ``classes`` noisy 8 x 8 grey patterns, 40 training and 10 test images each, and return the override."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 200, (classes, 8, 8))
    arrays = {}
    for split, count in (("train", 40), ("test", 10)):
        labels = np.arange(classes).repeat(count)
        arrays[f"x_{split}"] = (patterns[labels] + random.integers(0, 56, (len(labels), 8, 8))).astype(np.uint8)
        arrays[f"y_{split}"] = labels
    np.savez(path, **arrays)
    return f"dataset.root={path}"


TOY = (*TINY, "dataset=arrays", "dataset.channels=1", "objective.real_batch=16", "memory=ipc10")


@dataclass
class Finished:
    """A finished run in ``folder``, started in ``where``."""

    where: Path
    arguments: tuple[str, ...]
    outcome: Outcome
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())


def finish(where: Path, *arguments: str) -> Finished:
    outcome = run(where, *arguments)
    assert outcome.code == 0, outcome.err
    (folder,) = re.findall(r"^run folder: (.*)$", outcome.out, re.MULTILINE)
    return Finished(where, arguments, outcome, where / folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    where = tmp_path_factory.mktemp("run")
    return finish(where, *TOY, toy(where / "toy.npz"))


def row(printed: str, name: str) -> list[str]:
    """The cells of the printed table's row ``name``."""
    (line,) = [line for line in printed.splitlines() if line.startswith(f"{name}  ")]
    return re.split(r"\s{2,}", line)


# What a finished run leaves


def test_a_run_keeps_its_files_in_a_folder_of_its_id_and_nothing_else(finished):
    plan = planned(*finished.arguments)
    assert finished.folder == finished.where / "runs" / plan.run_id
    kept = {f"runs/{plan.run_id}/{name}" for name in KEPT | PRUNED}
    assert set(finished.outcome.files) == {"toy.npz", "runs", f"runs/{plan.run_id}"} | kept


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [("ascii", "93.41 ± 0.85", rb"93.41 \xb1 0.85"), ("utf-8", "\udcff.jpg", rb"\udcff.jpg")],  # a name on the disk
)
def test_what_the_output_cannot_encode_is_shown_as_an_escape(monkeypatch, encoding, text, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    in_one_line(lambda: print(text, end=""))
    assert stream.buffer.getvalue() == shown


@pytest.mark.parametrize("arguments", [("run.py", *TINY, "mode=plan"), ("sweep.py", "status", *TINY)])
def test_a_reader_that_has_seen_enough_ends_a_plan_without_a_word(tmp_path, arguments):
    command = [sys.executable, *arguments, f"paths.runs_dir={tmp_path}"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as nobody:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ended = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, cwd=ROOT, env=buffered)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_result_tells_what_was_measured_with_which_code_on_what(finished):
    result, plan = finished.result, planned(*finished.arguments)
    assert (result["schema_version"], result["run_id"], result["mode"]) == (1, plan.run_id, "run")
    assert set(result) >= {"commit", "dirty", "packages", "python", "device", "wall_seconds", "peak_bytes"}
    assert result["packages"]["torch"] == importlib.metadata.version("torch")
    assert result["device"] == f"{cpu_name()}, 1 threads"
    assert 10**7 < result["condense_peak_bytes"] <= result["peak_bytes"]
    assert set(result["wall_seconds"]) == {"condense", "score", "search_beta", "evaluate"}
    assert all(seconds > 0 for seconds in result["wall_seconds"].values())
    assert 10**7 < result["peak_bytes"] < 10**11
    assert (result["network"], result["profile"]) == ("ConvNet-D2-W4", "hmn_cosine")
    assert result["condense_steps"] == 6

    accuracy = result["accuracy"]
    last = [points[-1] for points in accuracy["by_network"]]
    assert (len(last), len(set(accuracy["seeds"])), accuracy["test_epochs"]) == (2, 2, [1, 2])
    assert accuracy["mean"] == pytest.approx(np.mean(last))
    assert accuracy["std"] == pytest.approx(np.std(last, ddof=1))
    assert accuracy["best_mean"] == pytest.approx(np.mean([max(points) for points in accuracy["by_network"]]))


def test_storage_stays_in_the_budget_and_the_counts_agree(finished):
    result, plan = finished.result, planned(*finished.arguments)
    assert result["budget_floats"] == 10 * 3 * 8 * 8
    assert result["stored_floats"] == plan.storage.stored_floats(3) <= result["budget_floats"]
    assert result["stored_floats"] == sum(result["tier_floats"].values())
    assert result["images_per_class"] == str(plan.storage.images_per_class)
    assert result["over_budget_images_per_class"] == plan.storage.over_budget_images_per_class
    cut = plan.storage.over_budget_images_per_class - plan.storage.images_per_class
    assert result["pruning"]["cut_per_class"] == cut > 0
    searched = {float(beta): value for beta, value in result["pruning"]["searched"].items()}
    assert searched[result["pruning"]["beta"]] == max(searched.values())
    tensors = load_file(finished.folder / "condensed.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == result["stored_floats"]


def test_the_one_line_loader_loads_it(finished):
    condensed = hmn.load_condensed(finished.folder)
    images, labels = condensed.tensors()
    count = planned(*finished.arguments).storage.images_per_class
    assert (images.shape, images.dtype) == ((3 * count, 1, 8, 8), torch.float32)
    assert labels.bincount().tolist() == [count] * 3
    assert condensed.container.storage_floats() == finished.result["stored_floats"]
    loader = torch.utils.data.DataLoader(condensed, batch_size=len(condensed), shuffle=False)
    (batch, batch_labels), *rest = list(loader)
    assert (torch.equal(batch, images), torch.equal(batch_labels, labels), rest) == (True, True, [])


def test_the_card_tells_budget_preprocessing_profile_accuracy_checksum_and_provenance(finished):
    card, result = json.loads((finished.folder / "card.json").read_text()), finished.result
    tensors = (finished.folder / "condensed.safetensors").read_bytes()
    assert card["sha256"] == result["artifact_sha256"] == hashlib.sha256(tensors).hexdigest()
    assert card["budget"] == {"images_per_class": 10, "floats": 1920}
    assert (card["stored_floats"], card["run_id"]) == (result["stored_floats"], result["run_id"])
    data = card["data"]
    assert (data["class_names"], data["image_size"], data["channels"]) == (["0", "1", "2"], 8, 1)
    assert (len(data["mean"]), len(data["std"])) == (1, 1)
    assert data["fingerprint"] == result["data"]["fingerprint"]
    assert card["evaluation"]["accuracy"] == result["accuracy"]
    assert (card["evaluation"]["profile"], card["evaluation"]["network"]) == ("hmn_cosine", "ConvNet-D2-W4")
    assert card["provenance"]["packages"] == result["packages"]
    assert card["container"]["images_per_class"] == planned(*finished.arguments).storage.images_per_class


def test_metrics_hold_every_stage(finished):
    records = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "condense/step" in record]
    assert [record["condense/step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    layers = ["condense/loss_layer1", "condense/loss_layer2"]
    for record in steps:
        assert record["condense/loss"] == pytest.approx(sum(record[layer] for layer in layers))
        assert "condense/loss_layer3" not in record
        tiers = {"instances", "class", "dataset", "extractors", "decoder"}
        assert {key.split("/")[-1] for key in record if "gradient_norm" in key} == tiers
        assert all(record[f"condense/{name}"] > 0 for name in ("steps_per_second", "images_per_second", "peak_bytes"))
    (aum,) = [record["prune/aum"] for record in records if "prune/aum" in record]
    assert sum(aum["counts"]) == 3 * finished.result["over_budget_images_per_class"]
    candidates = [record for record in records if "prune/candidate" in record]
    searched = {str(record["prune/beta"]): record["prune/held_out_accuracy"] for record in candidates}
    assert searched == finished.result["pruning"]["searched"]
    accuracies = [record["evaluate/accuracy"] for record in records if "evaluate/network" in record]
    assert accuracies == [points[-1] for points in finished.result["accuracy"]["by_network"]]


def test_the_picture_has_a_row_per_class(finished):
    picture = Image.open(finished.folder / "condensed.png")
    assert (picture.mode, picture.size) == ("RGB", (8 * (10 * 9 - 1), 8 * (3 * 9 - 1)))
    corner = np.asarray(picture)[:8, :8]
    image = hmn.load_condensed(finished.folder).tensors()[0][0]
    assert (corner == round(255 * float(image[0, 0, 0]))).all()


def test_the_kept_configuration_makes_the_same_run(finished):
    kept = OmegaConf.to_container(OmegaConf.load(finished.folder / "config.yaml"))
    config = replace(planned(*finished.arguments).config, launcher=None, sweep=None)
    sections = {
        name: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(type(getattr(config, name))), value))
        for name, value in kept.items()
        if isinstance(value, dict)
    }
    assert Config(**kept | sections) == config
    assert kept == finished.result["config"]


def test_the_printed_table_has_the_accuracy_of_the_result(finished):
    result, printed = finished.result, finished.outcome.out
    accuracy = result["accuracy"]
    mean, std, best = (f"{100 * accuracy[name]:.2f}" for name in ("mean", "std", "best_mean"))
    expected = [result["images_per_class"], f"{result['stored_floats']:,}", f"{mean} ± {std}", best, "2"]
    assert row(printed, "condensed") == ["condensed", *expected]
    assert "toy, ConvNet-D2-W4, profile hmn_cosine, test accuracy of the last epoch" in printed.splitlines()
    assert f"run folder: runs/{result['run_id']}" in printed.splitlines()
    assert f"images:     runs/{result['run_id']}/condensed.png" in printed.splitlines()


# The same command again, and its references


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_same_command_again_does_no_work_and_prints_the_kept_result(finished):
    before = stamps(finished.folder)
    # Threads, device and tracking do not make it another result.
    again = run(finished.where, *finished.arguments, "compute.threads=2", "tracking=offline", "compute.device=auto")
    assert (again.code, again.err) == (0, "")
    assert f"{finished.result['run_id']} is finished" in again.out
    assert row(again.out, "condensed") == row(finished.outcome.out, "condensed")
    assert stamps(finished.folder) == before


def test_references_are_hinted_at_until_they_are_measured_and_then_printed_beside(tmp_path):
    arguments = (*TOY, toy(tmp_path / "toy.npz"))
    hints = dict(re.findall(r"^(.*): not measured yet; (.*)$", finish(tmp_path, *arguments).outcome.out, re.MULTILINE))
    assert set(hints) == {"random real subset", "full training set"}
    for name, floats, images in (("random real subset", "1,920", "10"), ("full training set", "6,912", "36")):
        program, script, *typed = shlex.split(hints[name])
        assert (program, script, tuple(typed[:-1])) == ("python", "run.py", arguments)
        reference = finish(tmp_path, *typed)
        assert row(reference.outcome.out, name)[1:3] == [images, floats]
        assert {path.name for path in reference.folder.iterdir()} <= KEPT - {"condensed.safetensors", "card.json"}
        printed = run(tmp_path, *arguments).out
        assert row(printed, name) == row(reference.outcome.out, name)
        assert f"{name}: not measured yet" not in printed
    assert "not measured yet" not in printed


MEASURED = {
    "images_per_class": "1",
    "stored_floats": 640,
    "accuracy": {"mean": 0.5, "std": None, "best_mean": 0.5, "by_network": [[0.5]]},
}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((), "condensed"),
        (("container=coreset", "container.method=herding"), "coreset, herding"),
        (("mode=random_subset",), "random real subset"),
        (("mode=full_data",), "full training set"),
    ],
)
def test_the_first_row_names_what_networks_were_trained_on(tmp_path, arguments, name):
    plan = planned(*TINY, *arguments, f"paths.runs_dir={tmp_path}")
    assert [cells[0] for cells in experiment._rows(plan, MEASURED)] == [name]


def test_a_reference_that_was_cut_short_is_not_measured_yet(tmp_path):
    """At the end of a run, it does not keep the run's own result from being shown."""
    arguments = (*TINY, f"paths.runs_dir={tmp_path}")
    plan, reference = planned(*arguments), planned(*arguments, "mode=full_data").folder
    results.write(reference, MEASURED)
    assert [cells[0] for cells in experiment._rows(plan, MEASURED)] == ["condensed", "full training set"]
    (reference / results.FILE).write_text("{")
    assert [cells[0] for cells in experiment._rows(plan, MEASURED)] == ["condensed"]


# A kept artifact


def test_networks_are_trained_together_where_that_is_asked_for(tmp_path):
    given = ("mode=random_subset", "evaluation.networks=3", "compute.networks_together=2")
    finished = finish(tmp_path, *TOY, toy(tmp_path / "toy.npz"), *given)
    assert set(re.findall(r"evaluate \S+/3", finished.outcome.err)) == {"evaluate 1-2/3", "evaluate 3/3"}
    assert len(finished.result["accuracy"]["by_network"]) == 3


def test_an_artifact_is_evaluated_without_naming_its_data_on_any_network(finished, tmp_path):
    other = finish(tmp_path, *TINY, "mode=evaluate", f"artifact={finished.folder}", "network.width=6")
    assert (other.result["mode"], other.result["network"]) == ("evaluate", "ConvNet-D2-W6")
    assert other.result["artifact_sha256"] == finished.result["artifact_sha256"]
    assert other.result["data"] == finished.result["data"]
    assert row(other.outcome.out, "condensed")[1:3] == row(finished.outcome.out, "condensed")[1:3]
    assert {path.name for path in other.folder.iterdir()} == KEPT - {"condensed.safetensors", "card.json"}

    by_file = f"artifact={finished.folder / 'condensed.safetensors'}"
    again = run(tmp_path, *TINY, "mode=evaluate", by_file, "network.width=6")
    assert f"{other.result['run_id']} is finished" in again.out


def test_an_artifact_is_trained_as_its_own_run_trained_it(finished, tmp_path):
    """The same seeds give the same networks, so the accuracy on the card can be measured again."""
    again = finish(tmp_path, *TINY, "mode=evaluate", f"artifact={finished.folder}")
    assert again.result["accuracy"] == finished.result["accuracy"]


def test_an_artifact_of_other_classes_is_refused(finished, tmp_path):
    other = toy(tmp_path / "four.npz", classes=4)
    outcome = run(tmp_path, *TINY, "mode=evaluate", f"artifact={finished.folder}", other)
    assert (outcome.code, "its classes are not those of four" in outcome.complaint) == (2, True)


@pytest.mark.parametrize(("key", "given", "kept"), [("image_size", 16, 8), ("channels", 3, 1)])
def test_an_artifact_of_other_shapes_is_refused_before_anything_is_read(finished, tmp_path, key, given, kept):
    outcome = run(tmp_path, *TINY, "mode=evaluate", f"artifact={finished.folder}", f"dataset.{key}={given}")
    assert (outcome.code, outcome.files) == (2, [])
    assert outcome.complaint == f"dataset.{key}={given}: must be {kept}, as in artifact={finished.folder}"


def flip_last_bit(folder: Path) -> None:
    data = bytearray((folder / "condensed.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "condensed.safetensors").write_bytes(data)


def other_version(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"schema_version": 99}))


def pickled(folder: Path) -> None:
    torch.save({"instances": torch.zeros(3)}, folder / "condensed.safetensors")
    card = json.loads((folder / "card.json").read_text())
    card["sha256"] = hashlib.sha256((folder / "condensed.safetensors").read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (flip_last_bit, "condensed.safetensors", "its SHA-256 is not the card's"),
        (other_version, "card.json", "schema version 99, this program reads 1"),
        (pickled, "condensed.safetensors", "pickled tensors are never loaded"),
        (lambda folder: (folder / "card.json").unlink(), "card.json", "missing"),
    ],
)
def test_a_damaged_artifact_is_refused(finished, tmp_path, damage, file, reason):
    folder = tmp_path / "kept"
    shutil.copytree(finished.folder, folder)
    damage(folder)
    outcome = run(tmp_path, *TINY, "mode=evaluate", f"artifact={folder}")
    assert outcome.code == 2
    assert outcome.complaint.startswith(f"{folder / file}: ")
    assert reason in outcome.complaint


def test_a_card_alone_tells_of_what_was_measured_and_is_no_artifact(finished, tmp_path):
    card = tmp_path / "kept" / "card.json"
    card.parent.mkdir()
    shutil.copy(finished.folder / "card.json", card)
    other = finish(tmp_path, *TINY, "mode=evaluate", f"artifact={finished.folder}", "network.width=6")
    again = run(tmp_path, *TINY, "mode=evaluate", f"artifact={card.parent}", "network.width=6")
    assert f"{other.result['run_id']} is finished" in again.out
    outcome = run(tmp_path, *TINY, "mode=evaluate", f"artifact={card.parent}", "network.width=8")
    assert outcome.code == 2
    assert outcome.complaint == f"artifact={card.parent}: no condensed.safetensors there; give a finished run's folder"


# Sweeps


def test_a_multirun_makes_one_run_per_cell_that_a_single_command_knows(tmp_path):
    arguments = (*TOY, toy(tmp_path / "toy.npz"))
    own = tmp_path / "slots"  # a sweep of the same user may hold the usual slots for hours
    own.mkdir()
    grid = ("pruning.over_budget=0,0.1", "memory.images_per_class=10,12")
    outcome = run(tmp_path, "-m", *arguments, *grid, TMPDIR=str(own))
    assert outcome.code == 0, outcome.err
    cells = [(f"pruning.over_budget={p}", f"memory.images_per_class={ipc}") for p in ("0", "0.1") for ipc in (10, 12)]
    plans = [planned(*arguments, *cell) for cell in cells]
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == sorted([*(plan.run_id for plan in plans), "sweeps"])
    assert outcome.out.splitlines()[-1] == "4 runs: 4 done"
    for plan in plans:
        result = json.loads((tmp_path / plan.folder / "result.json").read_text())
        assert result["images_per_class"] == str(plan.storage.images_per_class)
        assert (result["pruning"]["cut_per_class"] > 0) == (plan.config.pruning.over_budget > 0)
    single = run(tmp_path, *arguments, "pruning=none", "memory.images_per_class=12")
    assert f"{plans[1].run_id} is finished" in single.out


def test_a_run_says_what_it_was_given_and_does_not_read(tmp_path):
    outcome = run(tmp_path, *TINY, "container.fit_steps=5000", "mode=run")
    assert outcome.code == 0, outcome.err
    assert "not read: container.fit_steps (container.init=random)\n" in outcome.out


def test_a_sweeper_selects_by_held_out_images_and_never_by_the_test_set(monkeypatch):
    given = SimpleNamespace(overrides=SimpleNamespace(task=list(TINY)))
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: given)
    for pruning, selected in (({"held_out_accuracy": 0.25}, 0.25), ({}, None)):
        result = {"accuracy": {"mean": 0.75}, "curve": [], "pruning": pruning}
        monkeypatch.setattr(cli.experiment, "run", lambda *_, result=result, **__: result)
        assert cli._run(compose(*TINY)) == selected


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ("-m seed=0,1", True),
        ("seed=0,1 --multirun", True),
        ("seed=0", False),
        ("-m seed=0,1 hydra/sweeper=optuna", False),
        ("-m seed=0,1 --cfg job", False),
    ],
)
def test_a_multirun_of_which_hydra_is_asked_more_is_left_to_hydra(arguments, ours):
    assert is_sweep(arguments.split()) is ours


def test_hydras_options_stand_a_check_of_every_help_text(monkeypatch):
    """As Python 3.14's argparse makes it when an option is added."""

    def check(_parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        assert action.help is None or "%" not in action.help

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    cli._accept_lazy_help()
    parser = get_args_parser()
    for action in parser._actions:
        parser._check_help(action)
    assert "shell completion" in parser.format_help()


def test_a_sweep_with_a_bad_cell_starts_none(tmp_path):
    outcome = run(tmp_path, "-m", *TINY, "seed=1,abc")
    assert (outcome.code, outcome.out, outcome.files) == (2, "", [])
    assert outcome.complaint.startswith("seed=abc: ")


# A run that fails


def test_a_run_that_diverges_names_step_and_tier_and_keeps_its_last_checkpoint(tmp_path):
    given = (*TOY, toy(tmp_path / "toy.npz"), "objective.weights_lr=1e30", "compute.checkpoint_every_seconds=0")
    outcome = run(tmp_path, *given)
    assert outcome.code == 1
    line = outcome.err.splitlines()[-1]
    found = re.search(r"the matching loss is (nan|inf) at step (\d+) \((.*)\); the last checkpoint is kept", line)
    assert found, line
    assert "tier" in found[3]
    (kept,) = (tmp_path / "runs").glob("*/checkpoints/condense.pt")
    state = torch.load(kept, weights_only=True)
    assert state["step"] == int(found[2]) - 1
    assert all(bool(tensor.isfinite().all()) for tensor in state["container"].values())


def test_help_shows_groups_and_settings(tmp_path):
    outcome = run(tmp_path, "--help")
    assert (outcome.code, outcome.err, outcome.files) == (0, "", [])
    assert "dataset: arrays, cifar10, cifar100" in outcome.out
    assert "over_budget: 0.1" in outcome.out


# W&B


@pytest.fixture
def wandb_home(monkeypatch, tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    without_login(monkeypatch, home)
    return {"HOME": str(home), "WANDB_ERROR_REPORTING": "false"}


def test_what_a_run_sends_to_wandb_is_really_in_it(tmp_path, wandb_home):
    given = (*TOY, "tracking=offline", "evaluation.curve_points=2", "evaluation.curve_epochs=1")
    outcome = run(tmp_path, *given, toy(tmp_path / "toy.npz"), **wandb_home)
    assert outcome.code == 0, outcome.err
    (folder,) = (tmp_path / "runs").glob("*/")
    result = json.loads((folder / "result.json").read_text())
    logged = read_offline_run(folder)
    assert (logged["run"]["id"], logged["run"]["job_type"], logged["run"]["project"]) == (folder.name, "run", "hmn")
    assert logged["exit_code"] == 0
    for section in ("dataset", "memory", "container", "objective", "pruning", "network", "evaluation"):
        assert logged["config"][section] == result["config"][section]

    def rows(name: str) -> list[Any]:
        return [entry[name] for entry in logged["history"] if name in entry]

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = ("steps_per_second", "images_per_second", "peak_bytes")
    for name in ("loss", "loss_layer1", "loss_layer2", "gradient_norm/decoder", "gradient_norm/instances", *rates):
        assert len(rows(f"condense/{name}")) == 6
        assert rows(f"condense/{name}") == [
            record[f"condense/{name}"] for record in records if "condense/loss" in record
        ]
    assert rows("curve/held_out_accuracy") == [point["held_out_accuracy"] for point in result["curve"]]
    assert rows("prune/held_out_accuracy") == list(result["pruning"]["searched"].values())
    assert rows("evaluate/accuracy") == [points[-1] for points in result["accuracy"]["by_network"]]
    assert logged["metrics"]["evaluate/accuracy"] == "evaluate/network"

    (aum,) = rows("prune/aum")
    assert (aum["_type"], sum(aum["values"])) == ("histogram", 3 * result["over_budget_images_per_class"])
    grids = [entry for entry in logged["history"] if "condense/images" in entry]
    assert [entry["condense/step"] for entry in grids] == [0, 3, 6]  # once, whatever they are due for
    files = [logged["files_dir"] / image["path"] for image in rows("condense/images")]
    assert all(Image.open(file).mode == "RGB" for file in files)

    (table,) = rows("result")
    stored = json.loads((logged["files_dir"] / table["path"]).read_text())
    assert [stored["columns"], *stored["data"]] == [list(cells) for cells in printed_table(outcome.out)]
    assert logged["summary"]["accuracy_mean"] == result["accuracy"]["mean"]
    (artifact,) = [entry for entry in logged["artifacts"] if entry["type"] == "condensed-set"]
    assert artifact["name"] == folder.name
    assert artifact["metadata"]["sha256"] == result["artifact_sha256"]
    for name in ("condensed.safetensors", "card.json", "condensed.png"):
        digest = base64.b64decode(artifact["files"][name]["digest"])
        assert digest == hashlib.md5((folder / name).read_bytes()).digest()


def printed_table(printed: str) -> list[list[str]]:
    lines = printed.splitlines()
    ruler = next(index for index, line in enumerate(lines) if line.startswith("---"))
    return [re.split(r"\s{2,}", lines[index]) for index in (ruler - 1, ruler + 1)]


def test_a_crash_leaves_its_exit_code_in_wandb(tmp_path, wandb_home):
    given = (*TOY, "tracking=offline", toy(tmp_path / "toy.npz"), "objective.real_batch=41")
    outcome = run(tmp_path, *given, **wandb_home)
    assert (outcome.code, "has only 36 training images" in outcome.complaint) == (2, True)
    (folder,) = (tmp_path / "runs").glob("*/")
    assert read_offline_run(folder)["exit_code"] == 2


def test_a_stopped_run_leaves_its_exit_code_in_wandb(tmp_path, wandb_home):
    given = (*TOY, "tracking=offline", toy(tmp_path / "toy.npz"), "objective.outer_steps=1000")
    command = start(tmp_path, *given, "compute.checkpoint_every_seconds=0", **wandb_home)
    command.wait_for(lambda: any(tmp_path.glob("runs/*/checkpoints/condense.pt")))
    command.process.terminate()
    assert command.finish().code == 143
    (folder,) = (tmp_path / "runs").glob("*/")
    logged = read_offline_run(folder)
    assert logged["exit_code"] == 143
    assert any("condense/loss" in entry for entry in logged["history"])
