"""The plain class loop that speed-ups are measured against: gradient matching as IDC's authors run it.

IDC (Kim et al., ICML 2022): class after class, the gradient on real images, the gradient on synthetic images with its
graph, the distance over convolution weights, and a backward pass to the pixels and whatever made them; then the
network's own training. Ordinary eager modules, contiguous NCHW tensors, fp32, ``torch.optim``; every augmentation is an
operator of its own. Written for clarity from the paper's description; no operator here is slower than it has to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn.config import GradientMatchingConfig
from hmn.containers.base import Container
from hmn.data.datasets import RealData
from hmn.data.preprocess import Normalise
from hmn.networks import Builder, initialise
from hmn.seeding import generator


class Random(NamedTuple):
    """What augmentation draws from: pixels' parameters on the device, decisions taken in Python on the host."""

    device: torch.Generator
    host: torch.Generator


def random_of(seed: int, device: torch.device) -> Random:
    return Random(torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed))


# Augmentation: parameters (n, ...) for each image, or (1, ...) for all images


def brightness(images: Tensor, u: Tensor) -> Tensor:
    return images + (u - 0.5).view(-1, 1, 1, 1)


def saturation(images: Tensor, u: Tensor) -> Tensor:
    grey = images.mean(dim=1, keepdim=True)
    return (images - grey) * (2 * u).view(-1, 1, 1, 1) + grey


