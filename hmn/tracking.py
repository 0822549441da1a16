"""The record of one run: ``metrics.jsonl`` is the truth, W&B mirrors it.

Every record carries its own step, such as ``condense/step``, and W&B is told which step each metric belongs to. W&B's
global step is never set: it can only grow, while a resumed run computes its last steps again.

A run that ``wandb agent`` starts records into the agent's own W&B run, whose id is in the environment, because W&B's
sweep looks for its metric nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hmn import distributed
from hmn.config import TrackingConfig
from hmn.config.sweeps import FINISH_TIMEOUT
from hmn.errors import ArtifactError, HmnError, Interrupted
from hmn.files import write_text

if TYPE_CHECKING:
    import wandb

METRICS_FILE = "metrics.jsonl"
LEFT_OPEN = "wandb-open"  # file in the run's folder while it is online; a kill leaves it there
ARTIFACT_TYPE = "condensed-set"
AGENT_SWEEP = "WANDB_SWEEP_ID"  # set by `wandb agent`, beside the WANDB_RUN_ID of the W&B run that it made
HISTOGRAM_BINS = 64
INIT_TIMEOUT_SECONDS = 30.0  # an online run continues offline if W&B has not answered by then
FINISH_TIMEOUT_SECONDS = 600.0  # what is not uploaded by then stays on disk for `wandb sync`
SUMMARIES = {  # for metrics whose last value is not what runs are compared by
    "condense/peak_bytes": "max",
    "curve/held_out_accuracy": "last,max",
}

Scalar = float | int | str | Tensor | np.generic


def start(
    config: TrackingConfig,
    *,
    run_id: str,
    run_dir: Path,
    run_config: Mapping[str, Any],
    job_type: str,
) -> Tracker:
    """Begin, or continue, the record of the run in ``run_dir``; use it in a ``with`` statement.

    ``run_id`` is also the W&B id, except under an agent. The W&B config holds ``run_config`` (plain nested values),
    ``run_id`` and ``label``. With several processes, only the first records anything. An online run that cannot reach
    W&B continues offline and prints a line about it. Raises :class:`HmnError` if W&B cannot even start offline, and
    :class:`ArtifactError` if ``metrics.jsonl`` is damaged.
    """
    if not distributed.first():
        return Tracker(None)
    run_dir = run_dir.resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run_dir)
    if config.mode != "disabled":
        tracker.mirror = _start_wandb(
            config.mode,
            dir=run_dir,
            id=run_id,  # under an agent W&B takes id, project and entity from the environment instead
            name=run_id,
            resume="allow",
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type=job_type,
            config=_wandb_config({"run_id": run_id, "label": config.labels, **run_config}),
            reinit="create_new",  # never the handle of another run that this process left open
        )
        if not tracker.mirror.offline:
            (run_dir / LEFT_OPEN).touch()
    return tracker


def left_open(run_dir: Path) -> bool:
    """Whether W&B was not told that the run in ``run_dir`` ended; it shows such a run as crashed."""
    return (run_dir / LEFT_OPEN).exists()


def of_agent() -> bool:
    """Whether ``wandb agent`` started this process."""
    return bool(os.environ.get(AGENT_SWEEP))


class Tracker:
    """Writes one run's record, or none without ``run_dir``; a failing W&B mirror is reported once and stops nothing.

    ``step_key`` names the counter that ``step`` belongs to, such as ``condense/step``; each metric uses only one.
    Leaving the ``with`` block ends the W&B run with the exit code of the exception that left it, 0 without one.
    """

    def __init__(self, run_dir: Path | None, mirror: wandb.Run | None = None) -> None:
        self.mirror = mirror
        self._path = run_dir and run_dir / METRICS_FILE
        self._sync_command = f"wandb sync --include-online {shlex.quote(str(run_dir and run_dir / 'wandb'))}"
        self._defined: set[str] = set()  # metrics whose step W&B knows
        self._mirror_failed = False
        self._rewrite(lambda record: True)

    def log(self, metrics: Mapping[str, Scalar], *, step_key: str, step: int) -> None:
        """Record numbers (0-d tensors too) or strings; a number that is not finite is ``null`` in ``metrics.jsonl``."""
        values = {name: plain(value) for name, value in metrics.items()}
        self._append({step_key: step, **{name: _finite(value) for name, value in values.items()}})
        self._mirror_values(lambda: values, step_key, step)

    def log_image(self, name: str, image: Image.Image, *, step_key: str, step: int) -> None:
        """Send an image to W&B; nothing is kept locally."""

        def values() -> dict[str, Any]:
            import wandb

            return {name: wandb.Image(image)}

        self._mirror_values(values, step_key, step)

    def log_histogram(self, name: str, values: Sequence[float] | Tensor, *, step_key: str, step: int) -> None:
        """Record the histogram of the finite ``values`` (any shape) and how many were not finite."""
        counts, edges, nonfinite = histogram(values)
        self._append({step_key: step, name: {"counts": counts, "edges": edges, "nonfinite": nonfinite}})

        def mirrored() -> dict[str, Any]:
            import wandb

            return {name: wandb.Histogram(np_histogram=(counts, edges))}

        self._mirror_values(mirrored, step_key, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Send a table to W&B; a column may mix numbers, strings and ``None``."""
        cells = [[plain(cell) for cell in row] for row in rows]

        def send(run: wandb.Run) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=cells, allow_mixed_types=True)})

        self._mirrored(send)

    def log_artifact(self, name: str, folder_files: Sequence[Path], metadata: Mapping[str, Any]) -> None:
        """Send files to W&B as one artifact of type ``condensed-set``. The files must stay in place and unchanged."""

        def send(run: wandb.Run) -> None:
            import wandb

            artifact = wandb.Artifact(name, type=ARTIFACT_TYPE, metadata=dict(metadata))
            for file in folder_files:  # immutable: the run folder keeps them, so no second copy is staged
                artifact.add_file(str(file.resolve()), name=file.name, policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

        self._mirrored(send)

    def summary(self, values: Mapping[str, Scalar | None]) -> None:
        """Set the W&B summary, the one row that W&B's run tables show; ``None`` is left out."""
        shown = {name: plain(value) for name, value in values.items() if value is not None}
        self._mirrored(lambda run: run.log(shown))  # in the history too: W&B's sweeps look for their metric there

    def rewind(self, step_key: str, step: int) -> None:
        """Drop the local records of ``step_key`` beyond ``step``: a resumed run computes those steps again.

        Atomic: a kill leaves the old file or the new one. W&B keeps both computations of a step.
        """
        self._rewrite(lambda record: record.get(step_key, step) <= step)

    def close(self, exit_code: int = 0) -> None:
        """End the W&B run. Waits for the upload, as long as :func:`_settings` allows."""
        if self._mirrored(lambda run: run.finish(exit_code=exit_code)) and self._path is not None:
            self._path.with_name(LEFT_OPEN).unlink(missing_ok=True)
        self.mirror = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Interrupted) and self.mirror is not None and not self.mirror.offline:
            limit = _settings("online").finish_timeout
            print(
                f"the run's state is kept; W&B may take up to {limit:.0f} s to upload its last records", file=sys.stderr
            )
        self.close(exit_code_of(error))

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:  # closed, so flushed, after every line
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def _rewrite(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the whole lines whose record ``keep`` accepts, unchanged."""
        if self._path is None:
            return
        lines = _whole_lines(self._path)
        records = _parse(lines, self._path)
        text = "".join(line + "\n" for line, record in zip(lines, records, strict=True) if keep(record))
        if self._path.exists() and text.encode() != self._path.read_bytes():
            write_text(self._path, text)

    def _mirror_values(self, values: Callable[[], Mapping[str, Any]], step_key: str, step: int) -> None:
        def send(run: wandb.Run) -> None:
            sent = values()
            self._define(run, step_key, sent)
            run.log({step_key: step, **sent})

        self._mirrored(send)

    def _define(self, run: wandb.Run, step_key: str, names: Iterable[str]) -> None:
        """Tell W&B the step of each metric by name: a ``condense/*`` rule would tie the two to one prefix."""
        new = [name for name in names if name not in self._defined]
        if new and step_key not in self._defined:
            run.define_metric(step_key, hidden=True)
            self._defined.add(step_key)
        for name in new:
            run.define_metric(name, step_metric=step_key, summary=SUMMARIES.get(name))
            self._defined.add(name)

    def _mirrored(self, send: Callable[[wandb.Run], object]) -> bool:
        """Send something to the W&B mirror; returns whether there is one and it took what was sent."""
        if self.mirror is None:
            return False
        try:
            send(self.mirror)
            return True
        except Exception as error:  # W&B's service killed, disk full, server gone: days of work must survive that
            if not self._mirror_failed:
                print(f"W&B: {_one_line(error)}; {self._path} is complete, upload the rest with: {self._sync_command}")
            self._mirror_failed = True
            return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl``, oldest first; none if there is no file.

    A last line that was cut short is left out. Numbers that were not finite are ``None``. Raises
    :class:`ArtifactError` naming a damaged line.
    """
    return _parse(_whole_lines(path), path)


def exit_code_of(error: BaseException | None) -> int:
    """The exit code of a process that ``error`` ends; 0 for ``None``."""
    if error is None:
        return 0
    if isinstance(error, HmnError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def plain(value: Any) -> Any:
    """The Python number in a 0-d tensor or NumPy scalar; anything else as it is."""
    return value.item() if isinstance(value, Tensor | np.generic) else value


def histogram(values: Sequence[float] | Tensor) -> tuple[list[int], list[float], int]:
    """Counts of the finite values in equal bins from least to greatest, the bin edges, and the non-finite count."""
    numbers = torch.as_tensor(values, dtype=torch.float64).detach().flatten().cpu().numpy()
    finite = numbers[np.isfinite(numbers)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    # The edges are passed because NumPy, given a number of bins, refuses values that differ only by rounding.
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)
    counts, _ = np.histogram(finite, edges)
    return counts.tolist(), edges.tolist(), numbers.size - finite.size


def _wandb_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as it is, or with dotted keys under an agent, whose ``container=hmn`` would replace the section."""
    return _dotted(config, "") if of_agent() else dict(config)


def _dotted(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _start_wandb(mode: str, **options: Any) -> wandb.Run:
    """Start a W&B run in ``mode``, whatever ``WANDB_MODE`` says; offline, with a line, where online is not possible."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's telemetry would call its server even offline
    import wandb

    reason = f"tracking.mode={mode}"
    if mode != "offline":
        try:
            _log_in()
            run = wandb.init(mode="online", settings=_settings("online"), **options)
            print(f"W&B: {run.url}")
            return run
        except Exception as error:  # not only wandb.Error: its service answers some failures with plain exceptions
            reason = _one_line(error)
            with contextlib.suppress(Exception):  # a service that is gone
                wandb.teardown()  # the service still holds the id of the run that did not start
    try:
        run = wandb.init(mode="offline", settings=_settings("offline"), **options)
    except Exception as error:
        advice = "fix that, or set tracking.mode=disabled to keep only the local files"
        raise HmnError(f"W&B did not start ({_one_line(error)}): {advice}") from error
    folder = shlex.quote(str(options["dir"] / "wandb"))
    print(f"W&B: logging offline ({reason}), upload with: wandb sync {folder}")
    return run


def _settings(mode: str) -> wandb.Settings:
    import wandb

    return wandb.Settings(
        mode=mode,
        silent=True,
        quiet=True,
        console="off",  # progress bars would make up most of a captured console
        disable_git=True,  # else it stores the uncommitted changes
        disable_code=True,
        save_code=False,
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=float(os.environ.get(FINISH_TIMEOUT, FINISH_TIMEOUT_SECONDS)),
        finish_timeout_raises=True,
    )


def _log_in() -> None:
    """Log in with the credentials in W&B's environment variables, netrc or settings file, without prompting.

    Raises ``wandb.Error`` if there are none or they are malformed. Only the server knows whether they are valid.
    """
    import wandb

    wandb.setup(_settings("online"))  # login reads the process's settings, and WANDB_MODE=offline would refuse it
    if not wandb.login(prompt=False, verify=False):
        raise wandb.errors.UsageError("no W&B login found; run `wandb login` to make one")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file without the last one if it was cut short, or no lines without the file."""
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def _parse(lines: Sequence[str], path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ArtifactError(f"{path}:{number}: not a JSON record; remove that line") from error
    return records


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
