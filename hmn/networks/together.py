"""Several networks as one module: on a GPU, several small networks together cost little more than one alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Together(nn.Module):
    """n networks of one architecture, stacked: parameters and buffers (n, ...), named as in a single network.

    Every network gets the input (N, channels, H, W); output (n, N, classes) logits. No tensor is channels_last, as
    PyTorch's group norm does not support that under vmap.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.one = (networks[0],)  # only for the architecture; the tuple keeps its parameters out of this module's
        for name, value in _stacked([dict(network.named_parameters()) for network in networks]).items():
            owner, leaf = self._owner(name)
            owner.register_parameter(leaf, nn.Parameter(value))
        for name, value in _stacked([dict(network.named_buffers()) for network in networks]).items():
            owner, leaf = self._owner(name)
            owner.register_buffer(leaf, value)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds ``name``, created if it is missing, and the last part of ``name``."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        return owner, leaf

    def forward(self, images: Tensor) -> Tensor:
        one = self.one[0].train(self.training)
        images = images.contiguous()
        state = (dict(self.named_parameters()), dict(self.named_buffers()))
        return torch.vmap(lambda *state: functional_call(one, state, (images,)))(*state)


def _stacked(tensors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name].detach().contiguous() for one in tensors]) for name in tensors[0]}
