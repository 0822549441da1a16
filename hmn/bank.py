"""The snapshot bank: matched networks, augmentation draws and real gradients stored on disk and shared by many runs.

Without a bank, every run trains its own networks on real images and computes its own real gradients. A bank stores
those of a fixed number of steps. A run that reads it has neither a real branch nor network updates, and sees each
snapshot many times: a different algorithm, cheaper per step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hmn import capture
from hmn.config import BankConfig, GradientMatchingConfig, require
from hmn.data import augment
from hmn.files import exclusive, write_tensors
from hmn.objectives.distance import Parameters, convolution_weights
from hmn.precomputed import check_images, read_part
from hmn.realside import Choice, LiveSide, RealSide, update_of
from hmn.seeding import generator
from hmn.stop import Stop

# (parameters, images (k, B, channels, H, W), labels (k,)) -> gradients {name: (k, ...)}
RealGradients = Callable[[Parameters, Tensor, Tensor], Parameters]


def snapshot_steps(snapshots: int, inner_steps: int) -> list[int]:
    """Training steps of a network, from 0, at which a snapshot is kept: evenly spaced, the untrained network first."""
    return [position * inner_steps // snapshots for position in range(snapshots)]


def files(folder: Path, config: BankConfig) -> list[Path]:
    """Paths of a bank's files, one per network, whether or not they exist."""
    return [folder / f"network-{number:04d}.safetensors" for number in range(config.networks)]


def network_bytes(network: nn.Module, config: BankConfig, classes: int) -> int:
    """Size of the file of one network: parameters and all classes' gradients of each snapshot; draws are tiny."""
    parameters = dict(network.named_parameters())
    own, matched = (sum(map(Tensor.numel, part.values())) for part in (parameters, convolution_weights(parameters)))
    return 4 * config.snapshots * (own + classes * matched)


def require_room(folder: Path, network: nn.Module, config: BankConfig, classes: int) -> None:
    """Raise ``ConfigError`` if the disk of ``folder`` has no room for the files that are missing."""
    needed = network_bytes(network, config, classes) * sum(not path.exists() for path in files(folder, config))
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    usage = shutil.disk_usage(disk)
    fits = needed <= usage.free or not usage.total  # some network file systems tell nothing
    rule = "less, or objective.bank.snapshots less, or paths.cache_dir on another disk: what is missing of the bank "
    rule += f"takes {needed / 1e9:.1f} GB, and {disk} has {usage.free / 1e9:.1f} GB left"
    require("objective.bank.networks", fits, config.networks, rule)


def build(
    folder: Path,
    live: Callable[[int], LiveSide],
    gradients: RealGradients,
    config: GradientMatchingConfig,
    *,
    classes: int,
    fingerprint: str,
    chunk: int,
    stop: Stop,
) -> list[Path]:
    """Write the bank into ``folder``, one file per network; return their paths.

    Existing files are kept, so an interrupted build continues. ``live(n)`` makes the real side of network n, with its
    own random streams. ``gradients`` is called with ``chunk`` classes at once. Raises ``ArtifactError`` for a file made
    from other images.
    """
    paths = files(folder, config.bank)
    with exclusive(folder, wait=stop):
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        done = len(paths) - len(missing)
        for number in tqdm(
            missing, desc="snapshot bank", unit="network", total=len(paths), initial=done, disable=not missing
        ):
            tensors = _record(live(number), gradients, config, classes, chunk, stop)
            write_tensors(paths[number], tensors, {"data": fingerprint})
    check_images(paths, fingerprint)
    return paths


def _record(
    side: LiveSide, gradients: RealGradients, config: GradientMatchingConfig, classes: int, chunk: int, stop: Stop
) -> dict[str, Tensor]:
    every_class = torch.arange(classes)
    due = snapshot_steps(config.bank.snapshots, config.inner_steps)
    tensors: dict[str, Tensor] = {}
    update = update_of(side, record=capture.recordable(side.labels.device))
    side.begin(0)
    for step in range(due[-1] + 1):
        stop.check("the snapshot bank keeps its finished networks; the same command resumes from there")
        if step in due:
            choice = side.choose(every_class)
            parameters, drawn = side.parameters(choice), side.draw(choice, classes)
            parts = []
            for start in range(0, classes, chunk):
                part = slice(start, start + chunk)
                labels = every_class[part].to(side.labels.device)
                parts.append(gradients(parameters, side.real(choice, drawn, part), labels))
            head = f"{due.index(step)}"
            tensors |= {f"{head}/parameters/{name}": value.clone() for name, value in parameters.items()}
            for name in parts[0]:
                tensors[f"{head}/gradients/{name}"] = torch.cat([part[name] for part in parts])
            tensors |= {f"{head}/draw/{name}": value for name, value in drawn.tensors().items()}
        if step < due[-1] and (choice := side.choose_update()):  # nothing reads the network after the last snapshot
            update(choice)
    return tensors


class BankSide(RealSide):
    """The real side read from a bank: every step takes the next snapshot of a random order, drawn again at each pass.

    On a GPU, up to ``keep_bytes`` of what is read stay in its memory; on a CPU, the system's file cache does the same.
    """

    USES_IMAGES = False

    def __init__(
        self,
        paths: list[Path],
        config: BankConfig,
        strategy: str,
        device: torch.device,
        seed: int,
        rule: str = "idc",
        keep_bytes: int = 0,
    ) -> None:
        self.paths, self.snapshots, self.device = paths, config.snapshots, device
        self.strategy, self.rule = strategy, rule
        self.choosing = generator(seed, "condense", "bank")  # on the host: it decides what is read
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0
        self.current: dict[str, Tensor] = {}
        self.keep_bytes, self.resident = keep_bytes, dict[int, dict[str, Tensor]]()

    def begin(self, step: int) -> None:
        if self.position == len(self.order):
            self.order = torch.randperm(len(self.paths) * self.snapshots, generator=self.choosing)
            self.position = 0
        number = int(self.order[self.position])
        self.position += 1
        if number in self.resident:
            self.current = self.resident[number]
            return
        self.current = self._read(*divmod(number, self.snapshots))
        size = sum(value.nbytes for value in self.current.values())
        if size <= self.keep_bytes:
            self.resident[number] = self.current
            self.keep_bytes -= size

    def _read(self, network: int, snapshot: int) -> dict[str, Tensor]:
        return read_part(self.paths[network], str(snapshot), self.device)

    def choose(self, classes: Tensor) -> Choice:
        classes = classes.to(self.device, non_blocking=True)
        return {
            name: value if name.startswith("parameters/") else value[classes] for name, value in self.current.items()
        }

    def parameters(self, choice: Choice) -> Parameters:
        return _under("parameters", choice)

    def draw(self, choice: Choice, count: int) -> augment.Draw:
        return augment.draw_of(self.strategy, _under("draw", choice), self.rule)

    def real(self, choice: Choice, drawn: augment.Draw, part: slice) -> Parameters:
        return {name: value[part] for name, value in _under("gradients", choice).items()}

    def state_dict(self) -> dict[str, Any]:
        return {"choosing": self.choosing.get_state(), "order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.choosing.set_state(state["choosing"])
        self.order, self.position = state["order"], state["position"]


def _under(head: str, choice: Choice) -> dict[str, Tensor]:
    return {name.removeprefix(f"{head}/"): value for name, value in choice.items() if name.startswith(f"{head}/")}
