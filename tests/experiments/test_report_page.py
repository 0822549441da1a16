"""The page of a sweep: what it reads, what it says, and how it behaves in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import report
from experiments.collection import collect, leading_number
from experiments.embedding import embed
from experiments.report import duration, render, size, thinned
from hmn.errors import ArtifactError, ConfigError
from tests.command import TINY, run
from tests.experiments.fabricated import noise, result, write_failure, write_run, write_sweep

HOSTILE = '</script><script>window.hit=1</script><img src=x onerror="window.hit=2">&amp;'


def a_sweep(runs: Path) -> Path:
    """A sweep of five runs: three finished at 9.5, 9.25 and 80.5 %, one failed, one waiting for a kept set."""
    for name, accuracies in (("d-aaaa0001", [0.08, 0.11]), ("d-aaaa0002", [0.0925]), ("d-aaaa0003", [0.80, 0.81])):
        steps = {"d-aaaa0001": 12, "d-aaaa0003": 600}.get(name, 0)
        write_run(runs / name, result(name, accuracies), losses=steps, pictures=bool(steps))
    write_failure(runs / "d-aaaa0004", f"ConfigError: {HOSTILE}", f"python run.py 'name={HOSTILE}'")
    labels = [("HMN", "ipc10"), ("HMN", "ipc2"), ("IDC", "ipc1"), (HOSTILE, "ipc1"), ("IDC", "ipc10")]
    cells = [
        {"name": f"{method}/{ipc}", "labels": {"method": method, "memory": ipc, "dataset": "digits"}, "run_id": run_id}
        for (method, ipc), run_id in zip(labels, [f"d-aaaa000{n}" for n in (1, 2, 3, 4)] + [None], strict=True)
    ]
    return write_sweep(runs, cells, title=f"Sweep {HOSTILE}")


# What is read


def test_runs_of_a_sweep_are_found_wherever_its_runs_folder_was_moved_to(tmp_path):
    found = collect(a_sweep(tmp_path / "moved"))
    statuses = [(run.run_id, run.state.status) for run in found.runs]
    assert statuses[:2] == [("d-aaaa0001", "done"), ("d-aaaa0002", "done")]
    assert statuses[2:] == [("d-aaaa0003", "done"), ("d-aaaa0004", "failed"), (None, "waiting")]
    assert (found.axes, found.alike) == (["method", "memory"], {"dataset": "digits"})
    assert [run.name for run in found.runs[:3]] == ["HMN · ipc10", "HMN · ipc2", "IDC · ipc1"]


def test_cells_that_are_one_run_are_one_row(tmp_path):
    write_run(tmp_path / "one", result("one", [0.5]))
    names = ("p=0", "none")
    folder = write_sweep(tmp_path, [{"name": name, "labels": {"rate": name}, "run_id": "one"} for name in names])
    (only,) = collect(folder).runs
    assert (only.cell, only.labels) == ("p=0 = none", {"rate": "p=0 = none"})


def test_any_folder_of_runs_is_told_apart_by_its_settings(tmp_path):
    for seed in (0, 1):
        config = result("", [0.5])["config"] | {"seed": seed, "dataset": {"name": None, "kind": "digits"}}
        write_run(tmp_path / f"run-{seed}", result(f"run-{seed}", [0.5], config=config))
    (tmp_path / "notes").mkdir()
    found = collect(tmp_path)
    assert [run.name for run in found.runs] == ["seed 0", "seed 1"]
    assert found.alike == {"dataset": "digits", "IPC": "10", "method": "hmn"}
    configs = [run.config for run in found.runs]
    assert "seed" not in report.shared_settings(configs) and configs[1]["seed"] == "1"
    assert report.shared_settings(configs)["container.name"] == '"hmn"'


def test_accuracies_of_networks_are_those_of_the_last_epoch(tmp_path):
    made = result("a", [0.5, 0.4])
    made["accuracy"]["by_network"] = [[0.2, 0.5], [0.9, 0.4]]
    write_run(tmp_path / "a", made)
    (only,) = collect(tmp_path).runs
    assert dict(report.provenance(only))["Accuracies, %"] == "50.00, 40.00"


def test_references_are_called_by_their_mode_and_have_no_objective(tmp_path):
    for mode in ("run", "full_data"):
        config = result("", [0.5])["config"] | {"mode": mode, "objective": {"name": "dc"}}
        config |= {"dataset": {"name": "mine", "kind": "digits"}}
        write_run(tmp_path / mode, result(mode, [0.5], mode=mode, config=config))
    shared = {"dataset": "mine", "IPC": "10", "seed": "0"}
    assert {run.run_id: run.labels for run in collect(tmp_path).runs} == {
        "run": shared | {"method": "hmn", "objective": "dc"},
        "full_data": shared | {"method": "full_data"},
    }


def test_runs_that_labels_do_not_tell_apart_keep_their_ids(tmp_path):
    for name in ("x-1", "x-2"):
        write_run(tmp_path / name, result(name, [0.5]))
    assert [run.name for run in collect(tmp_path).runs] == ["x-1", "x-2"]
    other = {**result("", [0.5])["config"], "seed": 7}
    write_run(tmp_path / "x-3", result("x-3", [0.5], config=other))
    assert [run.name for run in collect(tmp_path).runs] == ["seed 0 · 1", "seed 0 · 2", "seed 7"]


def test_without_learning_curves_their_chart_is_left_out(browser, tmp_path):
    metrics = write_run(tmp_path / "runs" / "a", result("a", [0.5]), losses=5) / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if "curve/" not in line]
    metrics.write_text("".join(kept))
    report.main([str(tmp_path / "runs"), "--output", str(tmp_path / "page.html")])
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.find_elements("css selector", "#chart-accuracy") == [] and lines(browser, "loss") == 1


@pytest.mark.parametrize("made", ["nothing", "not JSON", '{"name": "x"}', '{"cells": 3}'])
def test_folders_that_are_no_sweep_are_refused_in_one_line(tmp_path, made, capsys):
    if made != "nothing":
        (tmp_path / "sweep.json").write_text(made)
    with pytest.raises(ConfigError, match="holds neither" if made == "nothing" else "damaged") as caught:
        report.main([str(tmp_path)])
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_files_cut_short_cost_their_own_run_only(tmp_path):
    for name in ("whole", "cut"):
        write_run(tmp_path / name, result(name, [0.5]), losses=3, pictures=True)
    for name in ("result.json", "condensed.png"):
        path = tmp_path / "cut" / name
        path.write_bytes(path.read_bytes()[:40])
    (tmp_path / "cut" / "metrics.jsonl").write_text('{"condense/st\n')
    (tmp_path / "cut" / "config.yaml").write_text("mode: [")
    cut, whole = collect(tmp_path).runs
    assert (cut.state.status, whole.state.status) == ("damaged", "done")
    page = render(collect(tmp_path))
    assert "cut short or damaged" in page and page.count("<img ") == 3


def test_a_real_run_is_shown_as_it_was(tmp_path):
    given = ("memory.images_per_class=4", "pruning.over_budget=0.3", "pruning.beta=0.5")
    given += ("evaluation.curve_points=2", "evaluation.curve_epochs=1")
    outcome = run(tmp_path, *TINY, *given)
    assert outcome.code == 0, outcome.err
    report.main([str(tmp_path / "runs"), "--output", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    (only,) = collect(tmp_path / "runs").runs
    accuracy = only.result["accuracy"]
    assert f"<b>{100 * accuracy['mean']:.2f}</b> ± {100 * accuracy['std']:.2f}" in page
    assert f"{only.result['stored_floats']:,}" in page
    assert len(report.curves_of(only)["accuracy"]) == 2
    assert report.curves_of(only)["pruned"] == pytest.approx(100 * only.result["pruning"]["held_out_accuracy"], 1e-4)
    (histogram,) = report.histograms([only])
    assert sum(histogram["counts"]) == 10 * only.result["over_budget_images_per_class"]
    for name in ("over_budget.png", "condensed.png"):
        content = base64.b64encode((tmp_path / "runs" / only.run_id / name).read_bytes()).decode()
        assert f"data:image/png;base64,{content}" in page


# What it says


def test_a_page_is_a_function_of_its_folders(tmp_path):
    folder = a_sweep(tmp_path)
    assert render(collect(folder)) == render(collect(folder))


def test_a_page_asks_for_nothing_outside_of_it_and_runs_no_script_but_its_own(tmp_path):
    page = render(collect(a_sweep(tmp_path)))
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(links) > 10 and {link[0] for link in links if not link.startswith("data:")} == {"#"}
    assert "default-src 'none'" in page
    assert page.count("<script") == page.count("</script") == 2
    assert "url(" not in page and "@import" not in page


def test_what_runs_are_called_is_text(tmp_path):
    page = render(collect(a_sweep(tmp_path)))
    assert "<script>window" not in page and "<img src=x" not in page
    assert "&lt;img src=x onerror=&#34;window.hit=2&#34;&gt;&amp;amp;" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in data
    assert HOSTILE in json.loads(data)[3]["name"]


def test_the_summary_adds_up_and_warns_of_mixtures(tmp_path):
    write_run(tmp_path / "a", result("a", [0.5]))
    page = render(collect(tmp_path))
    assert "Mixed" not in page and "Uncommitted" not in page
    write_run(tmp_path / "b", result("b", [0.5], code="ba9876543210", dirty=True, device="GPU"))
    old = result("c", [0.5])
    del old["code"]  # as in results from before the field existed
    write_run(tmp_path / "c", old)
    found = report.summary(collect(tmp_path).runs)
    assert found["counts"] == [("done", 3)]
    assert (found["seconds"], found["stages"]) == (270.0, [("condense", 180.0), ("evaluate", 90.0)])
    assert found["codes"] == [("0123456789ab", 1), ("ba9876543210", 1), ("commit c0ffeec0ffee", 1)]
    page = render(collect(tmp_path))
    for words in ("Mixed code versions", "3 versions", "Uncommitted changes", "Mixed devices"):
        assert words in page


def test_accuracies_lie_between_the_lowest_and_the_highest_end_of_all(tmp_path):
    write_run(tmp_path / "a", result("a", [0.2]))
    write_run(tmp_path / "b", result("b", [0.5], accuracy=result("b", [0.5])["accuracy"] | {"std": 0.1}))
    assert [row["place"] for row in report.rows(collect(tmp_path).runs)] == [
        {"left": 4.0, "mean": 4.0, "right": 4.0},
        {"left": 40.0, "mean": 58.0, "right": 76.0},
    ]


def test_a_curve_that_metrics_have_lost_is_the_results(tmp_path):
    curve = [{"step": 0, "held_out_accuracy": 0.25}, {"step": 9, "held_out_accuracy": 0.5}]
    write_run(tmp_path / "a", result("a", [0.5], curve=curve))
    (only,) = collect(tmp_path).runs
    assert report.curves_of(only) == {"accuracy": [[0, 25.0], [9, 50.0]], "loss": [], "pruned": None}


def test_what_pruning_dropped_is_said_in_words(tmp_path):
    write_run(tmp_path / "a", result("a", [0.5]))
    write_run(tmp_path / "b", result("b", [0.5], pruning={"over_budget": 0.0, "cut_per_class": 0}))
    words = [report.pruning_of(run) for run in collect(tmp_path).runs]
    assert words == ["dropped of each class: 3 hardest, 7 easiest (β = 0.3)", "nothing dropped"]


def test_what_was_measured_without_the_easiest_images_is_listed(tmp_path):
    rows = [{"dropped": 0.1, "mean": 0.5, "std": 0.01}, {"dropped": 0.3, "mean": 0.25, "std": None}]
    write_run(tmp_path / "a", result("a", [0.5], mode="redundancy", rows=rows))
    (only,) = collect(tmp_path).runs
    told = dict(report.provenance(only))["Without its easiest"]
    assert told == "10% of each class: 50.00 ± 1.00 %; 30% of each class: 25.00 %"


def test_histograms_of_one_kind_share_an_axis(tmp_path):
    for name, edges in (("a", [-1.0, 0.0, 1.0]), ("b", [0.0, 2.0, 4.0])):
        write_run(tmp_path / name, result(name, [0.5]))
        record = {"prune/step": 0, "prune/aum": {"counts": [2, 1], "edges": edges, "nonfinite": 0}}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    first, second = report.histograms(collect(tmp_path).runs)
    assert (first["low"], first["high"]) == (second["low"], second["high"]) == (-1.0, 4.0)
    assert first["bars"] == "M0.0 60V2.0H40.0V60ZM40.0 60V31.0H80.0V60Z"
    assert second["bars"] == "M40.0 60V2.0H120.0V60ZM120.0 60V31.0H200.0V60Z"
    assert first["zero"] == pytest.approx(0.2)


@given(count=st.integers(0, 1000), most=st.integers(2, 50))
def test_thinned_curves_keep_their_ends_and_order(count, most):
    kept = thinned([(step, float(step)) for step in range(count)], most)
    steps = [x for x, _ in kept]
    assert steps == sorted(set(steps)) and len(steps) <= most + 1
    assert steps[:1] + steps[-1:] == ([0, count - 1] if count else [])
    assert count > most or len(steps) == count


def test_a_loss_that_was_not_finite_stays_a_gap():
    assert thinned([(1, 1.23456789), (2, None), (3, 2.0)]) == [[1, 1.2346], [2, None], [3, 2.0]]


def test_numbers_are_written_for_people():
    seconds = [duration(value) for value in (4.51, 59.6, 3000, 7200)]
    assert seconds == ["4.5 s", "60 s", "50 min", "2.0 h"]
    assert [size(2**30), size(5 * 2**20)] == ["1.00 GiB", "5 MiB"]
    texts = ("36", "36-40", "1e+30", "0.02", "conv3", "", None)
    assert [leading_number(text) for text in texts] == [36, 36, 1e30, 0.02, None, None, None]


# Pictures


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_a_picture_that_fits_is_embedded_byte_for_byte(tmp_path):
    noise(16).save(tmp_path / "a.png")
    found = embed(tmp_path / "a.png", 10_000)
    assert base64.b64decode(found.uri.partition("base64,")[2]) == (tmp_path / "a.png").read_bytes()
    assert (found.width, found.height, found.lossy) == (16, 16, False)


def test_a_picture_that_does_not_fit_loses_nothing_before_it_loses_something(tmp_path):
    Image.fromarray(np.asarray(noise(32)).repeat(8, 0).repeat(8, 1)).save(tmp_path / "a.png", compress_level=0)
    found = embed(tmp_path / "a.png", 190_000)
    assert found.uri.startswith("data:image/webp") and not found.lossy and len(found.uri) <= 190_000
    assert (decoded(found.uri) == np.asarray(Image.open(tmp_path / "a.png"))).all()


def test_a_large_picture_is_made_to_fit_and_shown_at_its_own_size(tmp_path):
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    smooth = np.broadcast_to(ramp[:, None, None], (512, 512, 3))
    Image.fromarray(np.clip(smooth * 0.8 + np.asarray(noise(512)) * 0.2, 0, 255).astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    for allowed in (60_000, 6_000):
        found = embed(tmp_path / "a.png", allowed)
        assert found.lossy and len(found.uri) <= allowed + 30
        assert (found.width, found.height) == (512, 512)
        shown = Image.fromarray(decoded(found.uri)).resize((512, 512))
        assert np.abs(np.asarray(shown).astype(float) - smooth * 0.8 - 25).mean() < 12


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ArtifactError, match=r"a\.png: not a picture"):
        embed(tmp_path / "a.png", 1000)


def test_pictures_share_what_the_page_has_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURE_CHARACTERS", 120_000)
    for name in "abcd":
        write_run(tmp_path / name, result(name, [0.5]))
        for number, picture in enumerate(("over_budget.png", "condensed.png")):
            noise(256, number).save(tmp_path / name / picture)
    page = render(collect(tmp_path))
    pictures = re.findall(r"data:image/\w+;base64,[\w+/=]+", page)
    assert len(pictures) == 8 and sum(map(len, pictures)) < 125_000
    assert "Pictures on this page are compressed" in page


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
FLAGS += ("disable-component-update", "disable-sync", "hide-scrollbars")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with chromedriver: on Debian, apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: it comes with the extra dev")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    folder = a_sweep(tmp_path_factory.mktemp("browser"))
    report.main([str(folder)])
    return (folder / "report.html").as_uri()


@pytest.fixture
def browser(chromium, address):
    """A desktop-sized window with the page of ``a_sweep``, freshly loaded; any console message fails the test."""
    resize(chromium, 1280)
    chromium.get("about:blank")
    chromium.get(address)
    yield chromium
    assert chromium.get_log("browser") == []


def resize(browser, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def texts(browser, selector: str) -> list[str]:
    """Texts of the visible elements that match ``selector``."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => e.innerText)"
    )
    return browser.execute_script(script, selector)


