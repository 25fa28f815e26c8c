"""evm-bench."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.settings import add_flags, given
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, Steps, common_flags, run_command
from evm_deploy.commands.hosts import fleet, host_flags, host_options
from evm_deploy.commands.matrix import matrix, matrix_flags, refuse_matrix_flags
from evm_deploy.errors import UsageError
from evm_deploy.runtimes.registry import setting_kinds

if TYPE_CHECKING:
    from evm_deploy.bench.sweep import Sweep

MAX_LIMIT_S = 3600


def bench_parser() -> Parser:
    parser = Parser(
        "evm-bench",
        description="Measure the latency of bundles, here or on another machine, until it is stable.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundles", nargs="*", metavar="BUNDLE", help="with --matrix: the checkpoint")
    add("--threads", default="", metavar="N[,N..]", help="intra-op threads, each measured; default: the runtime's")
    add("--batch", default="", metavar="N[,N..]", help="images of one inference, each measured; default: the bundle's")
    add("--streams", default="", metavar="N[,N..]", help="inferences at the same time, each measured; default: 1")
    add("--scan", default="auto", metavar="S", help="auto (default), plugin, bundled, portable, as for evm-run")
    add_flags(parser, setting_kinds())
    add("--end-to-end", action="store_true", help="time from an image file to its five best classes")
    add("--layers", action="store_true", help="also print the times by module")
    add("--limit", type=float, default=60.0, metavar="S", help="seconds for each measurement, default 60")
    add("-o", "--out", default="bench", metavar="DIR", help="folder for the records, default bench")
    add("--db", metavar="FILE", help="add the records to this history too, for evm-report --history")
    host_flags(parser)
    matrix_flags(parser)
    common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`evm-bench`. Returns the exit code."""
    args = bench_parser().parse_intermixed_args(argv)  # flags between bundles, too
    return run_command("evm-bench", lambda: _bench(args), args.verbose)


def _bench(args: argparse.Namespace) -> int:
    from evm_deploy.bench.remote.hosts import opened
    from evm_deploy.bench.text import layer_lines, lines
    from evm_deploy.report.history import append

    options, sweep = host_options(args), _sweep(args)
    if args.db:
        append(Path(args.db), [])  # now, not after minutes of measuring, is the time to refuse it
    if args.matrix:
        return matrix(args, sweep)
    refuse_matrix_flags(args)
    if not args.bundles:
        raise UsageError("no bundle is given", "evm-bench BUNDLE, or evm-bench --matrix for the demo")
    if args.devices:
        return fleet(args, options, sweep)
    steps, records = Steps(args.quiet), []
    with opened(options, steps) as bench:
        for record, path in sweep.run(bench, steps):
            if args.db:
                append(Path(args.db), [record])
            records.append({"record": str(path), **record.bundle, **record.summary_ms})
            if not args.json:
                print(escape_controls("\n".join([*lines(record, path), *(layer_lines(record) if args.layers else [])])))
    if args.json:
        print(json.dumps(records, indent=1))
    return 0


def _sweep(args: argparse.Namespace) -> Sweep:
    """Every combination that was asked for. Raises UsageError."""
    from evm_deploy.bench.record import Settings
    from evm_deploy.bench.sweep import Sweep

    if not 0 < args.limit <= MAX_LIMIT_S:
        raise UsageError(f"--limit {args.limit:g}: use seconds from 0 to {MAX_LIMIT_S}")
    settings = Settings(
        scan=args.scan,
        timed="end-to-end" if args.end_to_end else "model",
        limit_s=args.limit,
    )
    settings = settings.with_own(**given(args, setting_kinds()))
    return Sweep(
        bundles=args.bundles,
        threads=_numbers("--threads", args.threads),
        batches=_numbers("--batch", args.batch),
        streams=[streams or 1 for streams in _numbers("--streams", args.streams)],
        settings=settings,
        out=Path(args.out),
    )


def _numbers(flag: str, text: str) -> list[int | None]:
    """`1,4,8` -> numbers; empty: [None]. Raises UsageError."""
    if not text:
        return [None]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10000 for part in text.split(",")):
        raise UsageError(f"{flag} {text}: use numbers from 1, such as 1,4,8")
    return [int(part) for part in dict.fromkeys(text.split(","))]
