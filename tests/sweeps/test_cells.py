"""Which runs a grid or a table file asks for, and the errors for a file that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn.errors import ConfigError
from hmn.sweeps.cells import Cell, grid
from hmn.sweeps.table import last_of_each, load_table, smoked

# Grids


def test_a_grid_is_all_combinations_in_the_order_of_their_settings():
    cells = grid(["memory=ipc1,ipc10", "mode=full_data", "seed=0,1"])
    assert cells == tuple(
        Cell(
            f"memory={memory}, seed={seed}",
            {"memory": memory, "seed": seed},
            (f"memory={memory}", "mode=full_data", f"seed={seed}"),
        )
        for memory in ("ipc1", "ipc10")
        for seed in ("0", "1")
    )


def test_settings_without_alternatives_are_one_run():
    assert grid(["seed=1", "dataset.mean=[0.5,0.5]"]) == (Cell("run", {}, ("seed=1", "dataset.mean=[0.5,0.5]")),)
    assert grid([]) == (Cell("run", {}, ()),)


def test_a_grid_knows_hydras_ways_to_list_values():
    assert [cell.overrides for cell in grid(["seed=range(0,3)"])] == [("seed=0",), ("seed=1",), ("seed=2",)]
    (one, two) = grid(["dataset.mean=[0.1,0.2],[0.3,0.4]"])
    assert (one.overrides, two.overrides) == (("dataset.mean=[0.1,0.2]",), ("dataset.mean=[0.3,0.4]",))
    added = [Cell(f"debug={name}", {"debug": name}, (f"+debug={name}",)) for name in ("smoke", "smoke_bptt")]
    assert grid(["+debug=smoke,smoke_bptt"]) == tuple(added)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 4), max_size=4))
def test_a_grid_has_each_combination_once(counts):
    cells = grid([f"key{axis}=" + ",".join(map(str, range(count))) for axis, count in enumerate(counts)])
    product = 1
    for count in counts:
        product *= count
    assert len(cells) == len({cell.overrides for cell in cells}) == len({cell.name for cell in cells}) == product


# Table files

FILE = """
title: A title
reproduces: Somebody, 2024, table 1
kind: table
expects: {hours: 1, device: one CPU, memory_gb: 1}
rows: [method]
columns: [dataset, ipc]
over: [seed]
shows: [accuracy]
base: [evaluation=hmn_cosine, network.width=64]
axes:
  dataset: {SVHN: [dataset=svhn], CIFAR10: [dataset=cifar10]}
  ipc: {1: [memory=ipc1], 10: [memory=ipc10]}
  method: {Random: [mode=random_subset], HMN: [container=hmn, network.width=128]}
  seed: {0: [seed=0], 1: [seed=1]}
"""


@pytest.fixture
def table(tmp_path):
    """A function that loads the table of a file with the text ``text + more``."""

    def load(more: str = "", *overrides: str, text: str = FILE):
        path = tmp_path / "name.yaml"
        path.write_text(text + more)
        return load_table(path, overrides)

    return load


def named(table) -> dict[str, tuple[str, ...]]:
    return {cell.name: cell.overrides for cell in table.cells}


def test_a_table_is_its_file(table):
    found = table("reported: main\n")
    assert (found.name, found.title, found.reproduces, found.kind) == (
        *("name", "A title", "Somebody, 2024, table 1", "table"),
    )
    assert (found.rows, found.columns, found.over) == (("method",), ("dataset", "ipc"), ("seed",))
    assert (found.shows, found.reported) == (("accuracy",), "main")
    assert found.expects == {"hours": 1, "device": "one CPU", "memory_gb": 1}
    assert found.axes["ipc"] == {"1": ["memory=ipc1"], "10": ["memory=ipc10"]}
    assert table().reported is None


def test_cells_are_all_labels_with_the_settings_of_each(table):
    cells = table().cells
    assert len(cells) == 16
    assert cells[0] == Cell(
        "SVHN/1/Random/0",
        {"dataset": "SVHN", "ipc": "1", "method": "Random", "seed": "0"},
        ("evaluation=hmn_cosine", "network.width=64", "dataset=svhn", "memory=ipc1", "mode=random_subset", "seed=0"),
    )
    assert [cell.name for cell in cells][:3] == ["SVHN/1/Random/0", "SVHN/1/Random/1", "SVHN/1/HMN/0"]


def test_the_more_particular_setting_wins(table):
    """The order is base, axes, adjustments, command line; the last value of a key wins and is given once."""
    adjust = """
