"""Access to the scans of a Core ML package, for verification: their place in the program, their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import ToolchainError
from evm_deploy.export.coreml.program import scan_prefix
from evm_deploy.export.hub.graph import ScanSite
from evm_deploy.export.target import Artifact
from evm_deploy.runtimes.base import Feeds

if TYPE_CHECKING:
    from evm_deploy.runtimes.mil import Program
    from evm_deploy.runtimes.mil.program import Operation


def scan_site(program: Program, path: str) -> ScanSite:
    """Find the scan of module `path` in a saved program. Raises ToolchainError if the program does not contain it."""
    ops = _scan_operations(program, path)
    try:
        delta = ops.get("delta") or ops.get("softplus_0") or ops["u"]  # a bias of zeros is optimised away
        reads = {"delta": str(delta.variables["x"]), "u": str(ops["u"].variables["y"])}
        reads |= {key: str(ops[key].variables["x"]) for key in ("B", "C")}
        writes = ops["y"].results[0].name
    except KeyError as error:
        raise ToolchainError(f"the operation {error} of scan {path} is not in the program", "report this") from error
    return ScanSite(path, reads, writes)


def scan_constants(program: Program, path: str) -> dict[str, NDArray[np.float32]]:
    """Return the values of A, skip and bias that the operations of a scan read, in the shapes of the program.

    Without those that were optimised away: A of a single step, skip of ones, bias of zeros. coremltools stores equal
    constants of several scans once, under the name of one of them; so they are found by the operations that read them.
    """
    ops = _scan_operations(program, path)
    writers = {op.results[0].name: op for op in ops.values()}
    decay = [writers.get(name) for name in ops["exp_0"].reads] if "exp_0" in ops else []
    terms = [op for name in ops["y"].reads if (op := writers.get(name)) and op.type == "mul"]
    readers: dict[str, list[Operation | None]] = {"bias": [ops.get("delta")], "A": decay, "skip": [*terms]}
    found = {key: op.constants["y"] for key, each in readers.items() for op in each[:1] if op and "y" in op.constants}
    return {key: value.numpy() for key, value in found.items()}


def _scan_operations(program: Program, path: str) -> dict[str, Operation]:
    """Return the operations of a scan by their name within it, such as `u`, `delta` or `mul_1`."""
    prefix = f"{scan_prefix(path)}_"
    named = ((op.results[0].name, op) for op in program.operations)
    return {name.removeprefix(prefix).removesuffix("_cast_fp16"): op for name, op in named if name.startswith(prefix)}


class CoreMlScanAccess:
    """Per-scan access to a package in the MIL runtime, computed exactly: without float16 rounding."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        from evm_deploy.runtimes.mil import MilRuntime

        self.runtime = MilRuntime(artifact.path, artifact.function, exact=True)
        self.sites: tuple[ScanSite, ...] = artifact.details["scans"]
        self.names = tuple(site.name for site in self.sites)

    def in_situ(self, feeds: Feeds) -> list[dict[str, NDArray[np.float32]]]:
        """Run one inference. Returns u, delta, B, C, y and the constants (A if stored, skip, bias) of each scan."""
        variable = ("u", "delta", "B", "C")
        wanted = {name for site in self.sites for name in (*(site.reads[key] for key in variable), site.writes)}
        values = self.runtime.run(feeds, sorted(wanted))
        return [
            {key: values[site.reads[key]] for key in variable}
            | self._constants(site, values)
            | {"y": values[site.writes]}
            for site in self.sites
        ]

    def with_layer(self, path: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the outputs, and under `path` the output of the convolution of this module."""
        program, weight = self.runtime.program, f"{path.replace('.', '_')}_weight"
        name = next(op.results[0].name for op in program.operations if op.weight.partition(weight)[1])
        values = self.runtime.run(feeds, [*program.outputs, name])
        return {**values, path: values.pop(name)}

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C. Returns y."""
        site = self.sites[index]
        return self.runtime.run({site.reads[key]: value for key, value in feeds.items()}, [site.writes])[site.writes]

    def _constants(self, site: ScanSite, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Return those of A (K, D, N), skip and bias (K, D) that the scan reads in the program (`scan_constants`)."""
        _, K, _, D = values[site.reads["u"]].shape
        found = scan_constants(self.runtime.program, site.name)
        return {key: value[:K].reshape(K, D, -1) if key == "A" else value.reshape(K, D) for key, value in found.items()}
