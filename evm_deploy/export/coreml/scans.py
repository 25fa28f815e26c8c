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


def scan_site(program: Program, path: str) -> ScanSite:
    """Find the scan of module `path` in a saved program. Raises ToolchainError if the program does not contain it."""
    prefix = scan_prefix(path)
    ops = {}
    for op in program.operations:
        name = op.results[0].name
        if name.startswith(prefix):
            ops[name.removeprefix(prefix + "_").removesuffix("_cast_fp16")] = op
    try:
        delta = ops.get("delta") or ops.get("softplus_0") or ops["u"]  # a bias of zeros is optimised away
        reads = {"delta": str(delta.variables["x"]), "u": str(ops["u"].variables["y"])}
        reads |= {key: str(ops[key].variables["x"]) for key in ("B", "C")}
        writes = ops["y"].results[0].name
    except KeyError as error:
        raise ToolchainError(f"the operation {error} of scan {path} is not in the program", "report this") from error
    for key in ("A", "skip", "bias"):
        if constant := _constant_name(program, f"{prefix}_{key}"):
            reads[key] = constant
    return ScanSite(path, reads, writes)


def _constant_name(program: Program, name: str) -> str:
    """Return the constant's name in the file, or "" if it was optimised away: skip of ones, bias of zeros."""
    return next((found for found in (name, f"{name}_to_fp16") if found in program.constants), "")


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

    def alone(self, index: int, feeds: Feeds) -> NDArray[np.float32]:
        """Run scan `index` by itself on u, delta, B and C. Returns y."""
        site = self.sites[index]
        return self.runtime.run({site.reads[key]: value for key, value in feeds.items()}, [site.writes])[site.writes]

    def _constants(self, site: ScanSite, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Return those of A (K, D, N), skip and bias (K, D) that the program has under the scan's own name.

        The others were optimised away: A of a single step, skip of ones, bias of zeros, a copy of another scan's.
        """
        _, K, _, D = values[site.reads["u"]].shape
        program = self.runtime.program
        found = {key: program.constants[site.reads[key]].numpy() for key in ("A", "skip", "bias") if key in site.reads}
        return {key: value[:K].reshape(K, D, -1) if key == "A" else value.reshape(K, D) for key, value in found.items()}
