"""evm-report: compare records and bundles, recommend one, and find regressions."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy import __version__
from evm_deploy._util.files import require_writable, write_output
from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, print_document, run_command, stdout_console
from evm_deploy.errors import EvmError, LatencyError, UsageError

if TYPE_CHECKING:
    from evm_deploy.report.collect import Collected
    from evm_deploy.report.gate import Gate
    from evm_deploy.report.table import Group


def report_parser() -> Parser:
    """Return the argument parser of evm-report."""
    parser = Parser(
        "evm-report",
        description="Compare records and bundles, recommend the bundle to ship, and find regressions.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="records of evm-bench, bundles, folders of them, or of sweeps")
    add(
        "--max-drop",
        type=float,
        default=1.0,
        metavar="X",
        help="largest accepted drop of the task's main score (top-1, AP, mIoU) in points, default 1.0",
    )
    add("--markdown", metavar="FILE", help="write a Markdown report; - means stdout, also for --csv and --html")
    add("--csv", metavar="FILE", help="write a CSV file with one row for each candidate")
    add("--html", metavar="FILE", help="write one self-contained HTML page with charts")
    add("--compare", nargs=2, metavar=("OLD", "NEW"), help="compare the latencies of two records or folders of records")
    add(
        "--max-regression",
        metavar="PERCENT",
        help="with --compare: exit code 6 if a median rose by more than this, such as 5%%",
    )
    add("--max-latency", metavar="T", help="exit code 6 if the median of a bundle is above this, such as 20ms")
    add(
        "--select",
        action="append",
        default=[],
        metavar="T[,P]",
        help="bundles that --max-latency and --max-regression check, such as onnx or onnx,int8; may be repeated; "
        "default: all that can ship",
    )
    add("--db", metavar="FILE", help="history of records (SQLite): add the records to it; --history reads it")
    add("--history", action="store_true", help="print the latencies in --db over time")
    add("--model", metavar="M", help="with --history: only records of this model")
    add("--target", metavar="T", help="with --history: only records of this target")
    add("--last", type=int, metavar="N", help="with --history: the last N measurements of each bundle and setting")
    add("--json", action="store_true", help="print the result as JSON on stdout")
    add("-v", "--verbose", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"evm-deploy {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-report` with `argv` and return the exit code."""
    args = report_parser().parse_intermixed_args(argv)  # flags between paths, too
    return run_command("evm-report", lambda: _report(args), args)


