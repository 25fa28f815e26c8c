"""A torchvision of names alone. timm imports it, and uses none of it for a network."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from enum import Enum
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

from torch import nn


class InterpolationMode(Enum):
    NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS, NEAREST_EXACT = range(7)


class Finder:
    """Finder and loader of modules that have every name: a class without content."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def missing(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return {"InterpolationMode": InterpolationMode}.get(name) or type(name, (nn.Module,), {})

        module.__getattr__ = missing


@contextmanager
def torchvision():
    """Context manager in which torchvision can be imported: the installed one, or this one."""
    finder = Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if not find_spec("torchvision"):
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
