"""Every benchmark runs as it is called, with the forms of either kind of device: small and uncompiled here."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import tempfile
from typing import Any

import pytest
import torch

from benchmarks import chunks, evaluation, forms, memory, problem, settings, timing
from benchmarks.reports import Row

SMALL = ("--device", "cpu", "--width", "4", "--classes", "2", "--real", "4", "--synthetic", "4", "--samples", "8")
SHORT = ("--rounds", "1", "--least-seconds", "0")
KINDS = ("cpu", "cuda")


def run(part: str, *arguments: str) -> str:
    """What ``python -m benchmarks.PART ARGUMENTS`` prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as told:
        patch.setattr("sys.argv", [part, *arguments])
        importlib.import_module(f"benchmarks.{part}").main()
    return told.getvalue()


def child(_title: str, module: str, *arguments: str, **_: str) -> dict[str, Any]:
    """As :func:`benchmarks.settings.in_a_process`, without the process."""
    return json.loads(run(module.removeprefix("benchmarks."), *arguments).splitlines()[-1])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(settings, "in_a_process", child)
    monkeypatch.setattr(settings, "bf16_pays", lambda device: True)
    monkeypatch.setattr(settings, "keep_heap_pages", lambda: True)
    monkeypatch.setattr(timing, "ceilings", lambda device: {"fp32": {"matmul": 1e9, "convolution": 2e9}})
    monkeypatch.setattr(problem, "NOISE_PER_CLASS", 60)
    monkeypatch.setattr(evaluation, "IMAGES", 20)
    monkeypatch.setattr(memory, "HMN_SYNTHETIC", 4)
    monkeypatch.setattr(chunks, "CASES", ((2, 32, 4),))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with torch._dynamo.config.patch(cache_size_limit=8):  # which a benchmark raises
        yield


def rows(part: str, folder, *arguments: str) -> list[dict[str, Any]]:
    kept = folder / "rows.json"
    told = run(part, *SMALL, *SHORT, *arguments, "--json", str(kept))
    found = json.loads(kept.read_text())
    assert all(row["name"] in told for row in found["rows"])
    assert set(found["rows"][0]) == set(vars(Row(part="", name="")))
    return found["rows"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["matching", "outer_step", "evaluation"])
def test_every_form_is_timed_against_the_reference_and_its_memory_measured(part, kind, tmp_path):
    planned = {
        "matching": forms.matching(kind, 2),
        "outer_step": forms.outer_step(kind, 2),
        "evaluation": forms.evaluation(kind, 2),
    }[part]
    found = rows(part, tmp_path, "--forms-of", kind, "--networks", "2")
    if part == "outer_step":
        assert found[-2]["name"] == "compiled bf16, without network update"
        assert 0 < found[-1]["extra"]["share_of_matching_part_median"] < 1
    found = found[: len(planned)]
    assert [row["name"] for row in found] == [form.name for form in planned]
    for row in found:
        assert row["speedup_min"] <= row["speedup_median"] <= row["speedup_max"]
        assert row["peak_bytes"] >= row["idle_bytes"] > 0
        assert row["flops_per_second"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_condensations_are_timed_with_a_cold_and_a_warm_cache(kind, tmp_path):
    found = rows("condensation", tmp_path, "--forms-of", kind, "--steps", "2")
    names = [row["name"] for row in found]
    assert names[0] == "reference" and len(names) == len(set(names)) > 4
    assert {name.rsplit(", ")[-1] for name in names[1:]} == {"cold cache", "warm cache"}
    assert all(row["extra"]["steady_seconds"] > 0 for row in found)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_measured_for_every_size_of_hmn(kind, tmp_path):
    given = settings.parser("A benchmark.", rounds=1).parse_args([])
    found = rows("memory", tmp_path, "--forms-of", kind, "--parts", "hmn")
    assert [row["name"] for row in found] == memory.planned(kind, given)
    assert all(row["peak_bytes"] > 0 for row in found)


def test_memory_is_measured_with_a_limit_and_without(tmp_path, monkeypatch):
    free, limited = rows("chunks", tmp_path)
    assert (free["name"], limited["name"]) == ("2 classes, 32 px, 4 images", "2 classes, 32 px, 4 images, limit 2 GiB")
    # Without a limit a chunk has as many classes as one call matches, with one as many as fit.
    assert (free["extra"]["classes_per_chunk"], limited["extra"]["classes_per_chunk"]) == (1, 2)

    def killed(*_: str) -> dict[str, Any]:
        raise SystemExit("memory: chunks: its process failed\nended with exit code -9")

    monkeypatch.setattr(settings, "in_a_process", killed)
    assert [row["note"] for row in rows("chunks", tmp_path)] == 2 * ["failed: ended with exit code -9"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_lists_convolutions(kind):
    told = run("where", *SMALL, "--forms-of", kind, "--form", "r_operator bf16", "--rounds", "1")
    assert "convolution" in told


def test_what_sweeping_costs_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # slots of its own
    home = os.getcwd()
    told = run("sweeps", "--rounds", "1", "--runs", "3", "--json", str(tmp_path / "rows.json"))
    found = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(row["name"] in told and row["seconds_median"] > 0 for row in found)
    assert found[-1]["name"] == "3 finished runs planned and tabulated"
    assert os.getcwd() == home
