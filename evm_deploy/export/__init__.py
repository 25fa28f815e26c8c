"""From a checkpoint to a verified bundle. Calling this package is calling `pipeline.export`.

`evm_deploy.export` is the public function, and would be hidden by the package of the same name as soon as anything
imports that: so the package is callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from evm_deploy.export.pipeline import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
