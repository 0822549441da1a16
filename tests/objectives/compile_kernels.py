"""Compile the kernels of a block for GPUs of a compute capability, without one; print what they use, as JSON.

``python -m tests.objectives.compile_kernels 90``. For planes as ConvNet has them at width 128, in bf16, channels last.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hmn.objectives import block_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = ("_forward", "_backward", "_tangent_forward", "_tangent_backward")


class PretendedDriver:
    """What the compiler asks of a GPU's driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """In a kernel's place: compiles it for the arguments instead of launching it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.last = kernel, None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, **settings: Any) -> None:
            self.last = self.kernel.warmup(*arguments, grid=grid, **settings)

        return call


def used(kernel: Any) -> dict[str, int]:
    """Registers per thread, bytes spilled by each, and the widest read from memory in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    widths = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    ]
    registers, spilled = (int(re.search(rf"{key}:(\d+)", told)[1]) for key in ("REG", "STACK"))
    return {"registers": registers, "spilled": spilled, "widest_read": max(widths)}


def main(capability: int) -> None:
    driver.set_active(PretendedDriver(capability))
    kernels = {name: Compiled(getattr(block_triton, name)) for name in KERNELS}
    for name, kernel in kernels.items():
        setattr(block_triton, name, kernel)
    found = {}
    for side in (64, 32, 16, 8):
        y, d_p = maps(side), maps(side // 2)
        ones, passes = torch.ones(128), block_triton.TRITON
        _, seen = passes.forward(y, ones, ones, 1e-5)
        _, back = passes.backward(d_p, seen)
        _, moved = passes.tangent_forward(y, seen)
        passes.tangent_backward(d_p, seen, back, moved)
        found |= {f"{name} {side}": used(kernel.last) for name, kernel in kernels.items()}
    print(json.dumps(found))


def maps(side: int) -> Tensor:
    return torch.zeros(2, 128, side, side, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main(int(sys.argv[1]))
