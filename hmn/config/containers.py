"""Schemas of the data containers: what their shapes and starting values depend on.

The plan fills in a field left null, from a row of the container's presets or with what fits the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from hmn.config.checks import at_least, newer, one_of, positive, require, unscientific

SECTION = "container"
KEPT = "kept"
PIXEL_SPACES = ("unit", "normalised")
CORESET_METHODS = ("random", "herding", "k_center", "k_means", "ccs", "aum", "forgetting")


@dataclass(kw_only=True)
class ContainerConfig:
    """The settings of all containers; ``NAME`` and ``INITS`` are the values that ``name`` and ``init`` may take."""

    NAME: ClassVar[str] = ""
    INITS: ClassVar[tuple[str, ...]] = ()
    CONDENSED: ClassVar[bool] = True  # False: nothing is condensed; objective, pruning and learning curve are not used

    name: str = MISSING
    # Where the parameters start. fit_real: fitted to as many real images as the container holds; kept: at those of a
    # kept set of the same shapes and count, so that one objective can go on where another ended
    init: str = MISSING
    start: str | None = unscientific(None)  # a run folder or its condensed.safetensors; its checksum is in the run id
    fit_steps: int = 500  # Adam steps of fit_real
    fit_batch: int = 1024  # images per step of fit_real
    fit_learning_rate: float = 2e-2  # peak of its one-cycle schedule
    fit_weights_lr: float | None = newer(None)  # peak for networks; null: as for memories
    fit_images: str = newer("random")  # k_means: the images nearest to the centres of per-class k-means on pixels
    # By tier: factors on objective.memory_lr (memories) or objective.weights_lr (networks)
    lr_scale: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("container.name", self.name, (self.NAME,))
        one_of("container.init", self.init, (*self.INITS, *((KEPT,) if self.CONDENSED else ())))
        rule = f"given with container.init={KEPT}, else null"
        require("container.start", (self.start is not None) == (self.init == KEPT), self.start or "null", rule)
        at_least(SECTION, 1, self, "fit_steps", "fit_batch")
        one_of("container.fit_images", self.fit_images, ("random", "k_means"))
        positive(SECTION, self, "fit_learning_rate", "fit_weights_lr")
        for tier, factor in self.lr_scale.items():
            require(f"container.lr_scale.{tier}", factor >= 0, factor, "at least 0")


@dataclass(kw_only=True)
class HmnConfig(ContainerConfig):
    """Shapes of the Hierarchical Memory Network; a field left null is taken from the preset."""

    NAME: ClassVar[str] = "hmn"
    INITS: ClassVar[tuple[str, ...]] = ("random", "fit_real")  # random: as in the paper

    init: str = "random"
    preset: str = "auto"  # a row of hmn/containers/presets.py; auto: the row nearest to dataset and memory
    latent_side: int | None = None  # s: memories are s x s maps, doubled log2(image_size / s) times
    dataset_channels: int | None = None  # C_D of the dataset memory
    feature_channels: int | None = None  # C_F of each class's extractor output; 0: no dataset memory, no extractors
    feature_kernel: int | None = None  # k_f of the extractors
    class_channels: int | None = None  # C_C of each class memory; 0: no class memories
    instance_channels: int | None = None  # C_I of each instance memory
    decoder_width: int | None = None  # W
    decoder: str = "upsample"  # upsample: convolution then nearest x2; transposed: 4x4 transposed convolution
    decoder_norm: bool = False  # one-group GroupNorm after each hidden convolution
    output: str = newer("sigmoid")  # pixels in [0, 1]; linear: the sigmoid's tangent at 0, 1/2 + x/4, unbounded
    instance_init_scale: float = 1.0  # factor on the N(0, 1) that instance memories start from

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(SECTION, 1, self, "latent_side", "dataset_channels", "instance_channels", "decoder_width")
        at_least(SECTION, 0, self, "feature_channels", "class_channels")
        kernel, width = self.feature_kernel, self.decoder_width
        require("container.feature_kernel", kernel is None or (kernel > 0 and kernel % 2), kernel, "odd and positive")
        require("container.decoder_width", width is None or width % 2 == 0, width, "even")
        one_of("container.decoder", self.decoder, ("upsample", "transposed"))
        one_of("container.output", self.output, ("sigmoid", "linear"))
        positive(SECTION, self, "instance_init_scale")


@dataclass(kw_only=True)
class PixelConfig(ContainerConfig):
    """A container that is not bounded by a sigmoid."""

    # unit: pixels in [0, 1]; those stored as such (image, multiformation, HaBa's bases) are clamped before every fresh
    # network, as in IDC. normalised: mean/std-normalised pixels, never clamped, as in DC, DM, MTT and the methods built
    # on them
    pixel_space: str = "normalised"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("container.pixel_space", self.pixel_space, PIXEL_SPACES)


@dataclass(kw_only=True)
class ImageConfig(PixelConfig):
    """Raw images."""

    NAME: ClassVar[str] = "image"
    # k_means: the images nearest to the centres of per-class k-means on an untrained network's features (DREAM); first:
    # the first images of each class, which IDC calls "random"
    INITS: ClassVar[tuple[str, ...]] = ("real", "noise", "k_means", "first")

    init: str = "real"
    pixel_space: str = "unit"


@dataclass(kw_only=True)
class MultiformationConfig(PixelConfig):
    """IDC (Kim et al., ICML 2022): every stored image is cut into f x f tiles, each of which is an image."""

    NAME: ClassVar[str] = "multiformation"
    # Except for noise, every tile is a shrunk real image. mix: the first ones of the class (IDC); random: random ones,
    # shrunk bilinearly (IDM); k_means: those nearest to the centres of clusters (DREAM)
    INITS: ClassVar[tuple[str, ...]] = ("mix", "random", "noise", "k_means")

    init: str = "mix"
    pixel_space: str = "unit"
    factor: int = 2  # f
    # single: factor f; multi: every factor from 1 to f; bound: as single, but condensing decodes some stored
    # images at smaller factors, so that it sees at most ``bound`` images of a class
    decode: str = "single"
    bound: int | None = None  # for decode=bound; null: 128

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(SECTION, 1, self, "factor", "bound")
        one_of("container.decode", self.decode, ("single", "multi", "bound"))
        used = self.bound is None or self.decode == "bound"
        require("container.bound", used, self.bound, "null: only container.decode=bound uses it")


@dataclass(kw_only=True)
class HabaConfig(PixelConfig):
    """HaBa (Liu et al., NeurIPS 2022): every class's bases pass through styles that all classes share."""

    NAME: ClassVar[str] = "haba"
    ADVERSARY: ClassVar[tuple[str, ...]] = (
        "club_weight",
        "contrast_weight",
        "class_weight",
        "likeli_weight",
        "adversary_lr",
        "adversary_momentum",
    )
    INITS: ClassVar[tuple[str, ...]] = ("real", "noise", "fit_real")  # of the bases

    init: str = "real"
    styles: int | None = None  # S hallucinators; null: the number, at most 5, with the most images in the budget
    base_channels: int | None = None  # 1 or the image's; null: the image's if the budget pays for them, else 1
    # Only for objective=trajectory_matching: weights of the losses that push styles apart
    club_weight: float = 0.1  # loss of the container: cosine similarity of two styles' features
    contrast_weight: float = 0.1  # loss of the adversary that computes the features, as the next two are
    class_weight: float = 1.0
    likeli_weight: float = 0.1
    adversary_lr: float = 1e-3
    adversary_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(SECTION, 1, self, "styles", "base_channels")
        at_least(SECTION, 0, self, "club_weight", "contrast_weight", "class_weight", "likeli_weight")
        positive(SECTION, self, "adversary_lr")
        momentum = self.adversary_momentum
        require("container.adversary_momentum", 0 <= momentum < 1, momentum, "in [0, 1)")


