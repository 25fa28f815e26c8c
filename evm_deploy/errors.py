"""Exceptions for expected failures.

Every message says what is wrong and where; the hint says what to do next. Every class has an exit code.
"""

from __future__ import annotations


class EvmError(Exception):
    """Base class of all expected failures.

    hint: the next step for the user, printed on a separate line. code: identifier of the failure for programs. where:
    the key path in a manifest, or the file in a bundle, that is wrong. All SDKs report the same `code` and `where`
    (docs/bundle.md); the wording of the message is free.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "", *, code: str = "", where: str = "") -> None:
        super().__init__(message)
        self.hint, self.code, self.where = hint, code, where

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  {self.hint}" if self.hint else message


class UsageError(EvmError):
    """Invalid flag, value or combination of flags."""


class CheckpointError(EvmError):
    """Missing, unreadable or unsafe checkpoint, or checkpoint of an unknown network."""


class ImageError(EvmError):
    """Unreadable image."""


class CalibrationError(EvmError):
    """Images that are unfit for calibration or evaluation, or a calibration table of another network."""


class BundleError(EvmError):
    """Missing or damaged bundle, or a bundle that cannot be written."""


class ToolchainError(EvmError):
    """Package or tool of a target that is not installed or has failed."""

    exit_code = 3


class ParityError(EvmError):
    """Difference between the outputs of the artifact and of the float model above the tolerance."""

    exit_code = 4


class AccuracyError(EvmError):
    """Accuracy of the artifact below the requested limit."""

    exit_code = 5


class LatencyError(EvmError):
    """Latency above the requested limit, or above an earlier record."""

    exit_code = 6
