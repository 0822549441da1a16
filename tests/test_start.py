"""Condensing that starts from a saved set: what is taken over, what the run id says of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hmn import artifacts, load_condensed
from hmn.build import fit, start
from hmn.checkpoint import Checkpoints
from hmn.containers.fit import fit_real
from hmn.containers.image import RawImages, RawShape
from hmn.data.sampling import repeated_subset
from hmn.data.training_images import TrainingImages
from hmn.errors import ConfigError, DataError
from hmn.plan import make_plan
from hmn.seeding import generator
from tests.command import TINY, configured, run
from tests.small_matching import CLASSES, MEAN, PER_CLASS, REAL, STD, assert_same, clone_of, make_container, workshop

ALONE = (*TINY, "pruning=none")
FROM = "container.init=kept"
# Steps too small to change a float32 number
STILL = ("objective.memory_lr=1e-30", "objective.weights_lr=1e-30")
KINDS = {
    "hmn": (),
    "image": ("container=image", "container.pixel_space=normalised"),  # normalised pixels are not clamped
    "fred": ("container=fred", "memory=ipc10"),
    "linba": ("container=linba", "memory=ipc10"),
}


def kept(folder: Path, *given: str) -> Path:
    """Finish a run and return its folder."""
    before = set(folder.glob("runs/*/result.json"))
    outcome = run(folder, *given)
    assert outcome.code == 0, outcome.err
    (result,) = set(folder.glob("runs/*/result.json")) - before
    return result.parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of a finished run with the settings ``ALONE``."""
    return kept(tmp_path_factory.mktemp("alone"), *ALONE)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_where_the_kept_set_is(tmp_path, kind):
    first = kept(tmp_path, *ALONE, *KINDS[kind])
    then = kept(tmp_path, *ALONE, *KINDS[kind], FROM, f"container.start={first}", *STILL, "seed=7")
    sets = [load_condensed(folder) for folder in (first, then)]
    assert sets[1].card["start"] == {"init": "kept", "sha256": sets[0].card["sha256"]}
    was, found = (one.container.state_dict() for one in sets)
    assert was.keys() == found.keys()
    for name, tensor in was.items():
        assert torch.equal(found[name], tensor), name


def test_another_objective_goes_on_from_it(tmp_path, alone):
    given = ("debug=smoke_distribution", "objective=distribution_matching", "objective.real_batch=16")
    given += ("objective.optimizer=adam", "objective.memory_lr=0.001")
    then = kept(tmp_path, *ALONE[1:], *given, FROM, f"container.start={alone}")
    was, found = (load_condensed(folder).container.instances for folder in (alone, then))
    assert not torch.equal(was, found)
    assert (found - was).abs().max() < 0.05 < was.abs().mean()  # near the set, where a fresh container would not be


def test_the_run_id_is_of_what_it_started_from_and_not_of_where_that_lay(tmp_path, alone):
    moved, other = shutil.copytree(alone, tmp_path / "moved"), kept(tmp_path, *ALONE, "seed=1")
    ids = [
        make_plan(configured(*ALONE, FROM, f"container.start={folder}")).run_id
        for folder in (alone, moved, moved / "condensed.safetensors", other)
    ]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert ids[0] != make_plan(configured(*ALONE)).run_id


