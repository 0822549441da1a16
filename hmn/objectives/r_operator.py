"""Gradient matching without a second backward pass, written out for ConvNet.

With V = dD/dg, the derivative of the distance D with respect to the synthetic gradient g = dL/dW, the pixel gradient is

    dD/dx = d/dx <dL/dW, V> = the directional derivative of dL/dx when W moves along V

(Pearlmutter's R-operator, Neural Computation 1994): one forward and one backward pass, each with a tangent beside it.
No operation is differentiated twice, so none has to support it, and no graph is kept. V is zero except for convolution
weights, because only those are matched. A bias before an instance norm has no effect and is left out.

In a block, y = conv(x, W), h = (y - mean y) / deviation, p = pool(relu(gamma h + beta)), with statistics over an
image's plane. In the names below, ``d_`` is the derivative of the loss and ``_dot`` the tangent when W moves along V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.nn.grad import conv2d_input, conv2d_weight

from hmn.compute import Compute, wide
from hmn.config import require
from hmn.networks.convnet import ConvNet
from hmn.objectives.distance import Form, Matched, Parameters, batches, convolution_weights, distances

PLANE = (2, 3)


class _Block(NamedTuple):
    """What the later passes need from a block's forward pass."""

    inputs: Tensor
    h: Tensor
    scale: Tensor  # 1 / deviation, one number per plane
    mask: Tensor  # 1 where the ReLU is active


