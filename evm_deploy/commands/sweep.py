"""evm-sweep: export, evaluate and measure many checkpoints, forms, sizes and boards, and continue where it ended."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import require_writable
from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import command, escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, common_flags, run_command
from evm_deploy.commands.engines import engine_flags, opened_engine, reporter
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.sweep.run import SweepRun, UnitOutcome

STATUS, WORKER = "status", "worker"


def sweep_parser() -> Parser:
    """Return the argument parser of evm-sweep."""
    parser = Parser(
        "evm-sweep",
        description="Export, evaluate and measure checkpoints x forms x sizes x boards. What is done is kept: the same "
        "command continues an interrupted sweep.",
        epilog="evm-sweep status RUN  shows what is done, what failed and why\n"
        "evm-sweep worker --devices FLEET.toml --address HEAD  offers boards to a Ray cluster\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "sweep",
        metavar="SWEEP.toml",
        help="TOML file of the checkpoints, forms, sizes and boards; docs/scale.md explains it",
    )
    add("-o", "--out", required=True, metavar="RUN", help="folder of the sweep: bundles, records, what is done")
    engine_flags(parser)
    add("--devices", metavar="FILE", help="TOML file of the boards that this machine reaches, with --engine local")
    add("--dry-run", action="store_true", help="list the units and whether they are done, and do nothing")
    add("--only", metavar="KEY", help="do the units whose key begins so, and what they need")
    add("--retry-failed", action="store_true", help="do units again that failed in an earlier run")
    common_flags(parser)
    return parser


def status_parser() -> Parser:
    """Return the argument parser of `evm-sweep status`."""
    parser = Parser(f"evm-sweep {STATUS}", description="Show what of a sweep is done, what failed and why.")
    parser.add_argument("run", metavar="RUN", help="folder of a sweep")
    common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-sweep` with `argv` and return the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == [STATUS]:
        args = status_parser().parse_args(given[1:])
        return run_command("evm-sweep", lambda: _status(args), args)
    if given[:1] == [WORKER]:
        from evm_deploy.commands.worker import main as worker_main

        return worker_main(given[1:])
    args = sweep_parser().parse_args(given)
    return run_command("evm-sweep", lambda: _sweep(args), args)


def _sweep(args: argparse.Namespace) -> int:
    """Do the missing units, and print what was done. Return the largest exit code of the units that failed, or 0."""
    from evm_deploy.sweep.boards import Boards
    from evm_deploy.sweep.folder import RunFolder
    from evm_deploy.sweep.plan import read_sweep
    from evm_deploy.sweep.run import SweepRun
    from evm_deploy.sweep.tuned import read_tuned

    plan, boards = read_sweep(Path(args.sweep)), Boards.of(args.devices)
    folder = RunFolder(Path(args.out).resolve())
    require_writable(folder.path, "--out", folder=True)
    if read_tuned(folder):
        raise UsageError(f"{folder.path} is the folder of an evm-tune", "choose another --out")
    if args.dry_run:
        return _dry_run(SweepRun(plan, folder, only=args.only, retry_failed=False), args)
    with folder.locked():
        run = SweepRun(plan, folder, only=args.only, retry_failed=args.retry_failed)
        with opened_engine(args, boards, {each.board for each in run.missing}) as engine:
            outcomes = run.run(engine, reporter(args.quiet))
    return _finished(outcomes, args)


def _dry_run(run: SweepRun, args: argparse.Namespace) -> int:
    """List the units with their keys. Evaluations are listed as soon as their bundle is there."""
    rows = [
        {
            "key": key,
            "unit": f"{unit.kind} {unit.title}",
            "state": run.outcomes[key].state if key in run.outcomes else "to do",
        }
        for key, unit in run.units.items()
        if key in run.outcomes or unit in run.missing
    ]
    if args.json:
        print(strict_json(rows, indent=1))
        return 0
    for row in rows:
        print(escape_controls(f"{row['key']}  {row['state']:<7} {row['unit']}"))
    if run.plan.val:
        print(f"and the evaluation of each bundle on {run.plan.val}, as soon as the bundle is there")
    return 0


def _finished(outcomes: Sequence[UnitOutcome], args: argparse.Namespace) -> int:
    """Print counts and failures, and return the exit code."""
    from evm_deploy.sweep.run import counts

    failed = [(each, each.error) for each in outcomes if each.error]
    if args.json:
        print(strict_json([_row(each) for each in outcomes], indent=1))
    for each, error in failed:
        print(escape_controls(f"evm-sweep: {each.unit.kind} {each.unit.title}: {error}"), file=sys.stderr)
    if not args.json:
        print(f"Sweep     {counts(outcomes)}")
        print(f"Next      {command('evm-report', Path(args.out))}")
        if failed:
            again = command("evm-sweep", args.sweep, "-o", args.out, "--retry-failed")
            print(f"          {again}   # when the cause is gone")
    return max((error.exit_code for _, error in failed), default=0)


def _row(outcome: UnitOutcome) -> dict[str, Any]:
    """Return a unit's outcome for --json."""
    error = {"error": str(outcome.error), "exit_code": outcome.error.exit_code} if outcome.error else {}
    unit = outcome.unit
    return {"key": unit.key, "kind": unit.kind, "unit": unit.title, "state": outcome.state, **outcome.result, **error}


def _status(args: argparse.Namespace) -> int:
    """Print how many units of each kind are done, failed and missing, and the failures."""
    from evm_deploy.sweep.folder import RunFolder
    from evm_deploy.sweep.status import status

    found = status(RunFolder(Path(args.run)))
    if args.json:
        print(strict_json(found.as_dict(), indent=1))
        return 0
    print(escape_controls("\n".join(found.lines())))
    return 0
