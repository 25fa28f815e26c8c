"""evm-tune: find the most accurate artifact within limits of latency, size and memory."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.files import require_writable
from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import command, count_text, escape_controls, size_text
from evm_deploy.commands.console import EXIT_CODES, Parser, common_flags, run_command
from evm_deploy.commands.engines import engine_flags, opened_engine
from evm_deploy.commands.export_plans import announce_left_out
from evm_deploy.errors import LatencyError, UsageError

if TYPE_CHECKING:
    from evm_deploy.errors import EvmError
    from evm_deploy.sweep.budget import Budget
    from evm_deploy.sweep.choices import Choices
    from evm_deploy.sweep.space import Space
    from evm_deploy.sweep.tuned import Trial, Tuned

MAX_TRIALS, MAX_LIMIT_S = 10_000, 3600
SAMPLERS = ("additive", "tpe", "random")
JOURNAL = "search.journal"


def tune_parser() -> Parser:
    """Return the argument parser of evm-tune."""
    parser = Parser(
        "evm-tune",
        description="Find the most accurate artifact of a checkpoint within a budget of latency, size and memory, over "
        "precision, calibration, input size and threads. The same command continues an interrupted search.",
        epilog=EXIT_CODES + "\n  6 also means that no trial fits the budget",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint file, or demo:digits, demo:detector, demo:segmenter")
    add(
        "--budget",
        required=True,
        metavar="LIMITS",
        help='upper limits, such as "p50<20ms, size<10MB, memory<200MB"; p90, p95 and p99 are possible, too',
    )
    add("--val", required=True, metavar="PATH", help="labelled images that the accuracy is measured on, as evm-export")
    add("--calib", metavar="PATH", help="images to calibrate int8 with, as evm-export; without them int8 is left out")
    add("--target", metavar="T[,T2..]", help="targets to try; default: those of the device, else onnx")
    add(
        "--device",
        default="here",
        metavar="D",
        help="device profile of this machine's kind, or the name or class of a board; default here",
    )
    engine_flags(parser)
    add("--devices", metavar="FILE", help="TOML file of the boards that this machine reaches, with --engine local")
    add("--imgsz", metavar="N[,HxW..]", help="input sizes; default: the saved one, and 32 and 64 pixels less")
    add("--threads", metavar="N[,M..]", help="threads of an inference; default: powers of two up to the cores")
    add("--trials", type=int, default=20, metavar="N", help="candidates in all, those of earlier runs included (20)")
    add("--sampler", default="additive", choices=SAMPLERS, help="how candidates are proposed; default additive")
    add("--limit", type=float, default=20.0, metavar="S", help="seconds for an unstable measurement, default 20")
    add("-o", "--out", required=True, metavar="RUN", help="folder of the search: bundles, records, what is done")
    add("--dry-run", action="store_true", help="show what would be searched, and do nothing")
    add("--retry-failed", action="store_true", help="do trials again that failed in an earlier run")
    common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-tune` with `argv` and return the exit code."""
    args = tune_parser().parse_args(argv)
    return run_command("evm-tune", lambda: _tune(args), args)


