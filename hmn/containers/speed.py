"""SPEED (Wei et al., NeurIPS 2023): images are sparse codes over shared tokens, decoded patch by patch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from hmn.config import require
from hmn.config.containers import SpeedConfig
from hmn.containers import positions as packed
from hmn.containers.base import Container, PixelShape, PixelSpace, RealImages, parameter_floats
from hmn.containers.nearest import distance, first_paid, made_smaller

NORM_EPS = 1e-6
INIT_STD = 0.2  # of tokens and codes
SMALLEST = 4  # token_dim and top_k that preset=auto may come down to


@dataclass(frozen=True)
class Preset:
    """One row: the data it was made for, then the settings. Names as in :class:`hmn.config.containers.SpeedConfig`."""

    image_size: int
    classes: int
    images_per_class: int
    tokens: int
    token_dim: int
    depth: int
    heads: int
    top_k: int
    patch: int
    l1: float
    channels: int = 3  # of the data


# As published, except for the 8 x 8 digits; imagenet is any of the authors' subsets of ten classes.
# fmt: off
PRESETS = {
    #                        side classes  IPC    K    D  R  h    k  p    l1
    "cifar10_ipc1":   Preset(  32,     10,   1,  16,  32, 1, 2,  48, 4, 3e-6),
    "cifar10_ipc10":  Preset(  32,     10,  10,  64,  96, 1, 3,  48, 4, 3e-7),
    "cifar10_ipc50":  Preset(  32,     10,  50,  64, 192, 3, 6,  48, 4, 7e-8),
    "cifar100_ipc1":  Preset(  32,    100,   1,  64,  96, 2, 3,  48, 4, 3e-7),
    "cifar100_ipc10": Preset(  32,    100,  10,  64, 192, 3, 6,  48, 4, 7e-8),
    "cifar100_ipc50": Preset(  32,    100,  50,  64, 192, 3, 6, 166, 4, 3e-8),
    "tiny_ipc1":      Preset(  64,    200,   1, 128, 256, 2, 8,  48, 8, 7e-8),
    "tiny_ipc10":     Preset(  64,    200,  10, 128, 256, 2, 8, 128, 8, 7e-9),
    "imagenet_ipc1":  Preset( 128,     10,   1, 256, 192, 2, 4, 192, 8, 7e-7),
    "imagenet_ipc10": Preset( 128,     10,  10, 256, 384, 2, 6, 384, 8, 7e-8),
    "digits_ipc1":    Preset(   8,     10,   1,   8,   4, 1, 2,   4, 2, 3e-6, channels=1),
    "digits_ipc10":   Preset(   8,     10,  10,  16,  16, 1, 2,   8, 2, 3e-6, channels=1),
    "digits_ipc50":   Preset(   8,     10,  50,  16,  32, 1, 2,  16, 2, 3e-6, channels=1),
}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class SpeedShape(PixelShape):
    tokens: int  # K
    token_dim: int  # D
    depth: int  # R
    heads: int
    top_k: int  # per image and head
    patch: int  # p
    l1: float
    cut: str = "end"  # when codes lose all but their top_k entries
    sparse: bool = False  # whether only those are stored, with their positions

    @property
    def patches(self) -> int:
        """Number of patches, P."""
        return (self.image_size // self.patch) ** 2

    @property
    def code_size(self) -> int:
        """Number of entries in one head's code, P K."""
        return self.patches * self.tokens

    @property
    def shared_floats(self) -> int:
        return self.tokens * self.token_dim + parameter_floats(lambda: FReeNet(self))

    @property
    def instance_floats(self) -> int:
        """A float and a 16-bit position for each kept entry, rounded up to whole floats."""
        return math.ceil(self.heads * self.top_k * 1.5)


