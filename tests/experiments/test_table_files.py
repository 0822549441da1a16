"""Every file of experiments/tables/: its cells compose, and its description of itself is correct."""

from __future__ import annotations

import csv
import itertools

import pytest
from omegaconf import OmegaConf

from experiments.filling import VALUES, read_reported, reported_for, shown
from hmn.data.official import IMAGENET10
from hmn.errors import ConfigError
from hmn.plan import Plan
from hmn.sweeps import cli
from hmn.sweeps.cells import Cell
from hmn.sweeps.planning import plan_cells
from hmn.sweeps.table import TABLES, Table, load_table, table_file
from tests.command import ROOT

NAMES = sorted(path.stem for path in TABLES.glob("*.yaml"))
DRAWN = {"gallery"}  # shown by figures only
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="session")
def with_data(tmp_path_factory):
    """A folder with what plans look for: class folders without images, and the released condensed sets."""
    folder = tmp_path_factory.mktemp("work")
    for split in ("train", "val"):
        for wnid in IMAGENET10:
            (folder / "data" / "imagenet10" / split / wnid).mkdir(parents=True)
            (folder / "data" / "imagenette-224" / split / wnid).mkdir(parents=True)
    for split in ("train", "test"):
        for name in CIFAR10:
            (folder / "data" / "cifar10-q75" / split / name).mkdir(parents=True)
    (folder / "experiments").mkdir()
    (folder / "experiments" / "release").symlink_to(ROOT / "experiments" / "release")
    return folder


def first_of_each(table: Table) -> list[Cell]:
    """The cells of ``table`` without their repeats."""
    first = {axis: next(iter(table.axes[axis])) for axis in table.over}
    return [cell for cell in table.cells if all(cell.labels[axis] == label for axis, label in first.items())]


def in_pairs(table: Table) -> list[Cell]:
    """Enough of :func:`first_of_each` to cover every pair of labels or settings in a cell, and the cells they read."""
    cells, met, names = first_of_each(table), set(), set()
    for cell in cells:
        labels = sorted(cell.labels.items())
        if new := {*itertools.combinations(labels, 2), *itertools.product(labels, cell.overrides)} - met:
            met |= new
            names |= {cell.name, *cell.reads}
    return [cell for cell in cells if cell.name in names]


def without_repeats(table: Table, cell: Cell) -> set[str]:
    repeated = {item for axis in table.over for item in table.axes[axis][cell.labels[axis]]}
    assert repeated <= set(cell.overrides)
    return set(cell.overrides) - repeated


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_composes(name, with_data, monkeypatch):
    monkeypatch.chdir(with_data)
    for counted in ("expected_flops", "making_flops"):  # counting them takes longer than all the rest
        monkeypatch.setattr(Plan, counted, 0.0)
    table = load_table(table_file(name))
    own = first_of_each(table)
    planned = plan_cells(in_pairs(table))
    assert all((one.run_id is None) == bool(one.cell.reads) for one in planned)
    # Repeats differ from these only in the seed or the order of classes.
    alike = {
        tuple(v for k, v in cell.labels.items() if k not in table.over): without_repeats(table, cell) for cell in own
    }
    for cell in table.cells:
        assert without_repeats(table, cell) == alike[tuple(v for k, v in cell.labels.items() if k not in table.over)]


