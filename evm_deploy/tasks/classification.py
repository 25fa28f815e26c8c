"""Classification: one row of scores by class for each image, logits or probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.tasks.task import Labels, Outputs, Prediction, Spec, Task

LOGITS, PROBABILITIES = "logits", "probs"


def scores_name(outputs: Iterable[str]) -> str:
    """The output that holds the scores, of all outputs. Raises KeyError where there is none."""
    names = set(outputs)
    for name in (LOGITS, PROBABILITIES):
        if name in names:
            return name
    raise KeyError(f"no {LOGITS} or {PROBABILITIES} among the outputs {', '.join(sorted(names))}")


def check(outputs: Mapping[str, Spec], labels: Sequence[str] | None) -> tuple[str, str] | None:
    """Compare a classifier's outputs with what one gives: None, or the outputs as they are and what was expected."""
    try:
        scores = outputs[scores_name(outputs)]
    except KeyError:
        return ", ".join(map(str, outputs.values())), f"a classifier has {LOGITS} or {PROBABILITIES}"
    if scores.dtype != "float32" or len(scores.shape) != 2 or 0 in scores.shape:
        return str(scores), "a classifier has rows of float32 scores"
    if labels and scores.shape[1] not in (None, len(labels)):
        return f"{scores.shape[1]} classes", f"labels.txt has {len(labels)}"
    return None


def decode(outputs: Outputs, labels: Sequence[str] | None, top: int) -> list[list[Prediction]]:
    """The `top` most probable classes of each image, best first; classes without labels are called `class 7`."""
    name = scores_name(outputs)
    rows = outputs[name].astype(np.float64)
    probabilities = rows if name == PROBABILITIES else softmax(rows)
    found = []
    for row in probabilities:
        best = np.argsort(-row, kind="stable")[:top]
        found.append([Prediction(labels[i] if labels else f"class {i}", int(i), float(row[i])) for i in best])
    return found


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = e / e.sum(axis=-1, keepdims=True)
    return result


def score(outputs: Outputs, labels: Labels) -> dict[str, float]:
    """Shares of images whose label is the first class, and among the first five."""
    scores = outputs[scores_name(outputs)]
    return {f"top{k}": _top(scores, labels, k) for k in (1, 5)}


def agree(expected: Outputs, actual: Outputs) -> float:
    """The share of images with the same first class."""
    name = scores_name(expected)
    return float((actual[name].argmax(-1) == expected[name].argmax(-1)).mean())


def _top(scores: NDArray[Any], labels: Labels, k: int) -> float:
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(1).mean())


CLASSIFICATION = Task(
    "classification",
    (LOGITS, PROBABILITIES),
    "scores",
    check=check,
    decode=decode,
    score=score,
    agree=agree,
    metric="top1",
)