def click(browser, selector: str) -> None:
    browser.find_element("css selector", selector).click()


def accuracies(browser) -> list[str]:
    return [text.split()[0] for text in texts(browser, "tbody td[data-key=accuracy]")]


def test_the_page_renders(browser):
    assert browser.title == f"Sweep {HOSTILE}"
    assert len(texts(browser, "tbody.run")) == 5
    assert texts(browser, ".counts li") == ["3 done", "1 failed", "1 waiting"]
    assert texts(browser, "#shown") == ["5 runs"]
    assert accuracies(browser) == ["9.50", "9.25", "80.50", "–", "–"]


def test_a_click_on_a_header_sorts_numbers_as_numbers_and_another_turns_it_round(browser):
    button, state = "th[data-key=accuracy] button", "th[data-key=accuracy]"
    for direction, expected in (("descending", ["80.50", "9.50", "9.25"]), ("ascending", ["9.25", "9.50", "80.50"])):
        click(browser, button)
        assert accuracies(browser) == [*expected, "–", "–"]  # runs without a value come last either way
        assert browser.find_element("css selector", state).get_attribute("aria-sort") == direction


def test_words_are_sorted_as_people_do(browser):
    axis = "[data-key=axis1]"
    click(browser, f"th{axis} button")
    assert texts(browser, f"td{axis}") == ["ipc1", "ipc1", "ipc2", "ipc10", "ipc10"]
    click(browser, f"th{axis} button")
    assert texts(browser, f"td{axis}") == ["ipc10", "ipc10", "ipc2", "ipc1", "ipc1"]


