"""Tasks without interpretation of the outputs: feature maps of a backbone, and raw tensors of any network."""

from __future__ import annotations

import numpy as np

from evm_deploy.tasks.task import Outputs, Task

LEAST = 1e-30  # noise below which decibels end


def compare(expected: Outputs, actual: Outputs) -> dict[str, float]:
    """Return how far all outputs are from those of the float network, of all images together.

    relative_error: norm of the difference, divided by the norm of the expected outputs. psnr_db: mean over the outputs
    of 10 log10(peak^2 / mean squared error) in dB; peak is the range (largest - smallest) of the expected output.
    """
    noise = signal = 0.0
    ratios = []
    for name, value in expected.items():
        want, have = value.astype(np.float64), actual[name].astype(np.float64)
        squares = (have - want) ** 2
        noise, signal = noise + squares.sum(), signal + (want**2).sum()
        ratios.append(10 * np.log10(max(np.ptp(want) ** 2, LEAST) / max(squares.mean(), LEAST)))
    return {"relative_error": float(np.sqrt(noise / max(signal, LEAST))), "psnr_db": float(np.mean(ratios))}


FEATURES = Task("features", ("features",), "feature maps", compare=compare)
RAW = Task("raw", ("raw",), "tensors", compare=compare)
