"""A block's passes against autograd, and the GPU's kernels, interpreted, against the plain passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn.objectives import block
from hmn.objectives.block import PLAIN, Passes
from tests.interpreted import interpreted

ROOT = Path(__file__).parents[2]
EPSILON = 1e-5
NAMES = ("p", "d_y", "p_dot", "d_y_dot")


def draw(n: int, channels: int, height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    whole, halved = (n, channels, height, width), (n, channels, height // 2, width // 2)
    shapes = {"y": whole, "y_dot": whole, "d_p": halved, "d_p_dot": halved, "gamma": (channels,), "beta": (channels,)}
    made = {name: torch.randn(shape, generator=stream, dtype=torch.float64) for name, shape in shapes.items()}
    made["y"] += 3  # so that a mean is missed where it is left out
    return made


def run(passes: Passes, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """p, d_y, p_dot and d_y_dot."""
    p, seen = passes.forward(given["y"], given["gamma"], given["beta"], EPSILON)
    d_y, back = passes.backward(given["d_p"], seen)
    p_dot, moved = passes.tangent_forward(given["y_dot"], seen)
    return p, d_y, p_dot, passes.tangent_backward(given["d_p_dot"], seen, back, moved)


def plain_block(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.avg_pool2d(F.instance_norm(y, weight=gamma, bias=beta, eps=EPSILON).relu(), 2)


@pytest.mark.parametrize("sides", [(8, 8), (7, 7), (4, 6), (5, 2)])
def test_the_passes_are_autograd_s_derivatives(sides):
    """Tangents along y_dot and d_p_dot, of the block and of its backward pass."""
    drawn = draw(3, 5, *sides)

    def both(y: Tensor, d_p: Tensor) -> tuple[Tensor, Tensor]:
        y = y if y.requires_grad else y.detach().requires_grad_()
        p = plain_block(y, drawn["gamma"], drawn["beta"])
        return p, torch.autograd.grad(p, y, d_p, create_graph=True)[0]

    along = drawn["y_dot"], drawn["d_p_dot"]
    expected, tangents = torch.autograd.functional.jvp(both, (drawn["y"], drawn["d_p"]), along)
    found = run(PLAIN, drawn)
    for name, one, other in zip(NAMES, found, (expected[0], expected[1], *tangents), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


# The kernels of a GPU


@pytest.fixture
def kernels():
    from hmn.objectives import block_triton

    return block_triton


LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda maps: maps.contiguous(memory_format=torch.channels_last),
    "part of a larger tensor": lambda maps: torch.stack([maps, -maps], 2)[:, :, 0],
    "pixels without a common stride": lambda maps: F.pad(maps, (0, 3))[..., : maps.shape[3]],
}


def laid_out(drawn: dict[str, Tensor], layout: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Maps in the layout and dtype; gamma and beta are fp32 where maps are in bf16."""
    numbers = torch.float32 if dtype == torch.bfloat16 else dtype
    return {
        name: LAYOUTS[layout](value.to(dtype)) if value.ndim == 4 else value.to(numbers)
        for name, value in drawn.items()
    }


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 8, 8), (2, 4, 7, 7), (2, 3, 5, 6), (2, 3, 6, 3), (1, 200, 2, 2), (1, 3, 16, 16)]
)
def test_kernels_equal_the_plain_passes(kernels, shape, layout):
    drawn = draw(*shape)
    expected = run(PLAIN, drawn)
    found = run(kernels.TRITON, laid_out(drawn, layout))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@interpreted
@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
def test_kernels_equal_the_plain_passes_for_any_shape(n, channels, height, width, seed):
    from hmn.objectives import block_triton

    drawn = draw(n, channels, height, width, seed)
    for one, other in zip(run(block_triton.TRITON, drawn), run(PLAIN, drawn), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The interpreter cuts bf16 off, where a GPU rounds: two units of its seven bits
    [(torch.float32, 1e-5), (torch.bfloat16, 2 * 2**-7)],
)
def test_kernels_return_the_dtype_of_y_and_compute_in_fp32(kernels, dtype, tolerance):
    given = laid_out(draw(2, 5, 8, 8), "channels last", dtype)
    expected = run(PLAIN, {name: value.double() for name, value in given.items()})
    for one, other in zip(run(kernels.TRITON, given), expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * 1e-2)
    _, mean, _ = kernels.forward(given["y"], given["gamma"], given["beta"], EPSILON)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), given["y"].double().mean((2, 3)), rtol=1e-5, atol=0)


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_what_kernels_return_is_laid_out_as_y(kernels, layout):
    given = laid_out(draw(2, 5, 8, 6), layout)
    for maps in run(kernels.TRITON, given):
        assert maps.stride() == LAYOUTS[layout](maps).stride()