def _report(args: argparse.Namespace) -> int:
    """Print a report, a comparison or a history. Raises LatencyError if a latency limit is exceeded."""
    _check(args)
    if args.compare:
        _compare(args)
    elif args.history:
        _history(args)
    else:
        _groups(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that cannot be combined and for invalid numbers."""
    files = [flag for flag in ("markdown", "csv", "html") if getattr(args, flag)]
    if args.compare and (args.paths or args.history):
        raise UsageError("--compare cannot be combined with paths or --history", "evm-report --compare OLD NEW")
    if files and (args.compare or args.history):
        raise UsageError(f"--{files[0]} cannot be combined with --compare or --history", "use --json")
    if args.history and not args.db:
        raise UsageError("--history needs --db FILE", "to create a history: evm-report RECORD.. --db FILE")
    if args.select and args.max_latency is None and args.max_regression is None:
        raise UsageError("--select needs --max-latency or --max-regression")
    if args.max_regression and not args.compare:
        raise UsageError("--max-regression needs --compare OLD NEW")
    if not args.history and any(value is not None for value in (args.model, args.target, args.last)):
        raise UsageError("--model, --target and --last need --history")
    if args.last is not None and args.last < 1:
        raise UsageError(f"--last {args.last}: use a number from 1")
    if not 0 <= args.max_drop <= 100:
        raise UsageError(f"--max-drop {args.max_drop:g}: use points from 0 to 100")
    if not (args.paths or args.compare or args.history):
        raise UsageError("nothing to report", "give records of evm-bench, bundles, or folders of them")
    if [args.markdown, args.csv, args.html, "-" if args.json else ""].count("-") > 1:
        raise UsageError("only one of --markdown, --csv, --html and --json can write to stdout")
    written = {flag: Path(getattr(args, flag)) for flag in files if getattr(args, flag) != "-"}
    for flag, path in written.items():
        require_writable(path, f"--{flag}")
        _refuse_data(path, flag)
        for other in (*written.values(), *map(Path, args.paths), *([Path(args.db)] if args.db else [])):
            if other is not path and path.resolve() == other.resolve():
                raise UsageError(
                    f"--{flag} {path} would replace another file of this command", f"choose another --{flag}"
                )
    if args.db and (args.paths or not args.history):  # --history alone only reads
        require_writable(Path(args.db), "--db")


def _refuse_data(path: Path, flag: str) -> None:
    """Raise UsageError if the file `path` is a record, a manifest or a history: no report begins like one."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            begin = file.read(16)
    except OSError:
        return
    if begin.startswith((b"{", b"SQLite format 3")):
        raise UsageError(f"--{flag} {path} would replace a file of data by a report", f"choose another --{flag}")


def _groups(args: argparse.Namespace) -> None:
    """Print and write the report, then apply --max-latency."""
    from evm_deploy.report.collect import candidates
    from evm_deploy.report.overview import MANY, overview
    from evm_deploy.report.page import page
    from evm_deploy.report.table import grouped
    from evm_deploy.report.terminal import show_report
    from evm_deploy.report.write import as_dicts, markdown, table_csv

    gate = _gate(args)
    found = _collected(args, args.paths)
    all_candidates = candidates(found)
    groups = grouped(all_candidates, args.max_drop)
    many = len(groups) >= (2 if found.sweeps else MANY)
    seen = overview(groups, found.failed, found.tuned) if many or found.failed or found.tuned else None
    on_stdout = args.json
    forms: dict[str, Callable[[Sequence[Group]], str]] = {
        "markdown": markdown,
        "csv": table_csv,
        "html": partial(page, seen=seen),
    }
    for flag, form in forms.items():
        if target := getattr(args, flag):
            _write(target, form(groups))
            on_stdout |= target == "-"
    if args.json:
        print(strict_json(as_dicts(groups), indent=1))
    if not on_stdout:
        show_report(stdout_console(), groups, seen)
    _require(gate.check(all_candidates))


def _compare(args: argparse.Namespace) -> None:
    """Print the comparison of OLD and NEW, then apply --max-regression and --max-latency."""
    from evm_deploy.report.compare import compare
    from evm_deploy.report.terminal import show_comparison

    gate = _gate(args)
    old, new = (_collected(args, [path]).records for path in args.compare)
    comparison = compare(old, new)
    if args.json:
        print(
            strict_json({"pairs": [p.as_dict() for p in comparison.pairs], "unmatched": comparison.unmatched}, indent=1)
        )
    else:
        show_comparison(stdout_console(), comparison)
    _require(gate.check(comparison.new, comparison.pairs, comparison.gone))


def _history(args: argparse.Namespace) -> None:
    """Print the history, then apply --max-latency to the newest measurements."""
    from evm_deploy.report.history import as_dicts, courses, read
    from evm_deploy.report.terminal import show_history

    gate = _gate(args)
    if args.paths:
        _collected(args, args.paths)
    damaged: list[EvmError] = []
    found = courses(read(Path(args.db), args.model, args.target, damaged), args.last)
    _left_out(damaged)
    if not found and damaged:
        raise damaged[0]
    if not found and (args.model or args.target):
        raise UsageError(f"{args.db} has no records of this model and target", "leave --model and --target out")
    if not found:
        raise UsageError(f"{args.db} has no records", f"evm-bench BUNDLE --db {shlex.quote(args.db)}")
    if args.json:
        print(strict_json([as_dicts(course) for course in found], indent=1))
    else:
        show_history(stdout_console(), found)
    _require(gate.check([course[-1] for course in found]))


def _gate(args: argparse.Namespace) -> Gate:
    """Return the limits in `args`. Raises UsageError."""
    from evm_deploy.report.gate import Gate

    select = tuple(",".join(part.strip() for part in text.split(",")) for text in args.select)
    return Gate(milliseconds(args.max_latency), percent(args.max_regression), select, args.max_drop)


def _require(found: tuple[list[str], LatencyError | None]) -> None:
    """Print what a gate has checked to stderr, and raise its error if it has one."""
    said, error = found
    for text in said:
        print(escape_controls(f"evm-report: {text}"), file=sys.stderr)
    if error:
        raise error


def _collected(args: argparse.Namespace, paths: Sequence[str]) -> Collected:
    """Read the records and bundles at `paths`, and add the records to the history --db if given."""
    from evm_deploy.report.collect import collect
    from evm_deploy.report.history import append

    found = collect(paths)
    _left_out(found.damaged)
    for path in found.ignored:
        print(f"evm-report: {path} is not a record: ignored", file=sys.stderr)
    if args.db:
        append(Path(args.db), found.records)
    return found


def _left_out(damaged: Sequence[EvmError]) -> None:
    """Name the records and bundles that are left out of the report, on stderr."""
    for error in damaged:
        print(escape_controls(f"evm-report: left out: {error}"), file=sys.stderr)


def milliseconds(said: str | None) -> float | None:
    """Parse `20ms`, `0.02s` or `20` into 20.0 ms; None stays None. Raises UsageError."""
    if said is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ms|s)?", said, re.ASCII)
    if not match or not float(match[1]):
        raise UsageError(f"--max-latency {said}: use a time such as 20ms")
    return float(match[1]) * (1000 if match[2] == "s" else 1)


def percent(said: str | None) -> float | None:
    """Parse `5%` or `5` into 5.0; None stays None. Raises UsageError."""
    if said is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%?", said, re.ASCII)
    if not match:
        raise UsageError(f"--max-regression {said}: use a percentage such as 5%")
    return float(match[1])


def _write(target: str, text: str) -> None:
    """Write `text` to the file `target`, or to stdout if `target` is `-`. Raises UsageError."""
    if target == "-":
        print_document(text)
        return
    try:
        write_output(Path(target), text)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", "choose another file") from error
    print(f"Saved  {target}", file=sys.stderr)
