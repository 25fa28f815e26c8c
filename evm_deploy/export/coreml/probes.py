"""Probes of a Core ML program (see `calib.probe`): tensors between its operations, which the MIL runtime can give.

The maps that a selection reads are found in the torch module: each is written by a call of a layer. The program's
operation with the weights of that layer writes the same map.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from evm_deploy._util.silence import one_at_a_time
from evm_deploy.calib.evaluation import OpenCandidate
from evm_deploy.calib.probe import PREFIX, sampled
from evm_deploy.runtimes.base import Feeds, Runtime
from evm_deploy.tasks.task import SELECTION, Outputs

if TYPE_CHECKING:
    from evm_deploy.runtimes.mil import Program

Call = tuple[str, int]  # path of a module of the network, and number of its call


def float_run(module: Any, feed: NDArray[Any]) -> tuple[Outputs, dict[str, list[Call]]]:
    """Run the float model (`hub.graph.with_pre_and_postprocessing`) on a feed. Returns its outputs and probes by name.

    The second value has for each probe the calls of layers that write its maps; it is empty without a selection.
    """
    import torch

    from evm_deploy.export.coreml.program import network_path

    calls: Counter[str] = Counter()
    written: dict[int, tuple[Call, weakref.ref[Any]]] = {}
    maps: list[torch.Tensor] = []
    hooks = []

    def watch(path: str) -> Callable[..., None]:
        def look(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                written[id(output)] = (path, calls[path]), weakref.ref(output)
            calls[path] += 1

        return look

    selection = getattr(module, SELECTION, None)
    if selection is not None:
        layers = [(name, each) for name, each in module.named_modules() if not any(each.children())]
        hooks = [each.register_forward_hook(watch(network_path(name))) for name, each in layers]
        hooks.append(selection.register_forward_pre_hook(lambda module, inputs: maps.extend(inputs)))
    try:
        with one_at_a_time, torch.inference_mode():
            values = [value.numpy() for value in module(torch.from_numpy(feed))]
    finally:
        for hook in hooks:
            hook.remove()
    writers: dict[str, list[tuple[Call, NDArray[Any]]]] = {}
    for each in maps:
        call, tensor = written.get(id(each), (("", 0), lambda: None))
        if tensor() is each:
            writers.setdefault(call[0], []).append((call, each.numpy()))
    named = {f"{PREFIX}{number}": found for number, found in enumerate(writers.values())}
    probes = {name: sampled([value for _, value in found]) for name, found in named.items()}
    outputs = {**dict(zip(module.outputs, values, strict=True)), **probes}
    return outputs, {name: [call for call, _ in found] for name, found in named.items()}


def tensors_of(
    program: Program, modules: Mapping[str, str], calls: Mapping[str, Sequence[Call]]
) -> dict[str, list[str]]:
    """Return the names of the tensors in a program that these calls of layers write, by the name of the probe.

    modules: weight name in the program -> module path.
    """
    results: dict[str, list[str]] = {}
    for op in program.operations:
        path = modules.get(op.weight.removesuffix("_to_fp16")) if op.weight else None
        if path:
            results.setdefault(path, []).append(op.results[0].name)
    return {name: [results[path][number] for path, number in found] for name, found in calls.items()}


class ProbedRuntime:
    """MIL runtime whose outputs are joined by probes. tensors: by the name of the probe."""

    def __init__(self, runtime: Any, tensors: Mapping[str, Sequence[str]]) -> None:
        self.inputs, self.outputs = runtime.inputs, runtime.outputs
        self._runtime, self._tensors = runtime, tensors

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs and the probes."""
        between = [name for names in self._tensors.values() for name in names]
        values = self._runtime.run(feeds, [*self.outputs, *between])
        probes = {probe: sampled([values[name] for name in names]) for probe, names in self._tensors.items()}
        return {**{name: values[name] for name in self.outputs}, **probes}


def probed(open_candidate: OpenCandidate, tensors: Mapping[str, Sequence[str]]) -> OpenCandidate:
    """Return a function like `open_candidate` whose runtime gives probes, too."""

    @contextmanager
    def opened(model: Any) -> Iterator[Runtime]:
        with open_candidate(model) as runtime:
            yield ProbedRuntime(runtime, tensors)  # type: ignore[misc]

    return opened
