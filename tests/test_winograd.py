"""Winograd's convolution against PyTorch's, and where a compiled step uses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.func import grad

from hmn import winograd
from hmn.compute import Compute
from hmn.network_update import Batch, training_step
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet

SIDES = st.integers(1, 3).map(lambda tiles: 4 * tiles)
CHANNELS = st.integers(1, 5)
ONCE = ([1, 1], [1, 1], [1, 1])  # stride, padding, dilation
CPU = Compute(torch.device("cpu"))

compiled = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kron(matrix: winograd.Matrix) -> Tensor:
    factors = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(factors, factors)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """The transforms of tiles from now on, which are not compiled; convolutions of 32 channels are wide enough."""
    seen: list[Callable] = []

    def uncompiled(transform: Callable) -> Callable:
        seen.append(transform)
        return transform

    monkeypatch.setattr(winograd, "_compiled", uncompiled)
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 32)
    return seen


# Formulas, in float64


@pytest.mark.parametrize(
    ("transform", "matrix", "values"),
    [
        (winograd._of_inputs, winograd.INPUTS, noise(1, 1, 1, 6, 6, 7)),
        (winograd._of_products, winograd.OUTPUTS, noise(1, 1, 1, 6, 6, 7)),
        (winograd._of_gradients, winograd.OUTPUTS_TRANSPOSED, noise(1, 1, 1, 4, 4, 7)),
    ],
)
def test_a_transform_is_the_product_with_its_matrix_along_both_axes(transform, matrix, values):
    expected = kron(matrix) @ values.reshape(-1, 7)
    torch.testing.assert_close(transform(values).reshape(-1, 7), expected, rtol=0, atol=1e-12)


@given(st.integers(1, 3), CHANNELS, CHANNELS, SIDES, SIDES, st.booleans(), st.integers(1, 12))
def test_it_is_the_convolution_and_has_its_derivatives(n, c, k, height, width, last, tiles):
    layout = torch.channels_last if last else torch.contiguous_format
    images, gradient = (noise(n, channels, height, width, seed=channels) for channels in (c, k))
    images, gradient = images.contiguous(memory_format=layout), gradient.contiguous(memory_format=layout)
    weight, bias = noise(k, c, 3, 3), noise(k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_compiled", lambda transform: transform)
        patch.setattr(winograd, "TILES", tiles)
        found = winograd.convolve(images, weight, bias, False)
        of_images = winograd.convolve(gradient, weight, None, True)
        of_weight, of_bias = winograd.weight_gradient(images, gradient), winograd.bias_gradient(gradient)
    for tensor in (images, weight, bias):
        tensor.requires_grad_()
    expected = F.conv2d(images, weight, bias, padding=1)
    derivatives = torch.autograd.grad(expected, (images, weight, bias), gradient)
    for one, other in zip((found, of_images, of_weight, of_bias), (expected, *derivatives), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-11)


def test_images_are_taken_in_parts_of_so_many_tiles(monkeypatch):
    monkeypatch.setattr(winograd, "TILES", 9)
    assert [len(part) for part in winograd._parts(noise(5, 2, 8, 8))] == [2, 2, 1]  # of 4 tiles each
    assert [len(part) for part in winograd._parts(noise(2, 2, 16, 16))] == [1, 1]  # of 16
    assert [len(part) for part in winograd._parts(noise(5, 2, 4, 4))] == [5]


def small_transform(tiles: Tensor) -> Tensor:
    return torch.stack(winograd._along_both_axes(((1, 2), (0, -1), (3, 0)), tiles), dim=3)


@pytest.mark.slow
@compiled
@torch._dynamo.config.patch(cache_size_limit=1)
def test_a_compiled_transform_takes_tiles_of_any_number_and_layout():
    """It needs more than one version for these, and PyTorch gives up on more than the limit says."""
    tiles = noise(3, 2, 4, 2, 2, 8)
    for part in (tiles, tiles[:2, ..., :3], tiles[:1], tiles[:, :1], tiles.mT.contiguous().mT):
        expected = small_transform(part)
        torch.testing.assert_close(winograd._compiled(small_transform)(part), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_it_replaces_the_convolution_with_its_arguments(calls, transposed, biased):
    images, weight = noise(2, 32, 8, 8, dtype=torch.float32), noise(32, 33, 3, 3, dtype=torch.float32) / 17
    weight = weight if transposed else weight.transpose(0, 1).contiguous()
    bias = noise(33, dtype=torch.float32) if biased else None
    arguments = images, weight, bias, *ONCE, transposed, [0, 0], 1
    found = winograd.convolution(*arguments)
    torch.testing.assert_close(found, torch.ops.aten.convolution(*arguments), rtol=0, atol=1e-4)
    assert calls == [winograd._of_inputs, winograd._of_products]
    assert winograd.convolution(*arguments[:-2], [1, 0], 1) is NotImplemented


@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False], [False, False, True], [True] * 3])
def test_it_replaces_the_derivatives_that_are_wanted_and_no_others(calls, wanted):
    images, gradient = noise(2, 32, 8, 8, dtype=torch.float32), noise(2, 33, 8, 8, dtype=torch.float32)
    arguments = gradient, images, noise(33, 32, 3, 3, dtype=torch.float32) / 17, [33], *ONCE, False, [0, 0], 1, wanted
    found = winograd.convolution_backward(*arguments)
    expected = torch.ops.aten.convolution_backward(*arguments)
    assert [value is not None for value in found] == wanted
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert len(calls) == 2 * sum(wanted[:2])
    transposed = *arguments[:7], True, *arguments[8:]
    assert winograd.convolution_backward(*transposed) is NotImplemented


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (4, 4)])
def test_a_graph_is_told_the_shape_and_layout_of_an_operator_s_result(calls, height, width, last):
    layout = torch.channels_last if last else torch.contiguous_format
    images, gradient = (noise(2, channels, height, width).contiguous(memory_format=layout) for channels in (3, 5))
    for operator, arguments in (
        (winograd.convolve, (images, noise(5, 3, 3, 3), noise(5), False)),
        (winograd.convolve, (gradient, noise(5, 3, 3, 3), None, True)),
        (winograd.weight_gradient, (images, gradient)),
        (winograd.bias_gradient, (gradient,)),
    ):
        torch.library.opcheck(operator, arguments)


def test_in_fp32_its_error_is_less_than_twenty_times_the_direct_one_s(calls):
    images, weight = noise(4, 128, 16, 16), noise(128, 128, 3, 3)
    exact = F.conv2d(images, weight, padding=1)
    direct = (F.conv2d(images.float(), weight.float(), padding=1) - exact).std()
    own = (winograd.convolve(images.float(), weight.float(), None, False) - exact).std()
    assert direct < own < 20 * direct
    assert own < 1e-5 * exact.std()


# Where it is used


def test_compiled_code_of_another_version_of_the_file_is_not_taken(monkeypatch, tmp_path):
    key = winograd._Named().__reduce__()
    assert winograd._Named(other=1).__reduce__() == key
    monkeypatch.setattr(winograd, "__file__", str(tmp_path / "winograd.py"))
    (tmp_path / "winograd.py").write_text("# another version")
    assert winograd._Named().__reduce__() != key


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"images": (1, 64, 4, 4)}, True),
        ({"images": (1, 64, 8, 6)}, False),
        ({"images": (1, 64, 6, 8)}, False),
        ({"weight": (64, 64, 1, 1)}, False),
        ({"weight": (64, 64, 5, 5)}, False),
        ({"weight": (31, 64, 3, 3)}, False),
        ({"weight": (64, 31, 3, 3)}, False),
        ({"weight": (32, 32, 3, 3)}, True),
        ({"stride": [2, 2]}, False),
        ({"padding": [0, 0]}, False),
        ({"dilation": [1, 2]}, False),
        ({"groups": 2}, False),
        ({"dtype": torch.bfloat16}, False),
        ({"dtype": torch.float64}, False),
        ({"images": (1, 64, 8), "weight": (64, 64, 3), "stride": [1], "padding": [1], "dilation": [1]}, False),
    ],
)
def test_it_is_for_wide_maps_of_whole_tiles_in_fp32(calls, changed, fits):
    usual = {"images": (1, 64, 8, 8), "weight": (64, 64, 3, 3), "dtype": torch.float32}
    usual |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    given = usual | changed
    dtype = given.pop("dtype")
    images, weight = (torch.empty(given.pop(name), dtype=dtype) for name in ("images", "weight"))
    assert winograd.fits(images, weight, **given) == fits


def loss(weight: Tensor, pixels: Tensor) -> Tensor:
    return F.conv2d(pixels, weight, padding=1).tanh().square().sum()


def derivative_of_a_distance(pixels: Tensor, weight: Tensor) -> Tensor:
    """Nested, as in gradient matching: of the squared gradient of ``weight`` with respect to ``pixels``."""
    return grad(lambda moved: grad(loss)(weight, moved).square().mean())(pixels)


@pytest.mark.slow
@compiled
def test_a_compiled_second_derivative_uses_it_and_is_the_direct_one(calls):
    pixels, weight = noise(3, 32, 8, 8, dtype=torch.float32), noise(33, 32, 3, 3, dtype=torch.float32) / 17
    expected = derivative_of_a_distance(pixels.double(), weight.double())
    counters.clear()
    # The direct one first: it must not be taken from a cache for the other.
    for used in (False, True):
        step = Compute(CPU.device, compiled=True, winograd=used).maybe_compile(derivative_of_a_distance)
        found = step(pixels, weight).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert bool(calls) == used
    assert counters["inductor"]["fxgraph_cache_bypass"] == 0  # compiled code is kept for later runs


@pytest.mark.slow
@compiled
def test_a_compiled_training_step_uses_it_forward_and_backward(calls, monkeypatch):
    layouts, parts = [], winograd._parts

    def noted(maps: Tensor) -> tuple[Tensor, ...]:
        layouts.append(maps.is_contiguous(memory_format=torch.channels_last))
        return parts(maps)

    monkeypatch.setattr(winograd, "_parts", noted)
    own = initialise(ConvNet(3, 2, 16, width=32, depth=2), torch.Generator().manual_seed(1))
    parameters = {name: value.detach() for name, value in own.named_parameters()}
    labels = torch.tensor([0, 1, 1])
    batch = {}, Batch(noise(3, 3, 16, 16, dtype=torch.float32), labels, labels, torch.ones(())), torch.ones(3)
    _, expected, _ = training_step(own, CPU)(parameters, *batch)
    _, found, _ = training_step(own, Compute(CPU.device, compiled=True, winograd=True))(parameters, *batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-5)
    assert set(calls) == {winograd._of_inputs, winograd._of_products, winograd._of_gradients}
    assert calls.count(winograd._of_products) == 2  # the second convolution's outputs, and the derivative of its inputs
    assert layouts == [True] * 6  # the maps that go into and come out of these two, and both of the weight's derivative
