"""The configuration's schemas and range checks.

Every value is checked where it is declared; the message names the dotted key, the value and the rule. The core takes
tensors, numbers or a single section. Only the code that plans a run, makes its parts and keeps its results takes the
whole :class:`Config`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, MissingMandatoryValue, OmegaConf

from hmn.config import containers, objectives, sweeps
from hmn.config.checks import (
    check_strategy,
    identity_of,
    newer,
    one_of,
    require,
    unscientific,
)
from hmn.config.containers import ContainerConfig, HmnConfig
from hmn.config.objectives import BankConfig, GradientMatchingConfig, ObjectiveConfig
from hmn.config.sweeps import LauncherConfig, SweepConfig
from hmn.errors import ConfigError

__all__ = [  # what other modules import from here
    "BankConfig",
    "ContainerConfig",
    "GradientMatchingConfig",
    "HmnConfig",
    "LauncherConfig",
    "ObjectiveConfig",
    "SweepConfig",
    "one_of",
    "require",
]

CONF = Path(__file__).resolve().parents[2] / "conf"
MODES = ("run", "plan", "evaluate", "full_data", "random_subset", "experts", "redundancy")
NETWORK_NORMS = {  # the norms that each network can have
    "convnet": ("instance", "batch", "none"),
    "resnet10": ("instance", "batch"),
    "resnet18": ("instance", "batch"),
    "resnet_ap10": ("instance", "batch"),
    "resnet18_ap": ("instance", "batch"),
    "vgg11": ("instance", "batch", "none"),
    "vgg16": ("instance", "batch", "none"),
    "densenet121": ("instance", "batch"),
    "alexnet": ("none",),
    "lenet": ("none",),
    "mlp": ("none",),
}
FIXED_WIDTHS = ("alexnet", "lenet")
DATASETS = ("mnist", "fashion_mnist", "svhn", "cifar10", "cifar100", "tiny_imagenet", "imagenet10")
DATASETS += ("folder", "arrays", "digits")


@dataclass(kw_only=True)
class DatasetConfig:
    kind: str = MISSING  # which loader, one of DATASETS
    name: str | None = None  # shown in tables and run ids; null: the kind, or the folder's or file's own name
    # imagenet10 (not needed for its plan), folder: the directory; arrays: the .npz file; null: paths.data_dir/<kind>
    root: str | None = None
    image_size: int | None = None  # side in pixels; null (arrays only): the array's own
    channels: int | None = 3  # 1 or 3; null (arrays, folder): the images' own
    classes: int | None = None  # in the whole dataset; null: counted from the class folders or the label array
    # Class-incremental learning. class_order: all C classes are put in the order of numpy's RandomState(class_order)
    # .permutation(C); null: their own order. class_range: of these, only positions [first, last) are used; null: all.
    class_order: int | None = newer(None)
    class_range: list[int] | None = newer(None)
    # Of pixels in [0, 1]; null: measured on all classes of the training split, so sets condensed apart fit together
    mean: list[float] | None = None
    std: list[float] | None = None
    flip: bool = True  # whether a mirrored image keeps its class; if not, "flip" is dropped from every strategy
    held_out_fraction: float = 0.1  # share of each class's training images, never trained on; judges every selection
    test_fraction: float | None = None  # share of each class for test: digits, and folders without test/ or val/
    download: bool = unscientific(True)

    def __post_init__(self) -> None:
        one_of("dataset.kind", self.kind, DATASETS)
        require("dataset.image_size", self.image_size is None or self.image_size >= 4, self.image_size, "at least 4")
        require("dataset.image_size", self.image_size is not None or self.kind == "arrays", "null", "given")
        users = self.kind in ("arrays", "folder")
        known = self.channels in (1, 3) or self.channels is None and users
        value = "null" if self.channels is None else self.channels
        require("dataset.channels", known, value, "1, 3 or null" if users else "1 or 3")
        require("dataset.classes", self.classes is None or self.classes >= 2, self.classes, "at least 2")
        order, span = self.class_order, self.class_range
        require("dataset.class_order", order is None or 0 <= order < 2**32, order, "null or a seed in [0, 2^32)")
        fits = span is None or (len(span) == 2 and span[0] >= 0 and span[1] - span[0] >= 2)
        require("dataset.class_range", fits, span, "null or [first, last) of at least 2 classes, counted from 0")
        for key in ("mean", "std"):
            values = getattr(self, key)
            fits = values is None or self.channels is None or len(values) == self.channels
            require(f"dataset.{key}", fits, values, f"null or {self.channels} numbers, one per channel")
        require("dataset.std", self.std is None or min(self.std) > 0, self.std, "positive")
        require("dataset.held_out_fraction", 0 <= self.held_out_fraction < 1, self.held_out_fraction, "in [0, 1)")
        share = self.test_fraction
        require("dataset.test_fraction", share is None or 0 < share < 1, share, "null or in (0, 1)")
        require("dataset.root", not users or bool(self.root), "null", f"given for dataset={self.kind}")

    def identity(self) -> dict[str, Any]:
        """The settings that images and labels depend on, as plain values."""
        values = identity_of(self)
        if self.kind not in ("folder", "arrays"):
            del values["root"]  # official datasets are the same wherever they are stored
        else:
            values["root"] = os.path.normpath(values["root"])  # the same with or without a slash at its end
        return values


@dataclass(kw_only=True)
class MemoryConfig:
    images_per_class: int = MISSING  # IPC: the budget is IPC * classes * channels * side^2 numbers
    # Type in which a container's numbers are kept and judged; float16 takes half the bytes of the paper's float32 and
    # has 11 significant bits
    number: str = newer("float32", modes=("run", "coreset"))

    def __post_init__(self) -> None:
        require("memory.images_per_class", self.images_per_class >= 1, self.images_per_class, "at least 1")
        one_of("memory.number", self.number, ("float32", "float16"))


@dataclass(kw_only=True)
class PruningConfig:
    """Over-budget condensation, then double-end pruning (HMN)."""

    # Storage condensed beyond the budget, as a fraction of it (the paper's p)
    over_budget: float = field(default=MISSING, metadata={"modes": ("run",)})
    # logit_margin: mean over epochs (HMN); softmax_margin: of probabilities, summed over epochs (CCS); random
    score: str = "logit_margin"
    # share of the cut taken from the hardest end; null: found by a search on held-out real images
    beta: float | None = field(default=None, metadata={"modes": ("run",)})
    score_networks: int = 3  # margins are averaged over this many networks
    score_epochs: int = 200  # a fifth of the evaluation's epochs; its schedule is shortened to them
    # epochs of the one network that the beta search trains for each candidate
    search_epochs: int = field(default=100, metadata={"modes": ("run",)})

    def __post_init__(self) -> None:
        require("pruning.over_budget", 0 <= self.over_budget < 1, self.over_budget, "in [0, 1)")
        one_of("pruning.score", self.score, ("logit_margin", "softmax_margin", "random"))
        require("pruning.beta", self.beta is None or 0 <= self.beta <= 1, self.beta, "null or in [0, 1]")
        for key in ("score_networks", "score_epochs", "search_epochs"):
            require(f"pruning.{key}", getattr(self, key) >= 1, getattr(self, key), "at least 1")


@dataclass(kw_only=True)
class NetworkConfig:
    """The architecture that is matched and evaluated."""

    name: str = MISSING  # one of NETWORK_NORMS
    width: int | None = None  # of the first layer (densenet121: growth; mlp: every hidden layer); null: the paper's
    depth: int | None = None  # convnet only; null: at least 2, and enough blocks for a last map of at most 4 x 4
    norm: str = "instance"  # instance: GroupNorm with one channel per group; batch: cannot be matched; none

    def __post_init__(self) -> None:
        one_of("network.name", self.name, tuple(NETWORK_NORMS))
        one_of("network.norm", self.norm, NETWORK_NORMS[self.name])
        fixed = self.width is None or self.name not in FIXED_WIDTHS
        require("network.width", fixed, self.width, f"null for {self.name}")
        require("network.width", self.width is None or self.width >= 1, self.width, "null or at least 1")
        fixed = self.depth is None or self.name == "convnet"
        require("network.depth", fixed, self.depth, f"null for {self.name}")
        require("network.depth", self.depth is None or self.depth >= 1, self.depth, "null or at least 1")


@dataclass(kw_only=True)
class EvaluationConfig:
    """How fresh networks are trained on the kept set; the profile's last-epoch accuracy is the result."""

    profile: str = MISSING  # the name that tables show
    networks: int = 10
    epochs: int = 1000
    full_data_epochs: int | None = field(default=None, metadata={"modes": ("full_data",)})  # null: epochs
    batch: int = 64
    # false: full batches and a smaller last one, as in IDC; true: as many batches, of equal size. A last batch of a few
    # images makes a noisy step that weighs as much as a full batch's and costs accuracy points.
    even_batches: bool = newer(False)
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = MISSING  # cosine: to 0, stepped per epoch; multistep: x 0.2 at 2/3 and 5/6 of the epochs
    strategy: str = "color_crop_flip_scale_rotate"  # by IDC's rule, with parameters per image
    cutmix: float = 0.5  # probability per batch
    test_points: int = 4  # evenly spaced tests; the best of them is printed as an extra, the last is the result
    # number of tests during condensing, on held-out real images, evenly spaced from step 0 to the last step
    curve_points: int = field(default=0, metadata={"modes": ("run",)})
    curve_epochs: int = field(default=100, metadata={"modes": ("run",)})

    def __post_init__(self) -> None:
        for key in ("networks", "epochs", "batch", "test_points", "curve_epochs"):
            require(f"evaluation.{key}", getattr(self, key) >= 1, getattr(self, key), "at least 1")
        epochs = self.full_data_epochs
        require("evaluation.full_data_epochs", epochs is None or epochs >= 1, epochs, "null or at least 1")
        require("evaluation.lr", self.lr > 0, self.lr, "positive")
        require("evaluation.momentum", 0 <= self.momentum < 1, self.momentum, "in [0, 1)")
        require("evaluation.weight_decay", self.weight_decay >= 0, self.weight_decay, "at least 0")
        one_of("evaluation.schedule", self.schedule, ("cosine", "multistep"))
        require("evaluation.cutmix", 0 <= self.cutmix <= 1, self.cutmix, "in [0, 1]")
        points = self.curve_points
        require("evaluation.curve_points", points == 0 or points >= 2, points, "0 or at least 2")
        check_strategy("evaluation.strategy", self.strategy)


