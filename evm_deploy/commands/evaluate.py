"""evm-eval: evaluate a bundle on labelled images, in shards, on this machine or on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, Steps, common_flags, run_command
from evm_deploy.commands.engines import engine_flags, opened_engine


def eval_parser() -> Parser:
    """Return the argument parser of evm-eval."""
    parser = Parser(
        "evm-eval",
        description="Evaluate a bundle on any number of labelled images. An interrupted evaluation continues.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="bundle to evaluate")
    add("--val", required=True, metavar="PATH", help="labelled images, as for evm-export")
    add("--reference", metavar="BUNDLE", help="bundle of the float network: gives its figures, SQNR and agreement")
    engine_flags(parser)
    common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-eval` with `argv` and return the exit code."""
    args = eval_parser().parse_args(argv)
    return run_command("evm-eval", lambda: _eval(args), args)


def _eval(args: argparse.Namespace) -> int:
    """Evaluate the bundle and print its figures."""
    from evm_deploy.sweep.boards import Boards
    from evm_deploy.sweep.evaluate import evaluate

    steps = Steps(args.quiet)
    with opened_engine(args, Boards()) as engine, steps("evaluate", args.bundle) as progress:
        found = evaluate(args.bundle, args.val, args.reference, engine=engine, progress=progress)
    if args.json:
        facts = {
            "bundle": args.bundle,
            **found.accuracy.as_dict(),
            "skipped": list(found.skipped),
            "order": found.order,
        }
        print(strict_json(facts, indent=1))
        return 0
    lines = [f"Accuracy  {found.accuracy}"]
    lines += [f"Note      {found.order}"] if found.order else []
    lines += [f"Note      left out: {text}" for text in found.skipped]
    print(escape_controls("\n".join(lines)))
    return 0
