"""Gradient matching: metrics by hand, and all forms of the step against plain autograd and finite differences."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hmn.compute import Compute
from hmn.errors import ConfigError
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.distance import METRICS, Parameters, all_weights, convolution_weights, squared, unbiased
from hmn.objectives.gradient import FORMS, matching_step, real_gradients, stored_step
from tests.interpreted import interpreted

CPU = Compute(torch.device("cpu"))
ANY_NETWORK = [form for form in FORMS if form != "r_operator"]  # which only supports ConvNet


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def convnet(dtype: torch.dtype = torch.float64, *, width: int = 4, depth: int = 3) -> nn.Module:
    return initialise(ConvNet(3, 5, 8, width=width, depth=depth), generator()).to(dtype)


def batches(dtype: torch.dtype = torch.float64, *, channels: int = 3, real: int = 7, synthetic: int = 4):
    """Real images and labels, synthetic images and labels, of different counts and mixed classes."""
    stream = generator(1)
    images = [torch.randn(n, channels, 8, 8, generator=stream).to(dtype) for n in (real, synthetic)]
    labels = [torch.randint(5, (n,), generator=stream) for n in (real, synthetic)]
    return images[0], labels[0], images[1], labels[1]


def one_class(form: str, network: nn.Module, metric: str, compute: Compute = CPU):
    """The step as a function of (parameters, real, real labels, synthetic, synthetic labels)."""
    gradients, match = FORMS[form](network, metric, compute)
    return lambda parameters, real, labels, *synthetic: match(
        parameters, gradients(parameters, real, labels), *synthetic
    )


# Metrics

LAYER = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(2, 1, 1, 2)  # two output channels
OTHER = torch.tensor([[0.0, 0.0], [1.0, 6.0]]).view(2, 1, 1, 2)


def test_mse_is_the_summed_squared_difference():
    assert METRICS["mse"](LAYER, OTHER) == 1 + 4 + 4 + 4


def test_l1_is_the_summed_absolute_difference():
    assert METRICS["l1"](LAYER, OTHER) == 1 + 2 + 2 + 2


def test_cosine_is_summed_over_output_channels():
    # IDC: 1 - <a, b> / (|a||b| + 1e-6); a channel without a gradient has cosine 0.
    expected = (1 - 0) + (1 - (3 * 1 + 4 * 6) / (5 * 37**0.5 + 1e-6))
    torch.testing.assert_close(METRICS["cosine"](LAYER, OTHER), torch.tensor(expected), rtol=1e-6, atol=0)


def test_cosine_takes_all_inputs_and_taps_of_an_output_channel_as_one_vector():
    stream = generator()
    a, b = (torch.randn(3, 2, 3, 3, generator=stream, dtype=torch.float64) for _ in range(2))
    expected = sum(1 - F.cosine_similarity(x.flatten(), y.flatten(), dim=0, eps=0) for x, y in zip(a, b, strict=True))
    torch.testing.assert_close(METRICS["cosine"](a, b), expected, rtol=0, atol=1e-5)  # for the divisor's epsilon


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_is_symmetric(metric):
    assert METRICS[metric](LAYER, OTHER) == METRICS[metric](OTHER, LAYER)


# What is matched


def test_only_the_three_convolution_weights_of_convnet_d3_are_matched():
    matched = convolution_weights(parameters_of(convnet()))
    assert list(matched) == ["body.0.weight", "body.4.weight", "body.8.weight"]


def test_dc_matches_the_classifier_too_but_neither_biases_nor_norms():
    matched = all_weights(parameters_of(convnet()))
    assert list(matched) == ["body.0.weight", "body.4.weight", "body.8.weight", "classifier.weight"]


@pytest.mark.parametrize("form", ANY_NETWORK)
def test_the_classifier_enters_where_it_is_matched(form):
    network, (real, labels, _, _) = convnet(), batches()
    gradients, match = FORMS[form](network, "mse", CPU, all_weights)
    parameters = parameters_of(network)
    layers, _ = match(parameters, gradients(parameters, real, labels), real, labels)
    assert layers.shape == (4,) and layers.abs().max() < 1e-9
    layers, _ = match(parameters, gradients(parameters, real, labels), real, (labels + 1) % 5)
    assert layers[3] > 1e-3


def oracle(network: nn.Module, metric: str, real: Tensor, real_labels: Tensor, synthetic: Tensor, labels: Tensor):
    """IDC's loss by plain autograd through the module: gradients of all parameters, distance of the convolutions'."""

    def distance(s: Tensor, r: Tensor) -> Tensor:
        if metric == "mse":
            return ((s - r) ** 2).sum()
        if metric == "l1":
            return (s - r).abs().sum()
        parts = []
        for a, b in zip(s, r, strict=True):
            parts.append(1 - (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt() + 1e-6))
        return sum(parts)

    def gradients(images: Tensor, labels: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(network(images), labels)
        found = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        wanted = {id(layer.weight) for layer in layers}
        return [g for g, parameter in zip(found, network.parameters(), strict=True) if id(parameter) in wanted]

    pixels = synthetic.clone().requires_grad_()
    of_real = [g.detach() for g in gradients(real, real_labels)]
    layers = [distance(s, r) for s, r in zip(gradients(pixels, labels), of_real, strict=True)]
    (pixel_gradient,) = torch.autograd.grad(sum(layers), pixels)
    return torch.stack(layers).detach(), pixel_gradient


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_distance_per_layer_and_pixel_gradient_are_those_of_plain_autograd(form, metric):
    network, batch = convnet(), batches()
    expected, expected_gradient = oracle(network, metric, *batch)
    layers, gradient = one_class(form, network, metric)(parameters_of(network), *batch)
    assert layers.shape == (3,)
    assert gradient.shape == (4, 3, 8, 8)
    torch.testing.assert_close(layers, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)
    assert gradient.abs().amax((1, 2, 3)).min() > 1e-4  # far above the tolerance, for every image


@pytest.mark.parametrize("metric", ["mse", "l1"])
@pytest.mark.parametrize("form", FORMS)
def test_the_distance_of_a_batch_to_itself_is_zero(form, metric):
    network, (real, labels, _, _) = convnet(), batches()
    layers, gradient = one_class(form, network, metric)(parameters_of(network), real, labels, real.clone(), labels)
    assert layers.abs().max() < 1e-9
    if metric == "mse":
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_the_distance_does_not_depend_on_the_order_or_repetition_of_images(form):
    network, (real, labels, _, _) = convnet(), batches()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4] * 2)  # the loss is a mean, so every image twice is the same batch
    layers, _ = one_class(form, network, "mse")(parameters_of(network), real, labels, real[order], labels[order])
    assert layers.abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_only_the_classifier_has_does_not_enter(form):
    """With dead ReLUs all convolution gradients vanish, whatever the gradients of biases, norms and classifier."""
    network, (real, labels, synthetic, _) = convnet(), batches()
    parameters = parameters_of(network)
    parameters["body.9.weight"].zero_()  # the last norm
    parameters["body.9.bias"].fill_(-1)
    layers, _ = one_class(form, network, "l1")(parameters, real, labels, synthetic, torch.zeros(4, dtype=torch.int64))
    assert layers.tolist() == [0, 0, 0]


# Derivatives


class Smooth(nn.Module):
    """A network without kinks, so that finite differences are exact to their order everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.classifier = nn.Linear(2 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.avg_pool2d(torch.tanh(self.second(torch.tanh(self.first(images)))), 2)
        return self.classifier(hidden.flatten(1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", ANY_NETWORK)
def test_pixel_gradient_agrees_with_finite_differences(form, metric):
    network = initialise(Smooth(), generator(2)).double()
    stream = generator(3)
    real, synthetic = (torch.randn(2, 1, 8, 8, generator=stream, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 2])
    step = partial(one_class(form, network, metric), parameters_of(network), real, labels)
    _, gradient = step(synthetic, labels)
    direction = torch.randn(synthetic.shape, generator=stream, dtype=torch.float64)

    def along(distance: float) -> float:
        return float(step(synthetic + distance * direction, labels)[0].sum())

    h = 5e-3  # fp32 logits need a step this large; at fourth order it is still exact enough
    numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    assert numeric == pytest.approx(float((gradient * direction).sum()), rel=1e-4)
    assert abs(numeric) > 1e-3


# The step in its context


@pytest.mark.parametrize("form", FORMS)
def test_the_network_gives_the_architecture_only(form):
    network, batch = convnet(), batches()
    parameters = parameters_of(network)
    before = one_class(form, network, "mse")(parameters, *batch)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(torch.nan)
    after = one_class(form, network, "mse")(parameters, *batch)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None and parameter.isnan().all() for parameter in network.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_a_step_is_given_changes_and_nothing_it_returns_is_attached(form):
    network, batch = convnet(), batches()
    parameters = parameters_of(network)
    kept, kept_batch = {name: value.clone() for name, value in parameters.items()}, [part.clone() for part in batch]
    returned = one_class(form, network, "mse")(parameters, *batch)
    assert all(torch.equal(value, kept[name]) for name, value in parameters.items())
    assert all(torch.equal(part, other) for part, other in zip(batch, kept_batch, strict=True))
    assert not any(value.requires_grad for value in (*parameters.values(), *batch, *returned))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_finite_and_points_where_fp32_does(form, metric):
    network, batch = convnet(torch.float32, width=8, depth=2), batches(torch.float32, real=32, synthetic=8)
    parameters = parameters_of(network)
    exact, exact_gradient = one_class(form, network, metric)(parameters, *batch)
    bf16 = Compute(torch.device("cpu"), precision="bf16")
    layers, gradient = one_class(form, network, metric, bf16)(parameters, *batch)
    assert layers.dtype == gradient.dtype == torch.float32
    assert layers.isfinite().all() and gradient.isfinite().all()
    assert not torch.equal(gradient, exact_gradient)  # the convolutions did run in bf16
    assert F.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > 0.98
    torch.testing.assert_close(layers, exact, rtol=0.1, atol=0)


# All classes of a step


def classes(depth: int, size: int, *, dtype: torch.dtype = torch.float64, k: int = 3):
    """A ConvNet whose norms are not the identity, its parameters, and (real, synthetic, labels) of k classes."""
    stream = generator(4)
    network = initialise(ConvNet(3, 5, size, width=4, depth=depth), stream).to(dtype)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=stream)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=stream)
    real, synthetic = (torch.randn(k, n, 3, size, size, generator=stream).to(dtype) for n in (5, 4))
    return network, parameters_of(network), real, synthetic, torch.tensor([3, 0, 4][:k])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("depth", "size"), [(3, 8), (4, 16), (2, 7), (3, 28)])  # pooling truncates the side 7
