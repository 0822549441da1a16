"""``result.json`` is written whole, can be read back, and says which code measured it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from hmn import results
from hmn.errors import ArtifactError

RESULT = {"run_id": "digits-ipc1-hmn-00000000", "accuracy": {"mean": 0.5, "std": None, "by_network": [[0.25, 0.5]]}}


def test_what_is_written_is_read_back_with_its_version(tmp_path):
    written = results.write(tmp_path / "new", RESULT)
    assert written == results.read(tmp_path / "new") == {"schema_version": 1, **RESULT}
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == written
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]


def test_a_folder_without_a_result_has_none(tmp_path):
    assert results.read(tmp_path) is None
    assert results.read(tmp_path / "absent") is None


@pytest.mark.parametrize("version", [0, 2, None])
def test_a_result_of_another_version_is_refused(tmp_path, version):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | {"schema_version": version}))
    with pytest.raises(ArtifactError, match=rf"result.json: schema version {version}, this program reads 1") as caught:
        results.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path):
    results.write(tmp_path, RESULT)
    with pytest.raises(TypeError):
        results.write(tmp_path, RESULT | {"accuracy": object()})
    assert results.read(tmp_path) == {"schema_version": 1, **RESULT}


def test_provenance_names_versions_and_machine():
    found = results.provenance()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert {"torchvision", "numpy", "hydra-core", "wandb", "safetensors"} <= set(found["packages"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["platform"].split()[0] == os.uname().sysname
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("result", "value"),
    [
        (
            {
                "pruning": {"cut_per_class": 2, "held_out_accuracy": 0.5},
                "curve": [{"step": 4, "held_out_accuracy": 0.75}],
            },
            0.5,
        ),
        ({"pruning": {"cut_per_class": 0}, "curve": [{"held_out_accuracy": 0.25}, {"held_out_accuracy": 0.75}]}, 0.75),
        ({"pruning": {"cut_per_class": 2}, "curve": [{"step": 4, "held_out_accuracy": 0.75}]}, None),
        ({"pruning": {"cut_per_class": 2}, "curve": []}, None),
        ({}, None),
    ],
    ids=["pruned", "not pruned", "curve of another set", "no curve", "reference"],
)
def test_the_held_out_accuracy_is_of_the_kept_set_and_never_the_test_s(result, value):
    assert results.held_out_accuracy(RESULT | result) == value


def test_the_summary_has_the_numbers_that_compare_runs():
    measured = {"images_per_class": "78", "stored_floats": 30635, "budget_floats": 30720, "peak_bytes": 5}
    seconds = {"wall_seconds": {"condense": 1.5, "evaluate": 2.0}, "condense_seconds": 1.25, "condense_steps": 6}
    pruning = {"pruning": {"held_out_accuracy": 0.25}}
    origin = {"codes": ["a", "b"], "code": "b", "commit": "c", "device": "a CPU"}
    accuracy = {"accuracy_mean": 0.5, "accuracy_std": None, "networks": 1, "held_out_accuracy": 0.25}
    assert results.summary(RESULT | measured | seconds | pruning | origin) == {
        **(measured | seconds | accuracy),
        "images_per_class": 78,
        "wall_seconds": 3.5,
        "code": "a+b",
        "commit": "c",
        "device": "a CPU",
    }
    reference = {"images_per_class": "17-20", "stored_floats": 64, "wall_seconds": {}, "peak_bytes": 5}
    found = results.summary(RESULT | reference)
    assert (found["images_per_class"], found["condense_steps"], found["held_out_accuracy"]) == ("17-20", None, None)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    own = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # no hooks or keys of the user
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=own)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Iterator[Path]:
    """A checkout with one commit, which ``hmn.results`` takes for its own."""
    folder = tmp_path / "checkout"
    (folder / "hmn").mkdir(parents=True)
    code = folder / "hmn" / "results.py"
    code.write_text("pass\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    monkeypatch.setattr(results, "ROOT", folder)
    results.code_version.cache_clear()
    yield folder
    results.code_version.cache_clear()


def test_commit_and_dirty_flag_are_the_checkouts(checkout):
    found = results.provenance()
    assert (found["commit"], found["dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    (checkout / "notes.txt").write_text("not part of the code\n")
    assert results.provenance()["dirty"] is False
    (checkout / "hmn" / "results.py").write_text("changed\n")
    found = results.provenance()
    assert (found["commit"], found["dirty"]) == (git(checkout, "rev-parse", "HEAD"), True)


def test_installed_code_has_no_commit_even_inside_another_checkout(checkout, monkeypatch):
    (checkout / "env" / "hmn").mkdir(parents=True)
    monkeypatch.setattr(results, "ROOT", checkout / "env")
    found = results.provenance()
    assert (found["commit"], found["dirty"]) == (None, None)


def test_the_code_version_is_of_the_sources_of_a_run_alone(checkout):
    def version() -> str:
        results.code_version.cache_clear()
        return results.code_version()

    before = version()
    (checkout / "README.md").write_text("changed")
    (checkout / "hmn" / "sweeps").mkdir()
    (checkout / "hmn" / "sweeps" / "pool.py").write_text("how, not what")
    assert version() == before
    (checkout / "hmn" / "results.py").write_text("changed\n")
    changed = version()
    (checkout / "hmn" / ".#results.py").symlink_to("somebody@somewhere.1234")  # Emacs's lock
    (checkout / "hmn" / ".ipynb_checkpoints").mkdir()
    (checkout / "hmn" / ".ipynb_checkpoints" / "results-checkpoint.py").write_text("older\n")
    assert version() == changed
    (checkout / "hmn" / "results.py").rename(checkout / "hmn" / "other.py")
    assert len({before, changed, version()}) == 3


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    found = results.provenance()
    assert (found["commit"], found["dirty"]) == (None, None)


def test_a_package_whose_version_nobody_knows_is_no_reason_not_to_run(monkeypatch):
    monkeypatch.setattr(results, "PACKAGES", ("numpy", "copied-by-hand"))
    assert results.provenance()["packages"] == {"numpy": metadata.version("numpy"), "copied-by-hand": None}