@dataclass(kw_only=True)
class TrackingConfig:
    mode: str = "auto"  # auto: online when logged in to W&B, else offline
    project: str = "hmn"
    entity: str | None = None
    group: str | None = None  # null: one per sweep
    labels: dict[str, str] = field(default_factory=dict)  # the run's label on each axis of its table; columns in W&B
    log_every_steps: int = 10
    images_every_steps: int = 1000

    def __post_init__(self) -> None:
        one_of("tracking.mode", self.mode, ("auto", "online", "offline", "disabled"))
        for key in ("log_every_steps", "images_every_steps"):
            require(f"tracking.{key}", getattr(self, key) >= 1, getattr(self, key), "at least 1")


@dataclass(kw_only=True)
class ComputeConfig:
    device: str = unscientific("auto")  # auto, cpu, cuda or cuda:N; under torchrun: the GPU of the local rank
    # tf32 (CUDA) and bf16 are for convolutions and matrix products; statistics, softmax, distances, memories stay fp32
    precision: str = "fp32"  # bf16 becomes fp32 on devices that it does not speed up
    deterministic: bool = unscientific(True)
    # loop: autograd twice; compiled: nested derivatives; r_operator: written out, ConvNet only; auto: chosen by cost.
    # With all but loop, matching and the training of networks are compiled.
    matching: str = unscientific("auto")
    # What computes norm, ReLU and pooling in r_operator: triton, on a GPU, has one kernel of its own per pass
    blocks: str = unscientific("compiler")
    # winograd, which rounds more, is for compiled steps on a CPU in fp32; auto takes it there where it is faster
    convolutions: str = unscientific("auto")
    classes_per_call: int | None = unscientific(None)  # null: 1 on a CPU or for the loop, else at most 20
    # GiB per process; classes are condensed in chunks that fit. null: 20 classes at once on a GPU, one by one on a CPU
    memory_limit: float | None = unscientific(None)
    threads: int | None = unscientific(None)  # CPU threads; null: torch's own choice
    record: bool = unscientific(True)  # GPU: record steps as CUDA graphs, replay them; false: launch kernel by kernel
    # Networks trained at once; changes their random numbers, not the distribution; null: all on a GPU, one on a CPU
    networks_together: int | None = unscientific(None)
    # Runs that condense the same and differ in how they prune or evaluate condense once: the first keeps the result in
    # paths.cache_dir, and the others use it
    share_condensed: bool = unscientific(False)
    keep_heap: bool = unscientific(True)  # Linux: keep freed memory in the process instead of mapping it again
    checkpoint_every_seconds: float = unscientific(60.0)

    def __post_init__(self) -> None:
        one_of("compute.precision", self.precision, ("fp32", "tf32", "bf16"))
        one_of("compute.matching", self.matching, ("auto", "loop", "compiled", "r_operator"))
        one_of("compute.blocks", self.blocks, ("compiler", "triton"))
        used = self.blocks == "compiler" or self.matching == "r_operator"
        require("compute.blocks", used, self.blocks, "compiler unless compute.matching=r_operator")
        one_of("compute.convolutions", self.convolutions, ("auto", "direct", "winograd"))
        width, limit = self.classes_per_call, self.memory_limit
        require("compute.classes_per_call", width is None or width >= 1, width, "null or at least 1")
        require("compute.memory_limit", limit is None or limit > 0, limit, "null or positive")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        require("compute.device", known, self.device, "auto, cpu, cuda or cuda:N")
        require("compute.threads", self.threads is None or self.threads >= 1, self.threads, "null or at least 1")
        together = self.networks_together
        require("compute.networks_together", together is None or together >= 1, together, "null or at least 1")
        seconds = self.checkpoint_every_seconds
        require("compute.checkpoint_every_seconds", seconds >= 0, seconds, "at least 0")


