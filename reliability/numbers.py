"""Test exports with extreme weights: each must be refused or exported exactly; no export may give NaN silently.

    python -m reliability.numbers [CASE..] [--forms onnx:fp32,..] [-o dist/reliability]

Each case changes weights of the embedded demo. `exact`: the export passed its parity gate in every lowering, and the
bundle passed its self-test. `refused`: the export raised an EvmError; the message names the tensor if its weights are
not finite, or not finite in the precision. Exit code 1 for any other outcome.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy.errors import EvmError
from reliability import chosen

if TYPE_CHECKING:
    from torch import Tensor

FORMS = (
    "onnx:fp32",
    "onnx:fp16",
    "openvino:fp32",
    "openvino:fp16",
    "coreml:fp32",
    "coreml:fp16",
    "trt:fp32",
    "trt:fp16",
)
STATE = dict[str, "Tensor"]


@dataclass(frozen=True)
class Case:
    """A change of weights, and the expected outcomes.

    change: applied to the tensors whose names end with `suffix`. refused: forms in which the export must be refused; if
    `named`, with the tensor's name in the message. either: forms in which the export may be refused or exact. In all
    other forms the export must be exact.
    """

    suffix: str
    change: Callable[[Tensor], Tensor]
    refused: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    named: bool = True


def _one(value: float) -> Callable[[Tensor], Tensor]:
    """Return a change that sets one weight of a tensor to `value`."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[tensor.numel() // 2] = value
        return changed

    return change


def _all(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.new_full(tensor.shape, value)


def _alternating(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.new_full((tensor.numel(),), value)
        changed[::2] = -value
        return changed.view(tensor.shape)

    return change


def _zero_channels(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[::2] = 0
    return changed


HALF = tuple(form for form in FORMS if form.endswith("fp16"))
CASES: Mapping[str, Case] = {
    "nan weight": Case("0.blocks.0.op.in_proj.weight", _one(float("nan")), refused=FORMS),
    "inf weight": Case("0.blocks.0.op.conv2d.bias", _one(float("inf")), refused=FORMS),
    "denormal weights": Case("op.out_proj.weight", lambda tensor: tensor * 1e-40),
    "denormal dt": Case("op.dt_projs_weight", lambda tensor: tensor * 1e-42, either=HALF, named=False),
    "dt bias 30": Case("op.dt_projs_bias", _all(30.0)),
    "dt bias -30": Case("op.dt_projs_bias", _all(-30.0)),
    "dt bias +-30": Case("op.dt_projs_bias", _alternating(30.0)),
    "A_logs 20": Case("op.A_logs", _all(20.0)),
    "A_logs -20": Case("op.A_logs", _all(-20.0)),
    "A_logs +-20": Case("op.A_logs", _alternating(20.0)),
    "A_logs 95": Case("op.A_logs", _one(95.0), refused=FORMS),
    "zero channels": Case("op.in_proj.weight", _zero_channels),
    "zero block": Case("op.out_norm.weight", _all(0.0)),
    "zero D": Case("op.Ds", _all(0.0)),
    "dead normalisation": Case("conv_branch.1.running_var", _all(0.0)),
    "negative variance": Case("conv_branch.1.running_var", _one(-1.0), refused=FORMS),
    "weight over fp16": Case("classifier.head.weight", _one(7e4), refused=HALF),
    "activation over fp16": Case("classifier.norm.weight", lambda tensor: tensor * 6e4, refused=HALF, named=False),
}


def write(case: Case, path: Path) -> str:
    """Write a checkpoint of the demo with the case's weights; return the alphabetically first changed tensor."""
    from safetensors.torch import load_file, save_file

    from evm_deploy.demo import CHECKPOINT

    state = load_file(CHECKPOINT)
    changed = [name for name in state if name.endswith(case.suffix)]
    for name in changed:
        state[name] = case.change(state[name]).contiguous()
    save_file(state, path)
    return min(changed)


def attempt(case: Case, form: str, folder: Path) -> tuple[str, str]:
    """Export a case in one form -> ("exact" or "refused", details). Raises AssertionError for any other outcome."""
    from evm_deploy.bundle.loaded import load
    from evm_deploy.export.pipeline import export
    from evm_deploy.export.plan import ExportPlan

    tensor = write(case, folder / "net.safetensors")
    target, precision = form.split(":")
    plan = ExportPlan(target, precision=precision, imgsz=(64, 64), crop_pct=1.0)
    try:
        bundle = export(folder / "net.safetensors", plan, folder, force=True)
    except EvmError as error:
        said = str(error)
        if case.named and tensor not in said:
            raise AssertionError(f"refused without naming {tensor}: {said}") from error
        return "refused", said
    if not bundle.manifest.built:
        return "exact", "verified in ONNX Runtime"
    with load(bundle.path) as model:
        wrong = [check for check in model.selftest() if not check.ok]
    if wrong:
        raise AssertionError(f"exported, but the self-test fails: {wrong}")
    return "exact", f"max|d| {bundle.manifest.parity['max_abs']:.1e}"


def expected(case: Case, form: str) -> tuple[str, ...]:
    """Return the accepted outcomes of a case in a form."""
    return ("refused",) if form in case.refused else ("exact", "refused") if form in case.either else ("exact",)


def main() -> int:
    """Test the chosen cases in all forms; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("-o", "--out", type=Path, default=Path("dist/reliability"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in chosen(parser, args.cases, CASES):
        for form in args.forms.split(","):
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcome, said = attempt(CASES[name], form, Path(folder))
                except Exception as error:
                    outcome, said = "FAILED", f"{type(error).__name__}: {error}"
            if outcome not in (*expected(CASES[name], form), "FAILED"):
                outcome, said = "FAILED", f"{outcome}, expected {expected(CASES[name], form)}: {said}"
            results.append({"case": name, "form": form, "outcome": outcome, "said": said})
            print(
                f"{name:<22} {form:<14} {outcome:<8} {time.monotonic() - start:4.0f} s  {said.splitlines()[0]:.150}",
                flush=True,
            )
    (args.out / "numbers.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(each["outcome"] == "FAILED" for each in results))


if __name__ == "__main__":
    sys.exit(main())
