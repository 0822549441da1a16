"""Read back what W&B wrote offline: the records of a ``.wandb`` file, which ``wandb sync`` uploads."""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
FIRST_BYTES = 7  # ":W&B", a magic number and a version
FULL, FIRST, LAST = 1, 2, 4  # kinds of a record's pieces; 3 is a middle piece


def without_login(monkeypatch: Any, home: Path) -> None:
    """Keep W&B's login and settings from this process and those it starts; W&B's caches go under ``home``."""
    outside = ("NETRC", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
    for name in [name for name in os.environ if name.startswith("WANDB_") or name in outside]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    _end_service()  # it may hold the settings and login of an earlier test


def read_offline_run(run_dir: Path, part: int = -1) -> dict[str, Any]:
    """One offline start of the run in ``run_dir``, by default the last.

    ``run``: id, name, project, group, job_type, resume, sweep · ``config`` · ``history``: one dict per logged row ·
    ``summary`` · ``metrics``: metric -> its step metric · ``kept``: metric -> its chosen summaries ·
    ``artifacts``: name, type, metadata, files (path -> digest,
    size, local_path) · ``files``: paths below ``files_dir`` · ``exit_code``: ``None`` if the run never ended.
    """
    _end_service()  # it may write the last records after the run's end
    path = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))[part]
    result: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "metrics": {}, "artifacts": [], "files": []}
    result |= {"exit_code": None, "kept": {}}
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            result["run"] = {"id": run.run_id, "name": run.display_name, "project": run.project}
            result["run"] |= {"group": run.run_group, "job_type": run.job_type, "resume": run.resume}
            result["run"] |= {"sweep": run.sweep_id}
            result["config"] |= _values(run.config.update)
        elif kind == "history":
            result["history"].append(_values(record.history.item))
        elif kind == "summary":
            result["summary"] |= _values(record.summary.update)
        elif kind == "metric":
            result["metrics"][record.metric.name] = record.metric.step_metric
            if chosen := [field.name for field, on in record.metric.summary.ListFields() if on]:
                result["kept"][record.metric.name] = chosen
        elif kind == "artifact":
            result["artifacts"].append(_artifact(record.artifact))
        elif kind == "files":
            result["files"] += [file.path for file in record.files.files]
        elif kind == "exit":
            result["exit_code"] = record.exit.exit_code
    result["files_dir"] = path.parent / "files"
    return result


def _end_service() -> None:
    """End the service process that W&B keeps for this process, if there is one, and wait for it."""
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()


def _artifact(artifact: Any) -> dict[str, Any]:
    files = {
        entry.path: {"digest": entry.digest, "size": entry.size, "local_path": entry.local_path}
        for entry in artifact.manifest.contents
    }
    metadata = json.loads(artifact.metadata) if artifact.metadata else {}
    return {"name": artifact.name, "type": artifact.type, "metadata": metadata, "files": files}


def _values(items: Iterable[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        *parents, name = item.nested_key or [item.key]
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = json.loads(item.value_json)
    return values


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    for message in _messages(data):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        yield record


def _messages(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB that hold whole records or, for longer ones, their pieces in order.

    Stops at a truncated piece, which the last one of a killed run may be.
    """
    assert data[:4] == b":W&B", "not a .wandb file"
    position, message = FIRST_BYTES, b""
    while position < len(data):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < 7:  # too few for a piece's header: zeros
            position += left_in_block
            continue
        if position + 7 > len(data):
            return
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + 7 : position + 7 + length]
        if len(piece) < length:
            return
        assert checksum == zlib.crc32(piece, zlib.crc32(bytes([kind]))), f"damaged at byte {position}"
        message = piece if kind in (FULL, FIRST) else message + piece
        if kind in (FULL, LAST):
            yield message
        position += 7 + length
