"""Write a self-contained page about a sweep: ``python -m experiments.report DIR [--output FILE.html]``.

DIR is the folder of a sweep (``runs/sweeps/NAME``) or any folder of run folders (``runs``). The page needs no network
and no other files. It shows what the run folders hold now, whether runs have finished or not. Nothing in it comes from
the clock, so the same folders give the same bytes.

Pictures share ``PICTURE_CHARACTERS`` and are re-encoded to fit (experiments/embedding.py). Curves are thinned to
``POINTS`` points. A page of 200 runs stays below 20 MB.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from experiments.collection import Collection, Run, bare, collect, leading_number, shared_settings
from experiments.embedding import Embedded, embed
from hmn.errors import ArtifactError
from hmn.explain import in_one_line
from hmn.files import write_text
from hmn.prune import hardest_count
from hmn.report import percent
from hmn.results import code_of

PAGE = Path(__file__).with_name("page")
PICTURE_CHARACTERS = 14_000_000  # all pictures together
POINTS = 200  # per curve
OVER_BUDGET, CONDENSED = "over_budget.png", "condensed.png"
STATUSES = ("done", "running", "interrupted", "failed", "damaged", "waiting")
SCORES = {
    "logit_margin": "margin of logits, mean over epochs",
    "softmax_margin": "margin of probabilities, summed over epochs",
    "random": "random scores",
}


def accuracy_of(run: Run) -> dict[str, Any] | None:
    """Test accuracy in percent: mean, standard deviation over networks (None for one), and how many there are."""
    accuracy = run.result.get("accuracy")
    if not accuracy or accuracy.get("mean") is None:
        return None
    std, networks = accuracy.get("std"), accuracy.get("by_network", [])
    return {
        "mean": 100 * accuracy["mean"],
        "std": None if std is None else 100 * std,
        "networks": len(networks),
        "by_network": [f"{100 * each[-1]:.2f}" for each in networks],
    }


def thinned(points: Sequence[tuple[float, float | None]], most: int = POINTS) -> list[list[float | None]]:
    """At most about ``most`` points, the first and the last among them, rounded to 5 digits."""
    stride = max(1, math.ceil((len(points) - 1) / (most - 1))) if points else 1
    kept = [*points[:-1:stride], *points[-1:]]
    return [[x, None if y is None else float(f"{y:.5g}")] for x, y in kept]


def curves_of(run: Run) -> dict[str, Any]:
    """Held-out accuracy in percent and matching loss over steps; a loss that was not finite is None."""
    loss = [(row["condense/step"], row["condense/loss"]) for row in run.metrics if "condense/loss" in row]
    held_out = [
        (row["curve/step"], 100 * row["curve/held_out_accuracy"])
        for row in run.metrics
        if row.get("curve/held_out_accuracy") is not None
    ]
    if not held_out:
        held_out = [(one["step"], 100 * one["held_out_accuracy"]) for one in run.result.get("curve") or ()]
    pruned = next((row["curve/pruned_accuracy"] for row in run.metrics if row.get("curve/pruned_accuracy")), None)
    return {
        "accuracy": thinned(held_out),
        "loss": thinned(loss),
        "pruned": None if pruned is None else float(f"{100 * pruned:.5g}"),
    }


def pruning_of(run: Run) -> str:
    """How many images of a class were dropped at which end, in words."""
    pruning = run.result.get("pruning") or {}
    cut = pruning.get("cut_per_class")
    if not cut:
        return "nothing dropped" if pruning else ""
    beta = pruning.get("beta")
    if beta is None:
        return f"{cut} of each class dropped"
    hardest = hardest_count(beta, cut)
    return f"dropped of each class: {hardest} hardest, {cut - hardest} easiest (β = {beta:g})"


def histograms(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The AUM histogram of every run that has one; those of one kind of score share one range."""
    found = []
    for index, run in enumerate(runs):
        aum = next((row["prune/aum"] for row in reversed(run.metrics) if "prune/aum" in row), None)
        if aum and aum.get("counts"):
            score = bare(run.config.get("pruning.score", '"logit_margin"'))
            found.append({"index": index, "run": run, "score": SCORES.get(score, score), **aum})
    for one in found:
        alike = [other["edges"] for other in found if other["score"] == one["score"]]
        one["low"], one["high"] = min(edges[0] for edges in alike), max(edges[-1] for edges in alike)
        one["bars"] = _bars(one["counts"], one["edges"], one["low"], one["high"])
        one["zero"] = -one["low"] / (one["high"] - one["low"]) if one["low"] < 0 < one["high"] else None
    return found


