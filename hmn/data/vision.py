"""Import torchvision even if its compiled extension cannot be loaded. No other module imports it directly."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def torchvision() -> ModuleType:
    """The package, imported on first use because that takes seconds.

    The published wheel's extension is linked against CUDA. With a CPU-only torch it cannot be loaded, its operators
    stay undefined, and the package fails when it describes two of them ("operator torchvision::nms does not exist").
    This project calls no operator, so in that case the two schemas are declared first, without kernels.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _declare_operators()
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    return importlib.import_module("torchvision")


@cache  # keeps the library alive: its schemas would vanish with it
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
