"""Outputs without a meaning of their own: a backbone's feature maps, and tensors of any network."""

from __future__ import annotations

from evm_deploy.tasks.task import Task

FEATURES = Task("features", ("features",), "feature maps")
RAW = Task("raw", ("raw",), "tensors")
