"""Benchmarks: the reference, ratios, result rows and counted work are correct. No test reads a clock."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as everything
from benchmarks import (
    condensation,
    evaluation,
    forms,
    matching,
    outer_step,
    problem,
    reference,
    reports,
    settings,
    timing,
)
from benchmarks.reports import Row
from benchmarks.timing import Times, Variant
from hmn import capture
from hmn.compute import Compute
from hmn.data import augment
from hmn.files import write_json
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.gradient import matching_step

CPU = torch.device("cpu")


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def options(*arguments: str) -> argparse.Namespace:
    return settings.parser("A benchmark.", rounds=5).parse_args(arguments)


# The reference


def test_the_reference_step_is_our_loop_in_float64():
    network = initialise(ConvNet(3, 4, 8, width=4), stream()).double()
    real, synthetic = (torch.randn(4, n, 3, 8, 8, generator=stream(n), dtype=torch.float64) for n in (6, 5))
    expected = reference.matching_step(network, real, synthetic)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    found = matching_step(network, "mse", Compute(CPU))(parameters, real, synthetic, torch.arange(4))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(a.abs().max()))
    assert expected[1].abs().amax((2, 3, 4)).min() > 0


def test_whole_steps_of_reference_and_condensation_give_the_container_equal_gradients():
    found = outer_step.check(problem.make(options("--classes", "3"), CPU), options("--classes", "3"))
    assert set(found) == {"distance", "instances", "class", "dataset", "extractors", "decoder"}
    assert max(found.values()) <= 1e-9


def test_epochs_of_the_reference_and_of_ours_give_equal_weights_alone_and_together():
    found = evaluation.check("cuda")  # the check for a GPU, run on the CPU
    assert set(found) == {"1 at a time", "3 at a time"}
    assert max(found.values()) <= 1e-9


OPERATORS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "brightness": (reference.brightness, torch.tensor([0.0, 0.3, 0.9])),
    "saturation": (reference.saturation, torch.tensor([0.0, 0.3, 0.9])),
    "contrast": (reference.contrast, torch.tensor([0.0, 0.3, 0.9])),
    "flip": (reference.flip, torch.tensor([True, False, True])),
    "crop": (reference.crop, torch.tensor([[-4, 4], [0, 1], [3, -2]])),
    "scale": (reference.scale, torch.tensor([[0.9, 1.1], [1.2, 1.0], [1.0, 1.0]])),
    "rotate": (reference.rotate, torch.tensor([-0.2, 0.0, 0.25])),
    "cutout": (reference.cutout, torch.tensor([[0, 0], [31, 32], [16, 9]])),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_augments_as_we_do_for_equal_draws(name):
    operator, values = OPERATORS[name]
    images = torch.randn(3, 3, 32, 32, generator=stream())
    alternatives = augment.alternatives_of(name, "idc")
    drawn = {name: values}
    if name in ("brightness", "saturation", "contrast"):
        # Our three colour operators are applied together; u = 1/2 makes each the identity.
        drawn = {colour: torch.full((3,), 0.5) for colour in ("brightness", "saturation", "contrast")} | drawn
    expected = augment.apply(
        images,
        augment.Draw(alternatives=alternatives, chosen=torch.zeros(3, dtype=torch.int64), **drawn),
    )
    torch.testing.assert_close(operator(images, values), expected, rtol=0, atol=1e-5)
    assert (expected - images).abs().max() > 0.01


def test_one_draw_for_all_moves_real_and_synthetic_images_alike():
    images = torch.randn(1, 3, 32, 32, generator=stream()).expand(6, -1, -1, -1)
    found = reference.augment(images, "color_crop_cutout", reference.random_of(0, CPU), alike=True)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=0)
    each = reference.augment(images, "color_crop_cutout", reference.random_of(0, CPU), alike=False)
    assert (each - each[:1]).abs().amax((1, 2, 3))[1:].min() > 0.01


def test_the_cutmix_share_is_the_area_that_stays():
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    for seed in range(20):
        mixed, partners, share = reference.cutmix(images, torch.arange(8), reference.random_of(seed, CPU))
        changed = [i for i in range(8) if partners[i] != i]
        own = torch.stack([(mixed[i] == i).float().mean() for i in changed])
        torch.testing.assert_close(own, torch.full_like(own, share))


# Counted work


def test_work_of_convnet_d3_at_32_pixels_is_that_of_its_layers():
    work = problem.work(lambda: ConvNet(3, 10, 32, width=128))
    convolutions = [2 * 128 * 9 * channels * side**2 for channels, side in ((3, 32), (128, 16), (128, 8))]
    assert work.first == convolutions[0]
    assert work.convolutions == sum(convolutions)
    assert work.forward == sum(convolutions) + 2 * 2048 * 10
    assert work.matched / work.forward == pytest.approx(6.86, abs=0.01)


def test_a_training_image_takes_what_autograd_spends_on_it():
    network = ConvNet(3, 5, 32, width=4)
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert counter.get_total_flops() == 2 * problem.work(lambda: ConvNet(3, 5, 32, width=4)).training


# Ratios and rows


def test_ratios_are_taken_within_rounds():
    # In the second round, the machine was three times slower for both.
    assert reports.ratios([4, 12, 4], [2, 6, 1]) == (2, 2, 4)
    with pytest.raises(ValueError):
        reports.ratios([4, 12], [2])


def test_a_round_is_filled_with_calls():
    assert timing.calls_per_round(6.0, 0.5) == 1
    assert timing.calls_per_round(0.2, 0.5) == 3
    assert timing.calls_per_round(0.0, 0.5, most=500) == 500


def two_forms() -> list[Row]:
    variants = [
        Variant("reference", lambda: None, flops=8e9),
        Variant("ours bf16", lambda: None, flops=8e9, precision="bf16", note="another objective"),
    ]
    times = {
        "reference": Times(first=5.0, rounds=[4.0, 12.0, 4.0], calls=1),
        "ours bf16": Times(first=30.0, rounds=[2.0, 6.0, 1.0], calls=4),
    }
    return reports.rows("matching", variants, times, {"fp32": 4e9, "bf16": 8e9})


def test_rows_hold_ratios_times_and_shares_of_the_ceiling():
    plain, ours = two_forms()
    assert (plain.speedup_median, plain.speedup_min, plain.speedup_max) == (1, 1, 1)
    assert (ours.speedup_median, ours.speedup_min, ours.speedup_max) == (2, 2, 4)
    assert (ours.median_ms, ours.min_ms, ours.max_ms) == (2000, 1000, 6000)
    assert (ours.rounds, ours.calls_per_round, ours.first_call_seconds) == (3, 4, 30)
    assert (ours.flops_per_second, ours.ceiling_flops_per_second, ours.ceiling_share) == (4e9, 8e9, 0.5)
    assert plain.ceiling_share == 0.5  # 2e9 FLOP/s of the 4e9 for fp32
    assert ours.note == "another objective"


def test_without_the_reference_a_row_has_times_but_no_speed_up():
    variant = Variant("decoding", lambda: None, flops=1.0)
    (row,) = reports.rows("outer_step", [variant], {"decoding": Times(1.0, [1.0], 1)}, {}, baseline="none")
    assert (row.speedup_median, row.speedup_min, row.speedup_max) == (None, None, None)
    assert (row.median_ms, row.ceiling_share) == (1000, None)


def test_variants_take_turns_and_each_round_starts_with_another(monkeypatch: pytest.MonkeyPatch):
    turns = []

    def timed(variant: Variant, device: torch.device, calls: int = 1) -> tuple[float, object]:
        turns.append((variant.name, calls))
        return 0.2, variant.call()

    monkeypatch.setattr(timing, "timed", timed)
    variants = [Variant(name, lambda name=name: name.upper(), 1.0) for name in "abc"]
    times = timing.interleave(variants, CPU, rounds=2, least_seconds=0.5, title="test")
    assert [name for name, _ in turns] == list("abc" + "abc" + "abc" + "bca")
    assert [calls for _, calls in turns] == [1] * 6 + [3] * 6
    assert times["b"] == Times(first=0.2, rounds=[0.2, 0.2], calls=3, result="B")


def test_a_report_keeps_and_shows_every_row(tmp_path, capsys):
    given = options("--json", str(tmp_path / "rows.json"))
    rows = two_forms()
    rows[1].peak_bytes = 3 * 2**20
    reports.report(given, {"machine": "a machine", "shapes": {"width": 8}}, rows, ["GPU, matching: reference"])
    shown = capsys.readouterr().out
    for piece in (
        "2.00 (2.00, 4.00)",
        "2000",
        " 3 |",
        "50%",
        "another objective",
        "GPU, matching: reference",
        "width 8",
    ):
        assert piece in shown
    kept = json.loads((tmp_path / "rows.json").read_text())
    needed = {"name", "speedup_median", "speedup_min", "speedup_max", "peak_bytes", "median_ms", "first_call_seconds"}
    assert all(needed <= set(row) for row in kept["rows"])
    assert [row["name"] for row in kept["rows"]] == ["reference", "ours bf16"]
    assert kept["rows"][1]["peak_bytes"] == 3 * 2**20
    assert kept["header"]["machine"] == "a machine"


def test_all_parts_make_one_report():
    part = {
        "header": {"commit": "abc", "date": "today", "width": 128, "ceilings": {"fp32": 1}, "command": "of a part"},
        "rows": [{"name": 1}],
    }
    other = {"header": {"commit": "abc", "date": "later", "width": 32, "steps": 5}, "rows": [{"name": 2}]}
    found = everything.merge({"matching": part, "memory": other}, ["evaluation"], ["GPU, matching: reference"])
    assert found["header"]["commit"] == "abc"
    assert (found["header"]["matching date"], found["header"]["memory date"]) == ("today", "later")
    assert (found["header"]["width"], found["header"]["memory width"], found["header"]["steps"]) == (128, 32, 5)
    assert not {"memory commit", "command", "matching command"} & set(found["header"])
    assert found["rows"] == [{"name": 1}, {"name": 2}]
    assert found["not_measured"] == ["evaluation: failed, see its message", "GPU, matching: reference"]


def test_all_benchmarks_run_one_after_another_and_what_failed_is_named(tmp_path, monkeypatch, capsys):
    caches = set()

    def run(command, *, env, **_):  # a part's process: `matching` fails, the others have a row
        name, given = command[2].removeprefix("benchmarks."), options(*command[command.index("--rounds") :])
        assert given.rounds == 2
        if name == "matching":
            return subprocess.CompletedProcess(command, 1)
        caches.add(env["TORCHINDUCTOR_CACHE_DIR"])
        write_json(given.json, {"header": {"commit": "abc"}, "rows": [vars(Row(part=name, name="ours"))]})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(everything.subprocess, "run", run)
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--rounds", "2", "--device", "cpu"])
    assert everything.main() == 1
    kept = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["part"] for row in kept["rows"]] == [name for name in everything.PARTS if name != "matching"]
    assert "matching: failed, see its message" in kept["not_measured"]
    assert (tmp_path / "cpu.md").read_text().strip() in capsys.readouterr().out
    assert len(caches) == 1


def test_rows_that_wait_for_a_gpu_are_named():
    names = everything.planned("cuda", options())
    assert len(names) == len(set(names))
    assert "matching: r_operator bf16 stored" in names
    assert {"matching: r_operator bf16 triton", "outer_step: r_operator bf16 triton stored"} <= {*names}
    assert "memory: HMN 50 IPC, r_operator bf16" in names


def test_a_child_process_computes_the_same_shapes():
    given = options("--width", "8", "--images-per-class", "10", "--chunk", "1", "--networks", "4", "--system-allocator")
    again = options(*settings.shape_arguments(given))
    kept = (*settings.SHAPES, "chunk", "networks", "threads", "system_allocator", "data", "forms_of")
    assert [getattr(given, name) for name in kept] == [getattr(again, name) for name in kept]


def test_forms_are_chosen_by_name_and_the_reference_stays():
    planned = forms.matching("cpu", 10)
    chosen = settings.chosen(planned, options("--forms", "compiled bf16"))
    assert [form.name for form in chosen] == ["reference", "compiled bf16"]
    with pytest.raises(SystemExit, match="compiled fp16"):
        settings.chosen(planned, options("--forms", "compiled fp16"))


def test_without_the_reference_only_what_is_named_is_left():
    given = options("--forms", "loop fp32", "--without-reference")
    assert [form.name for form in settings.chosen(forms.matching("cpu", 10), given)] == ["loop fp32"]
    variant = Variant("loop fp32", lambda: None, 1.0)
    assert matching.compare([variant], {"loop fp32": Times(0.0, [1.0], 1)}) == {"loop fp32": {}}


def test_what_was_timed_is_written_before_memory_is_measured(tmp_path, monkeypatch):
    given = options("--json", str(tmp_path / "rows.json"))
    monkeypatch.setattr(capture, "launched_anew", {"no such kernel"})
    for device in ("cpu", "cuda"):
        reports.finished(given, {"device": device}, [Row(part="p", name="a", median_ms=2.0)])
        found = json.loads((tmp_path / "rows.json").read_text())
        assert [(row["name"], row["median_ms"], row["peak_bytes"]) for row in found["rows"]] == [("a", 2.0, None)]
        assert found["not_measured"] == ["peak memory: was being measured"]
        assert found["header"].get("launched_anew") == (None if device == "cpu" else "no such kernel")
    reports.finished(options("--json", str(tmp_path / "rows.json"), "--no-record"), {"device": "cuda"}, [])
    assert json.loads((tmp_path / "rows.json").read_text())["header"]["launched_anew"] == "everything: --no-record"


@torch._dynamo.config.patch(cache_size_limit=8)  # monkeypatch would delete what it restores
def test_recording_can_be_left_out_and_is_then_left_out_of_the_processes_that_measure_memory_too(monkeypatch):
    monkeypatch.setattr(capture, "_enabled", True)  # so that monkeypatch restores it afterwards
    monkeypatch.setattr(settings, "set_deterministic", lambda _: None)
    monkeypatch.setattr(settings, "keep_heap_pages", lambda: True)
    settings.prepare(options("--device", "cpu"))
    assert capture._enabled
    given = options("--device", "cpu", "--no-record")
    settings.prepare(given)
    assert not capture._enabled and "--no-record" in settings.shape_arguments(given)


def test_a_form_that_computes_something_else_ends_the_benchmark_once_all_is_written():
    ones, other = torch.ones(3), 2 * torch.ones(3)
    variants = [Variant(name, lambda: None, 1.0) for name in ("reference", "same", "other")]
    results = {"reference": ones, "same": ones, "other": other}
    found = matching.compare(variants, {name: Times(0.0, [1.0], 1, (value, ones)) for name, value in results.items()})
    rows = [Row(part="p", name=name, extra=extra) for name, extra in found.items()]
    matching.deviating(rows[:2])
    with pytest.raises(SystemExit, match="^other: the distance differs"):
        matching.deviating(rows)


@pytest.mark.parametrize("has", [False, True])
def test_bf16_is_left_out_where_it_does_not_pay_unless_it_is_named(monkeypatch, capsys, has):
    monkeypatch.setattr(settings, "bf16_pays", lambda device: has)
    planned = forms.outer_step("cpu", 10)
    names = [form.name for form in settings.chosen(planned, options())]
    assert names == (
        [form.name for form in planned]
        if has
        else ["reference", "compiled fp32", "compiled fp32 stored", forms.other_convolutions().name]
    )
    assert ("--forms" in capsys.readouterr().err) == (not has)
    assert [form.name for form in settings.chosen(planned, options("--forms", "compiled bf16"))][1:] == [
        "compiled bf16"
    ]


@pytest.mark.parametrize("pays", [False, True])
def test_fp32_is_measured_as_runs_compute_it_and_with_the_other_convolutions(monkeypatch, pays):
    monkeypatch.setattr(forms, "winograd_pays", lambda: pays)
    other = "compiled fp32 direct" if pays else "compiled fp32 winograd"
    for planned in (forms.matching("cpu", 10), forms.outer_step("cpu", 10), forms.evaluation("cpu", 1)):
        compiled = {form.name: form.winograd for form in planned if form.compiled and form.precision == "fp32"}
        assert compiled.pop(other) == (not pays)
        assert set(compiled.values()) == {pays}
    assert not any(form.winograd for form in forms.matching("cuda", 10))


def test_compiling_pays_once_its_seconds_are_saved():
    plain = {"preparation_seconds": 0.0, "first_step_seconds": 2.0, "steady_seconds": 2.0}
    ours = {"preparation_seconds": 10.0, "first_step_seconds": 42.0, "steady_seconds": 1.0}
    assert condensation.break_even(ours, plain) == 50
    assert condensation.break_even(ours | {"steady_seconds": 3.0}, plain) is None


# Images


def test_noise_is_normalised_like_images_and_not_white():
    data = problem.noise(2, per_class=50)
    pixels = data.train.images.float() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(problem.MEAN, abs=0.02)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(problem.STD, abs=0.02)
    steps = (pixels[..., 1:] - pixels[..., :-1]).std() / pixels.std()
    assert steps < 0.8 * math.sqrt(2)  # neighbours are similar; in white noise they would differ by sqrt(2) deviations
    again = problem.noise(2, per_class=50)
    assert torch.equal(again.train.images, data.train.images)
