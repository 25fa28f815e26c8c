"""`evm-bench --matrix`: compare one checkpoint in several forms, each a target with a precision."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.files import require_writable, write_output
from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import stdout_console
from evm_deploy.commands.engines import reporter
from evm_deploy.commands.export_flags import drop_patterns
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.bench.sweep import Sweep

PAGE = "report.html"
PAGE_TITLE = b"<title>Latency report"
ONLY_HERE = ("forms", "imgsz", "calib", "val")


def matrix_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of --matrix to the parser of evm-bench."""
    add = parser.add_argument_group("what to measure, with --matrix").add_argument
    add(
        "--matrix",
        action="store_true",
        help="export a checkpoint (default: the embedded demo) to each of --forms and measure each bundle",
    )
    add(
        "--forms",
        metavar="T:P[,T:P..]",
        help="pairs of target and precision, such as onnx:fp32,openvino:int8,onnx:w8a16; torch measures the checkpoint "
        "itself; default: torch, then ONNX and OpenVINO in fp32 and int8",
    )
    add("--imgsz", metavar="N|HxW", help="input size in pixels, see evm-export --help")
    add("--calib", metavar="DIR", help="images to calibrate int8, see evm-export --help")
    add("--val", metavar="PATH", help="labelled images to evaluate every form, see evm-export --help")


def refuse_matrix_flags(args: argparse.Namespace) -> None:
    """Raise UsageError if a flag of --matrix is given without --matrix."""
    for name in ONLY_HERE:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} needs --matrix", f"leave --{name} out, or give a checkpoint and --matrix")


def matrix(args: argparse.Namespace, sweep: Sweep) -> int:
    """Export and measure every form of one checkpoint, and print the report.

    Return the largest exit code of the forms that failed, or 0.
    """
    from evm_deploy.demo import CHECKPOINT, checkpoint_path
    from evm_deploy.sweep.forms import FORMS, parse_forms
    from evm_deploy.sweep.matrix import Matrix, run_matrix

    if len(args.bundles) > 1:
        raise UsageError("--matrix takes one checkpoint", "give one checkpoint, or none for the embedded demo")
    if args.host or args.adb or args.devices or args.profile:
        raise UsageError(
            "--matrix only measures on this machine", "to measure on another one: evm-bench BUNDLE.. --host .."
        )
    _require_own(Path(args.out) / PAGE)
    require_writable(sweep.out / PAGE, "--out")
    demo = not args.bundles
    wanted = Matrix(
        checkpoint=CHECKPOINT if demo else checkpoint_path(args.bundles[0]),
        forms=parse_forms(args.forms or FORMS),
        settings=tuple(replace(each, batch=each.batch or 1) for each in sweep.every()),
        out=Path(args.out),
        imgsz=args.imgsz,
        weights=args.weights or "ema",
        drop=drop_patterns(args.drop),
        calib=args.calib or ("demo" if demo else None),
        val=args.val or ("demo" if demo else None),
    )
    if demo:
        print(f"no checkpoint given: comparing forms of the embedded demo, {CHECKPOINT.name}", file=sys.stderr)
    outcome = run_matrix(wanted, reporter(args.quiet))
    for form, error in outcome.failed.items():
        print(escape_controls(f"{form}: {error}"), file=sys.stderr)
    if outcome.records:
        report(outcome.records, wanted.out, args)
    elif args.json:
        print(strict_json([], indent=1))
    return max((error.exit_code for error in outcome.failed.values()), default=0)


def _require_own(page: Path) -> None:
    """Raise UsageError if the file `page`, whose name the user did not choose, is another one than our report."""
    if not page.exists():
        return
    try:
        with page.open("rb") as file:
            ours = PAGE_TITLE in file.read(4096)
    except OSError:
        ours = False
    if not ours:
        raise UsageError(f"{page} exists and is no latency report: it is not replaced", "choose another --out")


def report(records: Sequence[Path], out: Path, args: argparse.Namespace) -> None:
    """Print table and verdict, write the HTML page into `out`, and add the records to the history --db if given."""
    from evm_deploy.report.collect import candidates, collect
    from evm_deploy.report.history import append
    from evm_deploy.report.page import page
    from evm_deploy.report.table import grouped
    from evm_deploy.report.terminal import show_groups
    from evm_deploy.report.verdict import MAX_DROP
    from evm_deploy.report.write import as_dicts

    found = collect([str(path) for path in records])
    if args.db:
        append(Path(args.db), found.records)
    groups = grouped(candidates(found), MAX_DROP)
    write_output(out / PAGE, page(groups))
    if args.json:
        print(strict_json(as_dicts(groups), indent=1))
        return
    show_groups(stdout_console(), groups)
    print(f"Saved    {out / PAGE}, {len(records)} records and their bundles in the same folder")
