"""Parity of an artifact with the float model: outputs, and the SSM part of every scan.

Logits alone are not enough. Where skip * u dominates, as in a freshly initialised network, they hide a wrong scan. So
three things are compared for each scan: its inputs in situ with those of the float model, its output in situ with the
float64 loop, and its output on large deltas with the float64 loop. Wrong lowerings fail on large deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.silence import one_at_a_time
from evm_deploy.errors import ParityError
from evm_deploy.export.hub.float16 import LARGEST
from evm_deploy.export.plan import TOLERANCES, ExportPlan
from evm_deploy.export.target import ScanAccess
from evm_deploy.runtimes.base import Feeds, Runtime, run_batched
from evm_deploy.scan.native import without_native_scan
from evm_deploy.scan.onnx_function import INPUTS, SOFTPLUS
from evm_deploy.scan.reference import Scan, large_delta_case, ssm_error
from evm_deploy.tasks.task import Outputs, Task

if TYPE_CHECKING:
    from torch import nn


LEAST_SHARE = 0.01


@dataclass(frozen=True)
class ScanParity:
    """Relative errors of one scan.

    inputs: against the float model's inputs. ssm: SSM part in situ against the float64 loop. probe: SSM part of the
    scan alone on large deltas against the float64 loop. share: of the recurrence in the output, |y - skip u| / |y|.
    """

    name: str
    inputs: float
    ssm: float
    probe: float
    lowering: str = "portable"
    share: float = 1.0


@dataclass(frozen=True)
class Parity:
    """Difference between an artifact and the float model.

    max_abs, limit: in units of the output that comes closest to its limit. cosine: of the worst image and output.
    top1_agreement: share of images with the same answer, None for tasks that give none.
    """

    max_abs: float
    limit: float
    cosine: float
    top1_agreement: float | None
    images: int
    scans: tuple[ScanParity, ...]
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every difference is within its limit."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {**asdict(self), "ok": self.ok}


class Judge(Protocol):
    """Float module of a selection whose outputs are choices among values, such as the classes of pixels.

    reads: path of the module, a convolution, that writes the maps which the selection reads.
    """

    reads: str

    def chosen(self, maps: NDArray[Any]) -> Outputs:
        """Return the right choices for these maps, as outputs by name."""
        ...

    def judged(self, maps: NDArray[Any], outputs: Outputs) -> Outputs:
        """Return the value that each choice in `outputs` has in these maps. The right choices have the largest."""
        ...


@dataclass(frozen=True)
class FloatRun:
    """Outputs and scans of the float model on the test inputs, computed in torch alone.

    test_inputs: (n, ...), n inputs of the artifact. outputs: by name. scans: the inputs of each scan on the first test
    input, in execution order. beyond_float16: layer name -> largest output, for layers whose output float16 cannot
    hold. judge: for outputs that are choices, the selection in the graph as a float module; else None. maps: what the
    network gives to it, (n, ...).
    """

    test_inputs: NDArray[Any]
    outputs: dict[str, NDArray[Any]]
    scans: list[Scan]
    beyond_float16: dict[str, float]
    judge: Judge | None = None
    maps: NDArray[Any] = field(default_factory=lambda: np.empty(0))


def verify(
    reference: FloatRun,
    runtime: Runtime,
    access: ScanAccess,
    plan: ExportPlan,
    task: Task,
    *,
    float16: bool,
    scan_tolerance: float = 0.0,
) -> Parity:
    """Compare the artifact in `runtime` with the float model. Differences beyond a limit are in `Parity.failures`.

    float16: whether the device computes the artifact's layers in float16. A value that float16 cannot hold is then a
    failure, even if the runtime on this machine hides it. scan_tolerance: as in `Target`.
    """
    failures: list[str] = []
    test_inputs = reference.test_inputs
    expected: Outputs = reference.outputs
    if float16:
        too_large = f"reaches {{:.2g}}, the largest float16 is {LARGEST:.0f}: use --precision fp32"
        failures += (f"{name} {too_large.format(value)}" for name, value in reference.beyond_float16.items())
    actual: Outputs = run_batched(runtime, plan.batch, test_inputs)
    agreement = float(task.agree(expected, actual).mean()) if task.agree else None
    if task.align:
        *paired, share = task.align(expected, actual, plan.tolerance)
        if share < plan.agreement:
            failures.append(f"{share:.1%} of the {task.gives} are those of the float model, limit {plan.agreement:.1%}")
        if reference.judge:
            paired = [reference.judge.judged(reference.maps, each) for each in (expected, actual)]
        expected, actual = paired
    max_abs = limit = 0.0
    cosine = 1.0
    for name, want in expected.items():
        have = actual[name]
        error = float(np.abs(have - want).max(initial=0.0)) if np.isfinite(have).all() else float("inf")
        allowed = plan.tolerance * float(np.abs(want[np.isfinite(want)]).max(initial=1.0))
        if not np.isfinite(want).all():
            failures.append(f"{name} of the float model contain NaN or Inf")
        elif not error <= allowed:
            failures.append(f"{name} differ by {error:.2g}, limit {allowed:.2g}")
        if not limit or error / allowed > max_abs / limit:
            max_abs, limit = error, allowed
        if len(want) and want.dtype.kind == "f" and np.isfinite(have).all():
            cosine = min(cosine, _cosine(have, want))
    first = {name: np.concatenate([test_inputs[:1]] * plan.batch.min) for name in runtime.inputs}
    if reference.judge:
        _verify_selection(access, first, reference.judge, reference.maps, plan, failures)
    scans = _verify_scans(access, first, reference.scans, plan, scan_tolerance, failures)
    return Parity(max_abs, limit, cosine, agreement, len(test_inputs), scans, tuple(failures))


def worst(parities: dict[str, Parity]) -> Parity:
    """Merge the parities of all lowerings of an artifact: the worst figures, every failure, and every scan."""
    every = list(parities.values())
    furthest = max(every, key=lambda parity: parity.max_abs / parity.limit)
    return replace(
        furthest,
        cosine=min(parity.cosine for parity in every),
        scans=tuple(replace(s, lowering=mode) for mode, parity in parities.items() for s in parity.scans),
        failures=tuple(f"{mode}: {text}" for mode, parity in parities.items() for text in parity.failures),
    )


def require(parity: Parity) -> None:
    """Raise ParityError if there are failures. The message lists the first four and the number of the others."""
    if not parity.ok:
        shown = "; ".join(parity.failures[:4])
        rest = f"; and {len(parity.failures) - 4} more" if len(parity.failures) > 4 else ""
        raise ParityError(f"the artifact differs from the float model: {shown}{rest}")


@contextmanager
def reaching(model: nn.Module, limit: float) -> Iterator[dict[str, float]]:
    """Context manager that records layer name -> largest output, for outputs above `limit` while the model runs in it.

    Finds float16 overflow in the float model. The runtimes on this machine may hide the overflow, because runtimes
    without float16 arithmetic compute in float32.
    """
    import torch

    found: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, (tuple, list)) else (output,):
                largest = float(value.abs().max()) if isinstance(value, torch.Tensor) and value.numel() else 0.0
                if largest > max(limit, found.get(name, 0)):
                    found[name] = largest

        return look

    layers = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def run_reference(reference: Any, test_inputs: NDArray[Any]) -> FloatRun:
    """Run the float model (of `with_pre_and_postprocessing`) on `test_inputs` in torch alone, and record its scans.

    The inputs run one at a time: some networks mix the images of a batch, or keep the batch of their first run.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    scans: list[Scan] = []

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.evm.selective_scan.default:
                scans.append({name: np.asarray(a) for name, a in zip((*INPUTS, SOFTPLUS), args, strict=False)})
            return func(*args, **(kwargs or {}))

    watched = reaching(reference, LARGEST)
    recorder = Recorder()  # type: ignore[no-untyped-call]
    selection = getattr(reference, "selection", None)
    judge = selection if hasattr(selection, "judged") else None
    seen: list[Any] = []
    hooks = [judge.register_forward_pre_hook(lambda _, maps: seen.extend(maps))] if judge else []
    with one_at_a_time, torch.inference_mode(), without_native_scan(), watched as reached, recorder:
        runs = [reference(torch.from_numpy(test_input[None])) for test_input in test_inputs]
    for hook in hooks:
        hook.remove()
    values = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    outputs = dict(zip(reference.outputs, values, strict=True))
    maps = np.concatenate(seen or [np.empty(0)])
    return FloatRun(test_inputs, outputs, scans[: len(scans) // len(runs)], reached, judge, maps)


def _verify_selection(
    access: ScanAccess, feeds: Feeds, judge: Judge, maps: NDArray[Any], plan: ExportPlan, failures: list[str]
) -> None:
    """Compare the maps that the artifact's selection reads with the float model's, and its choices with these maps.

    The selection is float32 in every precision, so that its choices have the limit of float32.
    """
    outputs = {name: value[:1] for name, value in access.with_layer(judge.reads, feeds).items()}
    own = outputs.pop(judge.reads).astype(np.float32)
    largest = max(1.0, float(np.abs(own).max()))
    error = _relative(own, maps[:1])
    if not error <= plan.tolerance:
        failures.append(f"{judge.reads} is off by {error:.2g} (relative), limit {plan.tolerance:.2g}")
    best, chosen = (judge.judged(own, each) for each in (judge.chosen(own), outputs))
    limit = TOLERANCES["fp32"] * largest
    for name, value in best.items():
        error = float(np.abs(value - chosen[name]).max())
        if not error <= limit:
            failures.append(f"{name} has choices that are worse than the best by {error:.2g}, limit {limit:.2g}")


def _verify_scans(
    access: ScanAccess,
    feeds: Feeds,
    float_scans: list[Scan],
    plan: ExportPlan,
    tolerance: float,
    failures: list[str],
) -> tuple[ScanParity, ...]:
    if len(access.names) != len(float_scans):
        failures.append(f"the artifact has {len(access.names)} scans, the float model {len(float_scans)}")
        return ()
    size = plan.batch.min
    seen = access.in_situ(feeds)
    rng = np.random.default_rng(0)
    results = []
    for index, (name, want, have) in enumerate(zip(access.names, float_scans, seen, strict=True)):
        constants = {key: have.get(key, want[key]) for key in ("A", "skip", "bias")}
        form = {key: want[key] for key in (SOFTPLUS,) if key in want}
        first = {key: want[key][:1] for key in ("u", "delta", "B", "C")}
        inputs = max(
            *(_relative(have[key][:1], first[key]) for key in first),
            *(_relative(constants[key], want[key]) for key in constants),
        )
        ssm, ssm_limit = ssm_error(have["y"][:1], {**form, **constants, **{key: have[key][:1] for key in first}})
        probe = large_delta_case({**form, **constants, **first}, rng)
        batched = {key: np.concatenate([probe[key]] * size) for key in first}
        alone, alone_limit = ssm_error(access.alone(index, batched)[:1], probe)
        share = recurrence_share(have["y"][:1], constants["skip"], have["u"][:1])
        results.append(ScanParity(name, inputs, ssm, alone, share=share))
        for what, error, limit in (
            ("reads inputs", inputs, max(plan.tolerance, tolerance, 1e-4)),
            ("is", ssm, max(tolerance, ssm_limit)),
            ("with large deltas is", alone, max(tolerance, alone_limit)),
        ):
            if not error <= limit:
                failures.append(f"scan {name} {what} off by {error:.2g} (relative), limit {limit:.2g}")
    return tuple(results)


def recurrence_share(y: NDArray[Any], skip: NDArray[Any], u: NDArray[Any]) -> float:
    """Return |y - skip u| / |y| of a scan."""
    return float(np.linalg.norm(y - skip[:, None] * u) / max(float(np.linalg.norm(y)), 1e-30))


def blind(parity: Parity) -> list[str]:
    """Return a note if no scan's recurrence is LEAST_SHARE of its output: the outputs then hide a wrong scan."""
    shares = [scan.share for scan in parity.scans]
    if not shares or max(shares) >= LEAST_SHARE:
        return []
    return [
        f"the recurrence is at most {max(shares):.1g} of any scan's output, as in a network that was not trained: the "
        "parity of the outputs says little about the scans"
    ]


def _relative(have: NDArray[Any], want: NDArray[Any]) -> float:
    if have.shape != want.shape or not np.isfinite(have).all():
        return float("inf")
    return float(np.abs(have - want).max() / max(float(np.abs(want).max()), 1e-6))


def _cosine(have: NDArray[Any], want: NDArray[Any]) -> float:
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (have, want))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.min((a * b).sum(1) / np.maximum(norms, 1e-30)))