def test_the_filter_holds_for_the_whole_page(browser):
    from selenium.webdriver import Keys

    box = browser.find_element("css selector", "#filter")
    box.send_keys("IPC10 hm")
    assert (texts(browser, "td[data-key=axis0]"), texts(browser, "#shown")) == (["HMN"], ["1 of 5 runs"])
    assert len(texts(browser, ".gallery")) == len(texts(browser, ".histogram")) == 1
    assert len(texts(browser, "details.provenance")) == len(texts(browser, "#legend button")) == 1
    box.send_keys(" nothing such")
    assert texts(browser, "#none") == ["No run matches."]
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.BACKSPACE)
    assert len(texts(browser, "tbody.run")) == 5


def test_runs_are_filtered_by_status(browser):
    click(browser, "#status option[value=failed]")
    assert [text.partition(" ")[0] for text in texts(browser, "tr.error p")] == ["ConfigError:"]
    assert len(texts(browser, "tbody.run")) == 1


def lines(browser, chart: str) -> int:
    return len(browser.find_elements("css selector", f"#chart-{chart} .line"))


def test_curves_are_drawn_for_the_runs_that_are_ticked(browser):
    assert (lines(browser, "accuracy"), lines(browser, "loss")) == (2, 2)
    assert len(browser.find_elements("css selector", "#chart-accuracy .square")) == 2  # after pruning
    points = browser.find_element("css selector", "#chart-loss .line").get_attribute("d")
    assert points.count("L") == 11 and "NaN" not in points
    click(browser, "tbody[data-index='0'] .pick")
    assert (lines(browser, "accuracy"), lines(browser, "loss")) == (1, 1)
    assert len(browser.find_elements("css selector", "#chart-loss .context")) == 1
    click(browser, "#legend button")
    assert lines(browser, "loss") == 0
    click(browser, "#pick-shown")
    assert lines(browser, "loss") == 2
    click(browser, "#pick-none")
    assert lines(browser, "loss") == 0 and len(browser.find_elements("css selector", "#chart-loss .context")) == 2