class _Pass(NamedTuple):
    """What the tangent needs from the forward and backward pass of a batch."""

    blocks: list[_Block]
    probabilities: Tensor
    kept: list[tuple[Tensor, Tensor, Tensor]]


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

    def low(tensor: Tensor) -> Tensor:
        """Lower the precision, for convolutions and matrix products only; all else stays fp32."""
        return tensor.to(torch.bfloat16) if compute.precision == "bf16" else tensor

    def convolve(inputs: Tensor, weight: Tensor, padding: int) -> Tensor:
        return wide(F.conv2d(low(inputs), low(weight), padding=padding))

    def transpose(outputs: Tensor, weight: Tensor, shape: torch.Size, padding: int) -> Tensor:
        return wide(conv2d_input(shape, low(weight), low(outputs), padding=padding))

    def linear(inputs: Tensor, weight: Tensor) -> Tensor:
        return wide(low(inputs) @ low(weight))

    def forward(parameters: Parameters, images: Tensor) -> tuple[Tensor, list[_Block]]:
        """The features (n, f) before the classifier, and the blocks."""
        blocks, x = [], images
        for names, padding in zip(layers, paddings, strict=True):
            y = convolve(x, parameters[names.weight], padding)
            centred = y - y.mean(PLANE, keepdim=True)
            scale = (centred.square().mean(PLANE, keepdim=True) + epsilon).rsqrt()
            h = centred * scale
            z = _column(parameters[names.gamma]) * h + _column(parameters[names.beta])
            blocks.append(_Block(x, h, scale, (z > 0).to(h.dtype)))
            x = F.avg_pool2d(z.relu(), 2)
        return x.flatten(1), blocks

    def softmax_minus_target(parameters: Parameters, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities (n, classes), and the derivative of the mean cross entropy with respect to the logits."""
        logits = linear(features, parameters["classifier.weight"].T) + parameters["classifier.bias"]
        probabilities = logits.softmax(1)
        return probabilities, (probabilities - F.one_hot(labels, logits.shape[1])) / len(labels)

    def backward(
        parameters: Parameters, blocks: list[_Block], d_features: Tensor
    ) -> tuple[Parameters, list[tuple[Tensor, Tensor, Tensor]]]:
        """The gradients of the convolution weights and, for the tangent, d_h, mean(d_h h) and d_y of every block."""
        gradients, kept = {}, []
        d_p = d_features.view(len(d_features), -1, *_pooled(blocks[-1].h))
        for index in reversed(range(len(layers))):
            names, padding, block = layers[index], paddings[index], blocks[index]
            d_h = _column(parameters[names.gamma]) * _unpool(d_p, block.h) * block.mask
            along = (d_h * block.h).mean(PLANE, keepdim=True)
            d_y = block.scale * (d_h - d_h.mean(PLANE, keepdim=True) - block.h * along)
            weight = parameters[names.weight]
            gradients[names.weight] = wide(conv2d_weight(low(block.inputs), weight.shape, low(d_y), padding=padding))
            kept.append((d_h, along, d_y))
            if index:
                d_p = transpose(d_y, weight, block.inputs.shape, padding)
        return {names.weight: gradients[names.weight] for names in layers}, kept[::-1]

    def gradients(parameters: Parameters, images: Tensor, labels: Tensor) -> Parameters:
        return first_pass(parameters, images, labels)[0]

    def first_pass(parameters: Parameters, images: Tensor, labels: Tensor) -> tuple[Parameters, _Pass]:
        """The gradients of the convolution weights, and what :func:`second_pass` needs."""
        features, blocks = forward(parameters, images)
        probabilities, d_logits = softmax_minus_target(parameters, features, labels)
        own, kept = backward(parameters, blocks, linear(d_logits, parameters["classifier.weight"]))
        return own, _Pass(blocks, probabilities, kept)

    def second_pass(parameters: Parameters, done: _Pass, direction: Parameters) -> Tensor:
        """The pixel gradient of <gradients, direction>."""
        blocks, probabilities, kept = done
        classifier = parameters["classifier.weight"]

        # Forward pass of the tangents: how every activation moves when W moves along the direction V.
        x_dot, saved = None, []
        for names, padding, block in zip(layers, paddings, blocks, strict=True):
            weight, moved = parameters[names.weight], direction[names.weight]
            if x_dot is None:  # the images do not move
                y_dot = convolve(block.inputs, moved, padding)
            else:  # conv(x, V) + conv(x_dot, W) as one convolution
                both = torch.cat([block.inputs, x_dot], 1), torch.cat([moved, weight], 1)
                y_dot = convolve(*both, padding)
            along = (y_dot * block.h).mean(PLANE, keepdim=True)
            h_dot = block.scale * (y_dot - y_dot.mean(PLANE, keepdim=True) - block.h * along)
            saved.append((h_dot, along))
            x_dot = F.avg_pool2d(block.mask * _column(parameters[names.gamma]) * h_dot, 2)

        logits_dot = linear(x_dot.flatten(1), classifier.T)
        mean_dot = (probabilities * logits_dot).sum(1, keepdim=True)
        d_logits_dot = probabilities * (logits_dot - mean_dot) / len(probabilities)
        d_p_dot = linear(d_logits_dot, classifier).view(len(probabilities), -1, *_pooled(blocks[-1].h))
        for index in reversed(range(len(layers))):
            names, padding, block = layers[index], paddings[index], blocks[index]
            (h_dot, scale_along), (d_h, along, d_y) = saved[index], kept[index]
            d_h_dot = _column(parameters[names.gamma]) * _unpool(d_p_dot, block.h) * block.mask
            along_dot = (d_h_dot * block.h + d_h * h_dot).mean(PLANE, keepdim=True)
            d_y_dot = (
                block.scale * (d_h_dot - d_h_dot.mean(PLANE, keepdim=True) - block.h * along_dot - h_dot * along)
                - scale_along * block.scale * d_y
            )
            weight, moved = parameters[names.weight], direction[names.weight]
            # d_y_dot through W and d_y through V as one transposed convolution
            both = torch.cat([d_y_dot, d_y], 1), torch.cat([weight, moved], 0)
            d_p_dot = transpose(*both, block.inputs.shape, padding)
        return d_p_dot

    def match(parameters: Parameters, targets: Parameters, synthetic: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found, passes = zip(*(first_pass(parameters, *p) for p in batches(synthetic, labels, share)), strict=True)

        def total(of_synthetic: list[Parameters]) -> tuple[Tensor, Tensor]:
            per_layer = distances(metric, of_synthetic, targets, share)
            return per_layer.sum(), per_layer

        directions, per_layer = grad(total, has_aux=True)(list(found))
        moved = [second_pass(parameters, *each) for each in zip(passes, directions, strict=True)]
        return per_layer, torch.cat(moved)

    return Form(gradients, match)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


def _pooled(h: Tensor) -> tuple[int, int]:
    return h.shape[2] // 2, h.shape[3] // 2


def _unpool(d_p: Tensor, like: Tensor) -> Tensor:
    """The adjoint of 2 x 2 average pooling; an odd side's last row or column is not pooled and gets zero."""
    spread = (d_p / 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    bottom, right = like.shape[2] - spread.shape[2], like.shape[3] - spread.shape[3]
    return F.pad(spread, (0, right, 0, bottom)) if bottom or right else spread