@pytest.mark.parametrize("name", ["q75_gradients", "q75_main_ipc10", "q75_baselines"])
def test_published_runs_are_those_that_their_table_plans(name, with_data, monkeypatch):
    """Otherwise the settings in conf/ and in the table no longer match the published numbers."""
    monkeypatch.chdir(with_data)
    for counted in ("expected_flops", "making_flops"):
        monkeypatch.setattr(Plan, counted, 0.0)
    table = load_table(table_file(name))
    axes = (*table.rows, *table.columns)
    with (ROOT / "experiments" / "q75" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        published = {
            tuple(row[axis] for axis in axes): set(row["runs"].split()) for row in csv.DictReader(file) if row["runs"]
        }
    found: dict[tuple[str, ...], set[str | None]] = {place: set() for place in published}
    shown_cells = [cell for cell in table.cells if tuple(cell.labels[axis] for axis in axes) in published]
    for one in plan_cells(shown_cells):
        found[tuple(one.cell.labels[axis] for axis in axes)].add(one.run_id)
    assert len(published) >= 5
    assert {place: runs - found[place] for place, runs in published.items()} == dict.fromkeys(published, set())


@pytest.mark.parametrize("name", NAMES)
def test_repeats_are_whole_numbers_from_nought(name):
    table = load_table(table_file(name))
    for axis in table.over:
        for number, (label, overrides) in enumerate(table.axes[axis].items()):
            assert label == str(number) and f"seed={number}" in overrides
            assert set(overrides) <= {f"seed={number}", f"dataset.class_order={number}"}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_says_of_itself(name):
    table = load_table(table_file(name))
    text = table_file(name).read_text(encoding="utf-8")
    assert text.startswith("# ") and text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 120
    placed = [*table.rows, *table.columns, *table.over]
    assert len(set(placed)) == len(placed) and set(placed) <= table.axes.keys() and table.columns
    assert set(table.shows) <= VALUES.keys() | DRAWN
    assert table.expects["hours"] > 0 and table.expects["memory_gb"] > 0 and table.expects["device"]
    kept = [line for line in text.splitlines() if not line.startswith("#")]
    before = text.splitlines()[text.splitlines().index(next(line for line in kept if line.startswith("expects"))) - 1]
    assert before.startswith("# ")  # how the estimate was made
    assert shown(table)


def test_all_tables_are_listed_with_what_they_cost(capsys):
    assert cli.run(["tables"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == NAMES
    (whole,) = [line for line in lines if line.startswith("main_table ")]
    assert " ".join(whole.split()) == "main_table Test accuracy of condensed sets 17,000 one H100"
    with pytest.raises(ConfigError, match="^tables=seed=1: must be given without settings"):
        cli.run(["seed=1", "tables"])


def test_a_file_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("hmn.sweeps.table.TABLES", tmp_path)
    (tmp_path / "odd.yaml").write_text("title: Odd\n")
    with pytest.raises(ConfigError, match=f"^{tmp_path}/odd.yaml: has no expects$"):
        cli.run(["tables"])


@pytest.mark.parametrize("name", [name for name in NAMES if load_table(table_file(name)).reported])
def test_reported_numbers_have_their_places(name):
    table, rows = load_table(table_file(name)), read_reported()
    units = {VALUES[key].unit for key in table.shows}
    found = {
        (one.number, one.source)
        for cell in shown(table)
        for unit in units
        for one in reported_for(rows, table.reported, cell.labels, unit)
    }
    assert len(found) >= 5
    if name != "main_table":  # its reported rows include budgets and datasets that it does not show
        numbers = {float(row["number"]) for row in rows if row["table"] == table.reported and row["unit"] == "%"}
        assert numbers <= {number for number, _ in found}


@pytest.mark.parametrize("name", NAMES)
def test_rules_match_a_cell_and_labels_of_the_file(name):
    file = OmegaConf.to_container(OmegaConf.load(table_file(name)))
    table = load_table(table_file(name))
    rules = [rule["when"] for key in ("adjust", "smoke", "artifacts") for rule in file.get(key, ())]
    for rule in rules:
        for axis, labels in rule.items():
            assert {str(one) for one in (labels if isinstance(labels, list) else [labels])} <= table.axes[axis].keys()
        wanted = {axis: labels if isinstance(labels, list) else [labels] for axis, labels in rule.items()}
        assert any(all(cell.labels[axis] in labels for axis, labels in wanted.items()) for cell in table.cells), rule


@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_variant_is_on_digits_and_seconds_long(name):
    cells = load_table(table_file(name), ["debug=smoke"]).cells
    assert cells
    for cell in cells:
        assert "dataset=digits" in cell.overrides
        assert any(override.startswith("debug=smoke") for override in cell.overrides)


def test_tables_share_the_runs_of_the_main_table(with_data, monkeypatch):
    """A condensed set that two tables need is condensed once."""
    monkeypatch.chdir(with_data)
    for counted in ("expected_flops", "making_flops"):
        monkeypatch.setattr(Plan, counted, 0.0)

    def ids(name: str, *chosen: str) -> set[str]:
        planned = plan_cells(load_table(table_file(name), ["only.ipc=10", *chosen]).cells)
        return {one.run_id for one in planned}

    cifar10 = "only.dataset=CIFAR10"
    main = ids("main_table", cifar10, "only.seed=0", "only.method=IDC,HaBa,LinBa,FreD,DM,HMN")
    assert ids("cost", cifar10) < main
    assert ids("galleries", cifar10) < main
    assert ids("cross_architecture", "only.network=ConvNet", "only.seed=0") < main
    assert ids("redundancy", "only.dropped=0", "only.seed=0") < main
    assert ids("over_budget", "only.over_budget=0.1", "only.seed=0") < main
    assert ids("pruning", "only.pruning=double-end", "only.seed=0") < main
    assert ids("same_loss", "only.method=HMN", "only.seed=0") < main
