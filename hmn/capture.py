"""Device work recorded once as a CUDA graph and replayed: a step costs one launch instead of thousands."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hmn.errors import HmnError

Tensors = dict[str, Tensor]
# Before it, a failed recording leaves a generator that believes itself recorded still: there is no going on without.
RECOVERS = "2.13.0a0"
_enabled = True
launched_anew: set[str] = set()  # why something was not recorded, once for all networks and steps
WARM_UP = 3  # calls before recording: they compile, choose algorithms and make optimiser state


def enable(record: bool) -> None:
    """Whether this process records at all."""
    global _enabled
    _enabled = record


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class Replay:
    """``function(inputs)`` on a GPU, recorded at the first call with each set of input shapes.

    ``function`` must do nothing but device work: read ``inputs``, change the ``state()`` tensors in place, draw from
    ``generators`` and return tensors. Optimiser state that its first calls make must start from zero. Where recording
    fails, the function is called as it is; PyTorch before 2.13 cannot go on then, which raises ``HmnError``.
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
            gc.collect()  # what was recorded before is held in cycles, and its memory with it
            self._warm_up(inputs)
            try:
                self.recorded[shapes] = self._record(inputs)
            except RuntimeError as error:
                error = _first(error)  # ending a recording that has failed fails, too
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
            cannot = f"a step cannot be recorded as a CUDA graph, and PyTorch {torch.__version__} cannot go on"
            raise HmnError(f"{cannot}: compute.record=false launches every step anew ({reason})")
        self.plain = True
        if reason not in launched_anew:
            launched_anew.add(reason)
            print(f"a step cannot be recorded as a CUDA graph, so it is launched anew: {reason}", file=sys.stderr)

    def _warm_up(self, inputs: Tensors) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            warm_up(self.function, inputs, self.state, self.generators)
        torch.cuda.current_stream().wait_stream(side)

    def _record(self, inputs: Tensors) -> _Recorded:
        inputs = {name: value.clone() for name, value in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                outputs = self.function(inputs)
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails leaves its own
        return _Recorded(graph, inputs, outputs)


def _first(error: RuntimeError) -> RuntimeError:
    """Of the errors that came of one another the earliest of PyTorch's kind."""
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
    """Call ``function`` a few times and undo what that did: state that was there is put back, new state is zeroed."""
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
    """What an optimiser changes: its parameters and all it remembers of them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    return parameters + kept
