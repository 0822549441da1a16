"""What every objective that compares real and synthetic images class by class must satisfy.

Each is compared with a plain implementation of its definition: a loop over classes and layers of the network itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.compute import Compute
from hmn.errors import ConfigError
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.distance import all_weights
from hmn.objectives.distribution import CE_FACTOR, IMAGES, distribution_step
from hmn.objectives.gradient import MatchingStep, matching_step

DEVICE = torch.device("cpu")
FACTOR = 35.0  # IDM: 0.5 times an accuracy of 70 percent
# The distance of one class from (network, real images, synthetic images, label)
Plain = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def gradients(network: nn.Module, images: Tensor, label: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(network(images), label.expand(len(images)))
    found = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
    return {name: value for (name, _), value in zip(network.named_parameters(), found, strict=True)}


def plain_idc(network: nn.Module, real: Tensor, synthetic: Tensor, label: Tensor) -> Tensor:
    """IDC: squared differences of the convolutions' gradients."""
    of_real, of_synthetic = gradients(network, real, label), gradients(network, synthetic, label)
    convolutions = [f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    return sum(((of_synthetic[name] - of_real[name].detach()) ** 2).sum() for name in convolutions)


def plain_dc(network: nn.Module, real: Tensor, synthetic: Tensor, label: Tensor) -> Tensor:
    """DC: one minus the cosine, row by row, of convolutions (out, in * k * k) and the classifier (out, in)."""
    of_real, of_synthetic = gradients(network, real, label), gradients(network, synthetic, label)
    total = torch.zeros((), dtype=synthetic.dtype)
    for name, value in of_synthetic.items():
        other = of_real[name].detach()
        if value.ndim == 4:
            value, other = value.reshape(len(value), -1), other.reshape(len(other), -1)
        elif value.ndim == 1:
            continue  # biases and norms
        for a, b in zip(value, other, strict=True):
            total = total + 1 - (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt() + 1e-6)
    return total


def plain_dm(network: nn.Module, real: Tensor, synthetic: Tensor, label: Tensor) -> Tensor:
    """DM: the squared distance between the mean features."""
    kept = []
    hook = network.classifier.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    network(real), network(synthetic)
    hook.remove()
    return ((kept[0].detach().mean(0) - kept[1].mean(0)) ** 2).sum()


def plain_idm(network: nn.Module, real: Tensor, synthetic: Tensor, label: Tensor) -> Tensor:
    """IDM: DM plus the cross-entropy of the synthetic images, weighted by a factor of the network."""
    loss = F.cross_entropy(network(synthetic), label.expand(len(synthetic)))
    return plain_dm(network, real, synthetic, label) + FACTOR * loss


def with_factor(images: Tensor) -> dict[str, Tensor]:
    return {IMAGES: images, CE_FACTOR: torch.full((len(images),), FACTOR, dtype=images.dtype)}


@dataclass(frozen=True)
class Objective:
    step: Callable[[nn.Module, Compute], MatchingStep]
    plain: Plain
    stored: float  # value for a network and images filled with ramps
    real_side: Callable[[Tensor], Tensor | dict[str, Tensor]] = lambda images: images
    zero: bool = False  # whether it is exactly zero on equal images
    only: frozenset[str] = frozenset({"loop", "compiled"})  # the available forms


OBJECTIVES = {
    "gradient_matching": Objective(
        lambda network, compute: matching_step(network, "mse", compute),
        plain_idc,
        stored=2.749388528,
        zero=True,
        only=frozenset({"loop", "compiled", "r_operator"}),
    ),
    "dc": Objective(
        lambda network, compute: matching_step(network, "cosine", compute, all_weights),
        plain_dc,
        stored=14.61230855,
    ),
    "distribution_matching": Objective(distribution_step, plain_dm, stored=0.5414962481, zero=True),
    "idm": Objective(distribution_step, plain_idm, stored=385.2601529, real_side=with_factor),
}
CASES = [(name, form) for name, objective in OBJECTIVES.items() for form in sorted(objective.only)]


def compute(form: str = "loop", classes_per_call: int = 1) -> Compute:
    return Compute(DEVICE, matching=form, classes_per_call=classes_per_call)


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters()}


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, and for three of its five classes real images (3, 6, ...), synthetic ones (3, 4, ...) and labels."""
    stream = torch.Generator().manual_seed(1)
    network = initialise(ConvNet(3, 5, 8, width=4, depth=2), stream).to(dtype)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=stream)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=stream)
    real, synthetic = (torch.randn(3, n, 3, 8, 8, generator=stream).to(dtype) for n in (6, 4))
    return network, real, synthetic, torch.tensor([3, 0, 4])


def run(name: str, form: str, per_call: int, network: nn.Module, real: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    objective = OBJECTIVES[name]
    width = 1 if form == "loop" else per_call
    step = objective.step(network, compute(form, width))
    return step(parameters_of(network), objective.real_side(real), *rest)


def by_definition(
    name: str, network: nn.Module, real: Tensor, synthetic: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The distance and the pixel gradients by plain autograd, class by class."""
    pixels = synthetic.clone().requires_grad_()
    total = sum(OBJECTIVES[name].plain(network, real[k], pixels[k], labels[k]) for k in range(len(labels)))
    return total.detach(), torch.autograd.grad(total, pixels)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("per_call", [1, 2])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_distance_and_pixel_gradient_are_those_of_the_definition(name, form, per_call, dtype, tolerance):
    network, real, synthetic, labels = problem(dtype)
    expected, expected_gradient = by_definition(name, network, real, synthetic, labels)
    parts, gradient = run(name, form, per_call, network, real, synthetic, labels)
    assert parts.ndim == 1 and gradient.shape == synthetic.shape
    torch.testing.assert_close(parts.sum(), expected, rtol=tolerance, atol=0)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance * scale)
    assert gradient.abs().amax((2, 3, 4)).min() > 1e-3 * scale  # every image has a gradient


