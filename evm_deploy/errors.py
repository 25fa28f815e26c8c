"""Expected failures: each says what is wrong, where, and what to do next; each class carries its exit code."""

from __future__ import annotations


class EvmError(Exception):
    """Base of every failure that a user can meet. `hint` is the next thing to do, shown on its own line.

    `code`: the kind of failure, for programs; `where`: the key path in a manifest, or the file in a bundle, that is
    wrong. Every SDK gives the same two (docs/bundle.md), in words of its own.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "", *, code: str = "", where: str = "") -> None:
        super().__init__(message)
        self.hint, self.code, self.where = hint, code, where

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  {self.hint}" if self.hint else message


class UsageError(EvmError):
    """A flag, value or combination that cannot work."""


class CheckpointError(EvmError):
    """A checkpoint that is missing, unreadable, unsafe or of another network."""


class ImageError(EvmError):
    """An image that cannot be read."""


class CalibrationError(EvmError):
    """Images that cannot be calibrated or judged with, or a calibration table that does not fit."""


class BundleError(EvmError):
    """A bundle that is missing, damaged, or cannot be written."""


class ToolchainError(EvmError):
    """A package or tool that the target needs is not installed, or failed."""

    exit_code = 3


class ParityError(EvmError):
    """The artifact does not compute what the float model computes."""

    exit_code = 4


class AccuracyError(EvmError):
    """The artifact is less accurate than was asked for."""

    exit_code = 5


class LatencyError(EvmError):
    """Slower than was asked for, or than before."""

    exit_code = 6
