"""Exports of one network to several targets.

Targets that trace alike share one trace. Targets with another trace run at the same time in a second process. The code
of a Factory runs in processes of its own alone (`export/worker.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evm_deploy._util.cores import usable_cores
from evm_deploy._util.progress import Step, silent
from evm_deploy._util.torch_settings import torch_threads
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.export.targets import get_target
from evm_deploy.export.worker import Job, TargetOutcome, Worker, attempted
from evm_deploy.model.factory import Factory
from evm_deploy.model.graph_file import GraphFile
from evm_deploy.model.network import ModelSpec, Network


def export_all(
    source: str | Path | Factory | GraphFile | Network | Source,
    plans: Sequence[ExportPlan],
    out: str | Path = "dist",
    *,
    force: bool = False,
    sign: str | Path | None = None,
    zipped: bool = False,
    step: Step = silent,
    cores: int | None = None,
) -> Iterator[TargetOutcome]:
    """Export every plan. Yields the outcome of each plan as soon as its export has ended.

    A failed export does not stop the others. Plans whose targets trace alike share one trace, in this process. Plans
    with another trace, such as Core ML's, run in a second process at the same time, unless `source` is a Network or
    there are fewer than two `cores`. The exports of a Factory all run in other processes: whatever its code does to
    Python, torch or stdout, and even its crash, stays there. The processes share the cores: threads of torch that wait
    for each other's cores take several times as long as one thread. Steps of other processes are entered from another
    thread, with the target's name before the detail if there are several. cores: by default the number of cores that
    this process may use.
    """
    cores = cores or usable_cores()
    source = Source.of(source)
    recipe = source.recipe
    groups: dict[Any, list[ExportPlan]] = {}
    for plan in plans:
        groups.setdefault(get_target(plan.target).trace, []).append(plan)
    parts = [list(plans)] if recipe is None or cores < 2 else [*groups.values()]
    here = [] if isinstance(recipe, Factory) else parts.pop(0)
    named = bool(here) or len(parts) > 1
    threads = max(1, cores // (bool(here) + len(parts)))
    with contextlib.ExitStack() as stack:
        others = [
            stack.enter_context(Worker(Job(recipe, tuple(part), out, force, sign, zipped, named, threads), step))
            for part in parts
            if recipe is not None
        ]
        for plan in here:
            with torch_threads(threads if others else None):
                outcome = attempted(source, plan, step, out=out, force=force, sign=sign, zipped=zipped)
            yield outcome
        for worker in others:
            yield from worker.outcomes()


def specs(source: Source, plans: Sequence[ExportPlan], step: Step = silent) -> list[ModelSpec]:
    """Return the spec of the network for each plan. The code of a Factory runs in a process of its own."""
    if not isinstance(source.recipe, Factory):
        return [source.network(plan).spec for plan in plans]
    with Worker(Job(source.recipe, ()), step) as worker:
        return [worker.spec()] * len(plans)
