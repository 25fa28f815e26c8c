"""Weights of resampling along one axis as matrices: means of windows, and bilinear interpolation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def window_means(size: int, wanted: int) -> NDArray[np.float32]:
    """Return the matrix (wanted, size) that computes the means of torch's adaptive windows.

    Window i is the elements from floor(i size / wanted) up to ceil((i + 1) size / wanted).
    """
    means = np.zeros((wanted, size), np.float32)
    for i in range(wanted):
        window = slice(i * size // wanted, -(-(i + 1) * size // wanted))
        means[i, window] = 1 / (window.stop - window.start)
    return means


def bilinear_weights(size: int, wanted: int, *, align_corners: bool = False) -> NDArray[np.float32]:
    """Return the matrix (wanted, size) that resizes an axis bilinearly, without antialiasing, as torch's interpolate.

    align_corners: the centres of the first and of the last element stay in place; else the axis is an area, and element
    i reads the position (i + 0.5) size / wanted - 0.5. Every row has at most two values, which add up to 1.
    """
    if align_corners:
        at = np.arange(wanted) * ((size - 1) / (wanted - 1) if wanted > 1 else 0.0)
    else:
        at = np.maximum((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0)
    first = np.minimum(at.astype(np.int64), size - 1)
    second = np.minimum(first + 1, size - 1)
    weights = np.zeros((wanted, size), np.float64)
    np.add.at(weights, (np.arange(wanted), first), 1 - (at - first))
    np.add.at(weights, (np.arange(wanted), second), at - first)
    return weights.astype(np.float32)
