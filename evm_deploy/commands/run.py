"""evm-run: classify images, detect objects or the class of every pixel with a bundle, or run its self-test."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.schema import strict_json
from evm_deploy._util.settings import add_flags, given
from evm_deploy._util.text import command, escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, common_flags, run_command
from evm_deploy.errors import CalibrationError, ImageError, UsageError
from evm_deploy.runtimes.registry import setting_kinds

if TYPE_CHECKING:
    from evm_deploy.bundle.loaded import LoadedBundle

AT_ONCE = 64  # images whose results are printed together


def run_parser() -> Parser:
    """Return the argument parser of evm-run."""
    parser = Parser(
        "evm-run",
        description="Classify images, or detect objects or the class of every pixel in them, with a bundle; or run the "
        "bundle's self-test on this device.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", nargs="?", metavar="BUNDLE", help="folder or .zip of the bundle")
    add(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="images: files, folders (searched whole) or patterns such as 'a/*.jpg'",
    )
    add("--top", type=int, default=5, metavar="K", help="number of classes to print per image, default 5")
    add(
        "--min-score",
        type=float,
        metavar="X",
        help="smallest score of the detections that are printed and drawn, default 0.3",
    )
    add(
        "--save",
        metavar="DIR",
        help="write a copy of each image with its detections or label map drawn into this folder",
    )
    add("--selftest", action="store_true", help="run the bundle's self-test; exit code 4 if it fails")
    add("--threads", type=int, metavar="N", help="intra-op threads; default: chosen by the runtime")
    add(
        "--scan",
        default="auto",
        metavar="S",
        help="auto (default), plugin (installed native library), bundled (the bundle's own native library), or "
        "portable (no native library)",
    )
    add("--require-signature", metavar="PUB", help="refuse bundles not signed with this ed25519 key (a PEM file)")
    add_flags(parser, setting_kinds())
    common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-run` with `argv` and return the exit code."""
    args = run_parser().parse_intermixed_args(argv)  # evm-run BUNDLE --top 3 cat.jpg
    return run_command("evm-run", lambda: _run(args), args)


def _run(args: argparse.Namespace) -> int:
    """Run the self-test, the classification, or both. Return 4 if the self-test failed, else 0."""
    from evm_deploy.bundle.loaded import load
    from evm_deploy.tasks.detection import DETECTION

    if args.bundle is None:
        raise UsageError(
            "no bundle is given",
            "evm-run BUNDLE cat.jpg, or evm-run BUNDLE --selftest; without a bundle yet:  evm-export --target onnx",
        )
    if not args.images and not args.selftest:
        raise UsageError(
            "nothing to do: no image is given",
            f"give images, or:  {command('evm-run', Path(args.bundle), '--selftest')}",
        )
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}: use a number from 1")
    if args.top < 1:
        raise UsageError(f"--top {args.top}: use a number from 1")
    if args.min_score is not None and not 0 <= args.min_score <= 1:
        raise UsageError(f"--min-score {args.min_score}: use a score from 0 to 1")
    options = {name: getattr(args, name) for name in ("threads", "scan", "require_signature")}
    options |= given(args, setting_kinds())
    with load(args.bundle, **options) as model:
        here, has_scans = model.target.availability(), bool(model.manifest.parity["scans"])
        if not here.can_run and not args.quiet:
            print(here.hint, file=sys.stderr)
        elif has_scans and args.scan == "auto" and model.scan.value == "portable" and not args.quiet:
            print(escape_controls(f"scans run in their portable form: {model.scan.reason}"), file=sys.stderr)
        if args.selftest:
            checks = model.selftest()
            passed = all(check.ok for check in checks)
            facts = [{"name": c.name, "error": c.error, "limit": c.limit, "ok": c.ok} for c in checks]
            lines = [f"{c.name:<32} {c.error:.1e}  limit {c.limit:.1e}  {'ok' if c.ok else 'FAILED'}" for c in checks]
            lines += [f"scans ran as {model.scan.value}: {model.scan.reason}"] if has_scans else []
            if args.json:
                print(strict_json({"passed": passed, "scan": vars(model.scan), "checks": facts}, indent=1))
            else:
                print(escape_controls("\n".join([*lines, "PASSED" if passed else "FAILED"])))
            if not passed:
                return 4
        if args.save and not model.task.draw:
            raise UsageError(
                f"--save draws boxes and label maps: the bundle gives {model.task.gives}", "leave --save out"
            )
        if args.min_score is not None and model.task.name != DETECTION.name:
            raise UsageError(
                f"--min-score is for detections: the bundle gives {model.task.gives}", "leave --min-score out"
            )
        if args.images:
            return (_detect if model.task.draw else _classify)(model, args)
    return 0


def _classify(model: LoadedBundle, args: argparse.Namespace) -> int:
    """Print the classes of each image as soon as they are known. Return 2 if an image cannot be read, else 0.

    Such an image costs no other: its error goes to stderr, and to its row of the JSON.
    """
    names = [name for given in args.images for name in _images(given)]
    rows: list[dict[str, Any]] = []
    try:
        for start in range(0, len(names), AT_ONCE):
            errors: dict[int, ImageError] = {}
            part = names[start : start + AT_ONCE]
            answers = model.predict(part, top=args.top, on_error=errors.__setitem__)
            for index, (name, answer) in enumerate(zip(part, answers, strict=True)):
                if index in errors:
                    rows.append({"image": name, "error": str(errors[index])})
                    print(escape_controls(f"evm-run: {errors[index]}"), file=sys.stderr)
                    continue
                rows.append({"image": name, "top": [vars(each) for each in answer]})
                if not args.json:
                    print(escape_controls(name))
                    print(
                        "\n".join(f"  {each.score:7.2%}  {escape_controls(each.label)}" for each in answer), flush=True
                    )
    finally:  # what follows may fail: the results so far are the user's
        if args.json:
            print(strict_json(rows, indent=1))
    return _unread(rows)


def _detect(model: LoadedBundle, args: argparse.Namespace) -> int:
    """Print what is found in each image as soon as it is known. Return 2 if an image cannot be read, else 0."""
    from evm_deploy.commands.detections import SHOWN, detect

    names = [name for given in args.images for name in _images(given)]
    rows: list[dict[str, Any]] = []
    save = Path(args.save) if args.save else None
    least = SHOWN[model.task.name].least if args.min_score is None else args.min_score
    try:
        for line in detect(model, names, least, save, rows, args.json):
            print(line, flush=True)
    finally:
        if args.json:
            print(strict_json(rows, indent=1))
    return _unread(rows)


def _unread(rows: list[dict[str, Any]]) -> int:
    """Report how many images could not be read. Return the exit code."""
    failed = sum("error" in row for row in rows)
    if failed and len(rows) > 1:
        print(f"evm-run: {failed} of {len(rows)} images could not be read", file=sys.stderr)
    return ImageError.exit_code if failed else 0


def _images(given: str) -> list[str]:
    """Return the images that an argument names: a folder's, those of a pattern that no shell expanded, or itself."""
    from evm_deploy.data.sources import find_images

    if os.path.isdir(given):  # noqa: PTH112  Path("") is the current folder
        with contextlib.suppress(CalibrationError):  # reading the folder itself fails, and says so
            return [str(item.source) for item in find_images(Path(given))]
    elif glob.has_magic(given) and not os.path.lexists(given):
        matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        return [name for match in matches for name in _images(match)] or [given]
    return [given]
