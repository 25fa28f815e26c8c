"""From a checkpoint to a verified bundle.

>>> from evm_deploy.export import ExportPlan, export
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evm_deploy._util.lazy import lazy_names

__all__ = ["ExportPlan", "Source", "export", "finish"]

if TYPE_CHECKING:
    from evm_deploy.export.pipeline import export, finish
    from evm_deploy.export.plan import ExportPlan
    from evm_deploy.export.source import Source
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "ExportPlan": "evm_deploy.export.plan",
            "Source": "evm_deploy.export.source",
            "export": "evm_deploy.export.pipeline",
            "finish": "evm_deploy.export.pipeline",
        },
    )
