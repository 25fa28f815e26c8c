"""Tasks without interpretation of the outputs: feature maps of a backbone, and raw tensors of any network."""

from __future__ import annotations

from evm_deploy.tasks.task import Task

FEATURES = Task("features", ("features",), "feature maps")
RAW = Task("raw", ("raw",), "tensors")
