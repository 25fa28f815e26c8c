"""The entry points of the commands: each is a file of `commands/`. Exit codes: `commands.console.EXIT_CODES`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module


def export_main(argv: Sequence[str] | None = None) -> int:
    """`evm-export`: a checkpoint to verified bundles. Returns the exit code, as the others do."""
    return _main("export", argv)


def run_main(argv: Sequence[str] | None = None) -> int:
    """`evm-run`: a bundle's predictions, or its self-test."""
    return _main("run", argv)


def bench_main(argv: Sequence[str] | None = None) -> int:
    """`evm-bench`: a bundle's latency, on this machine or another."""
    return _main("bench", argv)


def report_main(argv: Sequence[str] | None = None) -> int:
    """`evm-report`: records and bundles side by side."""
    return _main("report", argv)


def doctor_main(argv: Sequence[str] | None = None) -> int:
    """`evm-doctor`: the targets that this machine can build for and run."""
    return _main("doctor", argv)


def _main(command: str, argv: Sequence[str] | None) -> int:
    code: int = import_module(f"evm_deploy.commands.{command}").main(argv)
    return code
