"""Class chunks: results do not depend on them, and their estimated size follows the memory limit."""

from __future__ import annotations

import bisect
import math
import subprocess
import sys

import pytest
import torch

from hmn.chunks import (
    classes_per_chunk,
    decoding_bytes,
    feature_bytes,
    gradient_bytes,
    images_per_chunk,
    matching_bytes,
    saved_bytes,
)
from hmn.compute import Compute
from hmn.errors import ConfigError
from hmn.objectives.distance import all_weights
from tests.small_matching import CLASSES, PER_CLASS, build, clone_of, config, make_container, make_run


def test_saved_bytes_are_what_backward_needs():
    x, weight = torch.randn(10, 4), torch.randn(4, 4, requires_grad=True)
    # x @ w keeps x, and tanh keeps its result; the weight exists anyway and is not kept for this call
    assert saved_bytes(lambda: (x @ weight).tanh(), [weight]) == 4 * (10 * 4 + 10 * 4)


def test_decoding_keeps_something_once_and_the_same_for_every_image():
    container = make_container()
    once, each = decoding_bytes(container, "none")
    owned = list(container.parameters())
    for images in (3, 6):
        kept = saved_bytes(lambda n=images: container.decode_matched(torch.arange(n)), owned)
        assert kept == once + images * each
    assert once > 0  # the decoder's weights, summed by phase


def test_features_keep_less_than_a_gradient_and_all_weights_more_than_the_convolutions():
    network, pixels = build(), (3, 8, 8)
    features, convolutions = feature_bytes(network, pixels), matching_bytes(network, pixels)
    # At least the input of every norm and of every pooling: 4 channels at 8 x 8 and at 4 x 4.
    assert 4 * 2 * 4 * (64 + 16) <= features < convolutions
    assert matching_bytes(network, pixels, "cosine", all_weights) > matching_bytes(network, pixels, "cosine")


