"""Schemas of the matching objectives: losses, schedules and learning rates."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from omegaconf import MISSING

from hmn.config.checks import at_least, check_strategy, newer, one_of, positive, require, unscientific

SECTION = "objective"


def fraction(config: object, *names: str, below_one: bool = False) -> None:
    """Require every field in ``names`` to lie in [0, 1], or in [0, 1) with ``below_one``."""
    for name in names:
        value = getattr(config, name)
        fits = 0 <= value < 1 if below_one else 0 <= value <= 1
        require(f"{SECTION}.{name}", fits, value, "in [0, 1)" if below_one else "in [0, 1]")


def untouched(config: object, where: str, *names: str) -> None:
    """Require every field in ``names`` to have its default; ``where`` says when, or why, nothing reads it."""
    defaults = {item.name: item.default for item in fields(config)}
    for name in names:
        value, default = getattr(config, name), defaults[name]
        require(f"{SECTION}.{name}", value == default, value, f"{default} {where}")


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The settings of all objectives: how long to condense, and how to update the container."""

    NAMES: ClassVar[tuple[str, ...]] = ()

    name: str = MISSING
    outer_steps: int = MISSING  # each starts from a fresh network or trajectory
    inner_steps: int | None = 1  # container steps in each outer step
    optimizer: str = "adam"  # of the container: adam or sgd
    memory_lr: float = 1e-2  # dataset, class and instance memories, pixels, codes
    weights_lr: float = 1e-3  # networks inside the container: extractors, decoders
    lr_scaling: str = "none"  # idc: both rates times (images per class / 10) * (side / 32)^2, or 224 from 128 pixels on
    beta1: float = 0.9  # adam
    beta2: float = 0.99
    momentum: float = 0.5  # sgd
    final_lr_fraction: float = 0.1  # cosine decay over the run ends at this fraction; 1: constant rate
    gradient_clip: float | None = None  # largest norm of the container's whole gradient; null: not clipped
    # Keep an exponential moving average of the container's parameters over steps, with this decay; it follows faster at
    # the start, with a decay of at most (1 + t) / (10 + t) after t steps. null: keep the last step's parameters
    average: float | None = newer(None)

    def __post_init__(self) -> None:
        one_of("objective.name", self.name, self.NAMES)
        one_of("objective.optimizer", self.optimizer, ("adam", "sgd"))
        one_of("objective.lr_scaling", self.lr_scaling, ("none", "idc"))
        at_least(SECTION, 1, self, "outer_steps", "inner_steps")
        positive(SECTION, self, "memory_lr", "weights_lr", "gradient_clip")
        fraction(self, "beta1", "beta2", "momentum", below_one=True)
        fraction(self, "final_lr_fraction")
        average = self.average
        require("objective.average", average is None or 0 <= average < 1, average, "null or in [0, 1)")
        others = {"adam": ("momentum",), "sgd": ("beta1", "beta2")}[self.optimizer]
        untouched(self, f"with objective.optimizer={self.optimizer}, which does not use it", *others)


@dataclass(kw_only=True)
class ClassMatchingConfig(ObjectiveConfig):
    """Objectives that compare real and synthetic images class by class on one network."""

    real_batch: int = 64  # per class and step
    synthetic_batch: int | None = 128  # at most this many decoded images per class and step; null: all
    classes_per_step: int | None = None  # null: all; with many classes, a random group of this size
    strategy: str = "color_crop_cutout"  # siamese augmentation of real and synthetic images
    # idc: flip, all colours, one geometric operator, cutout; vico: one of the listed operators (DSA, DM, MTT)
    augmentation_rule: str = "idc"
    step_policy: str = "accumulate"  # accumulate: one optimiser step for all classes; per_class: one per class (IDC)
    class_reduction: str = "mean"  # of the distances in one optimiser step: mean or, as in DC and DM, sum

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("objective.step_policy", self.step_policy, ("accumulate", "per_class"))
        one_of("objective.augmentation_rule", self.augmentation_rule, ("idc", "vico"))
        one_of("objective.class_reduction", self.class_reduction, ("mean", "sum"))
        at_least(SECTION, 1, self, "real_batch", "synthetic_batch")
        group = self.classes_per_step
        require("objective.classes_per_step", group is None or group >= 1, group, "null or at least 1")
        check_strategy("objective.strategy", self.strategy)

    def shown(self, images: int) -> int:
        """How many of a class's ``images`` a step shows."""
        return images if self.synthetic_batch is None else min(self.synthetic_batch, images)

    def group(self, classes: int) -> int:
        """How many of ``classes`` a step compares."""
        return min(self.classes_per_step or classes, classes)


