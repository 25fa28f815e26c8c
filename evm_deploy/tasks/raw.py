"""Tasks without interpretation of the outputs: feature maps of a backbone, and raw tensors of any network."""

from __future__ import annotations

from typing import Any

import numpy as np

from evm_deploy.tasks.task import Measure, Outputs, Reading, Rows, Task

LEAST = 1e-30  # noise below which decibels end


def compare(outputs: Outputs, expected: Outputs, reading: Reading) -> Rows:
    """Return how far the outputs of each image are from `expected`, those of the float network: (images,) by name.

    relative_error: norm of the difference of all outputs, divided by the norm of the expected ones. psnr_db: mean over
    the outputs of 10 log10(peak^2 / mean squared error) in dB; peak is the range (largest - smallest) of the expected
    output of the image.
    """
    noise: Any = 0.0
    signal: Any = 0.0
    ratios = []
    for name, value in expected.items():
        want, have = (each.reshape(len(each), -1).astype(np.float64) for each in (value, outputs[name]))
        squares = (have - want) ** 2
        noise, signal = noise + squares.sum(1), signal + (want**2).sum(1)
        peak = np.ptp(want, axis=1) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):  # outputs that are not finite
            ratios.append(10 * np.log10(np.maximum(peak, LEAST) / np.maximum(squares.mean(1), LEAST)))
    return {"relative_error": np.sqrt(noise / np.maximum(signal, LEAST)), "psnr_db": np.mean(ratios, axis=0)}


FEATURES = Task("features", ("features",), "feature maps", compare=Measure(compare))
RAW = Task("raw", ("raw",), "tensors", compare=Measure(compare))
