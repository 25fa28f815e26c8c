"""evm-deploy: trained EfficientVMamba checkpoints to verified ONNX bundles, and bundles to predictions.

>>> from evm_deploy import ExportPlan, export, load
>>> bundle = export("evm_tiny.ckpt", ExportPlan("onnx"))
>>> load(bundle.path).predict(["cat.jpg"])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["EvmError", "ExportPlan", "__version__", "bench", "export", "load", "load_checkpoint", "plugin_path"]

if TYPE_CHECKING:
    from evm_deploy.bench.measuring import bench
    from evm_deploy.errors import EvmError
    from evm_deploy.export.pipeline import export
    from evm_deploy.export.plan import ExportPlan
    from evm_deploy.inference import load
    from evm_deploy.model.checkpoint import load_checkpoint
    from evm_deploy.plugins import plugin_path

_HOME = {
    "EvmError": "evm_deploy.errors",
    "ExportPlan": "evm_deploy.export.plan",
    "bench": "evm_deploy.bench.measuring",
    "export": "evm_deploy.export.pipeline",
    "load": "evm_deploy.inference",
    "load_checkpoint": "evm_deploy.model.checkpoint",
    "plugin_path": "evm_deploy.plugins",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `import evm_deploy` loads nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'evm_deploy' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