@dataclass(kw_only=True)
class PathsConfig:
    runs_dir: str = "runs"
    data_dir: str = "data"
    cache_dir: str = ".cache"  # compiled functions and what networks computed on real images; made again if removed

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            setattr(self, name, os.path.expanduser(value))


@dataclass(kw_only=True)
class RedundancyConfig:
    """``mode=redundancy``: what a kept set is worth without the images that networks find easiest."""

    # Shares of each class to leave out, one after the other; pruning.score* set how the easiest images are found
    drop: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])

    def __post_init__(self) -> None:
        fits = bool(self.drop) and all(0 <= share < 1 for share in self.drop)
        require("redundancy.drop", fits, self.drop, "one or more shares in [0, 1)")


@dataclass(kw_only=True)
class PlanConfig:
    format: str = "text"

    def __post_init__(self) -> None:
        one_of("plan.format", self.format, ("text", "json"))


@dataclass(kw_only=True)
class Config:
    mode: str = "run"
    seed: int = 0
    # mode=evaluate, mode=redundancy: a run folder or a condensed.safetensors; evaluate joins a list of them
    artifact: Any = None
    dataset: DatasetConfig = MISSING
    memory: MemoryConfig = MISSING
    container: ContainerConfig = MISSING
    objective: ObjectiveConfig = MISSING
    pruning: PruningConfig = MISSING
    network: NetworkConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    tracking: TrackingConfig = MISSING
    compute: ComputeConfig = MISSING
    paths: PathsConfig = MISSING
    redundancy: RedundancyConfig = field(default_factory=RedundancyConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    launcher: LauncherConfig = MISSING
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        require("seed", self.seed >= 0, self.seed, "at least 0")
        if self.judges:
            self._check_artifacts()
        else:
            require("artifact", self.artifact is None, self.artifact, "null unless mode=evaluate or mode=redundancy")
        if self.condenses and self.pruning.over_budget > 0 and self.pruning.beta is None:
            share = self.dataset.held_out_fraction
            rule = "positive while pruning.beta is null: the search is judged on held-out images"
            require("dataset.held_out_fraction", share > 0, share, rule)
        if self.mode == "experts":
            known = isinstance(self.objective, objectives.TrajectoryMatchingConfig)
            require("objective.name", known, self.objective.name, "trajectory_matching for mode=experts")
        if self.condenses and self.evaluation.curve_points:
            share = self.dataset.held_out_fraction
            require("dataset.held_out_fraction", share > 0, share, "positive while evaluation.curve_points is set")

    def _check_artifacts(self) -> None:
        given = "null" if self.artifact is None else self.artifact
        require("artifact", bool(self.artifact), given, f"given for mode={self.mode}")
        paths = f"[{','.join(self.artifacts)}]"
        require("artifact", len(set(self.artifacts)) == len(self.artifacts), paths, "different kept sets")
        alone = self.mode != "redundancy" or len(self.artifacts) == 1
        require("artifact", alone, paths, "one kept set for mode=redundancy")

    @property
    def condenses(self) -> bool:
        """Whether the run condenses images instead of choosing real ones."""
        return self.mode == "run" and self.container.CONDENSED

    @property
    def judges(self) -> bool:
        """Whether the mode reads kept sets and makes none."""
        return self.mode in ("evaluate", "redundancy")

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The paths of ``artifact``, one or several."""
        return tuple(map(str, self.artifact if isinstance(self.artifact, list) else [self.artifact]))

    @property
    def kind(self) -> str:
        """The mode, or ``coreset`` for a run that condenses nothing; a key of ``SECTIONS``."""
        return "coreset" if self.mode == "run" and not self.condenses else self.mode


@functools.cache
def register() -> None:
    """Register the schemas with Hydra; every file of ``conf/`` names the one that it must match."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    sections = {
        "dataset": DatasetConfig,
        "memory": MemoryConfig,
        "pruning": PruningConfig,
        "network": NetworkConfig,
        "evaluation": EvaluationConfig,
        "tracking": TrackingConfig,
        "compute": ComputeConfig,
        "paths": PathsConfig,
    }
    for group, schema in sections.items():
        store.store(group=group, name="schema", node=schema)
    for schema in containers.SCHEMAS:
        store.store(group="container", name=f"{schema.NAME}_schema", node=schema)
    for schema in sweeps.SCHEMAS:
        store.store(group="launcher", name=f"{schema.name}_schema", node=schema)
    for name, schema in objectives.SCHEMAS.items():
        store.store(group="objective", name=f"{name}_schema", node=schema)