def contrast(images: Tensor, u: Tensor) -> Tensor:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (u + 0.5).view(-1, 1, 1, 1) + mean


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def crop(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift by gathering from images padded with zeros; ``offsets`` are (y, x)."""
    n, size = len(images), images.shape[-1]
    offsets = offsets.expand(n, 2)
    positions = torch.arange(size, device=images.device)
    rows = (positions + offsets[:, :1] + 1).clamp(0, size + 1)
    columns = (positions + offsets[:, 1:] + 1).clamp(0, size + 1)
    padded = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def resample(images: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def scale(images: Tensor, factors: Tensor) -> Tensor:
    """Zoom by ``factors``, which are (x, y)."""
    return resample(images, torch.diag_embed(factors) @ _no_shift(images))


def rotate(images: Tensor, radians: Tensor) -> Tensor:
    cos, sin = radians.cos(), radians.sin()
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return resample(images, turn @ _no_shift(images))


def _no_shift(images: Tensor) -> Tensor:
    return torch.eye(2, 3, device=images.device, dtype=images.dtype)


def cutout(images: Tensor, centres: Tensor) -> Tensor:
    """Set a square of half the side to zero; ``centres`` are (y, x)."""
    n, size = len(images), images.shape[-1]
    side = int(0.5 * size + 0.5)
    centres = centres.expand(n, 2)
    square = torch.arange(side, device=images.device) - side // 2
    rows = (centres[:, :1] + square).clamp(0, size - 1)
    columns = (centres[:, 1:] + square).clamp(0, size - 1)
    mask = torch.ones(n, size, size, device=images.device, dtype=images.dtype)
    mask[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]] = 0
    return images * mask[:, None]


def augment(images: Tensor, strategy: str, random: Random, *, alike: bool) -> Tensor:
    """Apply flip, colours, one random geometric operator and cutout, as far as ``strategy`` names them.

    ``alike``: one draw for the whole batch, so that real and synthetic images of a class get the same transform.
    """
    n, size = 1 if alike else len(images), images.shape[-1]
    names = strategy.split("_")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random.device, device=images.device)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (n, 2), generator=random.device, device=images.device)

    if "flip" in names:
        images = flip(images, uniform(n) < 0.5)
    if "color" in names:
        for colour in (brightness, saturation, contrast):
            images = colour(images, uniform(n))
    geometric = [name for name in ("crop", "scale", "rotate") if name in names]
    if geometric:
        chosen = geometric[int(torch.randint(len(geometric), (), generator=random.host))]
        if chosen == "crop":
            shift = int(0.125 * size + 0.5)
            images = crop(images, integers(-shift, shift))
        elif chosen == "scale":
            images = scale(images, 1 / 1.2 + (1.2 - 1 / 1.2) * uniform(n, 2))
        else:
            images = rotate(images, (uniform(n) * 2 - 1) * math.radians(15))
    return cutout(images, integers(0, size)) if "cutout" in names else images


def cutmix(images: Tensor, labels: Tensor, random: Random) -> tuple[Tensor, Tensor, float]:
    """Paste a box of a random partner's pixels: images, partners' labels, and the area share that is an image's own."""
    size = images.shape[-1]
    keep, y, x = torch.rand(3, generator=random.host).tolist()
    half = int(size * math.sqrt(1 - keep)) // 2
    top, bottom = max(int(y * size) - half, 0), min(int(y * size) + half, size)
    left, right = max(int(x * size) - half, 0), min(int(x * size) + half, size)
    partners = torch.randperm(len(images), generator=random.device, device=images.device)
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
    return images, labels[partners], 1 - (bottom - top) * (right - left) / size**2


# Matching


def class_distances(network: nn.Module, real: Tensor, synthetic: Tensor, label: int) -> Tensor:
    """Summed squared difference per convolution between one class's gradients, with the graph to ``synthetic``."""
    parameters = list(network.parameters())

    def gradients(images: Tensor, *, create_graph: bool) -> Sequence[Tensor]:
        labels = torch.full((len(images),), label, device=images.device)
        loss = F.cross_entropy(network(images), labels)
        return torch.autograd.grad(loss, parameters, create_graph=create_graph)

    of_real = gradients(real, create_graph=False)
    of_synthetic = gradients(synthetic, create_graph=True)
    return torch.stack([((s - r) ** 2).sum() for s, r in zip(of_synthetic, of_real, strict=True) if s.ndim == 4])


def matching_step(network: nn.Module, real: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
    """Distances per layer, summed over classes, and pixel gradients, for images (classes, n, channels, H, W)."""
    total, pixel_gradients = None, []
    for label in range(len(real)):
        pixels = synthetic[label].detach().requires_grad_()
        distances = class_distances(network, real[label], pixels, label)
        distances.sum().backward()
        network.zero_grad()
        pixel_gradients.append(pixels.grad)
        total = distances.detach() if total is None else total + distances.detach()
    return total, torch.stack(pixel_gradients)


# Training


def training_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    strategy: str,
    cutmix_probability: float,
    random: Random,
) -> float:
    """One SGD step on normalised images; returns the loss, which a plain trainer reads at every step."""
    partners, share = labels, 1.0
    with torch.no_grad():
        images = augment(images, strategy, random, alike=False)
        if float(torch.rand((), generator=random.host)) < cutmix_probability:
            images, partners, share = cutmix(images, labels, random)
    logits = network(images)
    loss = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, partners)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class Condensation:
    """The bi-level loop over a container; ``run_step`` is one matching step of all classes and one network update."""

    def __init__(
        self,
        container: Container,
        data: RealData,
        config: GradientMatchingConfig,
        build: Builder,
        seed: int,
    ) -> None:
        self.container, self.data, self.config = container, data, config
        self.device = data.train.images.device
        self.random = random_of(seed, self.device)
        self.normalise = Normalise(data.mean, data.std, self.device)
        self.network = initialise(build().to(self.device), generator(seed, "network", 0, device=self.device))
        self.network_optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.network_lr,
            momentum=config.network_momentum,
            weight_decay=config.network_weight_decay,
        )
        memories = container.memory_tiers()
        groups = [
            {"params": parameters, "lr": config.memory_lr if tier in memories else config.weights_lr}
            for tier, parameters in container.tiers().items()
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(config.beta1, config.beta2))
        labels = data.train.labels
        self.members = [(labels == label).nonzero().squeeze(1) for label in range(container.classes)]

    def run_step(self) -> float:
        """The summed distance; one optimiser step for all classes, or one per class by ``config.step_policy``."""
        config, total = self.config, 0.0
        self.optimizer.zero_grad()
        for label in range(self.container.classes):
            distance = self.class_distance(label)
            total += distance.item()
            if config.step_policy == "per_class":
                distance.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            else:
                (distance / self.container.classes).backward()
        if config.step_policy != "per_class":
            self.optimizer.step()
        self.update_network()
        return total

    def update_network(self) -> None:
        config, images = self.config, self.data.train.images
        batches, count = math.ceil(config.network_samples / config.network_batch), len(images)
        order = torch.randperm(count, generator=self.random.device, device=self.device)
        for batch in range(batches):
            # Past the end of a small set, its order starts again.
            places = torch.arange(batch * config.network_batch, (batch + 1) * config.network_batch, device=self.device)
            index = order[places % count]
            training_step(
                self.network,
                self.network_optimizer,
                self.normalise(images[index]),
                self.data.train.labels[index],
                strategy=config.network_strategy,
                cutmix_probability=config.network_cutmix,
                random=self.random,
            )

    def class_distance(self, label: int) -> Tensor:
        """One class's distance, with the graph through augmentation and decoder to the container."""
        config, count = self.config, self.container.images_per_class
        rows = self._some(torch.arange(count, device=self.device), config.synthetic_batch) + label * count
        index = self._some(self.members[label], config.real_batch)
        real = self.normalise(self.data.train.images[index])
        synthetic = self.normalise(self.container.decode(rows))
        both = augment(torch.cat([real, synthetic]), config.strategy, self.random, alike=True)
        return class_distances(self.network, both[: len(real)], both[len(real) :], label).sum()

    def _some(self, members: Tensor, count: int) -> Tensor:
        order = torch.randperm(len(members), generator=self.random.device, device=self.device)
        return members[order[:count]]
