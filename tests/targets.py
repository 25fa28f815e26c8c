"""Targets by what they can, for tests of several."""

from __future__ import annotations

from evm_deploy.export.targets import load_targets

#: Names of the targets that compute in float32, to whose limits many tests hold.
FLOAT32 = [name for name, target in load_targets().items() if "fp32" in target.precisions]