@dataclass(kw_only=True)
class BankConfig:
    """Network snapshots with their augmentation draws and real gradients, computed once and shared by many runs."""

    networks: int = 0  # trained from scratch for the bank; 0: no bank, every run trains its own networks
    snapshots: int = 10  # of each network, spread over its inner_steps
    seed: int = 0  # the bank's own, so that runs of other seeds share it

    def __post_init__(self) -> None:
        at_least("objective.bank", 0, self, "networks", "seed")
        at_least("objective.bank", 1, self, "snapshots")


@dataclass(kw_only=True)
class GradientMatchingConfig(ClassMatchingConfig):
    """IDC's gradient matching (Kim et al., ICML 2022) as HMN uses it."""

    NAMES: ClassVar[tuple[str, ...]] = ("gradient_matching",)

    outer_steps: int = 200  # IDC: 2000
    inner_steps: int | None = 100
    metric: str = "mse"  # mse, l1 or cosine; nothing is divided by a count, so each metric needs its own learning rates
    # Estimate without bias, from a step's random images, the mse of all synthetic images of a class; the mse of the
    # step's own mean is lower where the images of a class are alike
    unbiased: bool = newer(False)
    network_samples: int = 2000  # real images the matched network trains on between matching steps; 0: none
    network_batch: int = 64
    network_lr: float = 0.01
    network_momentum: float = 0.9
    network_weight_decay: float = 5e-4
    network_strategy: str = "color_crop"  # by augmentation rule idc
    network_cutmix: float = 0.5  # probability per batch
    # DREAM (Liu et al., ICCV 2023): real batches are the images nearest to the centres of per-class k-means on the
    # matched network's features, chosen again every so many steps; null: random batches
    k_means_interval: int | None = None
    bank: BankConfig = field(default_factory=BankConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require("objective.inner_steps", self.inner_steps is not None, "null", "a number of steps")
        one_of("objective.metric", self.metric, ("mse", "l1", "cosine"))
        even = self.synthetic_batch is None or self.synthetic_batch % 2 == 0
        can = not self.unbiased or (self.metric == "mse" and even)
        require("objective.unbiased", can, "true", "false unless metric=mse and synthetic_batch is even or null")
        at_least(SECTION, 1, self, "network_batch", "k_means_interval")
        at_least(SECTION, 0, self, "network_samples", "network_weight_decay")
        positive(SECTION, self, "network_lr")
        fraction(self, "network_momentum", below_one=True)
        fraction(self, "network_cutmix")
        check_strategy("objective.network_strategy", self.network_strategy)
        snapshots = self.bank.snapshots
        fits = not self.bank.networks or snapshots <= self.inner_steps
        require("objective.bank.snapshots", fits, snapshots, f"at most objective.inner_steps={self.inner_steps}")
        interval = self.k_means_interval
        alone = interval is None or not self.bank.networks
        require("objective.k_means_interval", alone, interval, "null with a bank, which has no real batches to choose")


# DC (Zhao et al., ICLR 2021) by images per class: matching steps of one network, and its epochs on the synthetic set
# between them.
DC_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclass(kw_only=True)
class SyntheticGradientConfig(ClassMatchingConfig):
    """Gradient matching on networks that train on the synthetic set: DC (Zhao et al., ICLR 2021), DSA (ICML 2021)."""

    NAMES: ClassVar[tuple[str, ...]] = ("dc", "dsa")

    outer_steps: int = 1000
    inner_steps: int | None = None  # null: from DC's table by images per class, 1 to 50
    metric: str = "cosine"  # over all convolutions and the classifier; IDC leaves the classifier out
    real_batch: int = 256
    synthetic_batch: int | None = None
    network_epochs: int | None = None  # on the synthetic set between matching steps; null: from DC's table
    network_batch: int = 256
    network_lr: float = 0.01
    optimizer: str = "sgd"
    memory_lr: float = 0.1
    weights_lr: float = 0.1
    final_lr_fraction: float = 1.0
    strategy: str = "none"  # also for the images that networks train on
    augmentation_rule: str = "vico"
    class_reduction: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("objective.metric", self.metric, ("mse", "l1", "cosine"))
        at_least(SECTION, 0, self, "network_epochs")
        at_least(SECTION, 1, self, "network_batch")
        positive(SECTION, self, "network_lr")

    def with_loops(self, images_per_class: int) -> SyntheticGradientConfig:
        """This section, with ``inner_steps`` and ``network_epochs`` from :data:`DC_LOOPS` where they are null.

        Raises ``ConfigError`` for a budget that the table lacks.
        """
        given = {"inner_steps": self.inner_steps, "network_epochs": self.network_epochs}
        if None not in given.values():
            return self
        missing = next(name for name, value in given.items() if value is None)
        budgets = ", ".join(map(str, DC_LOOPS))
        known = images_per_class in DC_LOOPS
        rule = f"given: DC's table has no row for memory.images_per_class={images_per_class}, only for {budgets}"
        require(f"objective.{missing}", known, "null", rule)
        table = dict(zip(given, DC_LOOPS[images_per_class], strict=True))
        return replace(self, **{name: table[name] if value is None else value for name, value in given.items()})


@dataclass(kw_only=True)
class DistributionMatchingConfig(ClassMatchingConfig):
    """DM (Zhao & Bilen, WACV 2023): mean features of real and synthetic images on random networks."""

    NAMES: ClassVar[tuple[str, ...]] = ("distribution_matching",)

    outer_steps: int = 20_000
    real_batch: int = 256
    synthetic_batch: int | None = None
    optimizer: str = "sgd"
    memory_lr: float = 1.0
    weights_lr: float = 1.0
    final_lr_fraction: float = 1.0
    strategy: str = "color_crop_cutout_flip_scale_rotate"
    augmentation_rule: str = "vico"
    class_reduction: str = "sum"
    # IDM (Zhao et al., CVPR 2023): a first-in-first-out pool of networks that go on training on real images; 0: a fresh
    # random network for every step
    pool_networks: int = 0  # most networks in the pool
    pool_interval: int = 30  # steps between fresh networks
    pool_trained: int = 2  # networks trained after every step
    pool_steps: int = 10  # training steps of each of them, on batches of pool_batch real images
    pool_batch: int = 256
    pool_lr: float = 0.01
    pool_momentum: float = 0.9
    pool_weight_decay: float = 5e-4
    ce_weight: float = 0.0  # weight of the cross entropy on synthetic images, times the network's accuracy in percent

    def __post_init__(self) -> None:
        super().__post_init__()
        require("objective.inner_steps", self.inner_steps == 1, self.inner_steps, "1: every step has its own network")
        at_least(SECTION, 0, self, "pool_networks", "pool_trained", "pool_steps", "pool_weight_decay", "ce_weight")
        at_least(SECTION, 1, self, "pool_interval", "pool_batch")
        positive(SECTION, self, "pool_lr")
        fraction(self, "pool_momentum", below_one=True)
        if not self.pool_networks:
            of_pool = [item.name for item in fields(self) if item.name.startswith("pool_")]
            untouched(self, "while objective.pool_networks=0: there are no trained networks", "ce_weight", *of_pool)


@dataclass(kw_only=True)
class UnrolledConfig(ObjectiveConfig):
    """Objectives that differentiate through the training of a student on synthetic images."""

    student_steps: int = MISSING  # T, SGD steps of the student
    student_batch: int | None = None  # decoded images per student step; null: all
    student_momentum: float = 0.0
    student_dampening: float = 0.0  # v <- momentum * v + (1 - dampening) * gradient
    student_lr: float = 0.01
    # Keep the student's parameters only every so many steps and compute the others again in the backward pass.
    segment: int = unscientific(1)
    optimizer: str = "sgd"
    final_lr_fraction: float = 1.0
    strategy: str = "none"
    augmentation_rule: str = "vico"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("objective.inner_steps", self.inner_steps == 1, self.inner_steps, "1: every step has its own student")
        at_least(SECTION, 1, self, "student_steps", "student_batch", "segment")
        positive(SECTION, self, "student_lr")
        fraction(self, "student_momentum", "student_dampening", below_one=True)
        one_of("objective.augmentation_rule", self.augmentation_rule, ("idc", "vico"))
        check_strategy("objective.strategy", self.strategy)


@dataclass(kw_only=True)
class ExpertsConfig:
    """Networks trained on real images and saved once per epoch: the targets of trajectory matching."""

    count: int = 100
    epochs: int = 50
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch: int = 256
    strategy: str = "color_crop_cutout_flip_scale_rotate"
    augmentation_rule: str = "vico"
    seed: int = 0  # the experts' own, so that runs of other seeds share them

    def __post_init__(self) -> None:
        at_least("objective.experts", 1, self, "count", "epochs", "batch")
        at_least("objective.experts", 0, self, "weight_decay", "seed")
        positive("objective.experts", self, "lr")
        require("objective.experts.momentum", 0 <= self.momentum < 1, self.momentum, "in [0, 1)")
        one_of("objective.experts.augmentation_rule", self.augmentation_rule, ("idc", "vico"))
        check_strategy("objective.experts.strategy", self.strategy)


@dataclass(kw_only=True)
class TrajectoryMatchingConfig(UnrolledConfig):
    """MTT (Cazenavette et al., CVPR 2022): students on synthetic images should end where experts on real ones did."""

    NAMES: ClassVar[tuple[str, ...]] = ("trajectory_matching",)

    outer_steps: int = 5000
    student_steps: int = 50
    expert_epochs: int = 2  # M, between the student's start and its target
    max_start_epoch: int = 20  # the start is drawn from the epochs before this one
    student_lr: float = 0.01  # alpha's starting value
    student_lr_lr: float = 1e-5  # rate of alpha's own SGD; 0: alpha is fixed
    student_lr_momentum: float = 0.5
    student_lr_min: float = newer(1e-3)  # lower bound of a learned alpha, as in HaBa, SPEED and FreD; MTT has none: 0
    memory_lr: float = 100.0
    weights_lr: float = 100.0
    strategy: str = "color_crop_cutout_flip_scale_rotate"
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(SECTION, 1, self, "expert_epochs", "max_start_epoch")
        at_least(SECTION, 0, self, "student_lr_lr", "student_lr_min")
        held = self.student_lr_lr == 0 or self.student_lr >= self.student_lr_min
        rule = f"at least objective.student_lr_min={self.student_lr_min} while it is learned"
        require("objective.student_lr", held, self.student_lr, rule)
        fraction(self, "student_lr_momentum", below_one=True)
        last = self.max_start_epoch - 1 + self.expert_epochs
        rule = f"at most {self.experts.epochs + 1 - self.expert_epochs}: experts train for {self.experts.epochs} epochs"
        require("objective.max_start_epoch", last <= self.experts.epochs, self.max_start_epoch, rule)


@dataclass(kw_only=True)
class BpttConfig(UnrolledConfig):
    """Back-propagation through the training of a fresh network, LinBa's loss (Deng & Russakovsky, NeurIPS 2022)."""

    NAMES: ClassVar[tuple[str, ...]] = ("bptt",)

    outer_steps: int = 5000
    student_steps: int = 150
    student_momentum: float = 0.9
    class_batch: int = 32  # decoded images of every class per student step
    real_batch: int = 64  # real images per class that judge the trained student
    memory_lr: float = 0.1
    weights_lr: float = 0.1
    gradient_clip: float | None = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(SECTION, 1, self, "class_batch", "real_batch")
        require(
            "objective.student_batch",
            self.student_batch is None,
            self.student_batch,
            "null: objective.class_batch is used instead",
        )


SCHEMAS = {
    "gradient_matching": GradientMatchingConfig,
    "synthetic_gradient": SyntheticGradientConfig,
    "distribution_matching": DistributionMatchingConfig,
    "trajectory_matching": TrajectoryMatchingConfig,
    "bptt": BpttConfig,
}
