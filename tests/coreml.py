"""Core ML packages for tests, without the pipeline around."""

from __future__ import annotations

from evm_deploy.export.coreml import program
from evm_deploy.export.coreml import target as coreml
from evm_deploy.export.hub.graph import with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import check_plan
from evm_deploy.model.families import load_checkpoint

SIZES = {"imgsz": (32, 32), "more_imgsz": ((48, 48),), "min_target": "iOS18"}


def plan_for(**changes):
    return ExportPlan("coreml", **{"imgsz": (64, 64), **changes})


def built(checkpoint, folder, plan):
    """(artifact, float module, completed plan) of a checkpoint, without the pipeline around."""
    network = load_checkpoint(checkpoint, head=plan.head)
    plan, preprocessing = complete(check_plan(coreml.TARGET, plan), network.spec)
    module = with_pre_and_postprocessing(network, plan, preprocessing)
    return coreml.build(program.trace(module, plan, {}), plan, folder), module, plan
