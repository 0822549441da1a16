"""The local record (``metrics.jsonl``), its W&B mirror as W&B itself writes it offline, and what breaks neither."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from hmn import tracking
from hmn.config import TrackingConfig
from hmn.errors import ArtifactError, ConfigError, HmnError, Interrupted
from hmn.tracking import Tracker, exit_code_of, histogram, left_open, read_metrics
from tests.wandb_reader import read_offline_run, without_login

KEY = "0123456789" * 4  # well-formed, so W&B takes it for a login without asking its server
STEP = "condense/step"


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path_factory):
    without_login(monkeypatch, tmp_path_factory.mktemp("home"))
    yield
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()


def start(run_dir: Path, mode: str = "offline", run_id: str = "run-1", **config) -> Tracker:
    given = {"run_config": {"seed": 3, "memory": {"images_per_class": 10}}, "job_type": "run"}
    config = TrackingConfig(mode=mode, **{"group": "sweep-1"} | config)
    return tracking.start(config, run_id=run_id, run_dir=run_dir, **given)


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


# The local record


def test_each_call_is_one_json_line_on_disk_at_once(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log({"condense/loss": 0.5, "condense/note": "warm"}, step_key=STEP, step=10)
    assert lines(tmp_path) == ['{"condense/step": 10, "condense/loss": 0.5, "condense/note": "warm"}']
    tracker.log({"evaluate/accuracy": 0.25}, step_key="evaluate/network", step=0)
    assert lines(tmp_path)[1:] == ['{"evaluate/network": 0, "evaluate/accuracy": 0.25}']
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {STEP: 10, "condense/loss": 0.5, "condense/note": "warm"}


def test_tensor_and_numpy_scalars_become_numbers_and_what_is_not_finite_null(tmp_path):
    given = {"tensor": torch.tensor(1.5, requires_grad=True), "integer": torch.tensor(7), "numpy": np.float32(0.25)}
    given |= {"nan": math.nan, "infinite": torch.tensor(-math.inf), "numpy_nan": np.float32("nan")}
    Tracker(tmp_path).log(given, step_key=STEP, step=0)
    record = json.loads(lines(tmp_path)[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    expected = {STEP: 0, "tensor": 1.5, "integer": 7, "numpy": 0.25}
    assert record == expected | dict.fromkeys(["nan", "infinite", "numpy_nan"])
    assert isinstance(record["integer"], int)


def test_a_line_cut_short_by_a_kill_is_dropped_before_the_next_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"condense/step": 1, "x": 1}\n{"condense/step": 2, "x')
    assert read_metrics(path) == [{STEP: 1, "x": 1}]
    Tracker(tmp_path).log({"x": 2}, step_key=STEP, step=2)
    assert read_metrics(path) == [{STEP: 1, "x": 1}, {STEP: 2, "x": 2}]


def test_no_file_has_no_records_and_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl:2: .*remove that line"):
        read_metrics(path)


def test_rewind_drops_later_steps_of_its_key_only_and_keeps_the_rest_byte_for_byte(tmp_path):
    kept = ['{"condense/step":  10,"x":1e0}', '{"evaluate/epoch": 99, "y": 2}', '{"condense/step": 20, "x": 2}']
    gone = ['{"condense/step": 21, "x": 3}', '{"condense/step": 30, "x": 3}']
    tracker = Tracker(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([kept[0], gone[0], kept[1], kept[2], gone[1], '{"condense/st']))
    tracker.rewind(STEP, 20)
    assert path.read_text() == "".join(line + "\n" for line in kept)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    tracker.log({"x": 4}, step_key=STEP, step=21)
    assert lines(tmp_path) == [*kept, '{"condense/step": 21, "x": 4}']


def test_rewind_that_fails_leaves_the_record_as_it_was(tmp_path, monkeypatch):
    tracker = Tracker(tmp_path)
    for step in (1, 2):
        tracker.log({"x": step}, step_key=STEP, step=step)
    before = lines(tmp_path)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        tracker.rewind(STEP, 1)
    assert lines(tmp_path) == before


def test_rewind_before_anything_was_logged_makes_no_file(tmp_path):
    Tracker(tmp_path).rewind(STEP, 0)
    assert list(tmp_path.iterdir()) == []


def test_histogram_by_hand():
    counts, edges, nonfinite = histogram([0.0, 0.5, 1.5, 63.9, 64.0, math.nan, math.inf])
    assert edges == [float(edge) for edge in range(65)]
    assert (counts[0], counts[1], counts[63], sum(counts), nonfinite) == (2, 1, 2, 5, 2)


@pytest.mark.parametrize("values", [[], [2.0] * 5, [1.0, math.nextafter(1.0, 2)], torch.rand(6, 7, requires_grad=True)])
def test_histogram_counts_every_value_whatever_their_range(values):
    counts, edges, nonfinite = histogram(values)
    assert (len(counts), len(edges), nonfinite) == (64, 65, 0)
    assert sum(counts) == torch.as_tensor(values).numel()
    assert all(low <= high for low, high in zip(edges, edges[1:], strict=False))


def test_histogram_is_recorded_as_counts_and_edges(tmp_path):
    Tracker(tmp_path).log_histogram("prune/aum", torch.tensor([[0.0, 64.0], [1.0, math.nan]]), step_key=STEP, step=5)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record[STEP] == 5
    assert record["prune/aum"]["edges"] == list(range(65))
    assert [bin for bin, count in enumerate(record["prune/aum"]["counts"]) if count] == [0, 1, 63]
    assert record["prune/aum"]["nonfinite"] == 1


# The exit code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ConfigError("seed=-1"), 2),
        (HmnError("no"), 1),
        (Interrupted("stopped", 15), 143),
        (SystemExit(), 0),
        (SystemExit(7), 7),
        (SystemExit("message"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("bug"), 1),
    ],
)
def test_exit_code_is_the_process_s(error, code):
    assert exit_code_of(error) == code


# The mirror


def test_disabled_never_imports_wandb_and_still_records(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    with start(tmp_path / "new" / "run", mode="disabled") as tracker:
        log_everything(tracker, tmp_path)
        tracker.rewind(STEP, 150)
    assert [record[STEP] for record in read_metrics(tmp_path / "new" / "run" / "metrics.jsonl")] == list(range(151))


def log_everything(tracker: Tracker, folder: Path) -> Path:
    file = folder / "condensed.safetensors"
    file.write_bytes(b"condensed" * 100)
    for step in range(200):  # more than one 32 KiB block of W&B's file
        tracker.log({"condense/loss": torch.tensor(step / 4), "images_per_second": 8}, step_key=STEP, step=step)
    tracker.log({"condense/loss": math.nan}, step_key=STEP, step=200)
    tracker.log_image("condense/images", Image.new("RGB", (6, 4)), step_key=STEP, step=200)
    tracker.log_histogram("prune/aum", [0.0, 1.0, 64.0], step_key=STEP, step=200)
    tracker.log_table("result", ["network", "accuracy", "note"], [[0, np.float64(0.5), None], ["mean", 0.75, 2]])
    tracker.log_artifact("condensed-run-1", [file], metadata={"budget_floats": 640})
    tracker.summary({"accuracy_mean": torch.tensor(0.625)})
    return file


def test_an_offline_run_holds_everything_that_was_logged(tmp_path, capsys):
    run_dir = tmp_path / "run dir"
    with start(run_dir) as tracker:
        file = log_everything(tracker, tmp_path)
    run = read_offline_run(run_dir)

    names = {"id": "run-1", "name": "run-1", "project": "hmn", "group": "sweep-1", "job_type": "run"}
    assert run["run"] == names | {"resume": True, "sweep": ""}
    assert run["exit_code"] == 0
    assert run["config"]["seed"] == 3
    assert run["config"]["memory"] == {"images_per_class": 10}
    history = run["history"]
    assert [(row[STEP], row["condense/loss"], row["images_per_second"]) for row in history[:200]] == [
        (step, step / 4, 8) for step in range(200)
    ]
    assert math.isnan(history[200]["condense/loss"])
    steps = {"condense/loss", "images_per_second", "condense/images", "prune/aum"}
    assert {name: run["metrics"][name] for name in steps} == dict.fromkeys(steps, STEP)
    assert STEP in run["metrics"]
    assert run["summary"]["accuracy_mean"] == 0.625

    image = next(row for row in history if "condense/images" in row)
    assert image[STEP] == 200
    assert image["condense/images"]["path"] in run["files"]
    assert Image.open(run["files_dir"] / image["condense/images"]["path"]).size == (6, 4)
    aum = next(row["prune/aum"] for row in history if "prune/aum" in row)
    assert (aum["_type"], aum["bins"], sum(aum["values"])) == ("histogram", list(range(65)), 3)
    table = next(row["result"] for row in history if "result" in row)
    stored = json.loads((run["files_dir"] / table["path"]).read_text())
    assert stored["columns"] == ["network", "accuracy", "note"]
    assert stored["data"] == [[0, 0.5, None], ["mean", 0.75, 2]]

    (artifact,) = [artifact for artifact in run["artifacts"] if artifact["type"] == "condensed-set"]
    assert (artifact["name"], artifact["metadata"]) == ("condensed-run-1", {"budget_floats": 640})
    entry = artifact["files"]["condensed.safetensors"]
    assert base64.b64decode(entry["digest"]) == hashlib.md5(file.read_bytes()).digest()
    assert (entry["size"], Path(entry["local_path"])) == (900, file)  # the file itself, not a copy elsewhere

    printed = capsys.readouterr()
    assert printed.err == ""
    (line,) = printed.out.splitlines()
    assert shlex.split(line)[-3:] == ["wandb", "sync", str(run_dir / "wandb")]
    assert {path.name for path in run_dir.iterdir()} == {"metrics.jsonl", "wandb"}


def test_a_run_of_a_sweep_shows_its_labels_and_numbers_as_columns(tmp_path):
    labels = {"method": "HMN", "ipc": "10"}
    with start(tmp_path, group="main_table-1", labels=labels) as tracker:
        for step, (accuracy, memory) in enumerate([(0.5, 7), (0.75, 9), (0.25, 8)]):
            values = {"curve/held_out_accuracy": accuracy, "condense/peak_bytes": memory}
            tracker.log(values, step_key=STEP, step=step)
        tracker.summary({"accuracy_mean": torch.tensor(0.625), "accuracy_std": None, "images_per_class": "9-10"})
    run = read_offline_run(tmp_path)
    assert (run["run"]["group"], run["run"]["sweep"]) == ("main_table-1", "")
    assert (run["config"]["run_id"], run["config"]["label"]) == ("run-1", labels)
    assert run["kept"] == {"curve/held_out_accuracy": ["max", "last"], "condense/peak_bytes": ["max"]}
    assert {key: run["summary"][key] for key in run["kept"]} == {
        "curve/held_out_accuracy": {"last": 0.25, "max": 0.75},
        "condense/peak_bytes": {"max": 9},
    }
    shown = {"accuracy_mean": 0.625, "images_per_class": "9-10"}
    assert {key: value for key, value in run["summary"].items() if key in shown} == shown
    assert "accuracy_std" not in run["summary"]
    assert shown.items() <= run["history"][-1].items()  # where W&B's sweeps look for their metric


def test_under_an_agent_the_run_is_the_agent_s_and_keeps_its_whole_configuration(tmp_path, monkeypatch, capfd):
    given = tmp_path / "given.yaml"  # the agent writes the values that it chose into this file
    given.write_text("wandb_version: 1\nmemory: {value: ipc10}\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep-of-agent")
    monkeypatch.setenv("WANDB_RUN_ID", "made-by-agent")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(given))
    monkeypatch.setenv("WANDB_PROJECT", "of-agent")
    with start(tmp_path, labels={"ipc": "10"}) as tracker:
        tracker.summary({"held_out_accuracy": 0.5})
    run = read_offline_run(tmp_path)
    names = {"id": "made-by-agent", "name": "run-1", "project": "of-agent", "sweep": "sweep-of-agent"}
    assert names.items() <= run["run"].items()
    config = {"run_id": "run-1", "label.ipc": "10", "seed": 3, "memory": "ipc10", "memory.images_per_class": 10}
    assert config.items() <= run["config"].items()
    assert run["summary"]["held_out_accuracy"] == run["history"][-1]["held_out_accuracy"] == 0.5
    printed = capfd.readouterr()
    assert (len(printed.out.splitlines()), printed.err) == (1, "")


@pytest.mark.parametrize("error", [ConfigError("seed=-1"), Interrupted("stopped", 15), RuntimeError("bug")])
def test_a_crash_leaves_its_exit_code_and_goes_on(tmp_path, error):
    with pytest.raises(type(error)) as raised, start(tmp_path) as tracker:
        tracker.log({"condense/loss": 1.0}, step_key=STEP, step=1)
        raise error
    assert raised.value is error
    run = read_offline_run(tmp_path)
    assert run["exit_code"] == exit_code_of(error) != 0
    assert [row[STEP] for row in run["history"]] == [1]


def test_a_resumed_run_keeps_its_id_and_logs_steps_again(tmp_path):
    with start(tmp_path) as tracker:
        for step in (10, 20, 30):
            tracker.log({"condense/loss": step}, step_key=STEP, step=step)
    with start(tmp_path, group="mine") as tracker:
        tracker.rewind(STEP, 10)
        tracker.log({"condense/loss": 0.5}, step_key=STEP, step=20)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {STEP: 10, "condense/loss": 10},
        {STEP: 20, "condense/loss": 0.5},
    ]
    parts = [read_offline_run(tmp_path, part) for part in (0, 1)]
    assert [(part["run"]["id"], part["run"]["resume"]) for part in parts] == [("run-1", True)] * 2
    assert [part["run"]["group"] for part in parts] == ["sweep-1", "mine"]
    assert [[row[STEP] for row in part["history"]] for part in parts] == [[10, 20, 30], [20]]


def test_two_runs_at_once_are_two_runs(tmp_path):
    with start(tmp_path / "a", run_id="a") as first, start(tmp_path / "b", run_id="b") as second:
        first.log({"x": 1}, step_key=STEP, step=1)
        second.log({"x": 2}, step_key=STEP, step=2)
    for name, step in (("a", 1), ("b", 2)):
        run = read_offline_run(tmp_path / name)
        assert (run["run"]["id"], [row[STEP] for row in run["history"]], run["exit_code"]) == (name, [step], 0)


def test_a_broken_mirror_is_said_once_and_stops_nothing(tmp_path, capsys):
    def lost(*_, **__):
        raise ConnectionResetError("Connection lost")

    tracker = Tracker(tmp_path, SimpleNamespace(log=lost, define_metric=lost, finish=lost, log_artifact=lost))
    with tracker:
        for step in range(3):
            tracker.log({"x": step}, step_key=STEP, step=step)
    (line,) = capsys.readouterr().out.splitlines()
    assert "Connection lost" in line
    assert f"wandb sync --include-online {tmp_path / 'wandb'}" in line
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_an_interrupt_inside_the_mirror_is_not_swallowed(tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    tracker = Tracker(tmp_path, SimpleNamespace(define_metric=interrupted))
    with pytest.raises(KeyboardInterrupt):
        tracker.log({"x": 1}, step_key=STEP, step=1)


# Which mode


@pytest.fixture
def started(monkeypatch):
    """The modes and settings that W&B is started with; no server is contacted, nor is its address looked up."""
    import wandb

    started = SimpleNamespace(modes=[], settings=[])

    def init(*, mode, settings, **_):
        started.modes.append(mode)
        started.settings.append(settings)
        return SimpleNamespace(url="http://server/run-1", finish=lambda exit_code: None, offline=mode == "offline")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    return started


def test_auto_is_offline_without_a_login(tmp_path, started, capsys):
    start(tmp_path, mode="auto").close()
    assert started.modes == ["offline"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "no W&B login" in line
    assert f"wandb sync {tmp_path / 'wandb'}" in line


@pytest.mark.parametrize(
    ("source", "overridden"), [("environment", "offline"), ("netrc", "disabled"), ("settings", "offline")]
)
def test_auto_is_online_with_a_login_whatever_wandb_mode_says(
    tmp_path, started, monkeypatch, capfd, source, overridden
):
    monkeypatch.setenv("WANDB_MODE", overridden)
    if source == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    elif source == "netrc":
        monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example")
        Path("~/.netrc").expanduser().write_text(f"machine wandb.example login user password {KEY}\n")
    else:
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
        (tmp_path / "settings").write_text(f"[default]\napi_key = {KEY}\n")
    start(tmp_path, mode="auto").close()
    assert started.modes == ["online"]
    assert capfd.readouterr() == ("W&B: http://server/run-1\n", "")


def test_that_w_and_b_has_not_heard_the_end_of_an_online_run_is_remembered(tmp_path, started, monkeypatch):
    start(tmp_path, mode="offline")
    assert not left_open(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    start(tmp_path, mode="online")  # as if killed: it is never closed
    assert left_open(tmp_path)
    tracker = start(tmp_path, mode="online")
    monkeypatch.setattr(tracker.mirror, "finish", lambda exit_code: pytest.fail("timed out"))
    with pytest.raises(pytest.fail.Exception):  # not a subclass of Exception, as for a kill
        tracker.close()
    assert left_open(tmp_path)
    start(tmp_path, mode="online").close()
    assert not left_open(tmp_path)


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_malformed_key_is_said_and_the_run_goes_on_offline(tmp_path, started, monkeypatch, capsys, mode):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    start(tmp_path, mode=mode).close()
    assert started.modes == ["offline"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "API key must have 40+ characters" in line


def test_no_wait_for_the_server_is_without_end(tmp_path, started, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    start(tmp_path, mode="online").close()
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "60")  # as a launcher whose jobs have little time does
    start(tmp_path, mode="online").close()
    for settings, seconds in zip(started.settings, (600, 60), strict=True):
        assert (settings.init_timeout, settings.finish_timeout, settings.finish_timeout_raises) == (30, seconds, True)


@pytest.mark.parametrize("chosen", [None, "true"])
def test_wandb_reports_its_errors_only_to_who_asked_for_it(tmp_path, started, monkeypatch, chosen):
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    if chosen:
        monkeypatch.setenv("WANDB_ERROR_REPORTING", chosen)
    start(tmp_path).close()
    assert os.environ["WANDB_ERROR_REPORTING"] == (chosen or "false")


def test_online_without_an_answer_goes_on_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_SECONDS", 0.5)
    with socket.socket() as closed:  # bound but not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", "disabled")
        with start(tmp_path, mode="online") as tracker:
            tracker.log({"condense/loss": 1.0}, step_key=STEP, step=1)
    run = read_offline_run(tmp_path)
    assert (run["exit_code"], run["history"][0]["condense/loss"]) == (0, 1.0)
    printed = capfd.readouterr()
    (line,) = printed.out.splitlines()
    assert "connection refused" in line
    assert f"wandb sync {tmp_path / 'wandb'}" in line
    assert printed.err == ""


def test_online_sends_history_and_exit_code_to_the_server(tmp_path, monkeypatch, capfd):
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_MODE", "offline")
        with pytest.raises(ConfigError), start(tmp_path, mode="auto") as tracker:
            for step in (1, 2, 1):
                tracker.log({"condense/loss": step / 2}, step_key=STEP, step=step)
            raise ConfigError("seed=-1")
    sent = [message["files"].get("wandb-history.jsonl", {"content": []})["content"] for message in server.streamed]
    rows = [json.loads(row) for content in sent for row in content]
    assert [(row[STEP], row["condense/loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (1, 0.5)]
    assert [message["exitcode"] for message in server.streamed if message.get("complete")] == [2]
    assert capfd.readouterr() == (f"W&B: {server.url}/me/hmn/runs/run-1\n", "")


class WandbServer(http.server.ThreadingHTTPServer):
    """The part of a W&B server that one online run needs; ``streamed`` holds the history and exit code sent to it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), WandbHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.streamed = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Print nothing: W&B's service ends without closing its connections."""

    def answer(self, query: str, variables: dict) -> dict:
        if "mutation UpsertBucket" in query:
            project = {"id": "p", "name": "hmn", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": "run", "project": project}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class WandbHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        data = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            data = self.server.answer(asked["query"], asked["variables"])
        elif self.path.endswith("/file_stream"):
            self.server.streamed.append({"files": {}} | json.loads(body))
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


def test_what_wandb_refuses_even_offline_is_one_line(tmp_path):
    with pytest.raises(HmnError, match="did not start .*Invalid project name.*tracking.mode=disabled"):
        start(tmp_path, project="a/b")


# The configuration group

GROUP = Path(__file__).parents[1] / "conf" / "tracking"


def test_there_is_one_file_for_each_mode():
    assert {path.stem for path in GROUP.glob("*.yaml")} == {"auto", "online", "offline", "disabled"}


@pytest.mark.parametrize("path", sorted(GROUP.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_file_selects_its_mode(path):
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert values.pop("defaults") == ["schema"]
    assert TrackingConfig(**values).mode == path.stem


@pytest.mark.parametrize(("offline", "told"), [(False, 1), (True, 0)])
def test_who_stops_an_online_run_is_told_that_its_state_is_kept_before_w_and_b_takes_its_time(
    tmp_path, capsys, offline, told
):
    finished = []

    def finish(exit_code: int) -> None:
        finished.append((exit_code, capsys.readouterr().err.count("state is kept; W&B may take up to 600 s to upload")))

    with pytest.raises(Interrupted), Tracker(tmp_path, SimpleNamespace(offline=offline, finish=finish)):
        raise Interrupted("stopped", signal.SIGINT)
    assert finished == [(130, told)]
