"""The optimiser of a container: learning rates per tier, and class rows that no other class's step moves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hmn import capture
from hmn.config.objectives import ObjectiveConfig
from hmn.containers.base import Container

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
LARGE_SIDE = 128


def idc_rate_factor(images_per_class: int, image_size: int) -> float:
    """IDC's factor for a learning rate given for 10 images per class: (IPC / 10) (H / base)^2, base 32 or 224."""
    base = 224 if image_size >= LARGE_SIDE else 32
    return images_per_class / 10 * (image_size / base) ** 2


class ContainerOptimizer:
    """Adam or SGD over a container: ``memory_lr`` for memories, ``weights_lr`` for networks, cosine decay over the run.

    Both rates are multiplied by ``factor`` and by ``lr_scale[tier]``. With ``by_class`` each class's rows are separate
    parameters that share the stacked tensors' storage. A step for some classes then leaves the rows and moments of the
    others alone, which an optimiser with momentum would otherwise keep moving.
    """

    def __init__(
        self,
        container: Container,
        config: ObjectiveConfig,
        total_steps: int,
        *,
        by_class: bool,
        factor: float = 1.0,
        lr_scale: dict[str, float] | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.final = config.final_lr_fraction
        self.class_parameters = container.class_parameters()
        owned = {id(parameter) for parameter in self.class_parameters} if by_class else set()
        self.rows: list[tuple[nn.Parameter, list[Tensor]]] = []
        groups = []
        for tier, parameters in container.tiers().items():
            lr = config.memory_lr if tier in container.memory_tiers() else config.weights_lr
            lr *= factor * (lr_scale or {}).get(tier, 1.0)
            members: list[Tensor] = []
            for parameter in parameters:
                if id(parameter) in owned:
                    rows = [row.requires_grad_() for row in parameter.detach().unbind(0)]
                    self.rows.append((parameter, rows))
                    members += rows
                else:
                    members.append(parameter)
            groups.append({"params": members, "lr": lr, "initial_lr": lr})
        self.parameters = [parameter for tier in container.tiers().values() for parameter in tier]
        # A recorded step reads its rates from the device.
        self.recordable = capture.recordable(self.parameters[0].device)
        if self.recordable:
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], device=self.parameters[0].device)
        self.inner: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.inner = torch.optim.Adam(
                groups, betas=(config.beta1, config.beta2), eps=1e-8, capturable=self.recordable
            )
        else:
            # Only the fused SGD accepts a rate on the device without reading it back.
            self.inner = torch.optim.SGD(groups, momentum=config.momentum, fused=self.recordable)
            if config.momentum:  # from zeros: the fused form refuses a step where only some rows have moved before
                for parameter in [member for group in self.inner.param_groups for member in group["params"]]:
                    self.inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @property
    def learning_rate(self) -> float:
        """Current learning rate of the first tier."""
        return float(self.inner.param_groups[0]["lr"])

    def set_rates(self, done: int) -> None:
        """Set the learning rates for ``done`` steps into the run."""
        decay = self.final + (1 - self.final) * (1 + math.cos(math.pi * done / self.total_steps)) / 2
        for group in self.inner.param_groups:
            rate = group["initial_lr"] * decay
            if self.recordable:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, classes: Tensor | None = None) -> None:
        """Apply the gradients of ``classes`` (k,), a tensor on the host, or of all classes, then clear them."""
        taking_part = set(classes.tolist()) if self.rows and classes is not None else None
        for parameter, rows in self.rows:
            for index, row in enumerate(rows):
                row.grad = parameter.grad[index] if taking_part is None or index in taking_part else None
        self.inner.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state in the form it has on a CPU, whatever device it is on."""
        state = self.inner.state_dict()
        host = {"lr": float, "capturable": lambda _: False, "fused": lambda _: False}
        groups = [
            {key: host[key](value) if key in host and value is not None else value for key, value in group.items()}
            for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        here = [dict(group) for group in self.inner.param_groups]
        # Set before loading: `capturable` and `fused` tell torch where Adam's step counts go.
        groups = [
            {**group, **{key: before[key] for key in ("capturable", "fused") if key in before}}
            for group, before in zip(state["param_groups"], here, strict=True)
        ]
        self.inner.load_state_dict({**state, "param_groups": groups})
        if self.recordable:
            for group, before in zip(self.inner.param_groups, here, strict=True):
                group["lr"] = before["lr"].fill_(group["lr"])

    def class_rows(self) -> Iterator[tuple[int, Tensor]]:
        """Every class's row of each parameter that classes own, and of its moments, as (class, view)."""
        separate = {id(parameter): rows for parameter, rows in self.rows}
        for parameter in self.class_parameters:
            yield from enumerate(parameter.detach())
            for label, row in enumerate(separate.get(id(parameter), ())):
                for moment in self._moments(row):
                    yield label, moment
            for moment in self._moments(parameter):
                yield from enumerate(moment)

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        state = self.inner.state.get(parameter, {})
        return [state[name] for name in MOMENTS if state.get(name) is not None]
