"""Entry points of the commands.

The module `commands.<name>` implements each command. `commands.console.EXIT_CODES` lists the exit codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from evm_deploy.commands.console import guarded_output


def export_main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-export`: export a checkpoint to verified bundles. Returns the exit code."""
    return _main("export", argv)


def run_main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-run`: print the predictions of a bundle, or run its self-test. Returns the exit code."""
    return _main("run", argv)


def bench_main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-bench`: measure the latency of a bundle on this machine or on a remote one. Returns the exit code."""
    return _main("bench", argv)


def report_main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-report`: compare records and bundles in one table. Returns the exit code."""
    return _main("report", argv)


def sweep_main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-sweep`: export, evaluate and measure many checkpoints, forms and boards. Returns the exit code."""
    return _main("sweep", argv)


def eval_main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-eval`: evaluate a bundle on labelled images. Returns the exit code."""
    return _main("evaluate", argv)


def tune_main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-tune`: find the most accurate artifact within a budget. Returns the exit code."""
    return _main("tune", argv)


def doctor_main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-doctor`: list the targets that this machine can build and run. Returns the exit code."""
    return _main("doctor", argv)


def _main(command: str, argv: Sequence[str] | None) -> int:
    """Run a command and return its exit code: also 2 if its results could not be written to stdout."""
    with guarded_output() as stdout:
        code: int = import_module(f"evm_deploy.commands.{command}").main(argv)
    return code or stdout.exit_code
