"""Tables as text: Markdown, LaTeX and CSV, and the command that writes them."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import filling, tables
from experiments.filling import VALUES, Entry, Gap, fill, measure
from experiments.tables import escaped, latex, markdown
from hmn import results
from hmn.errors import ConfigError
from hmn.files import write_text
from hmn.sweeps.attempt import FAILURE
from hmn.sweeps.planning import Planned
from tests.experiments.small_table import AXES, COMMAND, HEAD, Runs, result, rows_of


def test_a_table_is_rendered_in_full(tmp_path, reported):
    reported(
        'small,Ours,A,1,N,65.7,,%,"Zheng et al., ECCV 2024",their way,',
        "small,Theirs,A,1,N,50.0,0.4,%,Somebody,,unverified",
        "other,Theirs,A,10,N,12.0,,%,Somebody,,",
    )
    runs = Runs(tmp_path / "runs", axes={**AXES, "dataset": {"A": []}})
    runs.finish("A/1/Ours/0", [0.60, 0.62])
    runs.finish("A/1/Ours/1", [0.64, 0.66])
    runs.finish("A/1/Theirs/0", [0.50, 0.51, 0.52])
    failed = runs.path("A/10/Theirs/1")
    write_text(failed / FAILURE, json.dumps({"error": "out of memory", "command": "ignored"}))
    assert markdown(fill(runs)) == (
        "# A small table\n\n"
        "Reproduces: nothing.\n\n"
        "## Test accuracy, A, %\n\n"
        "| method | ipc 1, measured | ipc 1, reported | ipc 1, difference "
        "| ipc 10, measured | ipc 10, reported | ipc 10, difference |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| Ours | **63.00 ± 2.83 (2 x 2)** | 65.7 [1] | -2.70 | [a] |  |  |\n"
        "| Theirs | 51.00 ± 1.00 (1 x 3) [a] | 50.0 ± 0.4 [2] | +1.00 | [a] [b] |  |  |\n\n"
        "- Mean ± standard deviation (ddof 1) over condensations, of one condensation over its networks; "
        "(n): condensations x networks.\n"
        "- [a] not measured: `python sweep.py experiment=small`\n"
        "- [b] failed: out of memory: `python run.py dataset=A ipc=10 method=Theirs seed=1`\n"
        "- [1] reported by Zheng et al., ECCV 2024 (their way)\n"
        "- [2] reported by Somebody (unverified)\n"
        "- Data: cifar10-q75 (re-encoded as JPEG, not the original), c6c867f81b10\n"
        "- Device: cpu, 2 threads\n"
        "- Code: feedfacecafe; commit 0123456\n"
        "- Runs: 3, together 1.50 hours\n"
        "- Command: `python sweep.py experiment=small`\n"
    )


def test_latex_in_full(tmp_path, reported):
    reported("small,Ours,A,1,N,65.7,,%,A & B,,")
    runs = Runs(
        tmp_path, axes={"dataset": {"A": []}, "ipc": {"1": []}, "method": {"Ours": [], "K_2": []}, "seed": {"0": []}}
    )
    runs.finish("A/1/Ours/0", [0.60, 0.62])
    runs.finish("A/1/K_2/0", [0.40])
    lines = latex(fill(runs)).splitlines()
    assert lines[:13] == [
        r"\begin{table}",
        r"\centering",
        r"\caption{A small table}",
        r"\label{tab:small}",
        r"\par\medskip test accuracy, A, \%\par",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"method & ipc 1, measured & ipc 1, reported & ipc 1, difference \\",
        r"\midrule",
        r"Ours & \textbf{61.00 $\pm$ 1.41 (1 x 2)} & 65.7\,[1] & $-4.70$ \\",
        r"K\_2 & 40.00 (1 x 1) &  &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert r"\par\footnotesize [1] reported by A \& B" in lines
    assert lines[-1] == r"\end{table}"


def test_latex_escapes_what_is_special_in_it():
    assert escaped(r"5 & 6% $x_1 #2 {a} ~ ^ \ ± –") == (
        r"5 \& 6\% \$x\_1 \#2 \{a\} \textasciitilde{} \textasciicircum{} \textbackslash{} $\pm$ --"
    )


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40))
def test_no_special_character_of_latex_is_left_alone(text):
    known = r"\\(textbackslash|textasciitilde|textasciicircum|textasciigrave|textless|textgreater)\{\}|\\[&%$#_{}]"
    rest = re.sub(known, "", escaped(text))
    assert not set(rest) & set("\\&%$#_{}~^")


def test_the_values_of_a_single_column_stand_side_by_side(tmp_path, reported):
    axes = {"method": {"X": [], "Y": []}, "ipc": {"1": []}}
    runs = Runs(tmp_path, axes=axes, columns=("ipc",), over=(), shows=("accuracy", "images_per_class"))
    runs.finish("X/1", [0.5])
    runs.finish("Y/1", [0.4], images_per_class="9")
    text = markdown(fill(runs))
    assert text.count("## ") == 1 and "## Ipc 1" in text
    assert "| method | test accuracy, % | images per class |" in text
    assert "| X | **50.00 (1 x 1)** | 78 |" in text and "| Y | 40.00 (1 x 1) | 9 |" in text
    assert latex(fill(runs)).count(r"\begin{tabular}") == 1


def test_a_line_of_csv_has_its_numbers_in_full_and_what_is_missing(tmp_path, reported):
    reported(
        'small,Ours,A,1,N,65.7,0.5,%,"Zheng et al., ECCV 2024",their way,',
        "small,Ours,A,1,N,60.0,,%,Somebody,,unverified",
    )
    axes = {"dataset": {"A": []}, "ipc": {"1": []}, "method": {"Ours": []}, "seed": {"0": [], "1": []}}
    runs = Runs(tmp_path, axes=axes)
    runs.finish("A/1/Ours/0", [0.5, 0.75])
    (row,) = rows_of(fill(runs))
    assert row == {"method": "Ours", "dataset": "A", "ipc": "1", "value": "accuracy", "unit": "%"} | {
        "mean": "62.5",
        "std": str(statistics.stdev([50.0, 75.0])),
        "n": "1 x 2",
        "best": "0",
        "runs": "A-1-Ours-0",
        "reported": "65.7",
        "reported_std": "0.5",
        "reported_source": filling.PAPER,
        "reported_protocol": "their way",
        "reported_note": "",
        "difference": str(62.5 - 65.7),
        "further_reported": "60.0 Somebody, unverified",
        "missing": "waiting",
        "commands": "python run.py dataset=A ipc=1 method=Ours seed=1",
    }


def test_after_the_alphabet_notes_have_more_letters():
    notes = tables.Notes(COMMAND)
    letters = [notes.letter(Gap("failed", f"reason {number}", "command")) for number in range(704)]
    assert (letters[0], letters[25:28], letters[51:54]) == ("a", ["z", "aa", "ab"], ["az", "ba", "bb"])
    assert letters[701:] == ["zz", "aaa", "aab"]
    assert notes.letter(Gap("failed", "reason 30", "command")) == letters[30]


def test_notes_of_one_cell_stand_in_their_order():
    notes = tables.Notes("")
    gaps = [Gap("failed", f"reason {number}", "command") for number in range(28)]
    assert [notes.letter(gap) for gap in gaps][25:] == ["z", "aa", "ab"]
    entry = Entry("accuracy", (), (), None, (), (), gaps=(gaps[26], gaps[1], gaps[25], gaps[1]))
    assert tables._cells(SimpleNamespace(compared=False), entry, notes, tables.MARKDOWN) == ["[b] [z] [aa]"]


def test_a_single_competitor_is_not_called_best(tmp_path, reported):
    runs = Runs(tmp_path)
    runs.finish("A/1/Ours/0", [0.6])
    assert "**" not in markdown(fill(runs))


def test_counts_are_shown_without_a_spread_unless_they_differ(tmp_path, reported):
    runs = Runs(tmp_path, shows=("stored_floats",))
    for name, floats in (("A/1/Ours/0", 30635), ("A/1/Ours/1", 30635), ("A/10/Ours/0", 1), ("A/10/Ours/1", 3)):
        runs.finish(name, [0.5], stored_floats=floats)
    assert "| Ours | 30,635 | 2 ± 1.4 (2) |" in markdown(fill(runs))


def test_a_smoke_variant_says_so_and_is_compared_with_nothing(tmp_path, reported):
    reported("small,Ours,A,1,N,65.7,,%,S,,")
    runs = Runs(tmp_path)
    runs.finish("A/1/Ours/0", [0.6], wall_seconds={"condense": 90.0})
    assert "65.7" in markdown(fill(runs))
    smoked = tuple(replace(cell, overrides=(*cell.overrides, "debug=smoke")) for cell in runs.table.cells)
    runs.table = replace(runs.table, cells=smoked)
    text = markdown(fill(runs))
    assert "65.7" not in text and "- Smoke variant: digits" in text
    assert "Runs: 1, together 1.5 minutes" in text


CELLS = [f"{d}/{i}/{m}/{s}" for d in "AB" for i in ("1", "10") for m in ("Ours", "Theirs") for s in "01"]


@settings(max_examples=30)
@given(
    done=st.dictionaries(
        st.sampled_from(CELLS), st.lists(st.integers(0, 10_000).map(lambda n: n / 10_000), min_size=1, max_size=3)
    ),
    published=st.sets(st.sampled_from([name.rsplit("/", 1)[0] for name in CELLS])),
)
def test_a_reported_number_is_never_in_a_measured_column(tmp_path_factory, done, published):
    folder = tmp_path_factory.mktemp("runs")
    rows = []
    for place, name in enumerate(sorted(published)):
        dataset, ipc, method = name.split("/")
        row = ["small", method, dataset, ipc, "", str(1000 + place), "", "%", "S", "", ""]  # no accuracy is that high
        rows.append(dict(zip(HEAD.split(","), row, strict=True)))
    runs = Runs(folder)
    for name, accuracies in done.items():
        runs.finish(name, accuracies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "read_reported", lambda: rows)
        filled = fill(runs)
    for text, split in ((markdown(filled), "|"), (latex(filled), "&")):
        examined = 0
        for line in text.splitlines():
            columns = [part.strip() for part in line.strip("|").removesuffix(r"\\").split(split)]
            if len(columns) == 1 + 6 and columns[0] in ("Ours", "Theirs"):
                examined += 1
                for measured, published_cell in zip(columns[1::3], columns[2::3], strict=True):
                    assert not re.search(r"1\d\d\d", measured)
                    assert not published_cell or re.match(r"1\d\d\d\D", published_cell)
        assert examined or not published
    for row in rows_of(filled):
        mine = [done[n] for n in done if n.rsplit("/", 1)[0] == f"{row['dataset']}/{row['ipc']}/{row['method']}"]
        if not mine:
            assert row["mean"] == row["std"] == row["n"] == row["difference"] == ""
        else:  # exact to the last bit
            assert float(row["mean"]) == measure(VALUES["accuracy"], [result(one) for one in mine]).mean
            assert 0 <= float(row["mean"]) <= 100
        assert (row["reported"] != "") == (f"{row['dataset']}/{row['ipc']}/{row['method']}" in published)


TABLE_FILE = """
title: Digits
reproduces: nothing
kind: table
expects: {hours: 0}
rows: [method]
columns: [dataset, ipc]
over: [seed]
shows: [accuracy]
reported: null
axes:
  dataset: {digits: [dataset=digits]}
  ipc: {"1": [memory=ipc1]}
  method: {Random: [mode=random_subset], HMN: [container=hmn]}
  seed: {"0": [seed=0], "1": [seed=1]}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[Planned]:
    """The planned runs of the only table, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hmn.sweeps.table.TABLES", tmp_path)
    (tmp_path / "tiny.yaml").write_text(TABLE_FILE, encoding="utf-8")
    return filling.sweep_of("tiny", ["debug=smoke"]).plan()


def test_the_command_writes_all_three_files_and_names_the_sweep(tiny, tmp_path, capsys):
    assert [one.cell.name for one in tiny] == ["digits/1/Random/0", "digits/1/HMN/0"]
    results.write(tiny[0].folder, result([0.5, 0.6]))
    tables.main(["tiny", "debug=smoke", "--output", "made"])
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["tiny.csv", "tiny.md", "tiny.tex"]
    assert capsys.readouterr().out == ""
    tables.main(["tiny", "debug=smoke"])
    text = capsys.readouterr().out
    assert text == (tmp_path / "made" / "tiny.md").read_text(encoding="utf-8")
    assert "| Random | 55.00 ± 7.07 (1 x 2) |" in text
    assert "| HMN | [a] |" in text
    assert "[a] not measured: `python sweep.py experiment=tiny debug=smoke`" in text


def test_a_table_with_less_than_is_there_is_not_written_over_it(tiny, tmp_path):
    random, hmn = tiny
    results.write(random.folder, result([0.5, 0.6]))
    tables.main(["tiny", "debug=smoke", "--output", "made"])
    written = (tmp_path / "made" / "tiny.md").read_text(encoding="utf-8")
    results.write(hmn.folder, result([0.7, 0.8]))
    shutil.rmtree(random.folder)
    with pytest.raises(ConfigError, match="shows 1 measured values"):
        tables.main(["tiny", "debug=smoke", "--output", "made", "--results", "kept"])
    assert not (tmp_path / "kept").exists()
    with pytest.raises(
        ConfigError, match="tiny.csv: shows 1 measured values .*, the first Random, digits, 1, accuracy: "
    ):
        tables.main(["tiny", "debug=smoke", "--output", "made"])
    assert (tmp_path / "made" / "tiny.md").read_text(encoding="utf-8") == written
    results.write(random.folder, result([0.5, 0.7]))
    tables.main(["tiny", "debug=smoke", "--output", "made"])
    assert "75.00" in (tmp_path / "made" / "tiny.md").read_text(encoding="utf-8")


def test_a_table_of_fewer_runs_is_not_written_over_it(tiny, tmp_path):
    """A mean over two condensations must not silently become that of one."""
    random, _ = tiny
    results.write(random.folder, result([0.5, 0.6]))
    tables.main(["tiny", "debug=smoke", "--output", "made"])
    kept = tmp_path / "made" / "tiny.csv"
    text = kept.read_text(encoding="utf-8")
    assert text.count(random.run_id) == 1
    kept.write_text(text.replace(random.run_id, f"{random.run_id} another"), encoding="utf-8")
    with pytest.raises(
        ConfigError, match="tiny.csv: shows 1 measured values .*, the first Random, digits, 1, accuracy: "
    ):
        tables.main(["tiny", "debug=smoke", "--output", "made"])
    kept.write_text(text, encoding="utf-8")
    tables.main(["tiny", "debug=smoke", "--output", "made"])