@pytest.mark.parametrize("per_call", [1, 2, 3])
@pytest.mark.parametrize("form", ["compiled", "r_operator"])
def test_every_form_and_number_of_classes_per_call_equals_the_loop(form, per_call, depth, size, metric):
    network, parameters, real, synthetic, labels = classes(depth, size)
    layers, gradient = matching_step(network, metric, CPU)(parameters, real, synthetic, labels)
    assert layers.shape == (depth,) and gradient.shape == synthetic.shape
    compute = Compute(torch.device("cpu"), matching=form, classes_per_call=per_call)
    found = matching_step(network, metric, compute)(parameters, real, synthetic, labels)
    torch.testing.assert_close(found[0], layers, rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1], gradient, rtol=0, atol=1e-9 * float(gradient.abs().max()))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("depth", "size"), [(3, 8), (4, 16)])
@pytest.mark.parametrize("form", ["compiled", "r_operator"])
def test_every_form_equals_the_loop_in_fp32_too(form, depth, size, metric):
    network, parameters, real, synthetic, labels = classes(depth, size, dtype=torch.float32)
    expected = matching_step(network, metric, CPU)(parameters, real, synthetic, labels)
    found = matching_step(network, metric, Compute(torch.device("cpu"), matching=form))(
        parameters, real, synthetic, labels
    )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4 * float(expected[1].abs().max()))


