"""Rules that write values into a tensor by index, and that read them: the scatter and gather_nd operations of MIL."""

from __future__ import annotations

from typing import Any

from evm_deploy.runtimes.mil.rule import Rule, UnsupportedError, into, tensor

RULES: dict[str, Rule] = {}
rule = into(RULES)


@rule
def scatter(
    data: Any, indices: Any, updates: Any, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Any:
    """Write `updates` to the places `indices`, one-dimensional, of an axis."""
    data, at = tensor(data), _from_start(indices, tensor(data).shape[axis])
    return _written(data, _numbered(data).index_select(axis, at), updates, mode)


@rule
def scatter_along_axis(
    data: Any, indices: Any, updates: Any, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Any:
    """Write each element of `updates` to its own place, given by `indices` of the same shape, of an axis."""
    data, at = tensor(data), _from_start(indices, tensor(data).shape[axis])
    return _written(data, _numbered(data).gather(axis, at), updates, mode)


@rule
def scatter_nd(data: Any, indices: Any, updates: Any, mode: str = "add", validate_indices: bool = False) -> Any:
    """Write `updates` to the places whose coordinates are the rows (last dimension) of `indices`."""
    data = tensor(data)
    return _written(data, _numbered(data)[tuple(tensor(indices).long().unbind(-1))], updates, mode)


@rule
def gather_nd(x: Any, indices: Any, batch_dims: int = 0, validate_indices: bool = False) -> Any:
    """Read the places whose coordinates are the rows (last dimension) of `indices`."""
    if batch_dims:
        raise UnsupportedError(f"gather_nd with batch_dims {batch_dims}")
    return tensor(x)[tuple(tensor(indices).long().unbind(-1))]


def _from_start(indices: Any, size: int) -> Any:
    """Return indices, of which negative ones count from the end, as indices from the start."""
    at = tensor(indices).long()
    return at + size * (at < 0)


def _numbered(data: Any) -> Any:
    """Return the number of each element of a tensor in row-major order, in the shape of the tensor."""
    import torch

    return torch.arange(data.numel()).reshape(data.shape)


def _written(data: Any, places: Any, updates: Any, mode: str) -> Any:
    """Combine the elements of numbers `places` with `updates` by `mode`. Several may have the same place."""
    flat, at, new = data.reshape(-1).clone(), places.reshape(-1), tensor(updates).expand(places.shape).reshape(-1)
    if mode == "update":
        flat[at] = new
    elif mode in ("add", "sub"):
        flat.index_add_(0, at, new if mode == "add" else -new)
    elif mode in ("mul", "div", "max", "min"):
        by = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}[mode]
        flat.scatter_reduce_(0, at, 1 / new if mode == "div" else new, by)
    else:
        raise UnsupportedError(f"a scatter with mode {mode}")
    return flat.reshape(data.shape)
