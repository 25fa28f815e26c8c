"""Targets by what they can, for tests of several."""

from __future__ import annotations

from evm_deploy.export.targets import load_targets

#: Names of the targets that compute in float32, to whose limits many tests hold.
FLOAT32 = [name for name, target in load_targets().items() if "fp32" in target.precisions]
#: Targets that build for seconds, with portable scans for minutes: tests of many networks leave them out.
BUILT_SLOWLY = ("executorch",)
#: The others that compute in float32.
MANY_NETWORKS = [name for name in FLOAT32 if name not in BUILT_SLOWLY]


def scan_of(name: str) -> str:
    """The lowering for tests that need no native library: portable, where that is quick."""
    return "auto" if name in BUILT_SLOWLY else "portable"