@interpreted
@pytest.mark.parametrize(("depth", "size"), [(3, 8), (2, 7), (3, 28)])
@pytest.mark.parametrize("per_call", [1, 3])
def test_a_step_with_a_gpu_s_kernels_equals_the_loop(per_call, depth, size):
    network, parameters, real, synthetic, labels = classes(depth, size)
    expected = matching_step(network, "mse", CPU)(parameters, real, synthetic, labels)
    compute = Compute(torch.device("cpu"), matching="r_operator", blocks="triton", classes_per_call=per_call)
    found = matching_step(network, "mse", compute)(parameters, real, synthetic, labels)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9 * float(expected[1].abs().max()))


@interpreted
@pytest.mark.parametrize("per_call", [1, 2])
def test_a_step_with_a_gpu_s_kernels_takes_bf16(per_call):
    network, parameters, real, synthetic, labels = classes(2, 16, dtype=torch.float32)
    low = Compute(torch.device("cpu"), "bf16", matching="r_operator", classes_per_call=per_call)
    steps = [matching_step(network, "mse", replace(low, blocks=blocks)) for blocks in ("compiler", "triton")]
    (expected, pixels), (found, pixels_found) = (step(parameters, real, synthetic, labels) for step in steps)
    assert found.dtype == pixels_found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.04, atol=0)  # the interpreter cuts bf16 off
    assert F.cosine_similarity(pixels_found.flatten(), pixels.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("per_call", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_removes_the_bias_of_a_random_part_alike(form, per_call, depth):
    network, parameters, real, synthetic, labels = classes(depth, 8, k=2)
    compute = Compute(torch.device("cpu"), matching=form, classes_per_call=1 if form == "loop" else per_call)
    found = matching_step(network, "mse", compute, share=0.3)(parameters, real, synthetic, labels)
    stored = real_gradients(network, compute)(parameters, real, labels)
    towards_stored = stored_step(network, "mse", compute, share=0.3)(parameters, stored, synthetic, labels)
    gradients = FORMS["loop"](network, "mse", CPU).gradients
    pixels = synthetic.requires_grad_()
    expected = torch.zeros(depth, dtype=torch.float64)
    for k, label in enumerate(labels):
        target = gradients(parameters, real[k], label.expand(5))
        first, second = (attached(network, parameters, half, label) for half in (pixels[k, :2], pixels[k, 2:]))
        between = [((first[name] - target[name]) * (second[name] - target[name])).sum() for name in target]
        whole = [((first[name] + second[name]) / 2 - target[name]).square().sum() for name in target]
        expected = expected + 0.7 * torch.stack(between) + 0.3 * torch.stack(whole)
    (gradient,) = torch.autograd.grad(expected.sum(), pixels)
    for layers, pixel_gradient in (found, towards_stored):
        torch.testing.assert_close(layers, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pixel_gradient, gradient, rtol=0, atol=1e-9 * float(gradient.abs().max()))


def attached(network: nn.Module, parameters: Parameters, images: Tensor, label: Tensor) -> Parameters:
    """Gradients of the convolution weights, differentiable with respect to the images."""
    weights = {name: value.clone().requires_grad_() for name, value in convolution_weights(parameters).items()}
    loss = F.cross_entropy(functional_call(network, parameters | weights, (images,)), label.expand(len(images)))
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), create_graph=True), strict=True))