def _tune(args: argparse.Namespace) -> int:
    """Search, and print the front and the chosen bundle. Raises LatencyError if nothing fits the budget."""
    from evm_deploy.demo import checkpoint_path, resolved
    from evm_deploy.sweep.boards import Boards
    from evm_deploy.sweep.budget import parse_budget
    from evm_deploy.sweep.choices import Choices, tuned_device
    from evm_deploy.sweep.folder import RunFolder
    from evm_deploy.sweep.keys import digest
    from evm_deploy.sweep.plan import known_digests
    from evm_deploy.sweep.search import Search
    from evm_deploy.sweep.tune import Goal, Tuner
    from evm_deploy.sweep.tuned import require_folder_of

    _check(args)
    budget, boards = parse_budget(args.budget), Boards.of(args.devices)
    if boards.members and args.device == "here":
        raise UsageError("--devices needs the board to measure on", "add --device with its name or class")
    device = tuned_device(args.device, boards, args.engine == "ray")
    known, checkpoint, calib = known_digests(), checkpoint_path(args.checkpoint), resolved(args.calib)
    choices = Choices(checkpoint.resolve(), device, calib, args.limit, known)
    space = _space(args, choices)
    of = digest([known.file(checkpoint), checkpoint.stem, known.images(args.val)])
    exports = [choices.units(each)[0].key for each in space.starts()]  # an impossible plan is an error now
    folder = RunFolder(Path(args.out).resolve())
    require_writable(folder.path, "--out", folder=True)
    if args.dry_run:
        return _dry_run(space, args)
    require_folder_of(folder, of)
    with folder.locked():
        name = digest([of, exports, budget.limits, device.board, space.as_dict(), args.sampler])
        search = Search(space, args.sampler, name=name, journal=folder.path / JOURNAL)
        goal = Goal(of, budget, device.board, args.val)
        with opened_engine(args, boards) as engine:
            engine.require(device.board)
            tuner = Tuner(goal, choices.units, folder, engine, retry_failed=args.retry_failed)
            found = tuner.search(search, args.trials, partial(_show, args, budget))
    return _finished(found, tuner.errors, args)


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for numbers that are out of range."""
    if not 1 <= args.trials <= MAX_TRIALS:
        raise UsageError(f"--trials {args.trials}: use a number from 1 to {MAX_TRIALS}")
    if not 0 < args.limit <= MAX_LIMIT_S:
        raise UsageError(f"--limit {args.limit:g}: use seconds above 0, up to {MAX_LIMIT_S}")


def _space(args: argparse.Namespace, choices: Choices) -> Space:
    """Return the space of the flags. Raises EvmError for a value that is not possible."""
    from evm_deploy.export.plan import parse_imgsz
    from evm_deploy.export.targets import resolve_names
    from evm_deploy.sweep.choices import forms_of, saved_sizes
    from evm_deploy.sweep.space import Space

    profile = choices.device.profile
    announce_left_out(args.target)
    targets = resolve_names(args.target) if args.target else list(profile.targets) if profile else ["onnx"]
    forms = forms_of(targets, args.calib is not None)
    sizes = [size_text(parse_imgsz(each.strip())) for each in args.imgsz.split(",")] if args.imgsz else ()
    threads = [_threads(each) for each in args.threads.split(",")] if args.threads else choices.device.threads
    if args.calib is None and not args.quiet:
        print("evm-tune: int8 is left out: it needs images to calibrate with (--calib)", file=sys.stderr)
    return Space(
        forms, tuple(dict.fromkeys(sizes)) or saved_sizes(choices.checkpoint, targets[0]), tuple(dict.fromkeys(threads))
    )


def _threads(text: str) -> str:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 1024:
        raise UsageError(f"--threads {text.strip()!r}: use whole numbers from 1, such as 1,4")
    return str(int(text))


def _dry_run(space: Space, args: argparse.Namespace) -> int:
    """Print the values of each setting, the number of candidates, and those that the search begins with."""
    found = {"candidates": len(space.all()), "space": space.as_dict(), "starts": [str(each) for each in space.starts()]}
    if args.json:
        print(strict_json(found, indent=1))
        return 0
    for name, values in space.as_dict().items():
        print(f"{name:<12} {', '.join(values)}")
    print(f"{found['candidates']} candidates, {min(args.trials, len(space.all()))} trials")
    return 0


def _show(args: argparse.Namespace, budget: Budget, trial: Trial, number: int) -> None:
    """Print one line for a trial."""
    if args.quiet:
        return
    said = trial.error.partition("\n")[0] if trial.error else trial.text(budget)
    print(
        escape_controls(f"[{number}/{max(number, args.trials)}] {trial.choice}   {trial.state}: {said}"),
        file=sys.stderr,
        flush=True,
    )


def _finished(found: Tuned, errors: Sequence[EvmError], args: argparse.Namespace) -> int:
    """Print the result. Raises LatencyError if nothing fits, or the error of the first trial if all failed."""
    states = Counter(each.state for each in found.trials)
    if args.json:
        print(strict_json(found.as_dict(), indent=1))
    best = found.chosen
    if best is None:
        _raise_none(found, errors)
    assert best
    path = Path(args.out) / best.bundle
    if not args.json:
        counted = ", ".join(f"{count} {state}" for state, count in states.items())
        print(f"Tuned     {count_text(len(found.trials), 'trial')}: {counted}   budget {found.budget}")
        for place, each in enumerate(found.front):
            print(escape_controls(f"{'' if place else 'Front':<9} {each.text(found.budget)}   {each.choice}"))
        print(escape_controls(f"Chosen    {best.choice}: {best.text(found.budget)}\nSaved     {path}"))
        print(
            escape_controls(
                f"Next      {command('evm-run', path)} IMAGE\n          {command('evm-report', Path(args.out))}"
            )
        )
    return 0


def _raise_none(found: Tuned, errors: Sequence[EvmError]) -> None:
    """Raise the error that says what came nearest to the budget, and what to do."""
    from evm_deploy.sweep.budget import figures_text

    near, count = found.nearest, count_text(len(found.trials), "trial")
    more = f" ({len(errors)} failed)" if errors else ""
    if near is None:
        first = errors[0]
        raise type(first)(f"every one of {count} failed; the first: {first.args[0]}", first.hint)
    over = 100 * found.budget.excess(near.figures)
    raise LatencyError(
        f"no candidate of {count}{more} fits the budget {found.budget}; nearest is {near.choice}, {over:.0f} % over: "
        f"{figures_text(near.figures, found.budget.metrics)}",
        "raise the limit, allow smaller images (--imgsz) or further targets (--target), or raise --trials: "
        "what is done is kept",
    )
