"""Read a checkpoint whose loading runs the code in it, for people who trust its author.

The file is loaded in a process of its own (`python -m evm_deploy.model.trusted FILE RESULT`), which keeps nothing but
tensors and numbers in nested dicts and lists. The result is then read like any other checkpoint: by the same rules,
without code.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from evm_deploy._util import processes
from evm_deploy._util.files import sha256
from evm_deploy.errors import CheckpointError
from evm_deploy.model.checkpoint_file import Content, read_content, saved_by_torch
from evm_deploy.model.file_kinds import file_kind

MAX_DEPTH = 40  # of objects in each other
TAIL = 300  # characters of the process's last words in an error


def read_trusted(path: Path) -> Content:
    """Read a checkpoint file of any format that torch or pickle loads. RUNS THE CODE IN THE FILE, in another process.

    Classes that this machine does not have are replaced by plain ones. Raises CheckpointError if the file cannot be
    loaded.
    """
    with tempfile.TemporaryDirectory(prefix="evm-deploy-") as folder:
        result = Path(folder) / "plain.pt"
        command = [sys.executable, "-m", __spec__.name, os.path.abspath(path), str(result)]  # noqa: PTH100
        done = processes.run(command, tied=True)
        if done.returncode or not result.is_file():
            said = (done.stdout + done.stderr).strip()
            why = said[-TAIL:] or f"its process ended with code {done.returncode}"
            raise CheckpointError(f"checkpoint {path} cannot be loaded, even with its code: {why}")
        content = read_content(result)
    return replace(content, path=path, sha256=sha256(path))


class Unknown(dict[Any, Any]):
    """Stand-in for an object of a class that this machine does not have: keeps its items and attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.__dict__.update({str(key): value for key, value in part.items()})

    def append(self, value: Any) -> None:
        """Keep an item of an object that is a list."""
        self[len(self)] = value

    def extend(self, values: Any) -> None:
        """Keep items of an object that is a list."""
        for value in values:
            self.append(value)

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class _Unpickler(pickle.Unpickler):
    """Unpickler that replaces classes and functions that cannot be imported by Unknown."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except Exception:  # importing a project's module may raise anything
            return type(name, (Unknown,), {})


def _load(file: IO[bytes], **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _content(path: Path) -> Any:
    import torch

    kind = file_kind(path)
    if kind == "torchscript":
        return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    with path.open("rb") as file:
        if kind == "pickle" and not saved_by_torch(path):
            return _load(file, encoding="latin1")
        tolerant = SimpleNamespace(Unpickler=_Unpickler, load=_load, UnpicklingError=pickle.UnpicklingError)
        tolerant.__name__ = "tolerant"
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=tolerant)


class Plain:
    """Converter of any objects to tensors and numbers in nested dicts and lists. A module becomes its state dict.

    An object that is met again, also inside itself, is converted once.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Any]] = {}  # id -> object, which keeps the id in use, and its conversion

    def __call__(self, value: Any, depth: int = 0) -> Any:
        import numpy as np
        import torch

        if isinstance(value, torch.Tensor):
            return value.detach().cpu()
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if depth > MAX_DEPTH or isinstance(value, type):
            return None
        if id(value) not in self._known:
            result: dict[str, Any] = {}
            self._known[id(value)] = value, result
            result.update((str(key), self(item, depth + 1)) for key, item in _items(value))
        return self._known[id(value)][1]


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (name, value) of all that an object holds: items, tensors of a module, attributes."""
    import torch

    attributes = getattr(value, "__dict__", {})
    if isinstance(value, torch.jit.ScriptModule):
        yield from value.state_dict().items()
    elif "_parameters" in attributes and "_modules" in attributes:
        yield from _tensors(value)
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    else:
        yield from attributes.items()
        yield from value.items() if isinstance(value, Mapping) else ()


def _tensors(module: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) of the parameters and buffers of a module, also of one whose class is Unknown."""
    parts = module.__dict__
    left_out = parts.get("_non_persistent_buffers_set") or ()
    for name, value in {**(parts.get("_parameters") or {}), **(parts.get("_buffers") or {})}.items():
        if value is not None and name not in left_out:
            yield f"{prefix}{name}", value
    for name, child in (parts.get("_modules") or {}).items():
        if child is not None and depth < MAX_DEPTH:
            yield from _tensors(child, f"{prefix}{name}.", depth + 1)


def _main(source: Path, result: Path) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.save(Plain()(_content(source)), result)


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end of stdin is closed; unlike sys.stdin it holds no lock
    os._exit(130)


if __name__ == "__main__":
    try:
        _main(*map(Path, sys.argv[1:]))
    except Exception as error:  # for the user of the other process: one line, no traceback
        sys.exit(f"{type(error).__name__}: {error}")