@interpreted
@pytest.mark.parametrize("of_dot", [0, 1, None])
@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_classes_together_are_classes_one_by_one(kernels, axis, of_dot):
    """Whichever axis is the class's, and if classes share some of the maps."""
    each = [draw(2, 3, 6, 4, seed) for seed in range(4)]
    axes = {"y": axis, "y_dot": of_dot, "d_p": axis, "d_p_dot": 0}
    shared = {name: each[0][name] for name in each[0] if axes.get(name) is None}
    axes = {name: where for name, where in axes.items() if where is not None}
    stacked = {name: torch.stack([one[name] for one in each], where) for name, where in axes.items()}

    def of_class(maps: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return run(kernels.TRITON, maps | shared)

    found = torch.vmap(of_class, in_dims=(axes,))(stacked)
    for k, one in enumerate(each):
        for together, alone in zip(found, run(PLAIN, one | shared), strict=True):
            torch.testing.assert_close(together[k], alone, rtol=1e-12, atol=1e-12)


@interpreted
def test_every_class_with_a_norm_of_its_own_is_refused(kernels):
    drawn = draw(2, 3, 6, 4)
    with pytest.raises(NotImplementedError, match="gamma and beta must be those of all classes"):
        torch.vmap(lambda gamma: run(kernels.TRITON, drawn | {"gamma": gamma}))(drawn["gamma"].expand(4, 3))


@interpreted
def test_the_compiler_is_told_what_kernels_return(kernels):
    """Shapes, dtypes, strides, and that nothing is written to."""
    for layout in ("contiguous", "channels last"):
        given = laid_out(draw(2, 3, 6, 4), layout)
        y, d_p, parameters = given["y"], given["d_p"], (given["gamma"], given["beta"])
        _, *of_forward = kernels.forward(y, *parameters, EPSILON)
        _, *of_backward = kernels.backward(d_p, y, *parameters, *of_forward)
        calls = {
            kernels.forward: (y, *parameters, EPSILON),
            kernels.backward: (d_p, y, *parameters, *of_forward),
            kernels.tangent_forward: (y, y, *parameters, *of_forward),
            kernels.tangent_backward: (d_p, d_p, y, y, *parameters, *of_forward, *of_backward, *of_backward),
        }
        for operator, arguments in calls.items():
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@interpreted
def test_planes_that_no_program_holds_are_left_to_the_compiler(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST", 36)
    monkeypatch.setattr(kernels, "_launch", None)  # calling it fails
    drawn = draw(1, 2, 6, 7)
    for one, other in zip(run(kernels.TRITON, drawn), run(PLAIN, drawn), strict=True):
        assert torch.equal(one, other)
    _, seen = kernels.TRITON.forward(drawn["y"], drawn["gamma"], drawn["beta"], EPSILON)
    assert isinstance(seen, block.Forward)
    with pytest.raises(TypeError, match="NoneType"):
        run(kernels.TRITON, draw(1, 2, 6, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (2, 4, 7, 7), (2, 128, 32, 32), (1, 3, 64, 64)])
def test_kernels_equal_the_plain_passes_on_a_gpu(kernels, shape, layout):
    drawn = draw(*shape)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2**-7)):
        given = {name: value.cuda() for name, value in laid_out(drawn, layout, dtype).items()}
        expected = run(PLAIN, {name: value.double() for name, value in given.items()})
        for one, other in zip(run(kernels.TRITON, given), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(kernels, capability, tmp_path):
    """A multiprocessor has 65,536 registers, which a program of 512 threads may use up."""
    command = [sys.executable, "-m", "tests.objectives.compile_kernels", str(capability)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 16
    for name, used in found.items():
        assert used["registers"] <= 128 and used["spilled"] <= 128, (name, used)
    assert all(found[f"{kernel} 32"]["widest_read"] == 16 for kernel in ("_forward", "_tangent_forward"))
