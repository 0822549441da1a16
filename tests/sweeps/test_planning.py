"""Planning of cells before anything runs: all errors at once, run ids, and what is cached."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from hmn import results
from hmn.artifacts import save
from hmn.errors import ConfigError
from hmn.sweeps import planning
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import Planned, by_run, plan_cells, work
from tests.command import TINY, planned

CPU = "compute.device=cpu"


def cell(name: str, *overrides: str, reads: tuple[str, ...] = ()) -> Cell:
    return Cell(name, {"name": name}, (CPU, *overrides), reads)


@pytest.fixture
def composed(monkeypatch) -> list[tuple[str, ...]]:
    """Records what is composed during the test; the cache starts empty."""
    seen = []
    real = planning.compose
    monkeypatch.setattr(planning, "compose", lambda overrides: seen.append(tuple(overrides)) or real(overrides))
    planning._plan.cache_clear()
    return seen


# Runs


def test_a_cell_is_the_run_of_the_command_with_its_settings():
    (one,) = plan_cells([cell("a", "memory=ipc10", "seed=3")])
    plan = planned(CPU, "memory=ipc10", "seed=3")
    assert (one.run_id, one.folder, one.overrides) == (plan.run_id, plan.folder, (CPU, "memory=ipc10", "seed=3"))
    assert one.budget_floats == 10 * 10 * 64 == plan.storage.budget_floats
    assert one.stored_floats == plan.storage.stored_floats(10) <= one.budget_floats
    assert one.images_per_class == plan.storage.images_per_class
    assert (one.steps, one.flops) == (plan.matching_steps, plan.expected_flops)


def test_a_cell_that_stores_nothing_has_no_budget():
    (one,) = plan_cells([cell("a", "mode=full_data")])
    assert (one.budget_floats, one.stored_floats, one.images_per_class, one.steps) == (None, None, None, None)
    assert one.flops == planned(CPU, "mode=full_data").expected_flops > 0


SEEDED = (
    *((), ("mode=full_data",), ("mode=random_subset", "memory=ipc10"), ("container=coreset",), ("pruning=none",)),
    ("container=multiformation", "objective=idc"),
)


@pytest.mark.parametrize("own", SEEDED, ids=" ".join)
def test_seeds_are_planned_without_composing_each(composed, own):
    """The plans are the same as when composed; only the run id depends on the seed."""
    cells = [cell(str(seed), f"seed={seed}", *own) for seed in (0, 1, 17)] + [cell("none", *own)]
    found = plan_cells(cells)
    assert len(composed) == 1
    for one in found:
        plan = planned(*one.cell.overrides)
        assert (one.run_id, one.folder, one.flops) == (plan.run_id, plan.folder, plan.expected_flops)
    assert len({one.run_id for one in found}) == 3
    assert found[0].run_id == found[3].run_id  # seed 0, given or not


def test_a_condensation_that_runs_share_is_work_once():
    """Of the pruning settings only the over-budget share changes the condensation; another seed is another one."""
    shared = ("memory=ipc10", "compute.share_condensed=true", "pruning.over_budget=0.1")
    betas = [cell(f"{beta}", *shared, f"pruning.beta={beta}") for beta in (0, 0.5, 1)]
    others = [cell("seed", *shared, "seed=1"), cell("more", *shared, "pruning.over_budget=0.3")]
    found = plan_cells([*betas, *others])
    plan = planned(CPU, *shared, "pruning.beta=0")
    once, each = plan.making_flops, plan.expected_flops - plan.making_flops
    assert once == plan.matching_steps * (plan.step_flops.matching + plan.step_flops.update) > each > 0
    assert work(found[:3]) == pytest.approx(once + 3 * each, rel=1e-12)
    assert work(found[1:3], finished=found[:1]) == pytest.approx(2 * each, rel=1e-12)
    assert work(found[:4]) == pytest.approx(2 * once + 4 * each, rel=1e-12)
    assert work(found) - work(found[:4]) == found[4].flops > plan.expected_flops
    apart = plan_cells([cell(f"{beta}", "memory=ipc10", f"pruning.beta={beta}") for beta in (0, 1)])
    assert work(apart) == sum(one.flops for one in apart)


def test_experts_that_runs_share_are_work_once():
    """Experts are shared per network and dataset, whatever is condensed with them; another network has its own."""
    cells = [
        cell(kind, "objective=trajectory_matching", "pruning=none", f"container={kind}") for kind in ("image", "fred")
    ]
    found = plan_cells([*cells, cell("wide", *cells[0].overrides[1:], "network.width=64")])
    trained = [one.expert_flops for one in found]
    assert trained[0] == trained[1] > trained[2] > 0
    assert work(found) == pytest.approx(sum(one.flops for one in found) - trained[0], rel=1e-12)
    assert work(found[1:2], finished=found[:1]) == pytest.approx(found[1].flops - trained[0], rel=1e-12)


def test_a_run_that_takes_more_experts_than_there_are_trains_the_rest():
    experts = ("objective=trajectory_matching", "pruning=none", "container=image")
    counts = [f"objective.experts.count={count}" for count in (10, 100)]
    few, many, again = plan_cells(
        [cell("few", *experts, counts[0]), *(cell(f"{seed}", *experts, counts[1], f"seed={seed}") for seed in (0, 1))]
    )
    assert many.expert_flops == 10 * few.expert_flops
    expected = sum(one.flops for one in (few, many, again)) - few.expert_flops - many.expert_flops
    for runs in ([few, many, again], [many, few, again]):
        assert work(runs) == pytest.approx(expected, rel=1e-12)
    assert work([many], finished=[few]) == pytest.approx(many.flops - few.expert_flops, rel=1e-12)


def test_references_under_an_objective_with_experts_train_none():
    given = ("objective=trajectory_matching", "pruning=none", "container=image")
    reference, run = plan_cells([cell(mode, *given, f"mode={mode}") for mode in ("random_subset", "run")])
    assert (reference.experts, reference.expert_flops) == (None, 0.0) and run.expert_flops > 0
    assert work([reference, run]) == work([run, reference]) == reference.flops + run.flops


def test_cells_that_are_one_run_are_one_run():
    found = plan_cells([cell("a", "seed=1"), cell("b", "seed=1", "compute.threads=3"), cell("c", "seed=2")])
    assert [one.cell.name for one in by_run(found).values()] == ["a", "c"]


# Complaints


def test_all_that_cannot_be_composed_is_said_at_once():
    cells = [
        cell("right", "seed=1"),
        cell("wrong seed", "seed=-1"),
        cell("wrong option", "dataset=usps"),
        *(cell(f"wrong {share}", "pruning.over_budget=2", f"seed={share}") for share in range(7)),
        cell("unknown key", "memory.pages=3"),
    ]
    with pytest.raises(ConfigError) as error:
        plan_cells(cells)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[0] == "wrong seed: seed=-1: must be at least 0"
    assert lines[1].startswith("wrong option: dataset=usps: must be one of ")
    several = "; ".join(f"wrong {share}" for share in range(5))
    assert lines[2].startswith(f"{several} and 2 more: pruning.over_budget=2")
    assert lines[3].startswith("unknown key: memory.pages: unknown key; memory has images_per_class")


def test_an_unknown_key_is_answered_with_the_keys_of_the_cells_own_container(monkeypatch):
    """The keys are not those of the command line, which may name a table and a different container."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", "plan", "experiment=main_table", "container=linba"])
    with pytest.raises(ConfigError, match="^a: container.instance_channels: unknown key; container has .*coefficients"):
        plan_cells([cell("a", "container=fred", "container.instance_channels=4")])


