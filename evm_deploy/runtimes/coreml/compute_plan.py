"""Read Core ML's compute plan: the device that Core ML prefers for each operation. Not run on a Mac yet."""

from __future__ import annotations

from collections import Counter
from typing import Any


def compute_plan(model: Any, units: Any, function: str) -> dict[str, Any]:
    """Return the number of operations and the share of the estimated cost, per preferred device.

    model: a coremltools MLModel. units: its compute units. Entries `<device> of scans` count only the scans.
    """
    from coremltools.models.compute_plan import MLComputePlan

    loaded = MLComputePlan.load_from_path(path=model.get_compiled_model_path(), compute_units=units)
    counts: Counter[str] = Counter()
    costs: dict[str, float] = {}
    for operation in loaded.model_structure.program.functions[function].block.operations:
        usage = loaded.get_compute_device_usage_for_mlprogram_operation(operation)
        cost = loaded.get_estimated_cost_for_mlprogram_operation(operation)
        if usage is None:
            continue
        where = type(usage.preferred_compute_device).__name__.removeprefix("ML").removesuffix("ComputeDevice")
        scan = any(output.name.startswith("evm_scan") for output in operation.outputs)
        for name in (where, f"{where} of scans") if scan else (where,):
            counts[name] += 1
            costs[name] = costs.get(name, 0.0) + (cost.weight if cost else 0.0)
    return {"operations": dict(counts), "cost": {name: round(value, 4) for name, value in costs.items()}}
