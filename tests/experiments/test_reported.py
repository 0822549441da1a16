"""experiments/reported.csv: its form, and a few numbers checked by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from experiments.filling import PAPER, UNVERIFIED, read_reported, reported_for

ROWS = read_reported()
COLUMNS = ["table", "method", "dataset", "ipc", "network", "number", "std", "unit", "source", "protocol", "note"]


def test_every_row_has_a_number_a_unit_and_a_source_or_says_why_not():
    for row in ROWS:
        assert list(row) == COLUMNS
        assert all(value == value.strip() for value in row.values())
        assert (
            row["table"]
            and row["method"]
            and row["dataset"]
            and row["source"]
            and row["unit"] in ("%", "MB", "hours", "days")
        )
        assert not row["ipc"] or int(row["ipc"]) >= 1
        assert not row["std"] or float(row["std"]) > 0
        if row["number"]:
            assert float(row["number"]) > 0 and (row["unit"] != "%" or float(row["number"]) < 100)
        else:
            assert row["note"].startswith("out of memory")
        assert row["protocol"] or row["note"] == UNVERIFIED


def test_no_source_says_a_cell_twice():
    keys = Counter(
        tuple(row[key] for key in ("table", "method", "dataset", "ipc", "network", "source")) for row in ROWS
    )
    assert [key for key, count in keys.items() if count > 1] == []


@pytest.mark.parametrize(
    ("table", "method", "dataset", "ipc", "unit", "shown", "others"),
    [
        ("main", "HMN", "CIFAR10", "1", "%", 65.7, []),
        ("main", "IDC", "CIFAR10", "1", "%", 50.0, [50.6]),  # the HMN paper's number comes before IDC's
        ("main", "IDC", "CIFAR10", "50", "%", 74.5, [74.5, 71.6]),
        ("main", "DC", "CIFAR10", "50", "%", 53.9, [53.9, 56.81, 54.54]),
        ("main", "SPEED", "CIFAR100", "10", "%", 45.9, []),
        ("main", "MTT", "Tiny-ImageNet", "50", "%", 28.16, [25.82, 28.0]),  # the unverified number comes last
        ("main", "HMN", "SVHN", "50", "%", 91.2, []),
        ("main", "Full data", "CIFAR10", "10", "%", 84.8, []),
        ("main", "IDC", "ImageNet-10", "10", "%", 72.8, []),
        ("main", "DREAM", "CIFAR10", "10", "%", 69.4, []),
        ("same_loss", "LinBa", "CIFAR10", "50", "%", 70.7, []),
        ("cost", "HaBa", "CIFAR10", "50", "GiB", 48276 / 1024, []),
        ("cost", "LinBa", "CIFAR10", "1", "GiB", None, []),
        ("cost", "LinBa", "CIFAR10", "1", "hours", 336.0, []),
        ("transfer", "Random", "Tiny-ImageNet", "50", "%", 6.17, []),
    ],
)
def test_a_few_numbers(table, method, dataset, ipc, unit, shown, others):
    found = reported_for(ROWS, table, {"method": method, "dataset": dataset, "ipc": ipc}, unit)
    assert [one.number for one in found] == [shown, *others]


def test_what_was_not_looked_up_is_marked_and_the_papers_own_number_of_it_too():
    for row in ROWS:
        assert ("recalled" in row["source"]) <= (row["note"] == UNVERIFIED)
    (svhn,) = (row for row in ROWS if (row["method"], row["dataset"], row["ipc"]) == ("HMN", "SVHN", "50"))
    assert svhn["source"] == PAPER and svhn["note"] == UNVERIFIED


def test_cross_architecture_numbers_by_network():
    labels = {"method": "HMN", "dataset": "CIFAR10", "ipc": "50"}
    found = {
        name: reported_for(ROWS, "cross_architecture", labels | {"network": name}, "%")[0].number
        for name in ("ConvNet", "VGG16", "ResNet18", "DenseNet121")
    }
    assert found == {"ConvNet": 76.9, "VGG16": 70.2, "ResNet18": 69.1, "DenseNet121": 65.1}
