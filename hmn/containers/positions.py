"""Positions of kept entries, stored in 16 bits: half of a float32 number each."""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 65_536  # positions that 16 bits can tell apart


def pack(positions: Tensor) -> Tensor:
    """Integers in [0, ``LIMIT``) as int16; the upper half become negative numbers with the same bits."""
    return positions.to(torch.int16)


def unpack(packed: Tensor) -> Tensor:
    """The int64 positions that :func:`pack` stored."""
    return packed.long() & (LIMIT - 1)
