"""Latency measurement on the device: timing until the median is stable, and the facts needed to compare two records.

>>> from evm_deploy.bench import bench
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evm_deploy._util.lazy import lazy_names

__all__ = ["bench"]

if TYPE_CHECKING:
    from evm_deploy.bench.run import bench
else:
    __getattr__ = lazy_names(__name__, {"bench": "evm_deploy.bench.run"})
