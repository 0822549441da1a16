"""Bad input gets one line and exit code 2, before anything is read or left on disk."""

from __future__ import annotations

import errno
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hmn.explain import ended_by_the_person, explain
from tests.command import TINY, Outcome, run

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
BAD_SETTINGS = {
    "foo=1": ["foo: unknown key", "mode, seed", "experiment"],
    "+foo=1": ["foo: unknown key", "mode, seed"],
    "objective.metrc=l1": ["objective.metrc: unknown key", "did you mean objective.metric?"],
    "container=linba container.base=3": ["container.base: unknown key", "did you mean container.bases?"],
    "container=haba memory=ipc10 pruning.over_budget=0.1": ["pruning.over_budget=0.1: must be 0 for container=haba"],
    "+network.foo=1": ["network.foo: unknown key", "width, depth"],
    "dataset=usps": ["dataset=usps: must be one of arrays, cifar10,"],
    "experiment=nope": ["experiment=nope: must be one of", "demo"],
    "experiment=main_table": ["experiment=main_table: this is a table of many runs; start it with python sweep.py"],
    "debug=nope": ["debug=nope: must be one of smoke, smoke_bptt, "],
    "nope=cifar10": ["nope: unknown key"],
    "seed=abc": ["seed=abc", "'abc'", "Integer"],
    "seed=0.5": ["seed=0.5", "Integer"],
    "dataset.flip=maybe": ["dataset.flip=maybe", "'maybe'"],
    "evaluation.networks=null": ["evaluation.networks=null", "not Optional"],
    "dataset=[": ["dataset=[: cannot be read as a setting"],
    "dataset.root=~/x": ["dataset.root=~/x: cannot be read", "special characters: dataset.root='\"~/x\"'"],
    "dataset.root=/a/job=1": ["dataset.root=/a/job=1: cannot be read", "dataset.root='\"/a/job=1\"'"],
    "pruning.over_budget=1": ["pruning.over_budget=1.0: must be in [0, 1)"],
    "evaluation.strategy=colour": ["evaluation.strategy=colour: must be none, or some of color, crop"],
    "container.latent_side=3": ["container.latent_side=3: must be", "dataset.image_size=8"],
    "container=hmn_p3": ["over the budget of 640", "the smallest budget that fits is 138,841"],
    "compute.device=cuda": ["compute.device=cuda: must be cpu or auto: this machine has no such GPU"],
    "mode=train": ["mode=train: must be one of run, plan, evaluate, full_data, random_subset, experts"],
    "mode=evaluate": ["artifact=null: must be given for mode=evaluate"],
    "mode=evaluate artifact=absent": ["artifact=absent: no condensed.safetensors there"],
    "container.init=kept container.start=absent": ["container.start=absent: no condensed.safetensors there"],
    "+pruning=none": ["pruning: chosen twice: write pruning=NAME without the +"],
    "container.lr_scale={decoder:0.1}": ["container.lr_scale: is a mapping: +container.lr_scale.NAME=VALUE adds to it"],
    "memory=10": ["memory=10: must be one of ipc1, ipc10, ipc50", "did you mean ipc10?"],
    "debug=true": ["debug=true: must be one of smoke, "],
    "seed=1,2": ["seed=1,2: a run takes one value: add -m to run each of them"],
    "objective.inner_steps=null": ["objective.inner_steps=null: must be a number of steps"],
    "container.lr_scale.decoder=0.1": ["container.lr_scale has no keys yet: +container.lr_scale.decoder=VALUE adds"],
    "launcher=submitit": ["launcher=submitit: a setting of sweeps, not of a run: add -m, or use sweep.py"],
    "-m hydra.verbose=false launcher=ray": ["launcher=ray: a setting of sweeps, not of a run: leave it out, or"],
    "dataset=folder": ["dataset.root=null: must be given for dataset=folder"],
    "dataset=folder dataset.root=absent": ["dataset.root: absent cannot be listed"],
    "dataset=arrays dataset.root=absent.npz": ["dataset.root=absent.npz: no such file"],
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory) -> dict[str, Outcome]:
    """The outcome of each bad setting, in a folder of its own; a few run at once, as most of the time is start-up."""
    folders = {arguments: tmp_path_factory.mktemp("refused") for arguments in BAD_SETTINGS}

    def refuse(arguments: str) -> Outcome:
        return run(folders[arguments], *TINY, *arguments.split(), **NO_GPU)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(folders, pool.map(refuse, folders), strict=True))


@pytest.mark.parametrize("arguments", BAD_SETTINGS)
def test_bad_settings_get_one_line_and_leave_nothing(refusals, arguments):
    outcome = refusals[arguments]
    assert (outcome.code, outcome.out, outcome.files) == (2, "", [])
    for part in BAD_SETTINGS[arguments]:
        assert part in outcome.complaint


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR])
def test_a_place_that_cannot_be_written_is_named(tmp_path, number):
    why = os.strerror(number)
    line, code = explain(OSError(number, why, str(tmp_path)))
    assert line.startswith(f"{tmp_path}: {why}: fix that, or choose another place with paths.runs_dir")
    assert code == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_is_full_where_the_person_s_part_of_it_is(number):
    full = "no space left on the disk: free some, and the same command resumes from the last checkpoint"
    assert explain(OSError(number, os.strerror(number))) == (full, 1)
    # safetensors makes an error of its own of the system's
    assert explain(RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")) == (full, 1)


def test_ctrl_c_ends_a_command_without_a_word(capsys):
    with pytest.raises(SystemExit) as ended, ended_by_the_person():
        raise KeyboardInterrupt
    assert (ended.value.code, capsys.readouterr()) == (128 + signal.SIGINT, ("", ""))


def tree(root: Path) -> Path:
    """Write two classes of noise with 20 training and 5 test images each."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def truncate(root: Path) -> None:
    path = root / "train" / "bee" / "7.png"
    path.write_bytes(path.read_bytes()[:-60])


def fake(root: Path) -> None:
    (root / "test" / "ant" / "3.png").write_text("not an image")


def empty(root: Path) -> None:
    for path in (root / "train" / "ant").iterdir():
        path.unlink()


def extra_class(root: Path) -> None:
    (root / "test" / "wasp").mkdir()


BAD_DATA = {
    "truncated image": (truncate, "", "{root}/train/bee/7.png cannot be read"),
    "no image": (fake, "", "{root}/test/ant/3.png cannot be read"),
    "empty class": (empty, "", "class ant has no images in {root}/train/ant"),
    "classes differ": (extra_class, "", "dataset.root={root}: the class folders differ, only in test/: wasp"),
    "few to match": (None, "objective.real_batch=19", "objective.real_batch=19: class ant has only 18 training images"),
    "few to draw": (
        None,
        "mode=random_subset memory.images_per_class=19",
        "memory.images_per_class=19: class ant has only 18 training images",
    ),
}
FOLDER = (*TINY, "dataset=folder", "dataset.image_size=8", "objective.real_batch=8", "memory=ipc10")


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_images_get_one_line_that_names_them(tmp_path, name):
    damage, arguments, line = BAD_DATA[name]
    root = tree(tmp_path / "images")
    if damage:
        damage(root)
    outcome = run(tmp_path, *FOLDER, f"dataset.root={root}", *arguments.split())
    assert outcome.code == 2
    assert outcome.complaint.startswith(line.format(root=root))
    assert not [name for name in outcome.files if name.endswith(("result.json", "safetensors"))]