@pytest.mark.parametrize(("total", "n"), [(4, 2), (6, 2), (6, 4)])
def test_over_all_draws_the_unbiased_distance_is_that_of_all_images(total, n):
    single = torch.randn(total, 7, generator=generator(1), dtype=torch.float64)
    real = torch.randn(7, generator=generator(2), dtype=torch.float64)
    draws = [torch.tensor(draw) for draw in itertools.permutations(range(total), n)]
    parts = [(single[draw[: n // 2]].mean(0), single[draw[n // 2 :]].mean(0)) for draw in draws]
    exact = squared(single.mean(0), real)
    mean = torch.stack([unbiased(*halves, real, n / total) for halves in parts]).mean()
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=0)
    variance = single.var(0).sum()
    biased = torch.stack([squared(sum(halves) / 2, real) for halves in parts]).mean()
    torch.testing.assert_close(biased, exact + variance * (1 / n - 1 / total), rtol=1e-12, atol=0)


def test_the_loop_over_classes_is_one_oracle_per_class():
    network, parameters, real, synthetic, labels = classes(3, 8)
    layers, gradient = matching_step(network, "mse", CPU)(parameters, real, synthetic, labels)
    one_by_one = [
        oracle(network, "mse", real[k], labels[k].expand(5), synthetic[k], labels[k].expand(4)) for k in range(3)
    ]
    torch.testing.assert_close(layers, sum(found[0] for found in one_by_one), rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, torch.stack([found[1] for found in one_by_one]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("per_call", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_stored_gradients_give_the_step_of_the_images_they_were_taken_on(form, per_call):
    network, parameters, real, synthetic, labels = classes(3, 8)
    compute = Compute(torch.device("cpu"), matching=form, classes_per_call=1 if form == "loop" else per_call)
    stored = real_gradients(network, compute)(parameters, real, labels)
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        name: (3, *value.shape) for name, value in convolution_weights(parameters).items()
    }
    found = stored_step(network, "cosine", compute)(parameters, stored, synthetic, labels)
    expected = matching_step(network, "cosine", CPU)(parameters, real, synthetic, labels)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_written_out_form_is_refused_for_another_network():
    with pytest.raises(ConfigError, match="compute.matching=r_operator: must be loop or compiled for Smooth"):
        FORMS["r_operator"](Smooth(), "mse", CPU)
    with pytest.raises(
        ConfigError, match="compute.matching=r_operator: must be loop or compiled for network.norm=none"
    ):
        FORMS["r_operator"](ConvNet(3, 5, 8, width=4, depth=2, norm="none"), "mse", CPU)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
@pytest.mark.parametrize("per_call", [1, 2])
@pytest.mark.parametrize(
    ("form", "blocks"),
    [("compiled", "compiler"), ("r_operator", "compiler"), pytest.param("r_operator", "triton", marks=interpreted)],
)
def test_a_compiled_step_equals_the_loop(form, blocks, per_call):
    network, parameters, real, synthetic, labels = classes(1, 8, dtype=torch.float32, k=2)
    layers, gradient = matching_step(network, "mse", CPU)(parameters, real, synthetic, labels)
    compute = Compute(torch.device("cpu"), matching=form, blocks=blocks, compiled=True, classes_per_call=per_call)
    found = matching_step(network, "mse", compute)(parameters, real, synthetic, labels)
    torch.testing.assert_close(found[0], layers, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