adjust:
  - {when: {method: HMN}, set: [network.width=1]}
  - {when: {method: HMN, dataset: [SVHN, other], ipc: 10}, set: [network.width=2, evaluation=idc]}
"""
    cells = named(table(adjust, "seed=7", "network.depth=2"))
    assert cells["SVHN/1/Random/0"][1] == "network.width=64"
    assert cells["CIFAR10/10/HMN/1"][1] == "network.width=1"
    assert cells["SVHN/10/HMN/1"] == (
        *("evaluation=idc", "network.width=2", "dataset=svhn", "memory=ipc10", "container=hmn", "seed=7"),
        "network.depth=2",
    )


def test_cells_that_do_not_exist_are_left_out(table):
    found = named(table("skip: [{method: [HMN, other], dataset: SVHN}, {method: Random, ipc: 10}]\n"))
    assert [name for name in found if name.endswith("/0")] == [
        *("SVHN/1/Random/0", "CIFAR10/1/Random/0", "CIFAR10/1/HMN/0", "CIFAR10/10/HMN/0"),
    ]


def test_named_cells_stand_beside_the_grid(table):
    more = """
cells:
  - {labels: {method: Whole, dataset: SVHN, seed: 0}, set: [mode=full_data, network.width=8]}
"""
    cell = table(more, "debug=null").cells[-1]
    assert (cell.name, cell.labels) == ("Whole/SVHN/0", {"method": "Whole", "dataset": "SVHN", "seed": "0"})
    assert cell.overrides == ("evaluation=hmn_cosine", "network.width=8", "mode=full_data", "debug=null")


def test_a_table_may_be_of_named_cells_alone(table):
    head = FILE[: FILE.index("axes:")].replace("[dataset, ipc]", "[]").replace("[seed]", "[]")
    text = head + "cells: [{labels: {method: A}, set: [seed=0]}]\n"
    assert named(table(text=text)) == {"A": ("evaluation=hmn_cosine", "network.width=64", "seed=0")}


READERS = """
cells:
  - {labels: {dataset: SVHN, ipc: 1, method: HMN, seed: 0, network: VGG}, set: [mode=evaluate, network=vgg11]}
  - {labels: {dataset: SVHN, ipc: 1, method: HMN, seed: 0, network: ConvNet}, set: []}
artifacts: [{when: {network: VGG}, from: {network: ConvNet}}]
"""


def test_a_cell_reads_the_cells_with_its_labels_but_for_those_named(table):
    cells = {cell.name: cell for cell in table(READERS).cells}
    assert cells["SVHN/1/HMN/0/VGG"].reads == ("SVHN/1/HMN/0/ConvNet",)
    assert cells["SVHN/1/HMN/0/ConvNet"].reads == cells["SVHN/1/HMN/0"].reads == ()


def test_a_cell_may_read_several_in_the_order_of_the_list(table):
    more = "artifacts: [{when: {method: Random, ipc: 1}, from: {method: HMN, ipc: [10, 1]}}]\n"
    cells = {cell.name: cell for cell in table(more).cells}
    assert cells["SVHN/1/Random/1"].reads == ("SVHN/10/HMN/1", "SVHN/1/HMN/1")


def test_a_part_of_the_cells_brings_what_it_reads(table):
    found = table(READERS, "only.network=VGG")
    assert [cell.name for cell in found.cells] == ["SVHN/1/HMN/0/VGG", "SVHN/1/HMN/0/ConvNet"]


def test_a_part_of_the_cells_is_those_with_the_labels(table):
    found = named(table("", "only.dataset=SVHN", "only.seed=0,1", "only.method=HMN"))
    assert list(found) == ["SVHN/1/HMN/0", "SVHN/1/HMN/1", "SVHN/10/HMN/0", "SVHN/10/HMN/1"]
    assert not any("only" in override for overrides in found.values() for override in overrides)
    (again,) = {named(table())[name] == found[name] for name in found}
    assert again


COMMAS = """
cells:
  - {labels: {dataset: SVHN, ipc: 1, method: "HMN, pruned", seed: 0}, set: [pruning=double_end]}
  - {labels: {dataset: SVHN, ipc: 1, method: "Random, HMN", seed: 0}, set: [mode=random_subset]}
