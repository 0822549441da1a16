"""Several networks as one module: on a GPU, networks this small cost little more together than one of them alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Together(nn.Module):
    """n networks of one architecture, stacked: parameters and buffers (n, ...) by their names in one of them.

    Input (N, channels, H, W), which every network sees; output (n, N, classes) logits. Nothing here is channels_last:
    under vmap, PyTorch has no group norm for that.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.one = (networks[0],)  # gives the architecture only: in a tuple, its parameters are not among ours
        for name, value in _stacked([dict(network.named_parameters()) for network in networks]).items():
            owner, leaf = self._owner(name)
            owner.register_parameter(leaf, nn.Parameter(value))
        for name, value in _stacked([dict(network.named_buffers()) for network in networks]).items():
            owner, leaf = self._owner(name)
            owner.register_buffer(leaf, value)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds ``name``, made where it is missing, and what ``name`` is called there."""
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
