"""evm-report."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy import __version__
from evm_deploy._util.files import write_atomically
from evm_deploy.commands.console import EXIT_CODES, Parser, run_command, stdout_console
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.report.collect import Collected
    from evm_deploy.report.table import Group


def report_parser() -> Parser:
    parser = Parser(
        "evm-report",
        description="Records and bundles side by side, what to ship, and what got slower.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="records of evm-bench, bundles, or folders of them")
    add("--max-drop", type=float, default=1.0, metavar="X", help="points of top-1 that may be lost, default 1.0")
    add("--markdown", metavar="FILE", help="write a Markdown table; - is stdout, here and below")
    add("--csv", metavar="FILE", help="write one row for each candidate")
    add("--html", metavar="FILE", help="write one page with charts, which needs nothing else")
    add("--compare", nargs=2, metavar=("OLD", "NEW"), help="records or folders: what got slower, what faster")
    add("--max-regression", metavar="PERCENT", help="with --compare: exit 6 where the median rose by more, such as 5%%")
    add("--max-latency", metavar="T", help="exit 6 where a median is above this, such as 20ms")
    add("--db", metavar="FILE", help="add the records to this history, and read --history from it")
    add("--history", action="store_true", help="how latencies changed, from --db")
    add("--model", metavar="M", help="with --history: of this model alone")
    add("--target", metavar="T", help="with --history: of this target alone")
    add("--last", type=int, metavar="N", help="with --history: the last N measurements of each bundle and setting")
    add("--json", action="store_true", help="JSON on stdout")
    add("-v", "--verbose", action="store_true", help="tracebacks")
    add("--version", action="version", version=f"evm-deploy {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`evm-report`. Returns the exit code."""
    args = report_parser().parse_intermixed_args(argv)  # flags between paths, too
    return run_command("evm-report", lambda: _report(args), args.verbose)


def _report(args: argparse.Namespace) -> int:
    _check(args)
    if args.compare:
        _compare(args)
    elif args.history:
        _history(args)
    else:
        _groups(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together. Raises UsageError."""
    files = [flag for flag in ("markdown", "csv", "html") if getattr(args, flag)]
    if args.compare and (args.paths or args.history):
        raise UsageError("--compare takes OLD and NEW alone", "evm-report --compare OLD NEW")
    if files and (args.compare or args.history):
        raise UsageError(f"--{files[0]} is for a report, not for --compare or --history", "use --json")
    if args.history and not args.db:
        raise UsageError("--history needs --db FILE", "evm-report RECORD.. --db FILE makes one")
    if args.max_regression and not args.compare:
        raise UsageError("--max-regression needs --compare OLD NEW")
    if not args.history and any(value is not None for value in (args.model, args.target, args.last)):
        raise UsageError("--model, --target and --last are for --history")
    if args.last is not None and args.last < 1:
        raise UsageError(f"--last {args.last}: use a number from 1")
    if not 0 <= args.max_drop <= 100:
        raise UsageError(f"--max-drop {args.max_drop:g}: use points from 0 to 100")
    if not (args.paths or args.compare or args.history):
        raise UsageError("nothing to report", "give records of evm-bench, bundles, or folders of them")
    if [args.markdown, args.csv, args.html, "-" if args.json else ""].count("-") > 1:
        raise UsageError("only one of --markdown, --csv, --html and --json can go to stdout")


def _groups(args: argparse.Namespace) -> None:
    from evm_deploy.report.collect import candidates
    from evm_deploy.report.compare import require
    from evm_deploy.report.table import grouped
    from evm_deploy.report.terminal import show_groups
    from evm_deploy.report.write import as_dicts, markdown, table_csv

    max_latency = milliseconds(args.max_latency)
    all_candidates = candidates(_collected(args, args.paths))
    groups = grouped(all_candidates, args.max_drop)
    on_stdout = args.json
    forms = {"markdown": markdown, "csv": table_csv, "html": _page}
    for flag, form in forms.items():
        if target := getattr(args, flag):
            _write(target, form(groups))
            on_stdout |= target == "-"
    if args.json:
        print(json.dumps(as_dicts(groups), indent=1))
    if not on_stdout:
        show_groups(stdout_console(), groups)
    require((), all_candidates, max_latency_ms=max_latency)


def _compare(args: argparse.Namespace) -> None:
    from evm_deploy.report.compare import compare, require
    from evm_deploy.report.terminal import show_comparison

    limits = percent(args.max_regression), milliseconds(args.max_latency)
    old, new = (_collected(args, [path]).records for path in args.compare)
    comparison = compare(old, new)
    if args.json:
        print(
            json.dumps({"pairs": [p.as_dict() for p in comparison.pairs], "unmatched": comparison.unmatched}, indent=1)
        )
    else:
        show_comparison(stdout_console(), comparison)
    require(comparison.pairs, comparison.new, *limits)


def _history(args: argparse.Namespace) -> None:
    from evm_deploy.report.compare import require
    from evm_deploy.report.history import as_dicts, courses, read
    from evm_deploy.report.terminal import show_history

    max_latency = milliseconds(args.max_latency)
    if args.paths:
        _collected(args, args.paths)
    found = courses(read(Path(args.db), args.model, args.target), args.last)
    if not found:
        raise UsageError(f"{args.db} has no such records")
    if args.json:
        print(json.dumps([as_dicts(course) for course in found], indent=1))
    else:
        show_history(stdout_console(), found)
    require((), [course[-1] for course in found], max_latency_ms=max_latency)


def _collected(args: argparse.Namespace, paths: Sequence[str]) -> Collected:
    """Read what is given, and add its records to the history if there is one."""
    from evm_deploy.report.collect import collect
    from evm_deploy.report.history import append

    found = collect(paths)
    for path in found.ignored:
        print(f"evm-report: {path} is no record: left out", file=sys.stderr)
    if args.db:
        append(Path(args.db), found.records)
    return found


def milliseconds(said: str | None) -> float | None:
    """`20ms`, `0.02s` or `20` -> 20.0. Raises UsageError."""
    if said is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ms|s)?", said, re.ASCII)
    if not match or not float(match[1]):
        raise UsageError(f"--max-latency {said}: use a time such as 20ms")
    return float(match[1]) * (1000 if match[2] == "s" else 1)


def percent(said: str | None) -> float | None:
    """`5%` or `5` -> 5.0. Raises UsageError."""
    if said is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%?", said, re.ASCII)
    if not match:
        raise UsageError(f"--max-regression {said}: use percent such as 5%")
    return float(match[1])


def _page(groups: Sequence[Group]) -> str:
    from evm_deploy.report.page import page

    return page(groups)


def _write(target: str, text: str) -> None:
    if target == "-":
        print(text, end="")
        return
    try:
        write_atomically(Path(target), text)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", "choose another file") from error
    print(f"Saved  {target}", file=sys.stderr)
