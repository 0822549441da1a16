"""Several networks as one module: on a GPU, networks this small cost little more together than one of them alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Together(nn.Module):
    """n networks of one architecture, stacked: parameters (n, ...) by their names in one of them.

    Input (N, channels, H, W), which every network sees; output (n, N, classes) logits. Nothing here is channels_last:
    under vmap, PyTorch has no group norm for that.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.one = (networks[0],)  # gives the architecture only: in a tuple, its parameters are not among ours
        for names in zip(*(network.named_parameters() for network in networks), strict=True):
            *path, leaf = names[0][0].split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            stacked = torch.stack([parameter.detach().contiguous() for _, parameter in names])
            owner.register_parameter(leaf, nn.Parameter(stacked))

    def forward(self, images: Tensor) -> Tensor:
        one = self.one[0].train(self.training)
        images = images.contiguous()
        return torch.vmap(lambda parameters: functional_call(one, parameters, (images,)))(dict(self.named_parameters()))