def ramp(like: Tensor, reach: float) -> Tensor:
    """Values from -reach to reach in storage order, scrambled by a fixed stride so that rows differ."""
    n = like.numel()
    return ((torch.arange(n) * 7919 % n).to(like.dtype) / max(n - 1, 1) * 2 - 1).view(like.shape) * reach


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_distance_on_ramps_is_the_stored_one(name):
    network, real, synthetic, labels = problem()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(ramp(parameter, 0.5))
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight += 1
    parts, _ = run(name, "loop", 1, network, ramp(real, 2.0), ramp(synthetic, 1.0), labels)
    assert float(parts.sum()) == pytest.approx(OBJECTIVES[name].stored, rel=1e-7)


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in CASES if OBJECTIVES[name].zero])
def test_equal_images_are_at_distance_zero(name, form):
    network, real, _, labels = problem()
    parts, gradient = run(name, form, 1, network, real, real.clone(), labels)
    assert parts.abs().max() < 1e-9 and gradient.abs().max() < 1e-9


@pytest.mark.parametrize(("name", "form"), CASES)
def test_an_images_order_and_repetition_change_nothing(name, form):
    """All distances are means over images, so a batch with every image twice is the same batch."""
    network, real, synthetic, labels = problem()
    order = torch.tensor([2, 0, 3, 1] * 2)
    parts, gradient = run(name, form, 1, network, real, synthetic, labels)
    again, repeated = run(name, form, 1, network, real.flip(1), synthetic[:, order], labels)
    torch.testing.assert_close(again, parts, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(repeated * 2, gradient[:, order], rtol=0, atol=1e-9 * float(gradient.abs().max()))


@pytest.mark.parametrize(("name", "form"), CASES)
def test_nothing_that_is_given_changes_and_nothing_returned_is_attached(name, form):
    network, *given = problem()
    before = [value.clone() for value in given]
    weights = {name: value.clone() for name, value in parameters_of(network).items()}
    returned = run(name, form, 2, network, *given)
    assert all(torch.equal(value, kept) for value, kept in zip(given, before, strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in network.named_parameters())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(value.requires_grad for value in returned)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_bf16_is_finite_and_points_where_fp32_does(name, form):
    network, real, synthetic, labels = problem(torch.float32)
    objective = OBJECTIVES[name]
    _, exact = run(name, form, 1, network, real, synthetic, labels)
    step = objective.step(network, Compute(DEVICE, precision="bf16", matching=form))
    parts, gradient = step(parameters_of(network), objective.real_side(real), synthetic, labels)
    assert parts.dtype == gradient.dtype == torch.float32
    assert parts.isfinite().all() and gradient.isfinite().all() and not torch.equal(gradient, exact)
    assert F.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if "r_operator" not in objective.only])
def test_the_written_out_form_is_refused_where_it_has_no_formula(name):
    network, *_ = problem()
    with pytest.raises(ConfigError, match="compute.matching=r_operator: must be loop or compiled"):
        OBJECTIVES[name].step(network, compute("r_operator"))
