"""Helpers of the OpenVINO target's tests."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from evm_deploy.export import openvino
from evm_deploy.export.hub.graph import Graph, trace, with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import Artifact, native_library
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import RunOptions
from evm_deploy.runtimes.openvino import OpenVinoRuntime

LOWERINGS = ("plugin", "portable")
#: The same for `parametrize`: the extension of the first is compiled.
EVERY_LOWERING = [pytest.param(LOWERINGS[0], marks=pytest.mark.compiler), LOWERINGS[1]]


def traced(checkpoint: Path, plan: ExportPlan) -> tuple[Graph, ExportPlan]:
    """The hub graph of a checkpoint, and the complete plan."""
    network = load_checkpoint(checkpoint, head=plan.head)
    plan, preprocessing = complete(plan, network.spec)
    return trace(with_pre_and_postprocessing(network, plan, preprocessing), plan, {"model": network.spec.name}), plan


def built(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    folder.mkdir()
    return openvino.build(copy.deepcopy(graph), plan, folder)


def opened(artifact: Artifact, **options) -> OpenVinoRuntime:
    return OpenVinoRuntime(artifact.path, RunOptions(plugin=native_library(openvino.TARGET, artifact), **options))
