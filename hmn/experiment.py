"""One run from its plan to its saved result: folder, device, tracking, and what is printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hmn import compute, distributed, machine, networks, report, results, tracking
from hmn.checkpoint import Checkpoints, clear
from hmn.config import Config
from hmn.data import datasets
from hmn.errors import ArtifactError
from hmn.files import exclusive, write_text
from hmn.plan import Plan, make_plan
from hmn.seeding import generator, set_deterministic
from hmn.session import Session
from hmn.stop import Stop

REFERENCES = {"random_subset": "random real subset", "full_data": "full training set"}


def run(plan: Plan, *, command: str) -> dict[str, Any]:
    """Return the run's result; a finished run's is read back, an interrupted run resumes from its last checkpoint.

    ``command`` is what the user typed, for the hint on how to measure a missing reference.
    """
    folder = plan.folder
    shared_out = plan.data.classes if plan.config.condenses else None
    distributed.start(compute.device_of(plan.config.compute), at_most=shared_out)
    with exclusive(folder), Stop().listening() as stop:
        result = distributed.from_first(lambda: results.read(folder))
        if result is None:
            result = _work(plan, folder, stop)
        else:
            print(f"{plan.run_id} is finished: this is its saved result (move {folder} away to measure it again)")
            # A W&B agent expects the result in a W&B run of its own; without an agent, W&B may have missed the end.
            if tracking.of_agent() or tracking.left_open(folder):
                with _tracker(plan, folder) as tracker:
                    tracker.summary(results.summary(result))
        if distributed.first():
            clear(folder / "checkpoints")  # only now: a run killed before its result is written needs them
    _print_result(plan, result, command)
    distributed.finish()
    return result


def _work(plan: Plan, folder: Path, stop: Stop) -> dict[str, Any]:
    config = plan.config
    chosen = compute.choose(config.compute, plan.expected_flops, plan.data.classes)
    set_deterministic(config.compute.deterministic)
    if config.compute.keep_heap:
        machine.keep_heap_pages()
    machine.keep_compiled(Path(config.paths.cache_dir) / "compiled")
    compute.forget_compiled()  # of an earlier run of the same multirun
    print(f"{plan.run_id} on {machine.device_name(chosen.device)}, {chosen.precision}, ", end="")
    print("compiled" if chosen.compiled else "not compiled", end="")
    print(" with Winograd's convolutions" if chosen.winograd else "", end="")
    print(f", {distributed.world()} processes" if distributed.world() > 1 else "")
    if chosen.lacking:
        print(f"compute.matching=auto: not compiled, though the work is long, because {chosen.lacking}")
    if chosen.precision != config.compute.precision:
        print(f"compute.precision={config.compute.precision}: no faster than fp32 on this machine, so fp32 is used")
    if plan.not_read:
        print(f"not read: {'  '.join(plan.not_read)}")
    plain = _plain(config)
    provenance = results.provenance()  # of the code that runs, even if it is edited meanwhile
    with _tracker(plan, folder) as tracker:
        # The split belongs to the dataset: every run of a sweep, whatever its seed, holds out the same images.
        data = distributed.first_then_others(
            lambda: datasets.load(config.dataset, Path(config.paths.data_dir), generator(0, "split"))
        )
        for note in data.notes:
            print(note)
        if distributed.first():
            write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
        origin = {"data": data.fingerprint, "device": chosen.device.type, "code": provenance["code"]}
        origin["precision"] = chosen.precision
        every = config.compute.checkpoint_every_seconds
        checkpoints = Checkpoints(folder / "checkpoints", every, stop, origin)
        session = Session(plan, data.to(chosen.device), chosen, checkpoints, tracker, folder, provenance)
        measured = {
            "run": session.condense_and_evaluate,
            "coreset": session.choose_and_evaluate,
            "evaluate": session.evaluate_artifacts,
            "redundancy": session.redundancy,
            "full_data": session.full_data,
            "random_subset": session.random_subset,
            "experts": session.experts,
        }[config.kind]()
        result = {
            "run_id": plan.run_id,
            "mode": config.mode,
            **measured,
            "data": {"name": data.name, "fingerprint": data.fingerprint, "notes": list(data.notes)},
            "network": networks.full_name(config.network, plan.data.image_size),
            "profile": "experts" if config.mode == "experts" else config.evaluation.profile,
            "device": machine.device_name(chosen.device),
            "precision": chosen.precision,
            "compiled": chosen.compiled,
            "winograd": chosen.winograd,
            "compile_seconds": list(compute.compile_seconds),
            "processes": distributed.world(),
            "wall_seconds": checkpoints.seconds,
            "peak_bytes": chosen.peak_bytes(),
            "config": plain,
            "codes": checkpoints.codes,
            **provenance,
        }
        tracker.summary(results.summary(result))
        tracker.log_table("result", report.COLUMNS, _rows(plan, result))
        return distributed.from_first(lambda: results.write(folder, result))


def _plain(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(config, launcher=None, sweep=None))  # they are no part of the run


def _tracker(plan: Plan, folder: Path) -> tracking.Tracker:
    return tracking.start(
        plan.config.tracking,
        run_id=plan.run_id,
        run_dir=folder,
        run_config=_plain(plan.config),
        job_type=plan.config.mode,
    )


def _references(plan: Plan) -> dict[str, dict[str, Any] | None]:
    """Saved results of the reference modes under the plan's settings; ``None`` if not measured or not readable."""

    def kept(mode: str) -> dict[str, Any] | None:
        try:
            return results.read(make_plan(dataclasses.replace(plan.config, mode=mode)).folder)
        except ArtifactError:
            return None

    return {mode: kept(mode) for mode in REFERENCES} if plan.config.mode == "run" else {}


def _rows(plan: Plan, result: dict[str, Any]) -> list[list[str]]:
    """Table rows of the run, and of its references that are already measured under the same profile."""
    name = {**REFERENCES, "experts": "experts"}.get(plan.config.mode, "condensed")
    if plan.config.kind == "coreset":
        name = f"coreset, {plan.config.container.method}"
    if plan.config.mode == "redundancy":
        return [_row_without(row, result) for row in result["rows"]]
    measured = {mode: kept for mode, kept in _references(plan).items() if kept is not None}
    return [report.row(name, result), *(report.row(REFERENCES[mode], kept) for mode, kept in measured.items())]


def _row_without(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Table row of the set without the easiest images of each class, which ``row`` measured."""
    rest = {"accuracy": row, "images_per_class": str(row["images_per_class"])}
    return report.row(f"without {100 * row['dropped']:g} %", result | rest)


def _print_result(plan: Plan, result: dict[str, Any], command: str) -> None:
    print(
        f"\n{result['data']['name']}, {result['network']}, profile {result['profile']}, test accuracy of the last epoch"
    )
    print(report.text_table(report.COLUMNS, _rows(plan, result)))
    for mode, kept in _references(plan).items():
        if kept is None:
            print(f"{REFERENCES[mode]}: not measured yet; {command} mode={mode}")
    print(f"run folder: {plan.folder}")
    if (picture := plan.folder / "condensed.png").exists():
        print(f"images:     {picture}")
