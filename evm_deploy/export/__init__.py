"""Export of a checkpoint to a verified bundle.

>>> from evm_deploy.export import ExportPlan, export
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evm_deploy._util.lazy import lazy_names

__all__ = ["ExportPlan", "Source", "build_engine", "export"]

if TYPE_CHECKING:
    from evm_deploy.export.pipeline import build_engine, export
    from evm_deploy.export.plan import ExportPlan
    from evm_deploy.export.source import Source
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "ExportPlan": "evm_deploy.export.plan",
            "Source": "evm_deploy.export.source",
            "export": "evm_deploy.export.pipeline",
            "build_engine": "evm_deploy.export.pipeline",
        },
    )
