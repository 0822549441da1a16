"""How redundant a kept set is: ``python -m experiments.redundancy ARTIFACT OUTPUT [--drop 0,0.1,0.2] [KEY=VALUE ...]``.

Of every class, the images that networks find easiest (the highest AUM) are dropped, more and more of them, and fresh
networks are trained on the rest. Where accuracy stays, what was dropped had repeated what is left (Zheng et al., ECCV
2024, whose reason to prune this is). Decoded images are dropped, not instances: what the set stores stays as it is, and
containers whose images are tied can be measured as well.

Writes OUTPUT/redundancy.json and draws it, beside the file of every ``--beside`` (needs the extra ``figures``).
KEY=VALUE are settings as of run.py: ``pruning.score*`` of the AUM, ``network.*`` and ``evaluation.*`` of the networks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hydra

from hmn import artifacts, compute, config, networks, results
from hmn.checkpoint import Checkpoints, Stop, clear, exclusive, write_text
from hmn.cli import CONF, explain
from hmn.data import datasets
from hmn.data.preprocess import Normalise
from hmn.errors import DataError
from hmn.evaluate import Images, Judge, evaluate, recipe_of
from hmn.plan import Plan, make_plan
from hmn.prune import area_under_margin, kept_instances
from hmn.seeding import generator, set_deterministic
from hmn.training import training_step

FILE = "redundancy.json"


def planned(artifact: str, overrides: Sequence[str]) -> Plan:
    """The plan of ``mode=evaluate`` for this artifact; raises as run.py does."""
    typed = [*overrides, "mode=evaluate", f"artifact={artifact}"]
    config.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return make_plan(config.from_hydra(hydra.compose("config", overrides=typed)), typed=typed)


def kept_after(count: int, share: float) -> int:
    """Images left of ``count`` without the fraction ``share`` in [0, 1), rounded so that more are left."""
    return count - int(share * count + 1e-9)


def name_of(card: dict[str, Any]) -> str:
    return f"coreset {card['coreset']['method']}" if "coreset" in card else card["container"]["name"]


def shares(text: str) -> list[float]:
    values = [float(share) for share in text.split(",")]
    if not all(0 <= share < 1 for share in values):
        raise argparse.ArgumentTypeError(f"{text}: every share must be in [0, 1)")
    return values


def measure(plan: Plan, drops: Sequence[float], checkpoints: Checkpoints) -> dict[str, Any]:
    """Test accuracies after each share of ``drops``, and what they were measured by; resumable."""
    settings, pruning = plan.config, plan.config.pruning
    kept = artifacts.load_condensed(settings.artifact)
    chosen = compute.choose(settings.compute, plan.expected_flops, plan.data.classes)
    set_deterministic(settings.compute.deterministic)
    compute.keep_compiled(Path(settings.paths.cache_dir) / "compiled")
    data = datasets.load(settings.dataset, Path(settings.paths.data_dir), generator(0, "split"))
    if tuple(kept.card["data"]["class_names"]) != data.class_names:
        raise DataError(f"artifact={settings.artifact}: its classes are not those of {data.name}")
    decoded, test = (
        Images(images.to(chosen.device), labels.to(chosen.device))
        for images, labels in (kept.tensors(), (data.test.images, data.test.labels))
    )
    judge = Judge(
        build=plan.build,
        step=training_step(plan.build().to(chosen.device), chosen),
        normalise=Normalise(kept.card["data"]["mean"], kept.card["data"]["std"], chosen.device),
        recipe=replace(recipe_of(settings.evaluation, flip=settings.dataset.flip), epochs=plan.epochs),
        seed=settings.seed,
        checkpoints=checkpoints,
        together=chosen.together(max(settings.evaluation.networks, pruning.score_networks)),
    )
    with checkpoints.timed("score"):
        scores = area_under_margin(judge, decoded, pruning.score, pruning.score_networks, pruning.score_epochs)
    scores = scores.unflatten(0, (kept.container.classes, kept.container.images_per_class))
    rows = []
    for share in drops:
        keep = kept_after(scores.shape[1], share)
        index = kept_instances(scores, keep, beta=0.0)  # the easy end alone
        subset = Images(decoded.images[index], decoded.labels[index])
        with checkpoints.timed("evaluate"):
            found = evaluate(judge, subset, test, settings.evaluation.networks, 1, f"keep_{keep}")
        rows.append({"dropped": share, "images_per_class": keep, "mean": found.mean, "std": found.std})
        rows[-1]["by_network"] = found.last
        print(f"dropped {share:.0%} of each class, {keep} images left: {100 * found.mean:.2f} %")
    return {
        "rows": rows,
        "set": name_of(kept.card),
        "artifact_sha256": kept.card["sha256"],
        "budget": kept.card["budget"],
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "network": networks.full_name(settings.network, plan.data.image_size),
        "evaluation": asdict(settings.evaluation),
        "score": {name: getattr(pruning, name) for name in ("score", "score_networks", "score_epochs")},
        "seed": settings.seed,
        "device": results.device_name(chosen.device),
        "wall_seconds": checkpoints.seconds,
        **results.provenance(),
    }


def draw(measured: Sequence[dict[str, Any]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for one in measured:
        shares = [100 * row["dropped"] for row in one["rows"]]
        means = [100 * row["mean"] for row in one["rows"]]
        stds = [100 * (row["std"] or 0.0) for row in one["rows"]]
        label = f"{one['set']}, {one['rows'][0]['images_per_class']} images per class"
        axes.errorbar(shares, means, stds, marker="o", capsize=3, label=label)
    axes.set_xlabel("easiest images dropped from each class, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{measured[0]['data']['name']}, {measured[0]['network']}: mean ± std over networks", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", help="a run folder or a condensed.safetensors")
    parser.add_argument("output", type=Path, help="the folder to write to")
    parser.add_argument("--drop", type=shares, default="0,0.1,0.2,0.3,0.4,0.5", help="of each class, in [0, 1)")
    # Once for each: what takes several values would take the settings too.
    parser.add_argument("--beside", type=Path, action="append", default=[], help=f"another {FILE} for the picture")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of run.py")
    given = parser.parse_intermixed_args(arguments)
    plan = planned(given.artifact, given.overrides)
    own = config.digest(
        config.scientific(plan.config) | {"artifact": plan.artifact, "score": asdict(plan.config.pruning)}
    )
    folder = given.output / f"checkpoints-{own}"  # other settings must not go on from these
    with exclusive(given.output), Stop().listening() as stop:
        every = plan.config.compute.checkpoint_every_seconds
        measured = measure(plan, given.drop, Checkpoints(folder, every, stop))
        write_text(given.output / FILE, json.dumps(measured, indent=2) + "\n")
        clear(folder)
    others = [json.loads(path.read_text(encoding="utf-8")) for path in given.beside]
    draw([measured, *others], given.output / "redundancy.png")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        line, code = explain(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        sys.exit(code)