@dataclass(kw_only=True)
class LinbaConfig(PixelConfig):
    """LinBa (Deng & Russakovsky, NeurIPS 2022): images are linear combinations of bases that all classes share."""

    NAME: ClassVar[str] = "linba"
    INITS: ClassVar[tuple[str, ...]] = ("xavier", "fit_real")

    init: str = "xavier"
    bases: int | None = None  # null: from the row nearest to dataset and memory in the container's table
    downsample: int = 2  # bases are stored at 1 / downsample of the image's side

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(SECTION, 1, self, "bases", "downsample")


@dataclass(kw_only=True)
class SpeedConfig(PixelConfig):
    """SPEED (Wei et al., NeurIPS 2023): shared tokens, sparse codes per image and a recurrent decoder."""

    NAME: ClassVar[str] = "speed"
    INITS: ClassVar[tuple[str, ...]] = ("random", "fit_real")

    init: str = "random"
    preset: str = "auto"  # a row of hmn/containers/speed.py; auto: the row nearest to dataset and memory
    tokens: int | None = None  # K
    token_dim: int | None = None  # D
    depth: int | None = None  # R blocks with weights of their own that read the same tokens and code
    heads: int | None = None
    top_k: int | None = None  # entries kept of each image's code per head, charged at 1.5 floats each
    # When the other entries are cut. end: after condensing, as in the paper; always: in fitting and matching, too
    cut: str = newer("end")
    patch: int | None = None  # side of a patch in pixels
    l1: float | None = None  # weight of the codes' absolute sum in the loss

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(SECTION, 1, self, "tokens", "token_dim", "depth", "heads", "top_k", "patch")
        at_least(SECTION, 0, self, "l1")
        one_of("container.cut", self.cut, ("end", "always"))


