"""Forms of a network: pairs of a target and a precision, such as onnx:int8; torch:fp32 is the checkpoint itself."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy.bench.measurable import TORCH
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import canonical_precision
from evm_deploy.export.targets import get_target

FORMS = "torch:fp32,onnx:fp32,onnx:int8,openvino:fp32,openvino:int8"


@dataclass(frozen=True)
class Form:
    """Target and precision of one export in a comparison. Target `torch` is the checkpoint itself, not exported."""

    target: str
    precision: str

    def __str__(self) -> str:
        return f"{self.target} {self.precision}"


def parse_forms(text: str) -> tuple[Form, ...]:
    """Parse `torch:fp32,onnx:int8` into forms, without duplicates; aliases such as onnx:w8a16 are resolved.

    A form without a precision gets the first one of its target. Raises UsageError for an unknown target or precision.
    """
    forms = []
    for part in text.split(","):
        name, _, precision = part.strip().partition(":")
        if name == TORCH:
            if precision not in ("", "fp32"):
                raise UsageError(f"--forms {part}: torch measures the checkpoint unchanged", f"use {TORCH}:fp32")
            forms.append(Form(TORCH, "fp32"))
            continue
        target, precision = get_target(name, "--forms"), canonical_precision(precision)
        if precision and precision not in target.precisions:
            has = ", ".join(target.precisions)
            raise UsageError(f"--forms {part}: target '{target.name}' has no such precision", f"choose from: {has}")
        forms.append(Form(target.name, precision or target.precisions[0]))
    return tuple(dict.fromkeys(forms))
