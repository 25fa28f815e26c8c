"""Export trained visual Mamba networks to verified bundles, and run the bundles.

>>> from evm_deploy import load
>>> from evm_deploy.export import ExportPlan, export
>>> bundle = export("evm_tiny.ckpt", ExportPlan("onnx"))
>>> load(bundle.path).predict(["cat.jpg"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evm_deploy._util.lazy import lazy_names

__version__ = "0.2.0"
__all__ = ["EvmError", "__version__", "cpu_mamba", "load", "load_checkpoint", "plugin_path"]

if TYPE_CHECKING:
    from evm_deploy.bundle.loaded import load
    from evm_deploy.errors import EvmError
    from evm_deploy.model.families import load_checkpoint
    from evm_deploy.model.foreign import cpu_mamba
    from evm_deploy.runtimes.registry import plugin_path
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "EvmError": "evm_deploy.errors",
            "cpu_mamba": "evm_deploy.model.foreign",
            "load": "evm_deploy.bundle.loaded",
            "load_checkpoint": "evm_deploy.model.families",
            "plugin_path": "evm_deploy.runtimes.registry",
        },
    )