def _bars(counts: Sequence[int], edges: Sequence[float], low: float, high: float) -> str:
    """A histogram as one SVG path in a box of 200 x 60."""
    tallest = max(counts) or 1
    across = [200 * (edge - low) / (high - low) for edge in edges]
    parts = []
    for count, left, right in zip(counts, across, across[1:], strict=False):
        if count:
            parts.append(f"M{left:.1f} 60V{60 - 58 * count / tallest:.1f}H{right:.1f}V60Z")
    return "".join(parts)


def galleries(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], bool]:
    """The pictures of every run that has any, and whether embedding cost any of them detail."""
    paths = {
        index: [path for name in (OVER_BUDGET, CONDENSED) if run.folder and (path := run.folder / name).exists()]
        for index, run in enumerate(runs)
    }
    allowed = PICTURE_CHARACTERS // max(1, sum(map(len, paths.values())))
    found: list[dict[str, Any]] = []
    for index, there in paths.items():
        pictures = {path.name: picture for path in there if (picture := _embedded(path, allowed)) is not None}
        if pictures:
            found.append(
                {"index": index, "run": runs[index], "before": pictures.get(OVER_BUDGET)}
                | {"after": pictures.get(CONDENSED), "pruning": pruning_of(runs[index])}
            )
    lossy = any(one[key].lossy for one in found for key in ("before", "after") if one[key])
    return found, lossy


def _embedded(path: Path, allowed: int) -> Embedded | None:
    try:
        return embed(path, allowed)
    except ArtifactError:  # cut short
        return None


def sources(run: Run) -> str | None:
    """The digest of a result's sources, or the commit if the result is older than such digests."""
    if not run.result:
        return None
    if run.result.get("code"):
        return code_of(run.result)
    commit = run.result.get("commit")
    return f"commit {commit[:12]}" if commit else "unknown"


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    counted = Counter(run.state.status for run in runs)
    seconds = Counter()
    for run in runs:
        seconds.update(run.result.get("wall_seconds") or {})
    return {
        "counts": [(status, counted[status]) for status in STATUSES if counted[status]],
        "seconds": sum(seconds.values()),
        "stages": seconds.most_common(4),
        "devices": _tally(run.result.get("device") for run in runs),
        "codes": _tally(map(sources, runs)),
        "data": _tally(
            f"{data.get('name')} {str(data.get('fingerprint'))[:12]}" if (data := run.result.get("data")) else None
            for run in runs
        ),
        "dirty": sum(bool(run.result.get("dirty")) for run in runs),
    }


def _tally(values: Iterable[str | None]) -> list[tuple[str, int]]:
    return Counter(value for value in values if value is not None).most_common()


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    accuracies = [accuracy_of(run) for run in runs]
    reach = [
        end for one in accuracies if one for end in (one["mean"] - (one["std"] or 0), one["mean"] + (one["std"] or 0))
    ]
    low, high = (min(reach), max(reach)) if reach else (0.0, 1.0)
    return [
        {
            "index": index,
            "run": run,
            "status": run.state.status,
            "accuracy": accuracy,
            "place": _place(accuracy, low, high),
            "result": run.result,
            "images": run.result.get("images_per_class"),
        }
        for index, (run, accuracy) in enumerate(zip(runs, accuracies, strict=True))
    ]


