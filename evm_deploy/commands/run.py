"""evm-run: classify images and videos, detect objects or the class of every pixel in them, or run a self-test."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.schema import strict_json
from evm_deploy._util.settings import add_flags, given
from evm_deploy._util.text import command, escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, common_flags, run_command
from evm_deploy.commands.rows import Rows
from evm_deploy.errors import CalibrationError, ImageError, UsageError
from evm_deploy.runtimes.registry import setting_kinds

if TYPE_CHECKING:
    from evm_deploy.bundle.loaded import LoadedBundle
    from evm_deploy.commands.detections import Asked

AT_ONCE = 64  # images whose results are printed together


def run_parser() -> Parser:
    """Return the argument parser of evm-run."""
    parser = Parser(
        "evm-run",
        description="Classify images, videos or a camera's frames, or detect objects or the class of every pixel in "
        "them, with a bundle; or run the bundle's self-test on this device.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", nargs="?", metavar="BUNDLE", help="folder or .zip of the bundle")
    add(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="images: files, folders (searched whole) or patterns such as 'a/*.jpg'; video files such as clip.mp4; "
        "a camera: camera:0, or 0 if there is no file named 0",
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
        metavar="PLACE",
        help="write a copy of each image and video with its detections or label maps drawn into this folder; of one "
        "video: into this file (.mp4, .mov, .mkv, .avi or .webm). Nothing is replaced",
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
            lines += [f"{count} nodes ran on {provider}" for provider, count in model.nodes.items()]
            if args.json:
                found = {"passed": passed, "scan": vars(model.scan), "checks": facts, "nodes": dict(model.nodes)}
                print(strict_json(found, indent=1))
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
        return _answer(model, args) if args.images else 0


def _answer(model: LoadedBundle, args: argparse.Namespace) -> int:
    """Print the answers of images, videos and cameras as soon as they are known. Return 2 if an input fails, else 0.

    An input that cannot be read costs no other: its error goes to stderr, and to its row of the JSON.
    """
    from evm_deploy.commands.detections import SHOWN, Asked, detect
    from evm_deploy.commands.videos import check_videos, watch
    from evm_deploy.data.video import is_video

    model.predict([])  # raises UsageError if the bundle gives no answers
    names = [name for given in args.images for name in _images(given)]
    save = Path(args.save) if args.save else None
    check_videos(names, save)
    least = SHOWN[model.task.name].least if args.min_score is None else args.min_score
    asked = Asked(args.top, least, save, args.json, args.quiet)
    of_images = detect if model.task.draw else _classify
    with Rows(args.json) as rows:
        for video, group in groupby(names, is_video):
            one_by_one = (line for name in group for line in watch(model, name, asked, rows))
            for line in one_by_one if video else of_images(model, list(group), asked, rows):
                print(line, flush=True)
    if rows.failed and len(names) > 1:
        kind = "inputs" if any(map(is_video, names)) else "images"
        print(f"evm-run: {rows.failed} of {len(names)} {kind} could not be read", file=sys.stderr)
    return ImageError.exit_code if rows.failed else 0


def _classify(model: LoadedBundle, names: Sequence[str], asked: Asked, rows: Rows) -> Iterator[str]:
    """Predict the classes of image files. Yields the lines of each image: its name and a line for each class."""
    for start in range(0, len(names), AT_ONCE):
        errors: dict[int, ImageError] = {}
        part = names[start : start + AT_ONCE]
        answers = model.predict(part, top=asked.top, on_error=errors.__setitem__)
        for index, (name, answer) in enumerate(zip(part, answers, strict=True)):
            if index in errors:
                rows.fail({"image": name}, errors[index])
                continue
            rows.add({"image": name, "top": [vars(each) for each in answer]})
            if not asked.json:
                lines = (f"  {each.score:7.2%}  {escape_controls(each.label)}" for each in answer)
                yield "\n".join([escape_controls(name), *lines])


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
