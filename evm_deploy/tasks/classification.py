"""Classification: the outputs hold one row of class scores per image, as logits or probabilities.

A row of one score is the class against its absence: the logit x counts as the logits (0, x), whose softmax is the
sigmoid of x, and the probability p as (1 - p, p).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.classes import read_labels
from evm_deploy.tasks.task import Labels, Outputs, Prediction, Reading, Rows, Score, Spec, Task

CHANCE = 0.01  # probability of guessing as well as a network, from which on the network is no better than chance
LOGITS, PROBABILITIES = "logits", "probs"


def scores_name(outputs: Iterable[str]) -> str:
    """Return the name of the output that holds the scores: `logits` or `probs`. Raises KeyError if there is none."""
    names = set(outputs)
    for name in (LOGITS, PROBABILITIES):
        if name in names:
            return name
    raise KeyError(f"no {LOGITS} or {PROBABILITIES} among the outputs {', '.join(sorted(names))}")


def check(outputs: Mapping[str, Spec], labels: Sequence[str] | None) -> tuple[str, str] | None:
    """Check names, dtypes and shapes of a classifier's outputs.

    Returns None if the outputs are valid, else a pair of texts: the actual outputs, and the expectation.
    """
    try:
        scores = outputs[scores_name(outputs)]
    except KeyError:
        return ", ".join(map(str, outputs.values())), f"a classifier has {LOGITS} or {PROBABILITIES}"
    if scores.dtype != "float32" or len(scores.shape) != 2 or 0 in scores.shape:
        return str(scores), "a classifier has rows of float32 scores"
    if labels and scores.shape[1] not in (None, len(labels)):
        return f"{scores.shape[1]} classes", f"labels.txt has {len(labels)}"
    return None


def decode(outputs: Outputs, reading: Reading) -> list[list[Prediction]]:
    """Return the `top` most probable classes of each image, best first. Without labels, a class is named `class 7`."""
    labels, top = reading.labels, reading.top
    name = scores_name(outputs)
    rows = with_absence(name, outputs[name].astype(np.float64))
    probabilities = rows if name == PROBABILITIES else softmax(rows)
    found = []
    for row in probabilities[:, -outputs[name].shape[1] :]:
        best = np.argsort(-row, kind="stable")[:top]
        found.append([Prediction(labels[i] if labels else f"class {i}", int(i), float(row[i])) for i in best])
    return found


def with_absence(name: str, scores: NDArray[Any]) -> NDArray[Any]:
    """Return scores (images, classes) of the output `name`, with a first column for absence if there is one class."""
    if scores.shape[1] > 1:
        return scores
    absent = 1 - scores if name == PROBABILITIES else np.zeros_like(scores)
    return np.concatenate([absent, scores], axis=1)


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the softmax along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = e / e.sum(axis=-1, keepdims=True)
    return result


def score(outputs: Outputs, labels: Labels, reading: Reading) -> Rows:
    """Return `top1` and `top5` of each image, (images,): 1 if its label is among the best 1 or 5 classes, else 0.

    labels: class index of each image. With one class, label 0 is its absence and 1 its presence.
    """
    name = scores_name(outputs)
    scores = with_absence(name, outputs[name])
    return {f"top{k}": _top(scores, np.asarray(labels, np.int64), k) for k in (1, 5)}


def agree(expected: Outputs, actual: Outputs) -> NDArray[np.float64]:
    """Return 1 for each image for which both outputs have the same best class, else 0: (images,)."""
    name = scores_name(expected)
    best, wanted = (with_absence(name, each[name]).argmax(-1) for each in (actual, expected))
    same: NDArray[np.float64] = (best == wanted).astype(np.float64)
    return same


def by_chance(top1: float, images: int, classes: int) -> bool:
    """Test whether guessing among `classes` would be right as often in over 1 % of the cases."""
    right, classes = round(top1 * images), max(classes, 2)
    hit, miss = math.log(1 / classes), math.log1p(-1 / classes)
    whole = math.lgamma(images + 1)
    logs = (
        whole - math.lgamma(k + 1) - math.lgamma(images - k + 1) + k * hit + (images - k) * miss
        for k in range(right, images + 1)
    )
    return math.fsum(map(math.exp, logs)) > CHANCE


def _top(scores: NDArray[Any], labels: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    right: NDArray[np.float64] = (best == labels[:, None]).any(1).astype(np.float64)
    return right


CLASSIFICATION = Task(
    "classification",
    (LOGITS, PROBABILITIES),
    "scores",
    check=check,
    decode=decode,
    agree=agree,
    score=Score(
        score,
        titles={"top1": "top-1"},
        read=read_labels,
        by_chance=by_chance,
    ),
)