def _place(accuracy: Mapping[str, Any] | None, low: float, high: float) -> dict[str, float] | None:
    """Positions of a run's accuracy and its spread in a box of width 80 that spans all runs."""
    if accuracy is None or high <= low:
        return None
    spread = accuracy["std"] or 0.0
    ends = (accuracy["mean"] - spread, accuracy["mean"], accuracy["mean"] + spread)
    return {
        name: round(4 + 72 * (end - low) / (high - low), 1)
        for name, end in zip(("left", "mean", "right"), ends, strict=True)
    }


def provenance(run: Run) -> list[tuple[str, str]]:
    """What a run's result was made from and with, in words; unknown facts are left out."""
    found, data = run.result, run.result.get("data") or {}
    commit = found.get("commit")
    seeds = (found.get("accuracy") or {}).get("seeds") or []
    packages = found.get("packages") or {}
    accuracy = accuracy_of(run)
    facts = [
        ("Cell", run.cell if run.cell != run.run_id else None),
        ("Run id", run.run_id),
        ("Commit", f"{commit}{', with uncommitted changes' if found.get('dirty') else ''}" if commit else None),
        ("Sources", code_of(found) if found.get("code") else None),
        ("Device", found.get("device") and f"{found['device']}, {'compiled' if found.get('compiled') else 'eager'}"),
        ("Data", data.get("name") and f"{data['name']}, fingerprint {data.get('fingerprint')}"),
        ("Notes on data", "; ".join(data.get("notes") or [])),
        ("Network, profile", found.get("network") and f"{found['network']}, {found.get('profile')}"),
        ("Seed", bare(run.config["seed"]) if "seed" in run.config else None),
        ("Seeds of networks", ", ".join(map(str, seeds))),
        ("Accuracies, %", ", ".join(accuracy["by_network"]) if accuracy else None),
        ("Pruning", pruning_of(run)),
        ("Without its easiest", "; ".join(_without(row) for row in found.get("rows") or [])),
        ("Floats by tier", ", ".join(f"{tier} {count:,}" for tier, count in (found.get("tier_floats") or {}).items())),
        ("Wall time", ", ".join(f"{name} {duration(s)}" for name, s in (found.get("wall_seconds") or {}).items())),
        ("Python", found.get("python") and f"{found['python']}, {found.get('platform')}"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
    ]
    return [(name, value) for name, value in facts if value]


def _without(row: Mapping[str, Any]) -> str:
    """What ``mode=redundancy`` measured without one share of the images, in words."""
    return f"{row['dropped']:.0%} of each class: {percent(row)} %"


# How numbers are written


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.0f} MiB"


def render(found: Collection) -> str:
    """The page as HTML."""
    runs = found.runs
    shared = shared_settings([run.config for run in runs]) if len(runs) > 1 else {}
    shown, lossy = galleries(runs)
    script, style = ((PAGE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "size": size, "number": leading_number, "bare": bare}
    return environment.get_template("page.html").render(
        title=found.title,
        command=found.command,
        axes=found.axes,
        alike=found.alike,
        summary=summary(runs),
        rows=rows(runs),
        charts=[{"name": run.name, **curves_of(run)} for run in runs],
        histograms=histograms(runs),
        galleries=shown,
        lossy=lossy,
        shared=shared,
        provenance=[
            {"run": run, "facts": provenance(run)}
            | {"own": {key: value for key, value in run.config.items() if shared.get(key) != value}}
            for run in runs
        ],
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
    )


def _hash(source: str) -> str:
    """The hash by which the page's policy tells its own script and style from any that a run's name smuggles in."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a sweep's folder, or a folder of run folders")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="the file to write; default: DIR/report.html")
    given = parser.parse_args(arguments)
    output = given.output or given.folder / "report.html"
    page = render(collect(given.folder))
    write_text(output, page)
    print(f"{output}: {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    in_one_line(main)
