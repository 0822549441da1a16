"""The first stage of a run: start and condense a container, or take it over from a run that condensed the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hmn import build, condense, distributed, pictures, shared_condensed
from hmn.build import Workshop
from hmn.containers.base import Container, decode_all
from hmn.data.splits import Split
from hmn.files import exclusive
from hmn.plan import Plan
from hmn.tracking import Tracker

TAKEN = "taken"  # checkpoint slot of a condensation taken over from another run


@dataclass(frozen=True, kw_only=True)
class Making:
    """Condenses a container, or takes over a shared one, and records how it was made."""

    plan: Plan
    shop: Workshop
    tracker: Tracker
    code: str  # digest of the source code
    judged: Callable[[Split, str], float]  # (decoded images, stream name) -> held-out accuracy

    def make(self, container: Container) -> dict[str, Any]:
        """Bring ``container`` into the form that is kept; returns what the result records about its making.

        With ``compute.share_condensed`` the container may come from another run. A run that has finished its own
        condensation, or has taken one over, stays with it, because it may already have begun to judge that container.
        """
        checkpoints = self.shop.checkpoints
        if (taken := checkpoints.load(TAKEN)) is not None:
            container.finish()
            with checkpoints.restoring():
                container.load_state_dict(taken["container"])
                return taken["made"]
        if not self.plan.config.compute.share_condensed:
            return self._condense(container)
        done = self._steps_kept() == self.plan.matching_steps
        folder = shared_condensed.folder_of(
            self.plan, self.shop.data.fingerprint, self.code, self.shop.compute.precision
        )
        with exclusive(folder, wait=checkpoints.stop):
            distributed.barrier()  # no process looks before the first holds the folder; all use what the first finds
            made = None if done else distributed.from_first(lambda: shared_condensed.load(folder, container))
            if made is None:
                made = self._condense(container) | {"condensed_by": self.plan.run_id}
                if distributed.first() and len(checkpoints.codes) == 1:  # with more, mixed source versions made it
                    shared_condensed.offer(folder, container, made)
            else:
                if not distributed.first():
                    container.finish()
                distributed.copy_first_(container.state_dict().values())
                for step_key in ("condense/step", "curve/step"):  # drop the records of its own attempt
                    self.tracker.rewind(step_key, -1)
                checkpoints.save(TAKEN, {"made": made, "container": container.state_dict()})
                print(f"already condensed by {made['condensed_by']}: {folder / shared_condensed.TENSORS}")
        return made

    def _steps_kept(self) -> int | None:
        """Step of this run's own condensation checkpoint; ``None`` without one."""
        state = self.shop.checkpoints.load(condense.SLOT)
        return None if state is None else state["step"]

    def _condense(self, container: Container) -> dict[str, Any]:
        work = self._begun(container)
        self._run(work, container)
        work.settle(container)
        return {
            "curve": [{"step": step, "held_out_accuracy": value} for step, value in sorted(work.curve.items())],
            "condense_steps": work.step,
            "condense_seconds": work.seconds,
            "condense_peak_bytes": work.peak_bytes,
            "fit_seconds": self.shop.checkpoints.seconds.get("fit", 0.0),
            **work.measured(),
        }

    def _begun(self, container: Container) -> condense.Condensation:
        """The condensation of ``container``, at its first step or where its checkpoint left it."""
        build.start(self.shop, container)
        state = self.shop.checkpoints.load(condense.SLOT)
        settings = self.plan.config.container
        if state is None and settings.init == "fit_real":
            error = build.fit(self.shop, container)
            self.tracker.rewind("fit/step", -1)
            self.tracker.log({"fit/mean_squared_error": error}, step_key="fit/step", step=settings.fit_steps)
        # Another GPU may not reproduce the fit bit for bit.
        distributed.copy_first_(container.state_dict().values())
        work = build.condensation(self.shop, container)
        if state is not None:
            with self.shop.checkpoints.restoring():
                work.load_state_dict(state)
            print(f"continuing at step {work.step} of {work.total_steps}")
        self.tracker.rewind("condense/step", work.step)
        self.tracker.rewind("curve/step", max(work.curve, default=-1))
        return work

    def _run(self, work: condense.Condensation, container: Container) -> None:
        logging = self.plan.config.tracking
        shown: set[int] = set()  # steps; one may be due for several reasons

        def show(step: int) -> None:
            if step not in shown:
                shown.add(step)
                self._log_grid(container, step)

        def on_report(report: condense.Report) -> None:
            self.tracker.log(_metrics(report), step_key="condense/step", step=report.step)
            before = report.step - logging.log_every_steps
            if before // logging.images_every_steps != report.step // logging.images_every_steps:
                work.gather()
                show(report.step)

        def on_curve(step: int) -> float:
            kept = copy.deepcopy(container)
            work.settle(kept)
            value = self.judged(Split(*decode_all(kept)), f"curve_{step}")
            metrics = {"curve/held_out_accuracy": value, "curve/condense_seconds": work.seconds}
            self.tracker.log(metrics, step_key="curve/step", step=step)
            show(step)
            return value

        if work.step == 0:
            show(0)
        with self.shop.checkpoints.timed("condense"):
            condense.condense(
                work,
                self.shop.checkpoints,
                log_every_steps=logging.log_every_steps,
                on_report=on_report,
                curve_points=self.plan.config.evaluation.curve_points,
                on_curve=on_curve,
            )
        show(work.step)

    def _log_grid(self, container: Container, step: int) -> None:
        if not distributed.first():
            return
        rows = torch.arange(container.classes * container.images_per_class, device=self.shop.compute.device)
        index = rows.view(container.classes, -1)[:, :10].flatten()  # the first images of every class
        with torch.no_grad():
            images = container.decode(index)
        grid = pictures.class_grid(images, index // container.images_per_class, pixels=32)
        self.tracker.log_image("condense/images", grid, step_key="condense/step", step=step)


def _metrics(report: condense.Report) -> dict[str, float]:
    layers = {f"condense/loss_layer{layer}": value for layer, value in enumerate(report.losses, start=1)}
    norms = {f"condense/gradient_norm/{tier}": value for tier, value in report.gradient_norms.items()}
    return {
        "condense/loss": sum(report.losses),
        **layers,
        **norms,
        "condense/steps_per_second": report.steps_per_second,
        "condense/images_per_second": report.images_per_second,
        "condense/peak_bytes": report.peak_bytes,
        "condense/memory_lr": report.learning_rate,
        **{f"condense/{name}": value for name, value in report.measured.items()},
    }
