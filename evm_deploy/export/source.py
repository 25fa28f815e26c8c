"""A network to export, read once and traced once for all plans that trace it alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.export.hub.graph import with_pre_and_postprocessing
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import make_test_inputs
from evm_deploy.export.target import Target
from evm_deploy.export.verify import FloatRun, run_reference
from evm_deploy.model.families import load_checkpoint
from evm_deploy.model.network import Network

T = TypeVar("T")


class Source:
    """A checkpoint's path, or a Network, for any number of exports in one thread.

    Loading, tracing and running the float model are most of an export's time, and the same for most targets and
    precisions: each is done once for all plans that agree in what decides it, and kept as long as this object.
    """

    def __init__(self, given: str | Path | Network) -> None:
        self._given = given
        self._kept: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def of(cls, given: str | Path | Network | Source) -> Source:
        """`given` itself, if it is a Source."""
        return given if isinstance(given, Source) else cls(given)

    @property
    def checkpoint(self) -> str | Path | None:
        """The path that this was made of; None for a Network."""
        return None if isinstance(self._given, Network) else self._given

    @property
    def name(self) -> str:
        return self._given.spec.name if isinstance(self._given, Network) else Path(self._given).name

    def network(self, plan: ExportPlan) -> Network:
        """The network with the head and weights that a plan asks for. Raises CheckpointError."""
        given = self._given
        if isinstance(given, Network):
            return given
        key = ("network", plan.head == "features", plan.weights)
        return self._once(key, lambda: load_checkpoint(given, head=plan.head, weights=plan.weights))

    def reference(self, plan: ExportPlan, preprocessing: Preprocessing) -> Any:
        """The float model of a complete plan (`hub.graph.Deployable`)."""
        key = ("reference", plan.head, plan.weights, plan.input, preprocessing)
        return self._once(key, lambda: with_pre_and_postprocessing(self.network(plan), plan, preprocessing))

    def float_run(self, plan: ExportPlan, preprocessing: Preprocessing) -> FloatRun:
        """The float model's outputs and scans on the test_inputs of a complete plan."""
        key = ("run", plan.head, plan.weights, plan.input, preprocessing)
        return self._once(
            key, lambda: run_reference(self.reference(plan, preprocessing), make_test_inputs(plan, preprocessing))
        )

    def traced(
        self, target: Target, plan: ExportPlan, preprocessing: Preprocessing, metadata: Mapping[str, str]
    ) -> Any:
        """What `target` starts from, such as the hub graph. Whoever changes it must copy it first."""
        key = ("traced", target.trace, target.trace_key(plan), plan.weights, preprocessing, tuple(metadata.items()))
        return self._once(key, lambda: target.trace(self.reference(plan, preprocessing), plan, dict(metadata)))

    def _once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept
