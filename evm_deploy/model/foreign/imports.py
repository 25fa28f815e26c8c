"""Import of code that was written for CUDA: finders that serve the stand-ins, and a `cuda` that is the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from evm_deploy.errors import UsageError
from evm_deploy.model.foreign import stand_ins
from evm_deploy.model.foreign.guarded import dispensable_imports
from evm_deploy.model.foreign.own_loops import replace_own_loops

#: Packages that look for Triton themselves, and must find that there is none.
LIBRARIES = frozenset({"torch", "torchvision", "timm", "transformers", "onnxscript", "numpy", "einops", "fvcore"})


@contextmanager
def cpu_mamba() -> Iterator[None]:
    """Context manager for the import of a Mamba package that was written for CUDA, and for making its modules.

    Compiled extensions and Triton-backed modules of mamba_ssm, causal_conv1d and their copies are served by stand-ins
    for the CPU. mamba_ssm and causal_conv1d themselves are served where they are not installed. `.cuda()` and
    `.to("cuda")` leave things on the CPU. Functions of the package that loop over the tokens in Python are replaced by
    the op where both compute the same. Afterwards the import system and torch are as they were; the imported package
    keeps its stand-ins. A name without a stand-in raises a UsageError when it is called, with its own name.
    """
    before = set(sys.modules)
    with importable(), _CudaIsCpu():
        yield
    replace_own_loops([module for name, module in [*sys.modules.items()] if name not in before])


@contextmanager
def importable() -> Iterator[None]:
    """Context manager in which the stand-ins can be imported. Afterwards `sys.modules` holds none of them."""
    from torch.utils._triton import has_triton_package

    has_triton_package()  # torch keeps the answer, which must not be that of the stand-in
    finders = (_Finder(stand_ins.served_first), _Finder(stand_ins.served_last, guarded=("triton",)))
    sys.meta_path.insert(0, finders[0])
    sys.meta_path.append(finders[1])
    try:
        yield
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)
            for name, module in finder.loaded.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]


class Placeholder:
    """A name without a stand-in. It can be imported, called as a decorator, read and subclassed; a call raises."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:  # @triton.jit
            if isinstance(args[0], Placeholder):
                return args[0]
            if isinstance(args[0], (FunctionType, type)):
                return Placeholder(args[0].__qualname__)
        if self._name.startswith("triton."):  # @triton.autotune(..), triton.Config(..)
            return Placeholder(self._name)
        raise _without_stand_in(self._name)

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            raise _without_stand_in(f"the Triton kernel {self._name}")

        return launch

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (torch.nn.Module,)


def _without_stand_in(name: str) -> UsageError:
    caller = sys._getframe(2)
    return UsageError(
        f"{name} has no form for the CPU; {caller.f_code.co_filename}:{caller.f_lineno} calls it",
        "register one before the import: evm_deploy.model.foreign.register(name, function)",
    )


class _CudaIsCpu(TorchFunctionMode):
    """Torch function mode that leaves out every device `cuda` of a call."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in (kwargs or {}).items()})


def _on_cpu(value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda":
        return torch.device("cpu")
    return value


class _Finder(MetaPathFinder, Loader):
    """Finder and loader of the modules that `served` knows, which it keeps in `loaded`.

    guarded: packages that guarded imports do not get.
    """

    def __init__(self, served: Any, guarded: tuple[str, ...] = ()) -> None:
        self.served, self.guarded = served, guarded
        self.loaded: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.served(fullname) is None:
            return None
        if fullname.partition(".")[0] in self.guarded and (_importer() in LIBRARIES or _has_another_way()):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        self.loaded[name] = module
        module.__dict__.update(self.served(name))

        def missing(attribute: str) -> Placeholder:
            if attribute.startswith("__"):
                raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
            return Placeholder(f"{name}.{attribute}")

        module.__dict__["__getattr__"] = missing


def _importing_frames() -> Iterator[FrameType]:
    """Yield the frames outside of the import system, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame:
        if "importlib" not in frame.f_code.co_filename and frame.f_globals.get("__name__") != __name__:
            yield frame
        frame = frame.f_back


def _importer() -> str:
    """Return the top-level package of the code whose import statement is being carried out."""
    return next((str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in _importing_frames()), "")


def _has_another_way() -> bool:
    """Test whether the code of an import statement that is being carried out can do without its module."""
    return any(frame.f_lineno in dispensable_imports(frame.f_code.co_filename) for frame in _importing_frames())
