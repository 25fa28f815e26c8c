"""Settings that mmengine, mmdet and mmseg write beside the weights: `meta.cfg` and `meta.dataset_meta`, read as data.

The configuration is Python text. It is parsed, never run: assignments of literals and of `dict(..)` calls are read, and
everything else is left out.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MAX_TEXT = 4 << 20  # characters of a configuration; published ones have 5000 to 20000
MAX_DEPTH = 60  # of calls, lists and dicts in each other
LOG = "mmengine.logging.history_buffer.HistoryBuffer"  # class of the logs in a training checkpoint's `message_hub`
IN_LOGS = (  # functions and classes that a pickled log names: of numpy's arrays, and of methods
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.ndarray", "numpy.dtype", "builtins.getattr", "__builtin__.getattr"),
)


class _Ignored:
    """Stand-in for all that a log holds: takes anything, keeps and runs nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __new__(cls, *args: Any) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


@contextmanager
def logs_ignored() -> Iterator[None]:
    """Context manager in which torch.load reads a training checkpoint of mmengine without the logs in it.

    The logs are objects of mmengine, which `weights_only` refuses (mmengine#1655). Each is replaced by an object that
    holds nothing. No class or function that the file names is looked up.
    """
    import torch

    with torch.serialization.safe_globals([(_Ignored, name) for name in (LOG, *IN_LOGS)]):
        yield


class _OddError(Exception):
    """A value of the configuration that is no literal."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training run.

    cfg: nested dicts of plain values, empty without one. classes: names in order. palette: colour of each class as red,
    green and blue, 0..255; empty without one.
    """

    cfg: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def read(cls, meta: Any) -> TrainingSettings:
        """Return the settings in the `meta` of a checkpoint, of mmengine or of mmcv 1. Odd values are left out."""
        if not isinstance(meta, Mapping):
            return cls()
        text = meta.get("cfg", meta.get("config"))
        cfg = text if isinstance(text, Mapping) else parse_config(text) if isinstance(text, str) else {}
        dataset = meta.get("dataset_meta")
        named = dataset if isinstance(dataset, Mapping) else {}
        return cls(cfg, _classes(_first(named, meta, "classes")), _palette(_first(named, meta, "palette")))

    @classmethod
    def from_json(cls, text: str) -> TrainingSettings:
        """Return the settings in a text of `to_json`; none if the text is odd."""
        try:
            return cls.read(json.loads(text))
        except (ValueError, RecursionError):
            return cls()

    def to_json(self) -> str:
        """Return the settings as JSON, in the layout of a checkpoint's `meta`."""
        return json.dumps(
            {"cfg": self.cfg, "dataset_meta": {"classes": self.classes, "palette": self.palette}}, default=str
        )

    def get(self, path: str, kind: Any = object) -> Any:
        """Return the value at a dotted path such as `model.test_cfg.nms_pre`; None if absent or not of `kind`.

        A bool is no number.
        """
        value: Any = self.cfg
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        odd = isinstance(value, bool) and kind in (int, float, (int, float))
        return value if isinstance(value, kind) and not odd else None

    def numbers(self, path: str, count: int | None = None) -> tuple[float, ...] | None:
        """Return the list of numbers at a dotted path; None if absent, odd, or not of `count` numbers."""
        value = self.get(path, (list, tuple))
        if value is None or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in value):
            return None
        return tuple(map(float, value)) if value and count in (None, len(value)) else None


def _first(named: Mapping[str, Any], meta: Mapping[str, Any], key: str) -> list[Any]:
    """Return the values of `key`, in small and capital letters, of mmengine and then of mmcv 1."""
    places = ((named, key), (named, key.upper()), (meta, key.upper()), (meta, key))
    return [each.get(name) for each, name in places]


def _classes(found: Iterable[Any]) -> tuple[str, ...]:
    """Return the first value that is a list of names; a text is the name of a data set's one class."""
    for names in found:
        each = (names,) if isinstance(names, str) else names
        if isinstance(each, Sequence) and each and all(isinstance(name, str) for name in each):
            return tuple(each)
    return ()


def _palette(found: Iterable[Any]) -> tuple[tuple[int, int, int], ...]:
    """Return the first value that is a list of colours, each three whole numbers from 0 to 255."""
    for colours in found:
        if isinstance(colours, Sequence) and colours and all(map(is_colour, colours)):
            return tuple((int(red), int(green), int(blue)) for red, green, blue in colours)
    return ()


def is_colour(value: Any) -> bool:
    """Test whether a value is red, green and blue as whole numbers from 0 to 255."""
    return (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 255 for part in value)
    )


def parse_config(text: str) -> dict[str, Any]:
    """Parse a configuration as mmengine writes it. Returns the values of its assignments; nothing is run.

    Returns an empty dict for text that is no Python.
    """
    if len(text) > MAX_TEXT:
        return {}
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    values: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name):
                _put(values, target.id, statement.value, 0)
    return values


def _put(values: dict[Any, Any], key: Any, node: ast.expr, depth: int) -> None:
    """Set `values[key]` to the value of an expression. An odd one is left out, and removes an earlier value."""
    values.pop(key, None)
    try:
        values[key] = _value(node, depth)
    except _OddError:
        return


def _value(node: ast.expr, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise _OddError
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, depth + 1)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(each, depth + 1) for each in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    found: dict[Any, Any] = {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        for keyword in node.keywords:
            if keyword.arg is not None:
                _put(found, keyword.arg, keyword.value, depth + 1)
        return found
    if isinstance(node, ast.Dict):
        for key, item in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                _put(found, key.value, item, depth + 1)
        return found
    raise _OddError