REFUSED = {
    "another shape": (("container.decoder_width=6",), "decoder_width is 4 in the set, 6 in this run"),
    "over budget": (("pruning=double_end", "memory=ipc10", "container=hmn_digits_ipc1"), "set pruning=none"),
    "another container": (("container=image",), "name is hmn in the set, image in this run"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_set_that_does_not_fit_is_refused_in_one_line(tmp_path, alone, why):
    given, told = REFUSED[why]
    outcome = run(tmp_path, *ALONE, *given, FROM, f"container.start={alone}")
    assert outcome.code == 2
    assert outcome.complaint.startswith("container.start=") and told in outcome.complaint


def test_a_set_of_other_classes_is_refused_in_one_line(tmp_path):
    first = kept(tmp_path, *ALONE, "memory=ipc10", "dataset.class_range=[0,2]")
    outcome = run(tmp_path, *ALONE, "memory=ipc10", "dataset.class_range=[2,4]", FROM, f"container.start={first}")
    assert outcome.code == 2
    assert "its class_names is ['0', '1'], but this run's dataset has ['2', '3']" in outcome.complaint


def raw(pixel_space: str) -> RawImages:
    shape = RawShape(classes=CLASSES, channels=3, image_size=8, pixel_space=pixel_space, mean=MEAN, std=STD)
    container = RawImages(shape, 2)
    container.hold(torch.rand(CLASSES * 2, 3, 8, 8, generator=generator(0)))
    return container


@pytest.mark.parametrize("key", ["mean", "std"])
@pytest.mark.parametrize("pixel_space", ["normalised", "unit"])
def test_pixels_that_were_normalised_in_another_way_are_refused(tmp_path, pixel_space, key):
    data = {"class_names": list(REAL.class_names), "mean": list(MEAN), "std": list(STD)}
    folder, other, container = tmp_path / "kept", [0.1, 0.2, 0.3], raw(pixel_space)
    artifacts.save(folder, raw(pixel_space), {"budget": {"floats": 10**6}, "data": data | {key: other}})
    own = workshop(
        tmp_path, "container=image", f"container.pixel_space={pixel_space}", FROM, f"container.start={folder}"
    )
    if pixel_space == "unit":  # pixels in [0, 1] do not depend on the normalisation
        start(own, container)
    else:
        with pytest.raises(DataError) as caught:
            start(own, container)
        assert str(caught.value) == (
            f"container.start={folder}: its {key} is {other}, but this run's dataset has {data[key]}"
        )


def test_init_and_start_are_given_together():
    with pytest.raises(ConfigError, match="container.start=null: must be given with container.init=kept"):
        configured(*ALONE, FROM)
    with pytest.raises(ConfigError, match="container.start=runs/a: must be given with container.init=kept, else null"):
        configured(*ALONE, "container.start=runs/a")


def test_a_missing_set_is_told_in_one_line(tmp_path):
    outcome = run(tmp_path, *ALONE, FROM, "container.start=runs/none")
    assert outcome.code == 2 and "no condensed.safetensors there" in outcome.complaint


def test_a_container_is_fitted_by_its_own_settings(tmp_path):
    given = ("fit_steps=7", "fit_batch=14", "fit_learning_rate=0.03", "fit_weights_lr=0.004")
    container, expected = make_container(), make_container()
    error = fit(workshop(tmp_path / "one", "seed=3", *(f"container.{one}" for one in given)), container)
    stream = generator(3, "fit")
    index = repeated_subset(REAL.train.labels, PER_CLASS, REAL.class_names, stream)
    rates = {"lr": 0.03, "weights_lr": 0.004}
    parts = {"generator": stream, "checkpoints": Checkpoints(tmp_path / "other", 60)}
    assert error == fit_real(expected, REAL.train.images[index], steps=7, batch=14, **rates, **parts)
    assert_same(clone_of(container), clone_of(expected))


def test_the_images_that_a_set_is_fitted_to_may_be_chosen_by_k_means(tmp_path):
    fitted = (*ALONE, "container.init=fit_real", "container.fit_steps=8", *STILL)
    chosen = [kept(tmp_path, *fitted, f"container.fit_images={how}") for how in ("random", "k_means")]
    one, other = (load_condensed(folder).container.instances for folder in chosen)
    assert not torch.equal(one, other)
    assert [result(folder)["config"]["container"]["fit_images"] for folder in chosen] == ["random", "k_means"]
    rates = {"fit_learning_rate": 0.2, "fit_weights_lr": 0.005}
    fit = {"init": "fit_real", "fit_steps": 8, "fit_batch": 128, **rates, "fit_images": "k_means"}
    assert load_condensed(chosen[1]).card["start"] == fit


def test_k_means_of_a_fit_is_of_pixels(tmp_path, monkeypatch):
    asked, choose = [], TrainingImages.choose
    monkeypatch.setattr(
        TrainingImages, "choose", lambda self, count, how: asked.append(how) or choose(self, count, how)
    )
    given = ("fit_steps=7", "fit_learning_rate=0.03", "fit_images=k_means")
    fit(workshop(tmp_path, *(f"container.{one}" for one in given)), make_container())
    assert asked == ["k_means_of_pixels"]