"""


@pytest.mark.parametrize(
    ("asked", "methods"),
    [
        ("HMN, pruned", {"HMN, pruned"}),
        ("Random, HMN", {"Random, HMN"}),
        ("Random,HMN, pruned,HMN", {"Random", "HMN, pruned", "HMN"}),
        ("HMN,Random", {"HMN", "Random"}),
    ],
)
def test_a_label_with_commas_is_chosen_as_it_is_written(table, asked, methods):
    found = table(COMMAS, "only.dataset=SVHN", f"only.method={asked}")
    assert {cell.labels["method"] for cell in found.cells} == methods


# The smoke variant


@pytest.mark.parametrize("asked", ["debug=smoke", "+debug=smoke"])
def test_the_smoke_variant_is_each_cell_of_one_condensation_on_digits(table, asked):
    found = named(table("", asked))
    assert list(found) == [
        f"{dataset}/{ipc}/{method}/0"
        for dataset in ("SVHN", "CIFAR10")
        for ipc in ("1", "10")
        for method in ("Random", "HMN")
    ]
    assert found["CIFAR10/10/HMN/0"] == (
        *("evaluation=hmn_cosine", "dataset=digits", "memory=ipc10", "container=hmn", "seed=0", "debug=smoke"),
    )


def test_the_smoke_variant_has_settings_of_its_own_and_leaves_cells_out(table):
    more = """
smoke:
  - {when: {ipc: 10}, set: [memory=ipc1, network.width=4]}
  - {when: {method: Random}, skip: true}