class SparseCodes(Container):
    """x = FReeNet(E, A_{c,i}): every patch mixes the tokens E (SAET) by the image's code A (SCM), head by head.

    Shapes: ``tokens`` (K, D), ``instances`` (C, G, heads, P, K) while condensing. :meth:`finish` keeps the k
    largest of each head as ``instances`` (C, G, heads, k), and their places in the flattened (P, K) as the buffer
    ``positions`` (C, G, heads, k) int16. Storage is counted in the finished form from the start. With ``cut="always"``,
    images are decoded from those entries alone from the start, and finishing does not change them.
    """

    NAME = "speed"

    def __init__(self, shape: SpeedShape, instances: int) -> None:
        super().__init__()
        self.shape = shape
        self.space = PixelSpace(shape)
        codes = (shape.classes, instances, shape.heads)
        if shape.sparse:
            self.instances = nn.Parameter(torch.empty(*codes, shape.top_k))
            self.register_buffer("positions", torch.zeros(*codes, shape.top_k, dtype=torch.int16))
        else:
            self.instances = nn.Parameter(torch.empty(*codes, shape.patches, shape.tokens))
        self.tokens = nn.Parameter(torch.empty(shape.tokens, shape.token_dim))
        self.decoder = FReeNet(shape)

    def decode(self, index: Tensor) -> Tensor:
        return self.space.to_images(self.decoder(self.tokens, self._codes(index)))

    def _codes(self, index: Tensor) -> Tensor:
        """Dense codes (n, heads, P, K)."""
        codes = self.instances.flatten(0, 1)[index]
        if self.shape.sparse:
            where = packed.unpack(self.positions.flatten(0, 1)[index])
            codes = codes.new_zeros(*codes.shape[:2], self.shape.code_size).scatter(2, where, codes)
            codes = codes.unflatten(2, (self.shape.patches, self.shape.tokens))
        elif self.shape.cut == "always":
            codes = _largest(codes, self.shape.top_k)
        return codes

    def initialise(self, generator: torch.Generator, config: SpeedConfig, real: RealImages) -> None:
        """Tokens and codes N(0, 0.2^2), linear layers Xavier uniform, their biases zero."""
        for memory in (self.tokens, self.instances):
            nn.init.normal_(memory, std=INIT_STD, generator=generator)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()  # ones and zeros

    def tiers(self) -> dict[str, list[nn.Parameter]]:
        return {"instances": [self.instances], "tokens": [self.tokens], "decoder": list(self.decoder.parameters())}

    def memory_tiers(self) -> frozenset[str]:
        return frozenset({"instances", "tokens"})

    def penalty(self) -> Tensor | None:
        """The weighted absolute sum of all codes, which drives most entries towards zero."""
        if self.shape.sparse or not self.shape.l1:
            return None
        return self.shape.l1 * self.instances.abs().sum()

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the ``top_k`` largest absolute values of each image's and head's code."""
        if self.shape.sparse:
            return
        codes = self.instances.flatten(3)
        positions = codes.abs().topk(self.shape.top_k, dim=3).indices
        self.shape = replace(self.shape, sparse=True)
        self.instances = nn.Parameter(codes.gather(3, positions))
        self.register_buffer("positions", packed.pack(positions))

    def keep(self, index: Tensor) -> None:
        if self.shape.sparse:
            rows = self.kept_rows(index)
            self.positions = self.positions.flatten(0, 1)[rows].unflatten(0, (self.classes, -1))
        super().keep(index)

    def tier_floats(self) -> dict[str, int]:
        return super().tier_floats() | {"instances": self.instances.shape[:2].numel() * self.shape.instance_floats}


def _largest(codes: Tensor, count: int) -> Tensor:
    """``codes`` (n, heads, P, K) with zeros for all but the ``count`` largest absolute values of each head.

    The gradient passes to all entries as if none were cut (straight-through), so that a cut entry can come back.
    """
    flat = codes.detach().flatten(2)
    kept = flat.abs().topk(count, dim=2).indices
    cut = torch.zeros_like(flat).scatter(2, kept, flat.gather(2, kept)).view_as(codes)
    return codes + (cut - codes.detach())


class FReeNet(nn.Module):
    """The recurrent decoder: R blocks that all read the same mix of tokens, then a linear head from token to patch."""

    def __init__(self, shape: SpeedShape) -> None:
        super().__init__()
        self.channels, self.patch, self.heads = shape.channels, shape.patch, shape.heads
        self.blocks = nn.ModuleList(Block(shape.token_dim) for _ in range(shape.depth))
        self.head = nn.Linear(shape.token_dim, shape.channels * shape.patch**2)

    def forward(self, tokens: Tensor, codes: Tensor) -> Tensor:
        """``tokens`` (K, D), ``codes`` (n, heads, P, K): images (n, channels, H, W) in the container's own pixels."""
        by_head = tokens.unflatten(1, (self.heads, -1))
        mixed = torch.einsum("nhpk,khd->nphd", codes, by_head).flatten(2)
        patches = torch.zeros_like(mixed)
        for block in self.blocks:
            patches = block(patches, mixed)
        return self._joined(self.head(patches))

    def _joined(self, patches: Tensor) -> Tensor:
        """Patches (n, P, p * p * channels), row by row, as images."""
        side = math.isqrt(patches.shape[1])
        grid = patches.unflatten(2, (self.patch, self.patch, self.channels)).unflatten(1, (side, side))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Block(nn.Module):
    """Multi-head sparse combination and MLP, each added and then normalised: x = LN(x + W m), x = LN(x + MLP(x))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm_mixed = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.norm_mlp = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, patches: Tensor, mixed: Tensor) -> Tensor:
        """``patches`` and ``mixed``, the tokens weighted by the code, (n, P, D)."""
        patches = self.norm_mixed(patches + self.project(mixed))
        return self.norm_mlp(patches + self.mlp(patches))


def fill(config: SpeedConfig, *, classes: int, channels: int, image_size: int, images_per_class: int) -> SpeedConfig:
    """``config`` with every null field taken from its preset; ``preset`` becomes the row's name.

    ``auto`` is the row for the nearest data that the budget pays for, if need be made smaller in what ``config`` leaves
    open, down to the share of the budget and the number of images that the row has where it was made for. Raises
    ``ConfigError`` for an unknown preset and for settings that do not fit each other or the images.
    """

    def shape(filled: SpeedConfig) -> SpeedShape:
        return SpeedShape.of(filled, classes=classes, channels=channels, image_size=image_size)

    def share_less(filled: SpeedConfig) -> SpeedConfig | None:
        dim = filled.token_dim // 2
        smaller = config.token_dim is None and dim >= SMALLEST and dim % filled.heads == 0
        return replace(filled, token_dim=dim) if smaller else None

    def store_less(filled: SpeedConfig) -> SpeedConfig | None:
        kept = filled.top_k // 2
        return replace(filled, top_k=kept) if config.top_k is None and kept >= SMALLEST else None

    def fitted(name: str) -> SpeedConfig:
        row = PRESETS[name]
        own_data = {"classes": row.classes, "channels": row.channels, "image_size": row.image_size}
        own = SpeedShape.of(_filled(config, name, row.image_size), **own_data)
        filled = _filled(config, name, image_size)
        return made_smaller(filled, shape, images_per_class, share_less, store_less, own, row.images_per_class)

    if config.preset == "auto":
        ranked = sorted(PRESETS, key=lambda row: distance(PRESETS[row], image_size, classes, images_per_class))
        name = first_paid(ranked, lambda name: shape(fitted(name)), images_per_class)
        config = fitted(name)
    else:
        require("container.preset", config.preset in PRESETS, config.preset, f"auto or one of {', '.join(PRESETS)}")
        config = _filled(config, config.preset, image_size)
    divides = image_size % config.patch == 0
    require("container.patch", divides, config.patch, f"a divisor of dataset.image_size={image_size}")
    rule = f"a divisor of container.token_dim={config.token_dim}"
    require("container.heads", config.token_dim % config.heads == 0, config.heads, rule)
    patches = (image_size // config.patch) ** 2
    rule = f"at most {packed.LIMIT // patches}: a position among {patches} patches times tokens must fit in 16 bits"
    require("container.tokens", patches * config.tokens <= packed.LIMIT, config.tokens, rule)
    entries = patches * config.tokens
    rule = f"at most the {entries} entries of a code, {patches} patches times {config.tokens} tokens"
    require("container.top_k", config.top_k <= entries, config.top_k, rule)
    return config


def _filled(config: SpeedConfig, name: str, image_size: int) -> SpeedConfig:
    row = asdict(PRESETS[name])
    names = ("tokens", "token_dim", "depth", "heads", "top_k", "l1")
    filled = replace(config, preset=name, **{key: row[key] for key in names if getattr(config, key) is None})
    if config.patch is None:
        filled = replace(filled, patch=patch_side(PRESETS[name], image_size, filled.tokens))
    return filled


def patch_side(preset: Preset, image_size: int, tokens: int) -> int:
    """The divisor of the image's side whose number of patches is nearest to the preset's, and no more than 16-bit
    positions can tell apart."""

    def excess(patch: int) -> float:
        return abs(math.log(patch / preset.patch * preset.image_size / image_size))

    divisors = [side for side in range(1, image_size + 1) if image_size % side == 0]
    allowed = [side for side in divisors if (image_size // side) ** 2 * tokens <= packed.LIMIT]
    return min(allowed or divisors, key=excess)
