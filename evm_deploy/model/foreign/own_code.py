"""Import of a user's own code, and the call of the factory in it. The code is run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from evm_deploy._util.torch_settings import default_torch_settings
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.model.factory import FORMS, TIMM, Factory
from evm_deploy.model.foreign.imports import cpu_mamba
from evm_deploy.model.foreign.look import OTHERS, reason


def made(factory: Factory) -> nn.Module:
    """Import the code that a factory names, within `cpu_mamba`, and call the factory.

    torch has its default settings meanwhile and afterwards, whatever the code sets. The folder of the code stays on
    `sys.path`, behind the installed packages, for imports that the network makes when it runs. Raises UsageError, also
    for code that fails or calls sys.exit.
    """
    where = factory.where
    try:
        with cpu_mamba(), default_torch_settings():
            if factory.place == TIMM:
                module = importlib.import_module(TIMM).create_model(factory.name, pretrained=False, **factory.arguments)
            else:
                found = _imported(factory)
                if not hasattr(found, factory.name):
                    raise UsageError(f"--model {where}: {found.__name__} has no {factory.name}", FORMS)
                value = getattr(found, factory.name)
                module = value if isinstance(value, nn.Module) else _called(value, where, factory.arguments)
    except EvmError:
        raise
    except ImportError as error:
        hint = "install the package that is missing, or start in the folder that holds the module"
        raise UsageError(f"--model {where} cannot be imported: {reason(error)}", hint) from error
    except OTHERS as error:
        raise UsageError(f"--model {where} fails: {reason(error)}", "mend it, or see --model-arg") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"--model {where} gives a {type(module).__name__}, not a torch.nn.Module")
    return module


def _imported(factory: Factory) -> ModuleType:
    if not factory.file:
        with _path(Path.cwd()):
            return importlib.import_module(factory.place)
    file = factory.file.resolve()
    if not _is_relative(file):
        name = file.stem if file.stem.isidentifier() and _is_free(file.stem) else f"_own_{file.stem}"
        with _path(file.parent):
            return _loaded(file, name)
    root, name = _package(file)
    with _path(file.parent), _path(root):
        found = importlib.import_module(name)
    if Path(found.__file__ or "").resolve() != file:
        raise UsageError(
            f"--model {factory.where}: another package is named {name.partition('.')[0]}: {found.__file__}",
            "rename the folder of the file: the file has relative imports",
        )
    return found


def _is_free(name: str) -> bool:
    """Test whether no module has this name: a file `onnx.py` must not become the `onnx` that others import."""
    return name not in sys.modules and importlib.util.find_spec(name) is None


def _loaded(file: Path, name: str) -> ModuleType:
    """Import a file under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_relative(file: Path) -> bool:
    """Test whether a file has relative imports, and so can only be imported as a part of its package."""
    tree = ast.parse(file.read_bytes(), str(file))
    return any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def _package(file: Path) -> tuple[Path, str]:
    """Return the folder above the outermost package that holds a file, and the file's name as a module of it."""
    root, parts = file.parent.parent, [file.parent.name, file.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    return root, ".".join(parts)


@contextmanager
def _path(folder: Path) -> Iterator[None]:
    """Context manager in which a folder is first on Python's path. Afterwards the folder is last."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the code may have changed the path
            sys.path.remove(str(folder))
        sys.path.append(str(folder))


def _called(factory: Any, where: str, arguments: Mapping[str, Any]) -> Any:
    if not callable(factory):
        raise UsageError(f"--model {where} is a {type(factory).__name__}, not a function, class or module")
    try:
        signature = inspect.signature(factory)
    except ValueError:  # written in C
        return factory(**arguments)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UsageError(
            f"--model {where}{signature} cannot be called with {dict(arguments) or 'no arguments'}: {error}",
            "give --model-arg name=value",
        ) from error
    return factory(**arguments)
