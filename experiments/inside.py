"""Measure condensed sets from inside: ``python -m experiments.inside RUN_FOLDER... [--real DIR] [--json FILE]``.

Every finished run gives one row: the matching loss of each layer and the gradient norm of each tier, as means over the
first and the last quarter of its logged steps, and measures of its decoded images. ``--real`` adds a row for as many
real images of every class, from a tree DIR/<class>/*, to compare with.

- contrast: standard deviation of pixels within an image, mean over images
- detail: share of an image's variance that lies in differences from 2 x 2 means, which smooth images lack
- spread: root mean square distance of an image's pixels from its class's mean image
- repeats: root mean square distance to the nearest other image of its class, divided by the spread; 0 for copies
- apart: root mean square distance of class means from their mean, divided by the spread
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hmn import artifacts, results
from hmn.data.folder import class_files, class_folders
from hmn.data.images import stack_files
from hmn.errors import ArtifactError, DataError
from hmn.explain import in_one_line
from hmn.files import write_json
from hmn.tracking import read_metrics


def measures(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Measures of ``images`` (N, channels, H, W) in [0, 1] with ``labels`` (N,), at least two of every class."""
    even = images.shape[-1] // 2 * 2
    images = images[..., :even, :even]
    smooth = F.avg_pool2d(images, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    variance = images.var(dim=(1, 2, 3), correction=0)
    detail = (images - smooth).square().mean(dim=(1, 2, 3)) / variance.clamp(min=1e-12)
    means, spreads, nearest = [], [], []
    for label in labels.unique():
        own = images[labels == label].flatten(1)
        mean = own.mean(0)
        means.append(mean)
        spreads.append((own - mean).square().mean(1))
        between = torch.cdist(own, own) / own.shape[1] ** 0.5
        nearest.append(between.fill_diagonal_(torch.inf).amin(1).square())
    spread = torch.cat(spreads).mean().sqrt()
    centres = torch.stack(means)
    return {
        "contrast": float(variance.sqrt().mean()),
        "detail": float(detail.mean()),
        "spread": float(spread),
        "repeats": float(torch.cat(nearest).mean().sqrt() / spread),
        "apart": float((centres - centres.mean(0)).square().mean().sqrt() / spread),
    }


def logged(folder: Path) -> dict[str, tuple[float, float]]:
    """Losses by layer and gradient norms by tier: means over the first and the last quarter of the logged steps."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "condense/loss" in row]
    names = [name for name in rows[0] if "loss" in name or "gradient_norm" in name] if rows else []
    count = max(1, len(rows) // 4)
    first, last = rows[:count], rows[-count:]
    return {
        name.removeprefix("condense/"): tuple(sum(row[name] for row in part) / count for part in (first, last))
        for name in names
    }


def of_run(folder: Path) -> dict[str, Any]:
    """The row of a run. Raises ``ArtifactError`` for a folder without a finished run or with a class of one image."""
    result = results.read(folder)
    if result is None:
        raise ArtifactError(f"{folder}: no finished run there")
    images, labels = artifacts.load_condensed(folder).tensors()
    row = {"set": result["run_id"], "images_per_class": len(images) // len(labels.unique())}
    if labels.bincount().min() < 2:
        raise ArtifactError(f"{folder}: has only one image of a class, and the measures compare those of a class")
    return row | measures(images.clamp(0, 1), labels) | {"logged": logged(folder)}


def of_real(folder: Path, count: int, side: int, channels: int) -> dict[str, Any]:
    """The row of ``count`` real images of every class, evenly spread over the sorted files of DIR/<class>/."""
    names = class_folders(folder)
    chosen: list[Path] = []
    for name, files in zip(names, class_files(folder, names).per_class, strict=True):
        if len(files) < count:
            raise DataError(f"{folder / name}: has {len(files)} images, fewer than the {count} that are compared")
        chosen += [files[position * len(files) // count] for position in range(count)]
    images, _ = stack_files(chosen, side, channels, "real images")
    row = {"set": f"real, {folder}", "images_per_class": count}
    return row | measures(images / 255, torch.arange(len(names)).repeat_interleave(count))


def text(rows: Sequence[dict[str, Any]]) -> str:
    names = ("contrast", "detail", "spread", "repeats", "apart")
    lines = ["| set | images per class | " + " | ".join(names) + " |", "| --- |" + " --- |" * (len(names) + 1)]
    for row in rows:
        cells = [str(row["images_per_class"]), *(f"{row[name]:.3f}" for name in names)]
        lines.append(f"| {row['set']} | " + " | ".join(cells) + " |")
    for row in rows:
        if row.get("logged"):
            lines += ["", row["set"]]
            lines += [f"  {name:32} {first:10.4g} -> {last:10.4g}" for name, (first, last) in row["logged"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--real", type=Path, help="a folder of class folders with images to compare with")
    parser.add_argument("--json", type=Path, help="the rows, as JSON")
    given = parser.parse_args(arguments)
    rows = [of_run(folder) for folder in given.runs]
    if given.real is not None:
        data = artifacts.load_condensed(given.runs[0]).card["data"]
        rows.append(of_real(given.real, rows[0]["images_per_class"], data["image_size"], data["channels"]))
    print(text(rows))
    if given.json is not None:
        write_json(given.json, rows)


if __name__ == "__main__":
    in_one_line(main)
