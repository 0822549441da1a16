"""Gradient matching without a second backward pass, written out for ConvNet.

With V = dD/dg, the derivative of the distance D with respect to the synthetic gradient g = dL/dW, the pixel gradient is

    dD/dx = d/dx <dL/dW, V> = the directional derivative of dL/dx when W moves along V

(Pearlmutter's R-operator, Neural Computation 1994): one forward and one backward pass, each with a tangent beside it.
No operation is differentiated twice, so none has to support it, and no graph is kept. V is zero except for convolution
weights, because only those are matched. A bias before an instance norm has no effect and is left out.

Between the convolutions are the passes of :mod:`hmn.objectives.block`, which explains the names below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.nn.grad import conv2d_input, conv2d_weight

from hmn.compute import Compute, wide
from hmn.config import require
from hmn.networks.convnet import ConvNet
from hmn.objectives import block
from hmn.objectives.distance import Form, Matched, Parameters, convolution_weights, distances, parts


class _Block(NamedTuple):
    """What the later passes need from a block and the convolution before it."""

    inputs: Tensor  # of the convolution
    kept: Any  # of the block's forward pass


class _Back(NamedTuple):
    """What the tangent needs from the backward pass of a block."""

    d_y: Tensor
    kept: Any


class _Pass(NamedTuple):
    """What the tangent needs from the forward and backward pass of a batch."""

    blocks: list[_Block]
    probabilities: Tensor
    backs: list[_Back]


class _Names(NamedTuple):
    weight: str
    gamma: str
    beta: str


def r_operator(
    network: nn.Module, metric: str, compute: Compute, matched: Matched = convolution_weights, share: float = 1.0
) -> Form:
    """The R-operator as a :class:`Form`.

    Raises ``ConfigError`` if ``network`` is not a :class:`ConvNet` with instance norm, or if more than its convolutions
    are ``matched``: the tangent of the classifier's weights is not implemented.
    """
    plain = matched is convolution_weights
    require("compute.matching", plain, "r_operator", "loop or compiled if the classifier's weights are matched, too")
    written = isinstance(network, ConvNet)
    require("compute.matching", written, "r_operator", f"loop or compiled for {type(network).__name__}")
    written = network.norm == "instance"
    require("compute.matching", written, "r_operator", f"loop or compiled for network.norm={network.norm}")
    convolutions = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    norms = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.GroupNorm)]
    layers = [
        _Names(f"{convolution}.weight", f"{norm}.weight", f"{norm}.bias")
        for (convolution, _), (norm, _) in zip(convolutions, norms, strict=True)
    ]
    paddings = [module.padding[0] for _, module in convolutions]
    epsilon = norms[0][1].eps
    passes = _passes(compute)

    def low(tensor: Tensor) -> Tensor:
        """Lower the precision, for convolutions and matrix products only; all else is computed in fp32."""
        return tensor.to(torch.bfloat16) if compute.precision == "bf16" else tensor

    def convolve(inputs: Tensor, weight: Tensor, padding: int) -> Tensor:
        return F.conv2d(low(inputs), low(weight), padding=padding)

    def transpose(outputs: Tensor, weight: Tensor, shape: torch.Size, padding: int) -> Tensor:
        return conv2d_input(shape, low(weight), low(outputs), padding=padding)

    def linear(inputs: Tensor, weight: Tensor) -> Tensor:
        return wide(low(inputs) @ low(weight))

    def forward(parameters: Parameters, images: Tensor) -> tuple[Tensor, list[_Block]]:
        """The maps (n, c, H, W) before the classifier, and the blocks."""
        blocks, x = [], images
        for names, padding in zip(layers, paddings, strict=True):
            y = convolve(x, parameters[names.weight], padding)
            p, kept = passes.forward(y, parameters[names.gamma], parameters[names.beta], epsilon)
            blocks.append(_Block(x, kept))
            x = p
        return x, blocks

    def softmax_minus_target(parameters: Parameters, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities (n, classes), and the derivative of the mean cross entropy with respect to the logits."""
        logits = linear(features, parameters["classifier.weight"].T) + parameters["classifier.bias"]
        probabilities = logits.softmax(1)
        return probabilities, (probabilities - F.one_hot(labels, logits.shape[1])) / len(labels)

    def backward(parameters: Parameters, blocks: list[_Block], d_p: Tensor) -> tuple[Parameters, list[_Back]]:
        """The gradients of the convolution weights and, for the tangent, d_y of every block."""
        gradients, backs = {}, []
        for index in reversed(range(len(layers))):
            name, padding, (inputs, kept) = layers[index].weight, paddings[index], blocks[index]
            d_y, of_backward = passes.backward(d_p, kept)
            weight = parameters[name]
            gradients[name] = wide(conv2d_weight(low(inputs), weight.shape, low(d_y), padding=padding))
            backs.append(_Back(d_y, of_backward))
            if index:
                d_p = transpose(d_y, weight, inputs.shape, padding)
        return {names.weight: gradients[names.weight] for names in layers}, backs[::-1]

    def gradients(parameters: Parameters, images: Tensor, labels: Tensor) -> Parameters:
        return first_pass(parameters, images, labels)[0]

    def first_pass(parameters: Parameters, images: Tensor, labels: Tensor) -> tuple[Parameters, _Pass]:
        """The gradients of the convolution weights, and what :func:`second_pass` needs."""
        maps, blocks = forward(parameters, images)
        probabilities, d_logits = softmax_minus_target(parameters, maps.flatten(1), labels)
        own, backs = backward(parameters, blocks, linear(d_logits, parameters["classifier.weight"]).view(maps.shape))
        return own, _Pass(blocks, probabilities, backs)

    def second_pass(parameters: Parameters, done: _Pass, direction: Parameters) -> Tensor:
        """The pixel gradient of <gradients, direction>."""
        blocks, probabilities, backs = done
        classifier = parameters["classifier.weight"]

        # Forward pass of the tangents: how every activation moves when W moves along the direction V.
        x_dot, moves = None, []
        for names, padding, (inputs, kept) in zip(layers, paddings, blocks, strict=True):
            weight, moved = parameters[names.weight], direction[names.weight]
            if x_dot is None:  # the images do not move
                y_dot = convolve(inputs, moved, padding)
            else:  # conv(x, V) + conv(x_dot, W) as one convolution
                both = torch.cat([inputs, x_dot], 1), torch.cat([moved, weight], 1)
                y_dot = convolve(*both, padding)
            x_dot, of_tangent = passes.tangent_forward(y_dot, kept)
            moves.append(of_tangent)

        logits_dot = linear(x_dot.flatten(1), classifier.T)
        mean_dot = (probabilities * logits_dot).sum(1, keepdim=True)
        d_logits_dot = probabilities * (logits_dot - mean_dot) / len(probabilities)
        d_p_dot = linear(d_logits_dot, classifier).view(x_dot.shape)
        for index in reversed(range(len(layers))):
            name, padding, (inputs, kept) = layers[index].weight, paddings[index], blocks[index]
            d_y, of_backward = backs[index]
            d_y_dot = passes.tangent_backward(d_p_dot, kept, of_backward, moves[index])
            # d_y_dot through W and d_y through V as one transposed convolution
            both = torch.cat([d_y_dot, d_y], 1), torch.cat([parameters[name], direction[name]], 0)
            d_p_dot = transpose(*both, inputs.shape, padding)
        return wide(d_p_dot)

    def match(parameters: Parameters, targets: Parameters, synthetic: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found, done = zip(*(first_pass(parameters, *part) for part in parts(synthetic, labels, share)), strict=True)

        def total(of_synthetic: list[Parameters]) -> tuple[Tensor, Tensor]:
            per_layer = distances(metric, of_synthetic, targets, share)
            return per_layer.sum(), per_layer

        directions, per_layer = grad(total, has_aux=True)(list(found))
        moved = [second_pass(parameters, *each) for each in zip(done, directions, strict=True)]
        return per_layer, torch.cat(moved)

    return Form(gradients, match)


def _passes(compute: Compute) -> block.Passes:
    if compute.blocks == "compiler":
        return block.PLAIN
    from hmn.objectives import block_triton  # Triton is there only with PyTorch for GPUs

    return block_triton.TRITON
