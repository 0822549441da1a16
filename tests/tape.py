"""A CUDA graph without a GPU: the operators of a recorded step, noted on a CPU and repeated on the same memory.

What a graph cannot hold shows as it would on a GPU. A number that Python computed stays what it was when the step was
recorded, a tensor that is put in another's place later is not seen, and an unregistered generator is an error.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hmn import capture


class Tape(TorchDispatchMode):
    """Notes all operators that run within the block, which ``replay`` repeats."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        super().__init__()
        self.registered = {generator._cdata for generator in generators}
        self.calls: list[tuple[Any, Any, Any]] = []  # operator, its arguments, its results

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn_from = kwargs.get("generator")
        if drawn_from is not None and drawn_from._cdata not in self.registered:
            raise AssertionError(f"{function} draws from a generator that is not registered")
        if waits_for_the_device(function, args):
            raise AssertionError(f"{function} makes the host wait for the device")
        given = _aliases((args, kwargs))  # before an operator that changes shapes in place, such as squeeze_
        found = function(*args, **kwargs)
        self.calls.append((function, given, _aliases(found)))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for function, given, before in self.calls:
            args, kwargs = _aliases(given)
            for old, new in zip(tree_leaves(before), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def waits_for_the_device(function: Any, args: Any) -> bool:
    """Whether the host needs what the operator computes: a number, or a size."""
    aten, packet = torch.ops.aten, function.overloadpacket
    masks = args[1] if packet in (aten.index, aten.index_put_) else ()
    return packet in (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero) or any(
        mask is not None and mask.dtype == torch.bool for mask in masks
    )


def _aliases(tree: Any) -> Any:
    """The same, with tensors in the same memory that have shapes of their own."""
    return tree_map_only(Tensor, Tensor.detach, tree)


def record_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let this process record steps on a CPU, as it would on a GPU, with a :class:`Tape` as the graph.

    Returns the names of the functions that are recorded, which it then fills.
    """
    recorded: list[str] = []

    def record(self: capture.Replay, inputs: capture.Tensors) -> capture._Recorded:
        tape, outputs = Tape(self.generators), {}

        def noted(inputs: capture.Tensors) -> capture.Tensors:
            with tape:
                outputs.update(self.function(inputs))
            return outputs

        recorded.append(self.function.__qualname__)
        monkeypatch.setattr(capture, "WARM_UP", 1)
        capture.warm_up(noted, inputs, self.state, self.generators)  # as a tape, unlike a graph, has taken a step
        return capture._Recorded(tape, inputs, outputs)

    def warm_up(self: capture.Replay, inputs: capture.Tensors) -> None:
        capture.warm_up(self.function, inputs, self.state, self.generators)

    monkeypatch.setattr(capture, "recordable", lambda device: True)
    monkeypatch.setattr(capture.Replay, "_warm_up", warm_up)
    monkeypatch.setattr(capture.Replay, "_record", record)
    # PyTorch allows Adam's recordable form on GPUs alone
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    return recorded
