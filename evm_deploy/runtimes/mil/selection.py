"""Rules of the MIL operations that select values: top-k, gather, select, upsampling, non-maximum suppression."""

from __future__ import annotations

from typing import Any

from evm_deploy.data.boxes import greedy_nms
from evm_deploy.runtimes.mil.rule import Rule, UnsupportedError, into, tensor

RULES: dict[str, Rule] = {}
rule = into(RULES)


@rule
def topk(
    x: Any,
    k: int,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Any:
    """Return the k largest or smallest values along an axis, in order, and their indices."""
    import torch

    if output_indices_dtype not in ("int32", "uint16"):
        raise UnsupportedError(f"topk with indices of {output_indices_dtype}")
    values, indices = x.topk(k, axis, largest=not ascending)
    return (values, indices.to(torch.int32)) if return_indices else values


@rule
def reduce_argmax(x: Any, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Any:
    """Return the index of the largest value along an axis; the first one of equal values."""
    import torch

    if output_dtype not in ("int32", "uint16"):
        raise UnsupportedError(f"reduce_argmax with indices of {output_dtype}")
    return x.argmax(axis, keepdim=keep_dims).to(torch.int32)


@rule
def argsort(x: Any, axis: int = -1, ascending: bool = False) -> Any:
    """Return the indices that sort x along an axis; of equal elements the first one comes first."""
    import torch

    return torch.argsort(x, dim=axis, descending=not ascending, stable=True).to(torch.int32)


@rule
def non_zero(x: Any) -> Any:
    """Return the coordinates of all elements that are not 0, (elements, rank)."""
    import torch

    return torch.nonzero(tensor(x)).to(torch.int32)


@rule
def gather_along_axis(x: Any, indices: Any, axis: int = 0, validate_indices: bool = False) -> Any:
    """Take one value of x for each index, along an axis. A negative index counts from the end."""
    indices = tensor(indices).long()
    return x.gather(axis, indices.where(indices >= 0, indices + x.shape[axis]))


@rule
def gather(x: Any, indices: Any, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Any:
    """Take whole slices of x along an axis. Raises UnsupportedError for batch_dims other than 0."""
    if batch_dims:
        raise UnsupportedError("gather with batch_dims")
    x, indices = tensor(x), tensor(indices)
    axis %= x.dim()
    taken = x.index_select(axis, indices.reshape(-1).long() % x.shape[axis])
    return taken.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@rule
def select(cond: Any, a: Any, b: Any) -> Any:
    """Take a where the condition holds, else b."""
    return tensor(a).where(tensor(cond).bool(), tensor(b))


@rule
def non_maximum_suppression(
    boxes: Any,
    scores: Any,
    iou_threshold: Any,
    max_boxes: int,
    score_threshold: Any = None,
    per_class_suppression: bool = False,
) -> Any:
    """Select boxes greedily. boxes: centre and size, (b, n, 4), or without a score threshold (b, 4, n), as of iOS17.

    Rows beyond the selected boxes repeat box 0, with score 0. Raises UnsupportedError for several classes.
    """
    import torch

    latest = score_threshold is None
    rows, row_scores = (boxes.mT, scores.mT) if latest else (boxes, scores)
    if row_scores.shape[2] != 1:
        raise UnsupportedError("non_maximum_suppression of several classes")
    least = float("-inf") if latest else float(score_threshold)
    half = rows[..., 2:] / 2
    corners = torch.cat([rows[..., :2] - half, rows[..., :2] + half], 2).numpy()
    index = torch.zeros(len(rows), max_boxes, dtype=torch.int64)
    count = torch.zeros(len(rows), dtype=torch.int32)
    one_class = row_scores[..., 0]
    for image, (one, score) in enumerate(zip(corners, one_class, strict=True)):
        above = score.where(score >= least, float("-inf")).numpy()
        kept = torch.from_numpy(greedy_nms(one, above, float(iou_threshold), max_boxes, float("-inf")))
        index[image, : len(kept)], count[image] = kept, len(kept)
    real = torch.arange(max_boxes)[None] < count[:, None]
    found = rows.gather(1, index[:, :, None].expand(-1, -1, 4))
    found_scores = one_class.gather(1, index).where(real, 0.0)[..., None]
    results = found, found_scores, index.to(torch.int32), count
    return (found.mT, found_scores.mT, results[2]) if latest else results
