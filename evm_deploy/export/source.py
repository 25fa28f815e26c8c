"""A network to export, made once and traced once for all plans that trace it alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from evm_deploy._util.values import path_text
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import UsageError
from evm_deploy.export.hub.graph import trace, with_pre_and_postprocessing
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import make_test_inputs
from evm_deploy.export.target import Target
from evm_deploy.export.verify import FloatRun, run_reference
from evm_deploy.model.factory import Factory
from evm_deploy.model.families import load_checkpoint
from evm_deploy.model.graph_file import GraphFile
from evm_deploy.model.network import Network

T = TypeVar("T")


class Source:
    """A checkpoint's path, a Factory, a GraphFile or a Network, for any number of exports in one thread.

    Raises UsageError for other types.

    Loading, tracing and running the float model take most of an export's time, and are the same for most targets and
    precisions. A Source does each of these steps once for all plans with the same settings for the step, and keeps the
    result.
    """

    def __init__(self, given: str | Path | Factory | GraphFile | Network) -> None:
        if not isinstance(given, (Factory, GraphFile, Network, str, os.PathLike)):
            message = f"source is a {type(given).__name__}, it must be the path of a checkpoint, or a Network"
            raise UsageError(message, "make a Network of a torch module with  Network.of(module, example)")
        self._given = given if isinstance(given, (Factory, GraphFile, Network)) else path_text("source", given)
        self._kept: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def of(cls, given: str | Path | Factory | GraphFile | Network | Source) -> Source:
        """Return `given` if it is a Source already, else a new Source of it."""
        return given if isinstance(given, Source) else cls(given)

    @property
    def recipe(self) -> str | Factory | GraphFile | None:
        """Path of the checkpoint, Factory or GraphFile: any process can make the network of it. None for a Network."""
        return None if isinstance(self._given, Network) else self._given

    @property
    def name(self) -> str:
        """Name of the Network, place of the Factory, or name of the file."""
        if isinstance(self._given, Factory):
            return self._given.where
        if isinstance(self._given, Network):
            return self._given.spec.name
        return Path(self._given.path if isinstance(self._given, GraphFile) else self._given).name

    def network(self, plan: ExportPlan) -> Network:
        """Return the network with the head and weights that the plan asks for. Raises CheckpointError."""
        given = self._given
        if isinstance(given, Network):
            return given
        if isinstance(given, Factory):
            from evm_deploy.model.foreign.door import network_of

            return self._once(("network",), lambda: network_of(given))
        if isinstance(given, GraphFile):
            from evm_deploy.model.foreign.ready import ready_network

            return self._once(("network",), lambda: ready_network(given, plan.imgsz))
        key = ("network", plan.head == "features", plan.weights, plan.drop)
        return self._once(key, lambda: load_checkpoint(given, head=plan.head, weights=plan.weights, drop=plan.drop))

    def reference(self, plan: ExportPlan, preprocessing: Preprocessing) -> Any:
        """Return the float model of a complete plan (`hub.graph.WrappedNetwork`)."""
        key = ("reference", *self._of_model(plan), preprocessing)
        return self._once(key, lambda: with_pre_and_postprocessing(self.network(plan), plan, preprocessing))

    def float_run(self, plan: ExportPlan, preprocessing: Preprocessing) -> FloatRun:
        """Return the float model's outputs and scans on the test inputs of a complete plan."""
        key = ("run", *self._of_model(plan), preprocessing)
        return self._once(
            key, lambda: run_reference(self.reference(plan, preprocessing), make_test_inputs(plan, preprocessing))
        )

    def traced(
        self, target: Target, plan: ExportPlan, preprocessing: Preprocessing, metadata: Mapping[str, str]
    ) -> Any:
        """Return the traced network that `target` builds from, such as the hub graph. Callers must not change it."""
        if isinstance(self._given, GraphFile) and target.trace is not trace:
            raise UsageError(
                f"target '{target.name}' is traced from a torch module, and {self.name} is a ready-made ONNX graph",
                "export the network itself with --model, or to another target",
            )
        taken = (plan.weights, plan.drop, preprocessing)
        key = ("traced", target.trace, target.trace_key(plan), *taken, tuple(metadata.items()))
        return self._once(key, lambda: target.trace(self.reference(plan, preprocessing), plan, dict(metadata)))

    @staticmethod
    def _of_model(plan: ExportPlan) -> tuple[Any, ...]:
        """Return the settings of a plan that decide the float model."""
        return plan.head, plan.multi_label, plan.selection, plan.weights, plan.drop, plan.input

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept
