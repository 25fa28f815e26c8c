"""Description of an export: manifest, metadata of the native file, and notes for users."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict

from evm_deploy import __version__
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.export import verify
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import Artifact, Target
from evm_deploy.export.verify_lowerings import Seen
from evm_deploy.model.network import ModelSpec
from evm_deploy.tasks.classification import CLASSIFICATION
from evm_deploy.toolchain.platforms import host_platform


def describe(
    target: Target, plan: ExportPlan, spec: ModelSpec, preprocessing: Preprocessing, artifact: Artifact, seen: Seen
) -> Manifest:
    """Create the manifest of an export. `bundle.commit` adds the hashes of the files."""
    sites = artifact.details.get("scans", ())
    inputs, outputs = seen.interface
    return Manifest(
        name=f"{spec.name}-{target.name}-{plan.precision}",
        target=target.name,
        artifact=artifact.path.name,
        plan=plan.as_dict(),
        model=asdict(spec),
        preprocessing=preprocessing.as_dict(),
        inputs=[asdict(value) for value in inputs],
        outputs=[asdict(value) for value in outputs],
        scan={
            **asdict(artifact.scan),
            "nodes": [site.name for site in sites],
            **({"plugins": dict(artifact.plugins)} if artifact.plugins else {}),
        },
        details={key: value for key, value in artifact.details.items() if key != "scans"},
        versions={"evm_deploy": __version__, "python": platform.python_version(), **target.environment().versions},
        parity=seen.parity.as_dict(),
        notes=[
            *spec.notes,
            *meaning_of_scores(plan, spec),
            *verify.blind(seen.parity),
            *untested(artifact),
            *seen.remarks,
        ],
    )


def native_metadata(plan: ExportPlan, spec: ModelSpec, preprocessing: Preprocessing) -> dict[str, str]:
    """Return the metadata that the native file itself carries, for users who have only this file."""
    facts = {
        "evm_deploy": __version__,
        "model": spec.name,
        "family": spec.family,
        "variant": spec.variant,
        "checkpoint_sha256": spec.checkpoint["sha256"],
        "preprocessing": json.dumps(preprocessing.as_dict(), sort_keys=True),
        "input": plan.input,
        "head": str(plan.head),
    }
    return {**facts, **({"labels": json.dumps(plan.labels)} if plan.labels else {})}


def untested(artifact: Artifact) -> list[str]:
    """Return a note on each native library that was compiled for another platform, and so was not run here."""
    there = [name for name in artifact.plugins if name != host_platform()]
    return [f"plugins/{name} was compiled but not run: check it on the device with the self-test" for name in there]


def meaning_of_scores(plan: ExportPlan, spec: ModelSpec) -> list[str]:
    """Return a note on a classifier whose probabilities are not a softmax over all classes."""
    if spec.task != CLASSIFICATION.name:
        return []
    if plan.multi_label:
        return ["the classes are independent: each probability is a sigmoid, and they do not add up to 1"]
    if spec.num_classes == 1:
        return ["the head has one class: its output is taken for a logit, the probability is its sigmoid"]
    return []