"""
    found = named(table(more, "debug=smoke"))
    assert list(found) == ["SVHN/1/HMN/0", "SVHN/10/HMN/0", "CIFAR10/1/HMN/0", "CIFAR10/10/HMN/0"]
    assert found["SVHN/10/HMN/0"] == (
        *("evaluation=hmn_cosine", "dataset=digits", "memory=ipc1", "container=hmn", "seed=0", "debug=smoke"),
        "network.width=4",
    )
    assert len(table(more).cells) == 16


SMOKED = {
    "another data set": (["dataset=cifar10", "dataset.root=/x"], ["dataset=digits", "debug=smoke"]),
    "no data set": (["seed=1"], ["seed=1", "dataset=digits", "debug=smoke"]),
    "classes": (
        ["dataset=svhn", "dataset.class_range=[0,5]"],
        ["dataset=digits", "dataset.class_range=[0,5]", "debug=smoke"],
    ),
    "what smoke settles": (
        ["objective.outer_steps=9", "evaluation.networks=3", "network.depth=4", "pruning.score_epochs=1"],
        ["dataset=digits", "debug=smoke"],
    ),
    "what it does not": (
        ["network=vgg11", "pruning.beta=0.3", "memory=ipc10", "container.init=noise"],
        ["network=vgg11", "pruning.beta=0.3", "memory=ipc10", "container.init=noise", "dataset=digits", "debug=smoke"],
    ),
    "an experiment": (["experiment=x", "compute.threads=9"], ["dataset=digits", "debug=smoke"]),
    "dsa": (["objective=dsa"], ["objective=dsa", "dataset=digits", "debug=smoke_synthetic"]),
    "matching distributions": (["objective=idm"], ["objective=idm", "dataset=digits", "debug=smoke_distribution"]),
    "bptt": (["objective=bptt"], ["objective=bptt", "dataset=digits", "debug=smoke_bptt"]),
    "mtt": (
        ["objective=mtt_cifar10_ipc1"],
        ["objective=trajectory_matching", "dataset=digits", "debug=smoke_trajectory"],
    ),
    "idc": (["objective=idc"], ["objective=idc", "dataset=digits", "debug=smoke"]),
}


@pytest.mark.parametrize("name", SMOKED)
def test_a_smoke_run_is_the_same_in_seconds(name):
    given, expected = SMOKED[name]
    assert smoked(given) == expected


def test_the_last_of_each_key_stays_where_the_first_was():
    assert last_of_each(["a=1", "b=2", "+a=3", "c=4", "b=5"]) == ["+a=3", "b=5", "c=4"]


# Files that cannot be used

ERRORS = {
    "no title": (FILE.replace("title: A title\n", ""), (), "has no title"),
    "no expects": (FILE[: FILE.index("expects")] + FILE[FILE.index("rows") :], (), "has no expects"),
    "another kind": (FILE.replace("kind: table", "kind: picture"), (), "kind=picture: must be one of table, figure"),
    "no yaml": ("title: A\nrows: [", (), "line 2: expected the node content"),
    "a key that nothing reads": (FILE + "colums: [ipc]\n", (), "key=colums: must be one of title, "),
    "an axis that is none": (FILE + "skip: [{methods: DC}]\n", (), "skip, adjust, smoke=methods: must be of "),
    "a rule without when": (FILE + "adjust: [{set: [seed=1]}]\n", (), "adjust.when=missing: must be a mapping"),
    "a rule that is none": (FILE + "adjust: [method]\n", (), "adjust=method: must be a list of mappings"),
    "a rule of words": (FILE + "adjust: [{when: method, set: []}]\n", (), "adjust.when=method: must be a mapping"),
    "a smoke rule of no strings": (
        FILE + "smoke: [{when: {}, set: [{seed: 0}]}]\n",
        (),
        "smoke.set=[{'seed': 0}]: must be a list of overrides, each a string",
    ),
    "labels in a list": (FILE + "cells: [{labels: [a], set: []}]\n", (), "cells.labels=['a']: must be a mapping"),
    "a kept set of nowhere": (FILE + "artifacts: [{when: {method: HMN}}]\n", (), "artifacts.from=missing: must be a"),
    "a base of no strings": (
        FILE.replace("network.width=64]", "seed: 0]"),
        (),
        "base=['evaluation=hmn_cosine', {'seed': 0}]: must be a list of overrides, each a string",
    ),
    "a label of numbers": (FILE.replace("[seed=1]", "[1]"), (), "axes.seed.1=[1]: must be a list of overrides, each"),
    "a range of hours": (FILE.replace("hours: 1", "hours: 4-6"), (), "expects.hours=4-6: must be a number"),
    "rows of no axis": (FILE.replace("[method]", "[methods]"), (), "rows=methods: must be of dataset, ipc, method, s"),
    "columns of no axis": (FILE.replace("[dataset, ipc]", "[data]"), (), "columns=data: must be of dataset, ipc,"),
    "over no axis": (FILE.replace("over: [seed]", "over: [seeds]"), (), "over=seeds: must be of dataset, ipc, method"),
    "a cell twice": (
        FILE + "cells: [{labels: {a: SVHN/1/HMN, b: 0}, set: []}]\n",
        (),
        "cells=SVHN/1/HMN/0: must be listed once",
    ),
    "a kept set of no cell": (
        FILE + "artifacts: [{when: {method: HMN}, from: {method: IDC}}]\n",
        (),
        "artifacts=SVHN/1/IDC/0: must be a cell of this table",
    ),
    "a part that is none": (FILE, ("only.method=IDC",), "only.method=IDC: must be of HMN, Random"),
    "a part that is none of labels with commas": (
        FILE.replace("Random:", '"A, B":'),
        ("only.method=IDC",),
        "only.method=IDC: must be of A, B; HMN",
    ),
    "a part without labels": (FILE, ("only.method",), "only.method: must be only.AXIS=LABEL,LABEL"),
    "a part of no axis": (FILE, ("only.network=VGG",), "only.network=VGG: must be of an axis of the table: "),
    "empty": ("", (), "has no "),
    "a list": ("- 1\n", (), "the file=list: must be a mapping"),
    "an empty key": (FILE + "skip:\n", (), "skip=null: must be a list"),
    "a label without settings": (
        FILE.replace("[dataset=svhn]", ""),
        (),
        "axes.dataset.SVHN=None: must be a list of overrides, each a string",
    ),
    "a setting of an axis": (
        FILE,
        ("memory=ipc1",),
        "memory=ipc1: is set by the axis ipc: only.ipc=LABEL,LABEL chooses among its labels",
    ),
    "a setting of one label": (FILE, ("network.width=9",), "network.width=9: is set by the axis method: only.method="),
    "an axis of the command": (
        FILE,
        ("network.depth=1,2",),
        "network.depth=1,2: must be one value: a table's axes are in its file",
    ),
    "an axis without labels": (FILE + "  none:\n", (), "axes.none=None: must be a mapping of labels"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_file_has_wrong_is_said_in_one_line_that_names_it(table, tmp_path, name):
    text, overrides, said = ERRORS[name]
    with pytest.raises(ConfigError) as error:
        table("", *overrides, text=text)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path / 'name.yaml'}: {said}")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        load_table(tmp_path / "none.yaml")
