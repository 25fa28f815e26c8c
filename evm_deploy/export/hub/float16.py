"""Range of float16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import UsageError

LARGEST = 65504.0


def check_range(weights: Iterable[tuple[str, NDArray[np.floating[Any]]]]) -> None:
    """Raise UsageError naming a weight that float16 cannot hold: converters would clip this weight or make it Inf."""
    for name, value in weights:
        largest = float(np.abs(value).max(initial=0))
        if largest > LARGEST:
            raise UsageError(
                f"{name} reaches {largest:.4g}, the largest float16 is {LARGEST:.0f}", "use --precision fp32"
            )
