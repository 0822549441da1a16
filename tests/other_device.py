"""A second device without one: its tensors say that they are on ``meta``, but have values, which are on the CPU.

The rules of a GPU are kept. Tensors of both devices do not mix, except for scalars and, as in PyTorch, indices. Nothing
is copied between the devices, and nothing read back, while a step runs that a GPU would replay.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from hmn import bank, capture, experts, precomputed
from hmn.compute import Compute
from tests.tape import waits_for_the_device

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_)


class Elsewhere(Tensor):
    """A tensor of the second device, with its ``value`` on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> Elsewhere:
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        self = Tensor._make_wrapper_subclass(cls, value.size(), **layout, device=DEVICE)
        self.value = value
        return self

    def tolist(self) -> Any:  # PyTorch has none for such tensors
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of the second device is used outside of other_device()")


class _Rules(TorchDispatchMode):
    """Computes on the CPU what the second device would, by its rules."""

    recorded = 0  # depth of calls that a GPU would replay

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet, given = function.overloadpacket, tree_leaves((args, kwargs))
        there = any(isinstance(value, Elsewhere) for value in given)
        here = any(isinstance(value, Tensor) and not isinstance(value, Elsewhere) and value.ndim for value in given)
        wanted = kwargs.get("device")
        values, options = tree_map_only(Elsewhere, lambda one: one.value, (args, kwargs))
        if wanted is not None:
            options["device"] = CPU
        if packet is aten._to_copy:
            to = torch.device(wanted or args[0].device)
            self.refuse(function, to.type != args[0].device.type)
            found = function(*values, **options)
            return Elsewhere(found) if to.type == DEVICE.type else found
        if packet is aten.copy_ and there and here:
            self.refuse(function, True)
            function(*values, **options)
            return args[0]
        if there:
            self.refuse(function, waits_for_the_device(function, args))
        if there and here:
            assert packet in INDEXING, f"{function} of tensors on two devices"
            self.refuse(function, True)
        found = function(*values, **options)
        if not there and (wanted is None or torch.device(wanted).type != DEVICE.type):
            return found
        found = tree_map_only(Tensor, lambda one: one if isinstance(one, Elsewhere) else Elsewhere(one), found)
        return return_and_correct_aliasing(function, args, kwargs, found)

    def refuse(self, function: Any, waits: bool) -> None:
        assert not (waits and self.recorded), f"{function} within a step that is to be replayed"


class _Generator(torch.Generator):
    """A generator of either device."""

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        self = super().__new__(cls)
        self.on = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.on


@contextlib.contextmanager
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Within the block there is a second device, on which steps are recorded."""
    rules, make_tensor = _Rules(), torch.tensor

    def replay(self: capture.Replay, inputs: capture.Tensors) -> capture.Tensors:
        rules.recorded += 1
        try:
            return self.function(inputs)
        finally:
            rules.recorded -= 1

    def tensor(data: Any, *, device: torch.device | None = None, **options: Any) -> Tensor:
        made = make_tensor(data, **options)
        return made if device is None else made.to(device)

    def read(path: Path, head: str, device: torch.device) -> dict[str, Tensor]:  # safetensors knows no such device
        return {name: value.to(device) for name, value in precomputed.read_part(path, head, CPU).items()}

    for module in (bank, experts):
        monkeypatch.setattr(module, "read_part", read)
    monkeypatch.setattr(capture.Replay, "__call__", replay)
    monkeypatch.setattr(capture, "recordable", lambda device: device.type == DEVICE.type)
    monkeypatch.setattr(torch, "tensor", tensor)  # would make a tensor without a value
    monkeypatch.setattr(torch, "Generator", _Generator)
    # PyTorch has these for some devices only
    monkeypatch.setattr(Compute, "autocast", lambda self: contextlib.nullcontext())
    adam, optimizer = sys.modules["torch.optim.adam"], sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: [DEVICE.type])
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])
    converts = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with rules:
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(converts)
