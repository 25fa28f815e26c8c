"""Rows of a shard as arrays by name, as they are kept in files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import write_atomically
from evm_deploy.sweep.shards import ShardRows

FACTS = "facts"


def packed(result: ShardRows) -> dict[str, NDArray[Any]]:
    """Return the result of a shard as arrays."""
    facts = json.dumps([result.skipped, result.digest]).encode()
    return {FACTS: np.frombuffer(facts, np.uint8), **result.rows}


def unpacked(arrays: Mapping[str, NDArray[Any]]) -> ShardRows:
    """Return the result of a shard that `packed` has made arrays of."""
    skipped, digest = json.loads(arrays[FACTS].tobytes())
    return ShardRows({name: each for name, each in arrays.items() if name != FACTS}, tuple(skipped), digest)


def write_rows(path: Path, result: ShardRows) -> None:
    """Write the result of a shard to a file, at once. Raises OSError."""
    content = io.BytesIO()
    np.savez(content, **packed(result))  # type: ignore[arg-type]  # the stub takes `allow_pickle` for an array
    write_atomically(path, content.getvalue())


def read_rows(path: Path) -> ShardRows:
    """Read the result of a shard. Raises OSError, ValueError."""
    with np.load(path, allow_pickle=False) as arrays:
        return unpacked(dict(arrays))