@pytest.mark.parametrize("changes", [{}, {"synthetic_batch": 2}, {"step_policy": "per_class"}, {"classes_per_step": 2}])
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_change_nothing_but_rounding(chunk: int, changes):
    torch.set_default_dtype(torch.float64)
    try:
        whole, parts = make_run(config(**changes)), make_run(config(**changes), chunk=chunk)
        for _ in range(3):
            (losses, norms), (other, others) = whole.run_step(), parts.run_step()
            torch.testing.assert_close(other, losses, rtol=1e-9, atol=0)
        for name, value in clone_of(whole.container).items():
            torch.testing.assert_close(clone_of(parts.container)[name], value, rtol=1e-9, atol=1e-9)
        for name, value in norms.items():
            torch.testing.assert_close(others[name], value, rtol=1e-9, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


class Holding(Compute):
    """A device on which 1 GiB is held already."""

    def current_bytes(self) -> int:
        return 2**30


def chunk_for(limit: float | None, banked: bool = False, **changes) -> int:
    compute, real = Holding(torch.device("cpu")), 0 if banked else None
    return classes_per_chunk(
        make_container(), build(), config(**changes), compute, limit=limit, strategy="color_crop", real_batch=real
    )


@pytest.mark.parametrize(
    ("device", "per_call", "group", "chunk"),
    [("cuda", 1, None, 3), ("cuda", 1, 2, 2), ("cpu", 1, None, 1), ("cpu", 2, None, 2), ("cpu", 3, 2, 2)],
)
def test_without_a_limit_a_cpu_decodes_the_classes_of_a_call_at_once_and_a_gpu_many(device, per_call, group, chunk):
    compute = Compute(torch.device(device), classes_per_call=per_call)
    settings = config(classes_per_step=group)
    assert classes_per_chunk(make_container(), build(), settings, compute, limit=None, strategy="none") == chunk


def test_more_memory_means_more_classes_and_never_more_than_there_are():
    chunks = []
    for kilobytes in range(1, 2000, 40):
        try:
            chunks.append(chunk_for(1 + kilobytes / 2**20))
        except ConfigError:
            assert not chunks  # limits that are too small come before those that suffice
    assert set(chunks) == set(range(1, CLASSES + 1))
    assert chunks == sorted(chunks)


GIB = 2**30
IMAGE = 4 * 3 * 8 * 8  # bytes


@pytest.mark.parametrize(("real_bytes", "step"), [(GIB // 64, 3 * GIB / 16), (GIB // 4, 5 * GIB / 4)])
def test_a_chunk_of_classes_takes_what_the_parts_of_a_step_add_up_to(monkeypatch, real_bytes: int, step: float):
    """Three synthetic and five real images per class, two classes per call; 1 GiB is in use already."""
    monkeypatch.setattr("hmn.chunks.decoding_bytes", lambda *_: (GIB // 8, GIB // 32))
    compute = Holding(torch.device("cpu"), classes_per_call=2)
    settings = config(real_batch=5, synthetic_batch=3)

    def chunk(limit: float) -> int:
        parts = {"in_step": lambda *_: GIB // 16, "of_real": lambda *_: real_bytes}
        return classes_per_chunk(make_container(), build(), settings, compute, limit=limit, strategy="none", **parts)

    fixed, each = 3 * GIB / 8 + 2 * step, 3 * 3 * GIB / 32 + 4 * (5 + 3) * IMAGE
    least = 1 + 1.3 * (fixed + each) / GIB
    with pytest.raises(ConfigError, match=rf"must be at least {math.ceil(10 * least) / 10}: one class needs that"):
        chunk(least - 1e-6)
    assert chunk(least + 1e-6) == chunk(least + 1.3 * each / GIB - 1e-6) == 1
    assert chunk(least + 1.3 * each / GIB + 1e-6) == 2


def test_a_chunk_of_images_takes_what_a_students_step_adds_up_to(monkeypatch):
    """Seven images per step and two copies of the network; all images and their derivatives stay in memory."""
    monkeypatch.setattr("hmn.chunks.decoding_bytes", lambda *_: (GIB // 8, GIB // 32))
    monkeypatch.setattr("hmn.chunks.matching_bytes", lambda *_: GIB // 16)
    container, network, compute = make_container(), build(), Holding(torch.device("cpu"))
    parameters = sum(value.numel() for value in network.parameters())

    def chunk(limit: float) -> int:
        return images_per_chunk(container, network, compute, limit=limit, batch=7, kept=2)

    student = 7 * GIB / 16 + 4 * 2 * parameters + 2 * CLASSES * container.matched_per_class * IMAGE
    each = 1.3 * 3 * GIB / 32
    least = 1 + (1.3 * student + 1.3 * 3 * GIB / 8 + each) / GIB
    told = rf"must be at least {math.ceil(10 * least) / 10}; or lower the student's batch"
    with pytest.raises(ConfigError, match=told):
        chunk(least - 1e-6)
    assert chunk(least + 1e-6) == chunk(least + each / GIB - 1e-6) == 1
    assert chunk(least + each / GIB + 1e-6) == 2


def test_too_small_a_limit_is_refused_with_the_least_one():
    with pytest.raises(ConfigError, match=r"compute.memory_limit=1.0: must be at least 1\.\d: one class needs that"):
        chunk_for(1.0)


def test_fewer_images_per_class_need_less():
    def enough(kilobytes: int, **changes) -> bool:
        try:
            return chunk_for(1 + kilobytes / 2**20, **changes) > 0
        except ConfigError:
            return False

    def least(**changes) -> int:
        found = bisect.bisect_left(range(2000), True, key=lambda kilobytes: enough(kilobytes, **changes))
        assert 0 < found < 2000
        return found

    assert least(synthetic_batch=1) < least(synthetic_batch=PER_CLASS)
    assert least(real_batch=4) < least(real_batch=40)
    assert least(real_batch=40, banked=True) == least(real_batch=4, banked=True) < least(real_batch=4)


def test_a_gradient_keeps_of_an_image_what_its_backward_pass_needs_and_less_than_a_gradient_of_it():
    network, pixels = build(), (3, 8, 8)
    assert feature_bytes(network, pixels) < gradient_bytes(network, pixels) < matching_bytes(network, pixels)


HELD = """
import torch
from hmn.compute import Compute
cpu = Compute(torch.device("cpu"))
before, block = cpu.current_bytes(), torch.ones(32 << 20)
print(cpu.current_bytes() - before, cpu.current_bytes(), cpu.peak_bytes())
"""


def test_the_estimate_is_of_this_process():
    """It runs in its own process: memory that other tests have freed could be reused without asking the system."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    grown, now, peak = map(int, done.stdout.split())
    assert now <= 1.1 * peak  # the system updates the two counts at different moments
    assert grown == pytest.approx(4 * (32 << 20), rel=0.2)
