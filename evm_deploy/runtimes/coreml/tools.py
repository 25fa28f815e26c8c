"""Import coremltools without its log lines and warnings."""

from __future__ import annotations

from functools import cache
from typing import Any

from evm_deploy._util.own_process import not_installed
from evm_deploy._util.packages import install_hint
from evm_deploy._util.silence import silence_libraries
from evm_deploy.errors import ToolchainError

INSTALL_HINT = install_hint("coreml")
#: Packages from which coremltools converts, too. It imports those that are installed, which takes most of its time.
OTHER_SOURCES = ("executorch", "sklearn", "tensorflow", "torchao", "xgboost")


@cache
def coremltools() -> Any:
    """Import and return the package coremltools. Raises ToolchainError if it is not installed."""
    try:
        with silence_libraries(), not_installed(*OTHER_SOURCES):
            import coremltools as ct
    except ImportError as error:
        raise ToolchainError(f"{error.name} is not installed", INSTALL_HINT) from error
    return ct
