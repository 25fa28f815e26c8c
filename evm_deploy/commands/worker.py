"""`evm-sweep worker`: offer the boards that this host reaches to a Ray cluster, until it is interrupted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from evm_deploy.commands.console import EXIT_CODES, Parser, common_flags, run_command
from evm_deploy.errors import UsageError


def worker_parser() -> Parser:
    """Return the argument parser of `evm-sweep worker`."""
    parser = Parser(
        "evm-sweep worker",
        description="Join a Ray cluster as a host whose boards are resources. Whoever reaches the cluster runs code on "
        "this host: see docs/security.md.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--devices", metavar="FILE", required=True, help="TOML file of the boards, as for evm-bench --devices")
    add("--address", metavar="HOST:PORT", required=True, help="head of the Ray cluster")
    add("--cpus", metavar="N", help="jobs beside each other on this host, default the number of its boards")
    add("--dry-run", action="store_true", help="print the command that starts Ray, and do nothing")
    common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-sweep worker` with `argv` and return the exit code."""
    args = worker_parser().parse_args(argv)
    return run_command("evm-sweep", lambda: _worker(args), args)


def _worker(args: argparse.Namespace) -> int:
    """Start Ray in the foreground, and return its exit code."""
    from evm_deploy.sweep.boards import Boards
    from evm_deploy.sweep.worker import Worker

    if args.cpus is not None and not (args.cpus.isascii() and args.cpus.isdigit() and 0 < int(args.cpus) < 10000):
        raise UsageError(f"--cpus {args.cpus}: use a whole number from 1")
    boards = Boards.of(args.devices)
    worker = Worker(args.devices, boards, args.address, int(args.cpus) if args.cpus else len(boards.members))
    if args.dry_run:
        print(worker.line)
        return 0
    return worker.run()
