"""The formulations that are measured, by kind of device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hmn.compute import Compute
from hmn.machine import winograd_pays


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to compute the same thing; names as in :class:`hmn.compute.Compute`."""

    name: str
    precision: str = "fp32"
    matching: str = "loop"
    blocks: str = "compiler"
    compiled: bool = False
    winograd: bool = False
    classes_per_call: int = 1
    stored: bool = False  # real gradients come from a bank of network snapshots
    networks: int = 1  # trained together, in evaluation

    def compute(self, device: torch.device) -> Compute:
        return Compute(
            device,
            self.precision,
            matching=self.matching,
            blocks=self.blocks,
            compiled=self.compiled,
            classes_per_call=self.classes_per_call,
            winograd=self.winograd,
        )

    @property
    def note(self) -> str:
        return STORED if self.stored else ""


# The class loop in benchmarks/reference.py. On a GPU its convolutions run in tf32, PyTorch's default.
REFERENCE = Form(name="reference")
ONE_CLASS = " one class per call"
TRITON = " triton"
STORED = "stored real gradients: another objective, to be read beside the accuracy it costs"


def other_convolutions() -> Form:
    """Compiled fp32 with the convolutions that ``compute.convolutions=auto`` does not take on this CPU."""
    name = "direct" if winograd_pays() else "winograd"
    return Form(name=f"compiled fp32 {name}", matching="compiled", compiled=True, winograd=name == "winograd")


def matching(kind: str, classes: int) -> list[Form]:
    """Forms of the matching step on a ``kind`` of device, ``cpu`` or ``cuda``."""
    if kind == "cpu":
        written = [("compiled", "fp32"), ("compiled", "bf16"), ("r_operator", "fp32"), ("r_operator", "bf16")]
        together = 1
    else:
        written = [(name, precision) for name in ("compiled", "r_operator") for precision in ("fp32", "tf32", "bf16")]
        together = classes
    forms = [REFERENCE, Form(name="loop fp32")]
    for stored in (False, True):
        for name, precision in written:
            forms.append(
                Form(
                    name=f"{name} {precision}" + (" stored" if stored else ""),
                    precision=precision,
                    matching=name,
                    compiled=True,
                    winograd=kind == "cpu" and precision == "fp32" and winograd_pays(),
                    classes_per_call=together,
                    stored=stored,
                )
            )
    if kind == "cpu":
        forms.append(other_convolutions())
    if kind == "cuda":
        forms += [
            replace(form, name=form.name.replace("bf16", f"bf16{TRITON}"), blocks="triton")
            for form in forms
            if form.name in ("r_operator bf16", "r_operator bf16 stored")
        ]
        # To see what batching classes is worth: it makes their convolutions grouped ones
        alone = {"precision": "bf16", "compiled": True}
        forms += [Form(name=f"{name} bf16{ONE_CLASS}", matching=name, **alone) for name in ("compiled", "r_operator")]
    return forms


def outer_step(kind: str, classes: int) -> list[Form]:
    """Forms of a whole outer step: fewer, since the matching step already tells them apart."""
    if kind == "cpu":
        kept = ("reference", "compiled fp32", "compiled fp32 stored", "compiled bf16", "r_operator bf16")
        kept += (other_convolutions().name,)
    else:
        kept = ("reference", "compiled tf32", "compiled bf16", "r_operator tf32", "r_operator bf16")
        kept += (f"compiled bf16{ONE_CLASS}", f"r_operator bf16{TRITON}", f"r_operator bf16{TRITON} stored")
    kept += ("compiled bf16 stored", "r_operator bf16 stored")
    return [form for form in matching(kind, classes) if form.name in kept]


def evaluation(kind: str, networks: int) -> list[Form]:
    """Forms of training ``networks`` fresh networks: one after another on a CPU, together on a GPU."""
    if kind == "cpu":
        kept = ("reference", "compiled fp32", "compiled bf16", other_convolutions().name)
        return [form for form in matching(kind, 1) if form.name in kept]
    forms = [REFERENCE]
    for precision in ("tf32", "bf16"):
        for together in sorted({1, networks}):
            name = f"compiled {precision}, {together} at a time"
            forms.append(Form(name=name, precision=precision, compiled=True, networks=together))
    return forms
