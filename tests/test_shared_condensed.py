"""Condensations that several runs share: which runs do, that it changes nothing, and what becomes of bad files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hmn import shared_condensed
from hmn.config.identity import condensation_identity
from hmn.errors import Interrupted
from hmn.files import exclusive
from hmn.results import code_version
from hmn.stop import Stop
from tests.command import TINY, configured, planned, run, run_several, start

SHARED = "compute.share_condensed=true"
# Settings of what may come after one condensation over budget
AFTER = {
    "beta": ("pruning.beta=1",),
    "score": ("pruning.score=random", "pruning.beta=0"),
    "scored longer": ("pruning.score_epochs=2",),
    "profile": ("evaluation=idc_multistep", "evaluation.epochs=2", "evaluation.networks=1"),
    "networks": ("evaluation.networks=1",),
    "rounding": ("memory.number=float16",),
}
OTHERWISE = {
    "seed": ("seed=3",),
    "steps": ("objective.outer_steps=1",),
    "rate": ("objective.memory_lr=0.005",),
    "start": ("container.instance_init_scale=2",),
    "over budget": ("pruning.over_budget=0.3",),
    "matched network": ("network.norm=none",),
    "precision": ("compute.precision=bf16",),
    "curve": ("evaluation.curve_points=3",),
    "data": ("dataset.held_out_fraction=0.2",),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which one run that shares its condensation has finished."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, *TINY, SHARED).code == 0
    return folder


@pytest.fixture
def made(finished, tmp_path) -> Path:
    """A copy of the folder ``finished``."""
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/*/result.json")}


CURVE = "evaluation.curve_points=2"


def identity(*overrides: str) -> dict[str, Any]:
    return condensation_identity(configured(*TINY, *overrides))


@pytest.mark.parametrize("name", AFTER)
def test_what_comes_after_condensing_is_no_part_of_it(name):
    assert identity(*AFTER[name]) == identity()


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_condensing_depends_on_is_part_of_it(name):
    assert identity(*OTHERWISE[name]) != identity()


def test_the_recipe_of_evaluation_is_part_of_it_where_a_curve_is_measured():
    assert identity("evaluation.lr=0.02") == identity()
    assert identity(CURVE, "evaluation.lr=0.02") != identity(CURVE)
    assert identity(CURVE, "evaluation.epochs=9") == identity(CURVE)


def test_other_images_and_other_sources_have_folders_of_their_own(tmp_path):
    plan = planned(*TINY, f"paths.cache_dir={tmp_path}")
    folders = {shared_condensed.folder_of(plan, data, code, "fp32") for data in "ab" for code in "cd"}
    assert len(folders | {shared_condensed.folder_of(plan, "a", "c", "bf16")}) == 5


def test_the_kept_set_that_a_container_starts_from_is_part_of_it(tmp_path):
    plan = planned(*TINY, f"paths.cache_dir={tmp_path}")
    none, one, other = (dataclasses.replace(plan, artifact=checksum) for checksum in (None, "a", "b"))
    assert shared_condensed.identity_of(one) != shared_condensed.identity_of(other)
    assert shared_condensed.identity_of(one) != shared_condensed.identity_of(none)
    assert len({shared_condensed.folder_of(start, "data", "code", "fp32") for start in (none, one, other)}) == 3


def test_runs_that_share_a_condensation_end_as_if_each_had_made_its_own(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    names = ("beta", "profile", "rounding")
    for folder in (alone, together):
        folder.mkdir()
        for name in names:
            outcome = run(folder, *TINY, *AFTER[name], f"compute.share_condensed={str(folder == together).lower()}")
            assert outcome.code == 0, outcome.err
    expected, found = results(alone), results(together)
    assert len(expected) == len(names) and expected.keys() == found.keys()
    for run_id, result in expected.items():
        for key in ("accuracy", "artifact_sha256", "curve", "pruning", "condense_steps"):
            assert found[run_id][key] == result[key], key
        assert "condensed_by" not in result
        number = 2 if result["config"]["memory"]["number"] == "float16" else 4
        assert found[run_id]["stored_bytes"] == number * result["stored_floats"]
    assert len(list(together.glob(".cache/condensed/*"))) == 1
    assert not (alone / ".cache" / "condensed").exists()
    (maker,) = {result["condensed_by"] for result in found.values()}
    (seconds,) = {result["condense_seconds"] for result in found.values()}
    assert seconds == found[maker]["condense_seconds"] > 0
    made = [run_id for run_id, result in found.items() if "condense" in result["wall_seconds"]]
    assert made == [maker]


@pytest.mark.parametrize("kind", ["speed", "fred", "haba", "multiformation"])
def test_every_container_is_shared_in_the_form_that_is_kept(tmp_path, kind):
    given = (*TINY, "pruning=none", "memory=ipc10", f"container={kind}", SHARED)
    for networks in (1, 2):
        outcome = run(tmp_path, *given, f"evaluation.networks={networks}")
        assert outcome.code == 0, outcome.err
    one, other = results(tmp_path).values()
    assert one["artifact_sha256"] == other["artifact_sha256"] and one["condensed_by"] == other["condensed_by"]


def test_several_processes_take_it_together(made):
    outcomes = run_several(made, 2, *TINY, SHARED, *AFTER["networks"])
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    one, other = results(made).values()
    assert one["artifact_sha256"] == other["artifact_sha256"] and one["condensed_by"] == other["condensed_by"]


def killed_at(slot: str, folder: Path, *arguments: str) -> None:
    """Start a run in ``folder`` and kill it once it has a checkpoint of ``slot``."""
    command = start(folder, *arguments)
    command.wait_for(lambda: any(folder.glob(f"runs/*/checkpoints/{slot}.pt")))
    command.process.kill()
    assert command.finish().code == 128 + signal.SIGKILL  # it had not finished before


def test_a_killed_run_goes_on_and_keeps_the_same_condensation(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    given = (*TINY, SHARED, "objective.outer_steps=12", "compute.checkpoint_every_seconds=0")
    assert run(whole, *given).code == 0
    killed_at("condense", killed, *given)
    assert not any(killed.glob(".cache/condensed/*/*.safetensors"))
    outcome = run(killed, *given)
    assert outcome.code == 0 and "continuing at step" in outcome.out
    (one,), (other,) = (list(folder.glob(".cache/condensed/*/*.safetensors")) for folder in (whole, killed))
    assert one.parent.name == other.parent.name
    (expected,), (found,) = results(whole).values(), results(killed).values()
    assert found["artifact_sha256"] == expected["artifact_sha256"]


def records(folder: Path, run_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / run_id / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_that_took_it_records_its_later_stages_once(made):
    given = (*TINY, SHARED, "pruning.score=random", "evaluation.epochs=60", "compute.checkpoint_every_seconds=0")
    killed_at("evaluate", made, *given)
    assert run(made, *given).code == 0
    (taken,) = [run_id for run_id, one in results(made).items() if one["condensed_by"] != run_id]
    found = records(made, taken)
    assert sum("prune/aum" in record for record in found) == 1
    assert len({json.dumps(record, sort_keys=True) for record in found}) == len(found)


def test_a_killed_run_keeps_its_record_of_what_it_condensed_itself(tmp_path):
    given = (*TINY, SHARED, "tracking.log_every_steps=1", "evaluation.epochs=60", "compute.checkpoint_every_seconds=0")
    killed_at("evaluate", tmp_path, *given)
    assert run(tmp_path, *given).code == 0
    ((run_id, result),) = results(tmp_path).items()
    steps = [record["condense/step"] for record in records(tmp_path, run_id) if "condense/loss" in record]
    assert steps == list(range(1, result["condense_steps"] + 1))


def test_a_run_that_has_condensed_alone_and_begun_to_judge_keeps_its_own(tmp_path):
    """Meanwhile, another run may have saved the same condensation with other numbers."""
    given = (*TINY, "evaluation.epochs=60", "compute.checkpoint_every_seconds=0")
    killed_at("evaluate", tmp_path, *given)
    assert run(tmp_path, *TINY, SHARED, *AFTER["networks"]).code == 0
    outcome = run(tmp_path, *given, SHARED)
    assert outcome.code == 0 and "condensed by" not in outcome.out


def test_what_a_run_took_and_has_begun_to_judge_it_keeps(made):
    """Even with the shared file gone and sharing off: otherwise half of its accuracy would be of another set."""
    given = (*TINY, SHARED, "pruning.score=random", "evaluation.epochs=60", "compute.checkpoint_every_seconds=0")
    killed_at("evaluate", made, *given)
    shutil.rmtree(made / ".cache" / "condensed")
    outcome = run(made, *given, "compute.share_condensed=false")
    assert outcome.code == 0, outcome.err
    (taken,) = [one for run_id, one in results(made).items() if one["condensed_by"] != run_id]
    assert "condense" not in taken["wall_seconds"]
    assert not any(made.glob(".cache/condensed/*/*.safetensors"))


def test_the_first_condensation_that_is_offered_stays(tmp_path):
    plan = planned(*TINY, "pruning=none")
    first, second = (plan.container(plan.storage.instances) for _ in range(2))
    for number, container in enumerate((first, second)):
        container.initialise(torch.Generator().manual_seed(number), plan.config.container, None)
        shared_condensed.offer(tmp_path, container, {"condensed_by": str(number)})
    assert shared_condensed.load(tmp_path, second) == {"condensed_by": "0"}
    assert torch.equal(second.instances, first.instances)


def test_what_two_versions_of_the_sources_condensed_is_not_shared(tmp_path):
    given = (*TINY, SHARED, "objective.outer_steps=12", "compute.checkpoint_every_seconds=0")
    killed_at("clock", tmp_path, *given)
    (clock,) = tmp_path.glob("runs/*/checkpoints/clock.pt")
    began = torch.load(clock, weights_only=True)
    torch.save(began | {"codes": ["0123456789ab"]}, clock)
    outcome = run(tmp_path, *given)
    assert outcome.code == 0 and "continuing from a state of another code version" in outcome.out
    assert not any(tmp_path.glob(".cache/condensed/*/*.safetensors"))
    (result,) = results(tmp_path).values()
    assert result["codes"] == ["0123456789ab", code_version()]  # otherwise a sweep would take it for a current one


def test_what_a_run_had_begun_to_condense_before_another_had_done_it_is_not_in_its_record(tmp_path):
    given = (*TINY, SHARED, "objective.outer_steps=12", "tracking.log_every_steps=1")
    killed_at("condense", tmp_path, *given, "compute.checkpoint_every_seconds=0")
    assert run(tmp_path, *given, *AFTER["networks"]).code == 0
    assert run(tmp_path, *given).code == 0
    (taken,) = [run_id for run_id, one in results(tmp_path).items() if one["condensed_by"] != run_id]
    assert not [record for record in records(tmp_path, taken) if "condense/step" in record]


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_damaged_condensation_is_told_in_one_line(made, damage):
    (kept,) = made.glob(".cache/condensed/*/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-4] if damage is None else damage)
    outcome = run(made, *TINY, SHARED, *AFTER["beta"])
    assert outcome.code == 2
    assert kept.name in outcome.complaint and "remove it" in outcome.complaint
    kept.unlink()
    assert run(made, *TINY, SHARED, *AFTER["beta"]).code == 0


def test_a_run_waits_for_the_one_that_condenses_and_can_be_stopped_while_it_waits(made):
    (folder,) = made.glob(".cache/condensed/*")
    with exclusive(folder):
        command = start(made, *TINY, SHARED, *AFTER["beta"])
        command.wait_for(lambda: "waiting for the process" in command.outputs()[1])
        command.process.terminate()
        assert command.finish().code == 128 + signal.SIGTERM
        waits = start(made, *TINY, SHARED, *AFTER["beta"])
        waits.wait_for(lambda: "waiting for the process" in waits.outputs()[1])
    outcome = waits.finish()
    assert outcome.code == 0 and "condensed by" in outcome.out


def test_a_folder_is_waited_for_until_asked_to_stop(tmp_path):
    stop = Stop()
    stop.signum = signal.SIGTERM
    before = time.monotonic()
    with exclusive(tmp_path), pytest.raises(Interrupted), exclusive(tmp_path, wait=stop):
        pass
    assert time.monotonic() - before < 10
