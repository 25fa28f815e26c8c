"""evm-run: classify images with a bundle, or run the bundle's self-test."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from evm_deploy._util.schema import strict_json
from evm_deploy._util.settings import add_flags, given
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, common_flags, run_command
from evm_deploy.errors import UsageError
from evm_deploy.runtimes.registry import setting_kinds


def run_parser() -> Parser:
    """Return the argument parser of evm-run."""
    parser = Parser(
        "evm-run",
        description="Classify images with a bundle, or run the bundle's self-test on this device.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="folder or .zip of the bundle")
    add("images", nargs="*", metavar="IMAGE", help="image files to classify")
    add("--top", type=int, default=5, metavar="K", help="number of classes to print per image, default 5")
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

    if not args.images and not args.selftest:
        raise UsageError("nothing to do: no image is given", f"give images, or:  evm-run {args.bundle} --selftest")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}: use a number from 1")
    if args.top < 1:
        raise UsageError(f"--top {args.top}: use a number from 1")
    options = {name: getattr(args, name) for name in ("threads", "scan", "require_signature")}
    options |= given(args, setting_kinds())
    with load(args.bundle, **options) as model:
        here = model.target.availability()
        if not here.can_run and not args.quiet:
            print(here.hint, file=sys.stderr)
        elif args.scan == "auto" and model.scan.value == "portable" and not args.quiet:
            print(escape_controls(f"scans run in their portable form: {model.scan.reason}"), file=sys.stderr)
        if args.selftest:
            checks = model.selftest()
            passed = all(check.ok for check in checks)
            facts = [{"name": c.name, "error": c.error, "limit": c.limit, "ok": c.ok} for c in checks]
            lines = [f"{c.name:<32} {c.error:.1e}  limit {c.limit:.1e}  {'ok' if c.ok else 'FAILED'}" for c in checks]
            if args.json:
                print(strict_json({"passed": passed, "scan": vars(model.scan), "checks": facts}, indent=1))
            else:
                print(escape_controls("\n".join([*lines, f"scans ran as {model.scan.value}: {model.scan.reason}"])))
                print("PASSED" if passed else "FAILED")
            if not passed:
                return 4
        if args.images:
            found = model.predict(args.images, top=args.top)
            if args.json:
                rows = [
                    {"image": image, "top": [vars(p) for p in predictions]}
                    for image, predictions in zip(args.images, found, strict=True)
                ]
                print(strict_json(rows, indent=1))
            else:
                for image, predictions in zip(args.images, found, strict=True):
                    print(image)
                    print("\n".join(f"  {p.score:7.2%}  {escape_controls(p.label)}" for p in predictions))
    return 0
