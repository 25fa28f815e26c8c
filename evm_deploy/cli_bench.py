"""evm-bench."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy.cli_matrix import matrix, matrix_flags, refuse_matrix_flags
from evm_deploy.console import EXIT_CODES, Parser, Steps, common_flags, run_command
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.bench.places import Place
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
    add(
        "--device",
        metavar="D",
        help="a device profile (evm-doctor lists them) or FILE.toml; or OpenVINO's: CPU (default), GPU, HETERO:GPU,CPU",
    )
    add("--host", metavar="USER@BOARD", help="measure there, over ssh; user@board:port; needs Python there")
    add("--python", default="python3", metavar="PATH", help="the board's Python, default python3")
    add("--ssh", metavar="COMMAND", help="such as 'ssh -F my_config'; default: $EVM_SSH, else ssh")
    add("--adb", metavar="SERIAL", help="measure on this Android device, with --runner")
    add("--runner", metavar="FILE", help="onnxruntime_perf_test for Android")
    add("--devices", metavar="FILE", help="TOML with several boards: measure on all at the same time")
    add("--cache", metavar="DIR", help="OpenVINO: keep compiled models in this folder")
    add("--cuda-graph", action="store_true", help="TensorRT: launch the engine as one CUDA graph")
    add("--end-to-end", action="store_true", help="time from a picture file to its five best classes")
    add("--layers", action="store_true", help="also print the times by module")
    add("--limit", type=float, default=60.0, metavar="S", help="seconds for each measurement, default 60")
    add("-o", "--out", default="bench", metavar="DIR", help="folder for the records, default bench")
    add("--db", metavar="FILE", help="add the records to this history too, for evm-report --history")
    matrix_flags(parser)
    common_flags(parser)
    return parser


def bench_main(argv: Sequence[str] | None = None) -> int:
    """`evm-bench`. Returns the exit code."""
    args = bench_parser().parse_args(argv)
    return run_command("evm-bench", lambda: _bench(args), args.verbose)


def _bench(args: argparse.Namespace) -> int:
    from evm_deploy.bench.places import opened
    from evm_deploy.bench.text import layer_lines, lines
    from evm_deploy.report.history import append

    place, sweep = _place(args), _sweep(args)
    if args.db:
        append(Path(args.db), [])  # now, not after minutes of measuring, is the time to refuse it
    if args.matrix:
        return matrix(args, sweep)
    refuse_matrix_flags(args)
    if not args.bundles:
        raise UsageError("no bundle is given", "evm-bench BUNDLE, or evm-bench --matrix for the demo")
    if args.devices:
        return _fleet(args, place, sweep)
    steps, records = Steps(args.quiet), []
    with opened(place, steps) as bench:
        for record, path in sweep.run(bench, steps):
            if args.db:
                append(Path(args.db), [record])
            records.append({"record": str(path), **record.bundle, **record.summary_ms})
            if not args.json:
                print("\n".join([*lines(record, path), *(layer_lines(record) if args.layers else [])]))
    if args.json:
        print(json.dumps(records, indent=1))
    return 0


def _place(args: argparse.Namespace) -> Place:
    from evm_deploy.bench.places import Place

    ssh = args.ssh or os.environ.get("EVM_SSH", "ssh")
    return Place(args.host, args.adb, args.device, ssh, args.python, args.runner)


def _sweep(args: argparse.Namespace) -> Sweep:
    """Every combination that was asked for. Raises UsageError."""
    from evm_deploy.bench.places import profile_of
    from evm_deploy.bench.record import Settings
    from evm_deploy.bench.sweep import Sweep

    if not 0 < args.limit <= MAX_LIMIT_S:
        raise UsageError(f"--limit {args.limit:g}: use seconds from 0 to {MAX_LIMIT_S}")
    settings = Settings(
        scan=args.scan,
        device=None if profile_of(args.device) else args.device,
        cache=args.cache,
        cuda_graph=args.cuda_graph,
        timed="end-to-end" if args.end_to_end else "model",
        limit_s=args.limit,
    )
    return Sweep(
        bundles=args.bundles,
        threads=_numbers("--threads", args.threads),
        batches=_numbers("--batch", args.batch),
        streams=[streams or 1 for streams in _numbers("--streams", args.streams)],
        settings=settings,
        out=Path(args.out),
    )


def _fleet(args: argparse.Namespace, place: Place, sweep: Sweep) -> int:
    from evm_deploy.bench.fleet import read_fleet, run_fleet, table
    from evm_deploy.report.history import append

    if place.host or place.adb:
        raise UsageError("--devices names the boards", "leave --host and --adb out")
    members = read_fleet(Path(args.devices), place, sweep)
    outcomes = run_fleet(members, Steps(args.quiet, live=False))
    if args.db:
        append(Path(args.db), [record for outcome in outcomes for record, _ in outcome.found])
    failures = [outcome.error for outcome in outcomes if outcome.error]
    if args.json:
        rows = [
            {"board": outcome.name, "record": str(path), **record.bundle, **record.summary_ms}
            for outcome in outcomes
            for record, path in outcome.found
        ]
        failed = [{"board": outcome.name, "error": str(outcome.error)} for outcome in outcomes if outcome.error]
        print(json.dumps([*rows, *failed], indent=1))
    else:
        print("\n".join([*table(outcomes), f"Saved  {sweep.out}"]))
    return max((error.exit_code for error in failures), default=0)


def _numbers(flag: str, text: str) -> list[int | None]:
    """`1,4,8` -> numbers; empty: [None]. Raises UsageError."""
    if not text:
        return [None]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10000 for part in text.split(",")):
        raise UsageError(f"{flag} {text}: use numbers from 1, such as 1,4,8")
    return [int(part) for part in dict.fromkeys(text.split(","))]