def from_hydra(raw: DictConfig) -> Config:
    """The checked configuration of a composed ``raw``, without Hydra's own node. Raises a one-line ``ConfigError``."""
    known = [item.name for item in dataclasses.fields(Config)]
    _refuse_added("", [str(key) for key in raw if key != "hydra"], known)
    return Config(**sections(raw, known))


def sections(raw: DictConfig, names: Sequence[str]) -> dict[str, Any]:
    """The checked sections ``names`` of a composed ``raw``, without checks across sections. Raises ``ConfigError``."""
    try:
        # Hydra keeps the schemas of the groups but not the root's: the sections come back checked, the root does not.
        found = OmegaConf.to_object(OmegaConf.masked_copy(raw, list(names)))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: give it a value") from None
    for name, section in found.items():
        if dataclasses.is_dataclass(section):
            _refuse_added_to(section, f"{name}.")
    return found


def _refuse_added_to(section: Any, prefix: str) -> None:
    _refuse_added(prefix, list(vars(section)), [item.name for item in dataclasses.fields(section)])
    for name, value in vars(section).items():
        if dataclasses.is_dataclass(value):
            _refuse_added_to(value, f"{prefix}{name}.")


def _refuse_added(prefix: str, keys: Sequence[str], known: Sequence[str]) -> None:
    """Refuse keys outside the schema, which ``+key=value`` adds and nothing reads."""
    for key in keys:
        if key not in known:
            raise ConfigError(f"{prefix}{key}: unknown key; valid are {', '.join(known)}")
