"""Packages that are also the public function of their name.

`evm_deploy.export` is a function, and would be hidden by the package of the same name as soon as anything imports that:
so the package is callable.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, module: str, function: str) -> None:
    """Calling the imported `package` is calling `function` of its `module`, which is imported then."""

    class Callable(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(f"{package}.{module}"), function)(*args, **kwargs)

    sys.modules[package].__class__ = Callable
