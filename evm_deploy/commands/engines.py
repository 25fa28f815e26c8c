"""Flags of the commands that run units on an engine: --engine and --address."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from evm_deploy._util.text import escape_controls
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.sweep.boards import Boards
    from evm_deploy.sweep.engine import Engine
    from evm_deploy.sweep.run import Report, UnitOutcome

ENGINES = ("local", "ray")


def engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add --engine and --address to a parser."""
    parser.add_argument("--engine", default="local", choices=ENGINES, help="local: this process (default); ray: Ray")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to use, or auto for the one on this machine; default: one of its own for this command",
    )


@contextlib.contextmanager
def opened_engine(args: argparse.Namespace, boards: Boards, needed: Collection[str] = ()) -> Iterator[Engine]:
    """Context manager: the engine that the flags name. needed: boards that will be asked for.

    Nothing may be printed on stdout meanwhile: Ray prints its notes there, and they are led to stderr.

    Raises UsageError for flags that cannot be combined, ToolchainError if Ray is missing or cannot be reached.
    """
    from evm_deploy.sweep.engine import LocalEngine

    if args.address and args.engine != "ray":
        raise UsageError("--address needs --engine ray", "leave --address out")
    with contextlib.ExitStack() as stack:
        engine: Engine
        if args.engine == "ray":
            from evm_deploy.sweep.ray_engine import RayEngine

            if boards.members:
                raise UsageError(
                    "--devices is for --engine local: with ray, each host offers its own boards",
                    "evm-sweep worker --devices FLEET.toml --address HEAD",
                )
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            engine = RayEngine(args.address)
        else:
            engine = LocalEngine(boards)
            for board in sorted({*needed} - {""}):
                engine.require(board)
        stack.callback(engine.close)
        yield engine


def reporter(quiet: bool) -> Report:
    """Return a function that prints one line on stderr for each unit that has ended, nothing if `quiet`."""

    def show(outcome: UnitOutcome, ended: int, total: int) -> None:
        if quiet:
            return
        unit, result = outcome.unit, outcome.result
        figure = f"   p50 {result['p50_ms']:.3g} ms" if "p50_ms" in result else ""
        line = f"[{ended}/{total}] {unit.kind:<8} {unit.title}   {outcome.state}{figure}"
        print(escape_controls(line), file=sys.stderr, flush=True)

    return show
