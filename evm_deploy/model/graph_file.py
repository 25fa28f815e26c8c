"""The description of a network that comes as a ready-made ONNX file with scan nodes of others: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evm_deploy.errors import UsageError

DEPTHART = "com.depthart::SelectiveScan"


@dataclass(frozen=True)
class GraphFile:
    """A ready-made ONNX file with one image input, in the place of a checkpoint. `foreign.ready` makes the network.

    scan_op: `domain::type` of its scan nodes, beside DEPTHART. Such a node has the inputs u, delta (b, G Dg, L); A
    (G Dg, N); B, C (b, G, N, L) or (b, N, L); and, where given, D and the bias of delta (G Dg,). Its attribute
    `delta_softplus` is 0 or 1. outputs: names of the outputs, in order. Raises UsageError for a file that does not
    exist, and for a scan_op of another form.
    """

    path: str
    scan_op: str | None = None
    outputs: tuple[str, ...] | None = None
    task: str = "raw"

    def __post_init__(self) -> None:
        if not Path(self.path).is_file():
            raise UsageError(f"the ONNX file {self.path} does not exist")
        if self.scan_op is not None and ("::" not in self.scan_op or not all(self.scan_op.split("::", 1))):
            raise UsageError(f"--scan-op {self.scan_op!r} names no operator", "use DOMAIN::TYPE, such as my.ops::Scan")

    @property
    def scan_ops(self) -> frozenset[tuple[str, str]]:
        """(domain, type) of the nodes that are scans."""
        named = [name for name in (DEPTHART, self.scan_op) if name]
        return frozenset((domain, kind) for domain, _, kind in (name.partition("::") for name in named))
