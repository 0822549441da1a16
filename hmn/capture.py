"""Device work recorded once as a CUDA graph and replayed: a step costs one launch instead of thousands."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hmn.errors import HmnError

Tensors = dict[str, Tensor]
# Before this version, a failed recording leaves a generator in recording mode, so the process cannot continue.
RECOVERS = "2.13.0a0"
_enabled = True
launched_anew: set[str] = set()  # why functions were not recorded: each reason once for all networks and steps
WARM_UP = 3  # calls before recording: they compile, choose algorithms and create optimiser state


def enable(record: bool) -> None:
    """Set whether this process records CUDA graphs at all."""
    global _enabled
    _enabled = record


def recordable(device: torch.device) -> bool:
    """Whether steps on ``device`` can be recorded. What changes between replays must then be in tensors."""
    return device.type == "cuda"


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class Replay:
    """Call ``function(inputs)`` as a CUDA graph, recorded at the first call with each set of input shapes.

    ``function`` must do nothing but device work: read ``inputs``, change the ``state()`` tensors in place, draw from
    ``generators`` and return tensors. Optimiser state that its first calls create must start at zero. If recording
    fails, the function is called without a graph; PyTorch before 2.13 cannot do that, which raises ``HmnError``.
    """

    def __init__(
        self,
        function: Callable[[Tensors], Tensors],
        state: Callable[[], Iterable[Tensor]],
        generators: list[torch.Generator],
    ) -> None:
        self.function, self.state, self.generators = function, state, generators
        self.recorded: dict[tuple[tuple[str, torch.Size], ...], _Recorded] = {}
        self.plain = not _enabled

    def __call__(self, inputs: Tensors) -> Tensors:
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        if shapes not in self.recorded and not self.plain:
            gc.collect()  # reference cycles hold earlier recordings and their memory
            # Warmed up with the very tensors that are recorded: with another layout, compiled code would compile again.
            kept = {name: value.clone() for name, value in inputs.items()}
            self._warm_up(kept)
            try:
                self.recorded[shapes] = self._record(kept)
            except RuntimeError as error:
                error = _first(error)  # ending a failed recording raises another error
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise error from None
                self._give_up(str(error).partition("\n")[0])
        if self.plain:
            return self.function(inputs)
        recorded = self.recorded[shapes]
        for name, value in inputs.items():
            recorded.inputs[name].copy_(value, non_blocking=True)
        recorded.graph.replay()
        return {name: value.clone() for name, value in recorded.outputs.items()}

    def _give_up(self, reason: str) -> None:
        if torch.__version__ < RECOVERS:
            cannot = f"a step cannot be recorded as a CUDA graph, and PyTorch {torch.__version__} cannot continue"
            raise HmnError(f"{cannot}: set compute.record=false to run without graphs ({reason})")
        self.plain = True
        if reason not in launched_anew:
            launched_anew.add(reason)
            print(f"a step cannot be recorded as a CUDA graph, so it runs without one: {reason}", file=sys.stderr)

    def _warm_up(self, inputs: Tensors) -> None:
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            warm_up(self.function, inputs, self.state, self.generators)
        torch.cuda.current_stream().wait_stream(side)

    def _record(self, inputs: Tensors) -> _Recorded:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        stream = torch.cuda.current_stream()
        try:
            with _uncollected(), torch.cuda.graph(graph):
                outputs = self.function(inputs)
        finally:
            torch.cuda.set_stream(stream)  # a failed recording leaves its own stream current
        return _Recorded(graph, inputs, outputs)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all warm-ups on ``device``, because cuBLAS keeps a workspace for every stream that it has run on."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python's garbage collector from freeing device code within the block, which would spoil a recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _first(error: RuntimeError) -> RuntimeError:
    """The earliest ``RuntimeError``, PyTorch's kind, in the chain of errors that led to ``error``."""
    first, cause = error, error.__context__
    while cause is not None:
        first = cause if isinstance(cause, RuntimeError) else first
        cause = cause.__context__
    return first


def warm_up(
    function: Callable[[Tensors], Tensors],
    inputs: Tensors,
    state: Callable[[], Iterable[Tensor]],
    generators: list[torch.Generator],
) -> None:
    """Call ``function`` a few times and undo its effects: existing state is restored, new state is zeroed."""
    before = [(tensor, tensor.detach().clone()) for tensor in state()]
    seeds = [generator.get_state() for generator in generators]
    try:
        for _ in range(WARM_UP):
            function(inputs)
    finally:
        old = {id(tensor) for tensor, _ in before}
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
            for tensor in state():
                if id(tensor) not in old:
                    tensor.zero_()
        for generator, seed in zip(generators, seeds, strict=True):
            generator.set_state(seed)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Tensors that an optimiser changes: its parameters and its state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    return parameters + kept
