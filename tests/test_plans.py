"""Every container's own settings at every budget: they fit, or the error says what would."""

from __future__ import annotations

import sys
from itertools import product

import pytest

from experiments import plans
from hmn.config.containers import SCHEMAS
from hmn.containers import KINDS, storage
from hmn.errors import ConfigError

CONFIGS = {schema.NAME: schema for schema in SCHEMAS}
DATA = {
    "mnist": (10, 1, 28),
    "svhn": (10, 3, 32),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
    "tiny_imagenet": (200, 3, 64),
    "imagenet10": (10, 3, 224),
    "imagenette at 128": (10, 3, 128),
    "digits": (10, 1, 8),
}
# A base of one channel takes as much as an image.
TOO_LARGE = {("digits", 1, "haba"): "732", ("mnist", 1, "haba"): "9,212"}


@pytest.mark.parametrize(("data", "ipc", "name"), list(product(DATA, (1, 10, 50), KINDS)))
def test_own_settings_fill_most_of_the_budget_or_are_refused_with_the_least_that_fits(data, ipc, name):
    sizes = dict(zip(("classes", "channels", "image_size"), DATA[data], strict=True))
    kind = KINDS[name]
    shape = kind.shape.of(kind.fill(CONFIGS[name](name=name), images_per_class=ipc, **sizes), **sizes)
    if (data, ipc, name) in TOO_LARGE:
        with pytest.raises(ConfigError, match=f"the smallest budget that fits is {TOO_LARGE[data, ipc, name]}"):
            storage(shape, ipc, 0.0)
        return
    stored = storage(shape, ipc, 0.0)
    least = 0.7 if name == "haba" else 0.8  # its bases come in whole rows of styles
    assert least <= stored.stored_floats(sizes["classes"]) / stored.budget_floats <= 1


def test_the_table_has_a_line_for_every_cell(monkeypatch, capsys):
    monkeypatch.setattr(plans, "DATASETS", ("digits",))
    monkeypatch.setattr(plans, "MEMORIES", (1,))
    monkeypatch.setattr(sys, "argv", ["plans"])
    plans.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + len(KINDS)
    cells = {line.split(" | ")[2]: line.removesuffix(" |").split(" | ")[3:] for line in lines[4:]}
    step = plans.planned("dataset=digits").step_flops
    assert cells["hmn"] == ["7", "629", "98.28", "349", f"{(step.matching + step.update) / 1e12:.3f}"]
    assert float(cells["hmn"][-1]) > 0
    assert cells["haba"][0] == "does not fit"
    assert cells["coreset"][:3] == ["1", "640", "100.00"]


def test_another_error_than_a_budgets_is_not_hidden(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plans", "network.width=0"])
    with pytest.raises(ConfigError, match="network.width=0"):
        plans.main()
