"""evm-bench."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy.cli_matrix import matrix, matrix_flags, refuse_matrix_flags
from evm_deploy.console import EXIT_CODES, Parser, Steps, common_flags, run_command
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.bench.record import Settings

MAX_LIMIT_S = 3600


def bench_parser() -> Parser:
    parser = Parser(
        "evm-bench",
        description="Measure the latency of bundles on this machine, until it is stable.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundles", nargs="*", metavar="BUNDLE", help="with --matrix: the checkpoint")
    add("--threads", default="", metavar="N[,N..]", help="intra-op threads, each measured; default: the runtime's")
    add("--batch", default="", metavar="N[,N..]", help="images of one inference, each measured; default: the bundle's")
    add("--streams", default="", metavar="N[,N..]", help="inferences at the same time, each measured; default: 1")
    add("--scan", default="auto", metavar="S", help="auto (default), plugin, bundled, portable, as for evm-run")
    add("--device", metavar="D", help="OpenVINO: CPU (default), GPU, AUTO, HETERO:GPU,CPU")
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
    from evm_deploy.bench.measuring import bench
    from evm_deploy.bench.text import file_name, layer_lines, lines
    from evm_deploy.report.history import append

    sweep = _settings(args)
    if args.db:
        append(Path(args.db), [])  # now, not after minutes of measuring, is the time to refuse it
    if args.matrix:
        return matrix(args, sweep)
    refuse_matrix_flags(args)
    if not args.bundles:
        raise UsageError("no bundle is given", "evm-bench BUNDLE, or evm-bench --matrix for the demo")
    steps, records = Steps(args.quiet), []
    for bundle, settings in itertools.product(args.bundles, sweep):
        with steps("measure", f"{Path(bundle).name}, {settings}"):
            record = bench(bundle, settings)
        path = Path(args.out) / file_name(record)
        record.write(path)
        if args.db:
            append(Path(args.db), [record])
        records.append({"record": str(path), **record.bundle, **record.summary_ms})
        if not args.json:
            print("\n".join([*lines(record, path), *(layer_lines(record) if args.layers else [])]))
    if args.json:
        print(json.dumps(records, indent=1))
    return 0


def _settings(args: argparse.Namespace) -> list[Settings]:
    """Every combination that was asked for. Raises UsageError."""
    from evm_deploy.bench.record import Settings

    if not 0 < args.limit <= MAX_LIMIT_S:
        raise UsageError(f"--limit {args.limit:g}: use seconds from 0 to {MAX_LIMIT_S}")
    sweep = itertools.product(
        _numbers("--threads", args.threads), _numbers("--batch", args.batch), _numbers("--streams", args.streams)
    )
    return [
        Settings(
            threads=threads,
            batch=batch,
            scan=args.scan,
            device=args.device,
            cache=args.cache,
            cuda_graph=args.cuda_graph,
            streams=streams or 1,
            timed="end-to-end" if args.end_to_end else "model",
            limit_s=args.limit,
        )
        for threads, batch, streams in sweep
    ]


def _numbers(flag: str, text: str) -> list[int | None]:
    """`1,4,8` -> numbers; empty: [None]. Raises UsageError."""
    if not text:
        return [None]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10000 for part in text.split(",")):
        raise UsageError(f"{flag} {text}: use numbers from 1, such as 1,4,8")
    return [int(part) for part in dict.fromkeys(text.split(","))]