def test_a_point_tells_its_run_step_and_value(browser):
    script = """
    const mark = document.querySelector("#chart-accuracy circle.mark"), box = mark.getBoundingClientRect();
    mark.ownerSVGElement.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x + 4, clientY: box.y + 4}));
    """
    browser.execute_script(script)
    assert texts(browser, "#tip") == ["HMN · ipc10 — step 0: 25 %"]
    browser.execute_script('document.querySelector("#chart-accuracy svg").dispatchEvent(new Event("pointerleave"))')
    assert texts(browser, "#tip") == []


def test_pictures_of_before_and_after_pruning_are_shown(browser):
    script = "return [...document.querySelectorAll('.gallery[open] img')].map(e => [e.complete, e.naturalWidth])"
    browser.execute_script("document.querySelectorAll('.gallery img').forEach(e => { e.loading = 'eager' })")
    assert browser.execute_script(script) == [[True, 64]] * 4


def test_a_link_opens_the_provenance_of_its_run(browser):
    click(browser, "tbody[data-index='2'] a")
    (opened,) = texts(browser, "details.provenance[open]")
    for words in ("IDC/ipc1", "d-aaaa0003", "f" * 64, "python run.py seed=2", "torch 2.13.0", "80.00, 81.00"):
        assert words in opened


def test_hostile_names_are_shown_to_the_letter(browser):
    assert browser.execute_script("return window.hit ?? null") is None
    assert texts(browser, "tr.error p") == [f"ConfigError: {HOSTILE}"]
    assert texts(browser, "tr.error code") == [f"python run.py 'name={HOSTILE}'"]
    assert texts(browser, "tbody[data-index='3'] td[data-key=axis0]") == [HOSTILE]


@pytest.mark.parametrize("width", [360, 800])
def test_nothing_is_wider_than_the_screen(browser, width):
    resize(browser, width)
    browser.refresh()
    browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert browser.execute_script("return document.scrollingElement.scrollWidth") == width
    click(browser, "#status option[value=done]")
    assert browser.execute_script("return document.scrollingElement.scrollWidth") == width


def test_a_phone_sorts_by_a_menu(browser):
    resize(browser, 360)
    assert texts(browser, "thead button") == []
    click(browser, "#sort option[value='accuracy descending']")
    assert [text.splitlines()[-1].split()[0] for text in texts(browser, "td[data-key=accuracy]")][:3] == [
        "80.50",
        "9.50",
        "9.25",
    ]