@dataclass(kw_only=True)
class FredConfig(PixelConfig):
    """FreD (Shin et al., NeurIPS 2023): the frequencies that vary most within a class, all else zero."""

    NAME: ClassVar[str] = "fred"
    INITS: ClassVar[tuple[str, ...]] = ("real",)

    init: str = "real"
    coefficients: int | None = None  # per image and channel; null: the table's number for the nearest image side
    count_mask: bool = False  # charge the kept positions too, half a float each; the paper does not
    orthonormal: bool = True  # scale of the stored coefficients; false: as in the paper, whose rates are 1e3 to 1e8

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(SECTION, 1, self, "coefficients")


@dataclass(kw_only=True)
class CoresetConfig(ContainerConfig):
    """Real images, chosen from the training set and kept as they are."""

    NAME: ClassVar[str] = "coreset"
    INITS: ClassVar[tuple[str, ...]] = ("real",)
    CONDENSED: ClassVar[bool] = False

    init: str = "real"
    method: str = "random"
    hard_cut: float | None = None  # ccs: share of the hardest images left out first; null: 0.3
    bins: int | None = None  # ccs: score bins sampled evenly; null: 50
    # All but random: number of networks whose features are joined, or margins or forgetting events averaged; null: 1
    networks: int | None = None
    epochs: int | None = None  # epochs of their training on the full training set; null: 200

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("container.method", self.method, CORESET_METHODS)
        at_least(SECTION, 1, self, "bins", "networks", "epochs")
        cut = self.hard_cut
        require("container.hard_cut", cut is None or 0 <= cut < 1, cut, "in [0, 1)")
        for key in ("hard_cut", "bins"):
            used = getattr(self, key) is None or self.method == "ccs"
            require(f"container.{key}", used, getattr(self, key), "null: only container.method=ccs uses it")
        for key in ("networks", "epochs"):
            used = getattr(self, key) is None or self.method != "random"
            require(f"container.{key}", used, getattr(self, key), "null: container.method=random trains no network")
        require("container.lr_scale", not self.lr_scale, self.lr_scale, "empty: nothing is condensed")


SCHEMAS = (
    HmnConfig,
    ImageConfig,
    MultiformationConfig,
    HabaConfig,
    LinbaConfig,
    SpeedConfig,
    FredConfig,
    CoresetConfig,
)