def test_a_table_with_a_wrong_cell_is_not_remembered(tmp_path):
    with pytest.raises(ConfigError):
        plan_cells([cell("right"), cell("wrong", "seed=x")], tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_program_is_no_complaint(monkeypatch):
    monkeypatch.setattr(planning, "compose", lambda overrides: {}["key"])
    planning._plan.cache_clear()
    with pytest.raises(KeyError):
        plan_cells([cell("a")])


# What is cached


def test_what_is_known_is_not_composed_again(tmp_path, composed):
    cells = [cell("a", "seed=1"), cell("b", "memory=ipc10")]
    found = plan_cells(cells, tmp_path / "plan.json")
    assert len(composed) == 2
    planning._plan.cache_clear()
    assert plan_cells(cells, tmp_path / "plan.json") == found
    assert plan_cells([dataclasses.replace(cells[1], name="c")], tmp_path / "plan.json")[0].run_id == found[1].run_id
    assert len(composed) == 2
    plan_cells([*cells, cell("d", "memory=ipc50")], tmp_path / "plan.json")
    assert len(composed) == 3
    assert len(json.loads((tmp_path / "plan.json").read_text())["cells"]) == 3


def test_what_is_known_of_other_sources_is_not_used(tmp_path, composed, monkeypatch):
    plan_cells([cell("a")], tmp_path / "plan.json")
    planning._plan.cache_clear()
    planning._version.cache_clear()
    monkeypatch.setattr(results, "code_version", lambda: "0123456789ab")
    plan_cells([cell("a")], tmp_path / "plan.json")
    assert len(composed) == 2
    planning._version.cache_clear()


def test_what_is_known_of_other_settings_files_is_not_used(tmp_path, composed, monkeypatch):
    plan_cells([cell("a")], tmp_path / "plan.json")
    before = planning._version()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("seed: 1\n")
    with monkeypatch.context() as patch:
        patch.setattr(planning, "CONF", tmp_path / "conf")
        planning._version.cache_clear()
        changed = planning._version()
        (tmp_path / "conf" / "config.yaml").write_text("seed: 2\n")
        planning._version.cache_clear()
        assert len({before, changed, planning._version()}) == 3
    planning._plan.cache_clear()
    plan_cells([cell("a")], tmp_path / "plan.json")  # the file still says ``changed``
    assert len(composed) == 2
    planning._version.cache_clear()


def test_a_plan_is_made_anew_for_images_of_other_classes(tmp_path, composed):
    def add_class(name: str) -> None:
        for split in ("train", "test"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            (tmp_path / "images" / split / name / "1.png").touch()

    add_class("ant"), add_class("bee")
    cells = [cell("a", "dataset=folder", f"dataset.root={tmp_path / 'images'}", "memory=ipc50")]
    (two,) = plan_cells(cells, tmp_path / "plan.json")
    assert plan_cells(cells, tmp_path / "plan.json") == [two] and len(composed) == 1
    add_class("cat")
    (three,) = plan_cells(cells, tmp_path / "plan.json")
    assert three.run_id == planned(*cells[0].overrides).run_id
    assert three.budget_floats == 1.5 * two.budget_floats


def test_what_is_known_of_a_finished_run_needs_its_images_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "toy.npz"
    zeros = {f"x_{split}": np.zeros((8, 8, 8, 1), np.uint8) for split in ("train", "test")}
    np.savez(images, **zeros, **{f"y_{split}": np.arange(8) % 2 for split in ("train", "test")})
    cells = [cell("a", *TINY, "dataset=arrays", f"dataset.root={images}", "dataset.channels=1", "memory=ipc10")]
    (before,) = plan_cells(cells, tmp_path / "plan.json")
    images.unlink()
    planning._plan.cache_clear()
    with pytest.raises(ConfigError, match="no such file"):
        plan_cells(cells, tmp_path / "plan.json")
    results.write(before.folder, {"accuracy": {"mean": 0.5, "std": None}})
    assert plan_cells(cells, tmp_path / "plan.json") == [before]


def test_a_plan_is_made_anew_for_another_kept_set_that_a_container_starts_from(kept, tmp_path):
    (made,) = plan_cells([cell("made", *TINY)])
    kept(made)
    starting = [cell("a", *TINY, "container.init=kept", f"container.start={made.folder}")]
    (one,) = plan_cells(starting, tmp_path / "plan.json")
    kept(made, "b")
    (other,) = plan_cells(starting, tmp_path / "plan.json")
    assert other.run_id == planned(*starting[0].overrides).run_id != one.run_id


@pytest.mark.parametrize("text", ["", "{", '{"version": 1', "[]", "null", '{"cells": {}}'])
def test_a_damaged_memory_is_made_anew(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    (one,) = plan_cells([cell("a")], tmp_path / "plan.json")
    assert one.run_id == planned(CPU).run_id
    assert len(json.loads((tmp_path / "plan.json").read_text())["cells"]) == 1


def test_a_disk_without_space_only_costs_the_memory(tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(planning, "write_text", full)
    (one,) = plan_cells([cell("a")], tmp_path / "plan.json")
    assert one.run_id == planned(CPU).run_id


# Cells that read the kept sets of others


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A function that finishes a run: it fills the run's folder, with a kept set of the given content."""
    monkeypatch.chdir(tmp_path)
    plan = planned(*TINY)

    def finish(one: Planned, content: str = "a") -> None:
        data = {"channels": plan.data.channels, "image_size": plan.data.image_size}
        data |= {
            "config": dataclasses.asdict(plan.config.dataset),
            "class_names": ["0", "1"],
            "mean": [0.0],
            "std": [1.0],
        }
        save(
            one.folder,
            plan.container(plan.storage.over_budget_instances),
            {"budget": {"floats": 10**6}, "data": data, "sha256": content},
        )
        results.write(one.folder, {"accuracy": {"mean": 0.5, "std": None}})

    return finish


def reader(name: str, *reads: str, overrides: tuple[str, ...] = ("network.width=8",)) -> Cell:
    return cell(name, "mode=evaluate", *overrides, reads=reads)


def test_a_cell_waits_for_what_it_reads(kept):
    cells = [reader("evaluated", "made"), cell("made", *TINY)]
    evaluated, made = plan_cells(cells)
    assert (evaluated.run_id, evaluated.folder) == (None, None)
    assert evaluated.overrides == (*cells[0].overrides, f"artifact={made.folder}")
    assert list(by_run([evaluated, made])) == [made.run_id]
    kept(made)
    evaluated, again = plan_cells(cells)
    assert again == made
    plan = planned(*evaluated.overrides)
    assert (evaluated.run_id, evaluated.flops) == (plan.run_id, plan.expected_flops)
    assert evaluated.run_id.startswith("digits-evaluate-")


def test_a_kept_card_plans_what_reads_a_run_that_is_gone(kept, tmp_path):
    cells, keeping = [cell("made", *TINY), reader("evaluated", "made")], tmp_path / "results"
    made, _ = plan_cells(cells)
    kept(made)
    before = plan_cells(cells)[1]
    (keeping / made.run_id).mkdir(parents=True)
    shutil.copy(made.folder / "result.json", keeping / made.run_id)
    assert plan_cells(cells, kept=keeping)[1] == before  # from the run's own folder while it exists
    card = (made.folder / "card.json").read_bytes()
    shutil.rmtree(made.folder)
    assert plan_cells(cells, kept=keeping)[1].run_id is None
    (keeping / made.run_id / "card.json").write_bytes(card)
    found = plan_cells(cells, kept=keeping)[1]
    assert found.run_id == before.run_id
    assert found.overrides[-1] == f"artifact={keeping / made.run_id}"
    assert plan_cells(cells)[1].run_id is None


def test_a_damaged_result_is_as_good_as_none(kept):
    cells = [cell("made", *TINY), reader("evaluated", "made")]
    made, _ = plan_cells(cells)
    kept(made)
    (made.folder / results.FILE).write_text("{")
    assert plan_cells(cells)[1].run_id is None


def test_another_kept_set_is_another_run(kept, tmp_path, composed):
    """This holds whether the plan is cached in this process or in the file."""
    cells = [cell("made", *TINY), reader("evaluated", "made")]
    made, _ = plan_cells(cells, tmp_path / "plan.json")
    ids = []
    for content in "aba":
        kept(made, content)
        _, evaluated = plan_cells(cells, tmp_path / "plan.json")
        assert evaluated.run_id == planning.make_plan(planning.compose(evaluated.overrides), evaluated.overrides).run_id
        ids.append(evaluated.run_id)
    assert ids[0] == ids[2] != ids[1]
    before = len(composed)
    planning._plan.cache_clear()
    assert plan_cells(cells, tmp_path / "plan.json")[1].run_id == ids[0]
    assert len(composed) == before


def test_the_settings_of_a_waiting_cell_are_checked(kept):
    cells = [cell("made", *TINY), reader("evaluated", "made", overrides=("evaluation.epochs=0",))]
    with pytest.raises(ConfigError, match="^evaluated: evaluation.epochs=0: must be at least 1$"):
        plan_cells(cells)


def test_what_reads_a_wrong_cell_is_not_complained_of_for_it(kept):
    cells = [cell("made", "seed=-1"), cell("other", "seed=-1"), reader("evaluated", "made", "other")]
    with pytest.raises(ConfigError) as error:
        plan_cells(cells)
    assert str(error.value) == "made; other: seed=-1: must be at least 0"


def test_what_reads_a_waiting_cell_waits(kept):
    cells = [cell("made", *TINY), reader("evaluated", "made"), reader("again", "evaluated")]
    assert [one.run_id is None for one in plan_cells(cells)] == [False, True, True]


def test_a_missing_card_is_a_complaint(kept):
    cells = [cell("made", *TINY), reader("evaluated", "made")]
    made, _ = plan_cells(cells)
    kept(made)
    (made.folder / "card.json").unlink()
    with pytest.raises(ConfigError, match="^evaluated: .*card.json: missing"):
        plan_cells(cells)
