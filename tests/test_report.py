"""The result table, compared character by character."""

from __future__ import annotations

from hmn.report import COLUMNS, row, text_table


def result(**accuracy: object) -> dict:
    return {"images_per_class": "78", "stored_floats": 30635, "accuracy": accuracy}


def test_a_row_has_percent_with_deviation_and_counts():
    networks = [[0.4, 0.3], [0.5, 0.42]]
    found = row("condensed", result(mean=0.36, std=0.0848528, best_mean=0.45, by_network=networks))
    assert found == ["condensed", "78", "30,635", "36.00 ± 8.49", "45.00", "2"]


def test_a_single_network_has_no_deviation():
    found = row("condensed", result(mean=0.123456, std=None, best_mean=1.0, by_network=[[0.1]]))
    assert found[3:] == ["12.35", "100.00", "1"]


def test_the_table_is_padded_to_its_widest_cells():
    rows = [
        row("condensed", result(mean=0.657, std=0.003, best_mean=0.66, by_network=[[0.657]] * 10)),
        ["full training set", "4500", "138,240,000", "84.80 ± 0.10", "85.00", "3"],
    ]
    assert text_table(COLUMNS, rows).splitlines() == [
        "set                images/class       floats    accuracy %  best of tests %  networks",
        "-----------------  ------------  -----------  ------------  ---------------  --------",
        "condensed                    78       30,635  65.70 ± 0.30            66.00        10",
        "full training set          4500  138,240,000  84.80 ± 0.10            85.00         3",
    ]


def test_a_table_without_rows_is_its_header():
    assert text_table(("a", "long"), []) == "a  long\n-  ----"
