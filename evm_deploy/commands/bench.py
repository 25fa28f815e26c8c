"""evm-bench: measure the latency of bundles, or of a checkpoint in several forms."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.files import require_writable
from evm_deploy._util.schema import strict_json
from evm_deploy._util.settings import add_flags, given
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, Steps, common_flags, run_command
from evm_deploy.commands.export_flags import drop_patterns, weights_flags
from evm_deploy.commands.hosts import fleet, host_flags, host_options
from evm_deploy.commands.matrix import matrix, matrix_flags, refuse_matrix_flags
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.runtimes.registry import setting_kinds

if TYPE_CHECKING:
    from evm_deploy.bench.sweep import Sweep

MAX_LIMIT_S = 3600


def bench_parser() -> Parser:
    """Return the argument parser of evm-bench."""
    parser = Parser(
        "evm-bench",
        description="Measure the latency of bundles, on this machine or another one, until the median is stable.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measured = parser.add_argument_group("what to measure")
    add = measured.add_argument
    add("bundles", nargs="*", metavar="BUNDLE", help="folder or .zip of a bundle; or a checkpoint, measured in torch")
    add(
        "--threads",
        default="",
        metavar="N[,N..]",
        help="intra-op threads, each value is measured; default: the runtime's",
    )
    add("--batch", default="", metavar="N[,N..]", help="images per inference, likewise; default: the bundle's smallest")
    add("--streams", default="", metavar="N[,N..]", help="concurrent inferences, likewise; default 1")
    add(
        "--scan",
        default="auto",
        metavar="S",
        help="auto (default), plugin (installed native library), bundled (the bundle's own native library), or "
        "portable (no native library)",
    )
    weights_flags(add, default=None, of="of a checkpoint: ")
    add_flags(measured, setting_kinds())
    add("--end-to-end", action="store_true", help="time from the image file to the five best classes")
    add("--require-signature", metavar="PUB", help="refuse bundles not signed with this ed25519 key (a PEM file)")
    add("--limit", type=float, default=60.0, metavar="S", help="longest time of one measurement in s, default 60")
    matrix_flags(parser)
    host_flags(parser)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("-o", "--out", default="bench", metavar="DIR", help="folder for the records, default bench")
    add("--db", metavar="FILE", help="also add the records to this history, for evm-report --history")
    add("--layers", action="store_true", help="also print the time of each block")
    common_flags(output)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-bench` with `argv` and return the exit code."""
    args = bench_parser().parse_intermixed_args(argv)  # flags between bundles, too
    return run_command("evm-bench", lambda: _bench(args), args)


def _bench(args: argparse.Namespace) -> int:
    """Measure bundles on one host, or hand over to --matrix or --devices. Return the largest exit code.

    A measurement that fails does not stop the others.
    """
    from evm_deploy.bench.remote.hosts import opened
    from evm_deploy.bench.text import layer_lines, lines
    from evm_deploy.bundle.signing import public_key
    from evm_deploy.report.history import append

    options, sweep = host_options(args), _sweep(args)
    require_writable(sweep.out, "--out", folder=True)  # what cannot be written must fail now, not after measuring
    if args.db:
        append(Path(args.db), [])
    if args.require_signature:
        public_key(args.require_signature)
    if args.matrix:
        if args.require_signature:
            raise UsageError("--require-signature cannot be combined with --matrix", "--matrix makes its own bundles")
        return matrix(args, sweep)
    refuse_matrix_flags(args)
    if not args.bundles:
        raise UsageError("no bundle is given", "evm-bench BUNDLE, or evm-bench --matrix for the demo checkpoint")
    _refuse_weights_of_bundles(args)
    if args.devices:
        return fleet(args, options, sweep)
    steps, results, code = Steps(args.quiet), [], 0
    with opened(options, steps) as bench:
        for bundle, settings in sweep.pairs():
            try:
                record, path = sweep.measured(bench, bundle, settings, steps)
                if args.db:
                    append(Path(args.db), [record])
            except EvmError as error:
                code = max(code, error.exit_code)
                print(escape_controls(f"evm-bench: {bundle}, {settings}: {error}"), file=sys.stderr)
                results.append({"bundle": bundle, "error": str(error), "exit_code": error.exit_code})
                continue
            results.append({"record": str(path), **record.bundle, **record.summary_ms})
            if not args.json:
                print(escape_controls("\n".join([*lines(record, path), *(layer_lines(record) if args.layers else [])])))
    if args.json:
        print(strict_json(results, indent=1))
    return code


def _refuse_weights_of_bundles(args: argparse.Namespace) -> None:
    """Raise UsageError if --weights or --drop is given for bundles: an export has chosen their weights."""
    from evm_deploy.bundle.archive import SUFFIX

    for flag, value in (("--weights", args.weights), ("--drop", args.drop)):
        there = args.host or args.adb or args.devices
        bundle = next((each for each in args.bundles if there or Path(each).is_dir() or each.endswith(SUFFIX)), None)
        if value is not None and bundle:
            raise UsageError(f"{flag} is for checkpoints: {bundle} has the weights of its export", f"leave {flag} out")


def _sweep(args: argparse.Namespace) -> Sweep:
    """Return the bundles and every combination of settings in `args`. Raises UsageError for an invalid number."""
    from evm_deploy.bench.record import Settings
    from evm_deploy.bench.sweep import Sweep

    if not 0 < args.limit <= MAX_LIMIT_S:
        raise UsageError(f"--limit {args.limit:g}: use seconds above 0, up to {MAX_LIMIT_S}")
    settings = Settings(
        scan=args.scan,
        timed="end-to-end" if args.end_to_end else "model",
        limit_s=args.limit,
    )
    if not args.matrix:  # which passes them to its exports
        settings = replace(settings, weights=args.weights, drop=",".join(drop_patterns(args.drop)) or None)
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
    """Parse `1,4,8` into [1, 4, 8], and empty text into [None]. Raises UsageError."""
    if not text:
        return [None]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10000 for part in text.split(",")):
        raise UsageError(f"{flag} {text}: use numbers from 1, such as 1,4,8")
    return [int(part) for part in dict.fromkeys(text.split(","))]
