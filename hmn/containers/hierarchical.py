"""The Hierarchical Memory Network (Zheng et al., ECCV 2024): memories in three tiers, decoded to images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.config.containers import HmnConfig
from hmn.containers.base import Container, ImageShape, RealImages

LEAK = 0.2  # negative slope of every LeakyReLU; initialisation and layers must agree on it


@dataclass(frozen=True, kw_only=True)
class HmnShape(ImageShape):
    """All numbers that fix the parameter shapes, the number of images aside."""

    latent_side: int  # s
    dataset_channels: int  # C_D
    feature_channels: int  # C_F; 0 leaves out dataset memory and extractors
    feature_kernel: int  # k_f
    class_channels: int  # C_C; 0 leaves out class memories
    instance_channels: int  # C_I
    decoder_width: int  # W
    decoder: str = "upsample"
    decoder_norm: bool = False

    @property
    def doublings(self) -> int:
        """L with s * 2^L = image side."""
        return round(math.log2(self.image_size / self.latent_side))

    @property
    def instance_floats(self) -> int:
        return self.instance_channels * self.latent_side**2

    @property
