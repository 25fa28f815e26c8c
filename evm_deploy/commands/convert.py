"""evm-export convert: convert a checkpoint of any layout, also one that needs code to load, to a safetensors file."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evm_deploy._util.files import require_writable
from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, Steps, common_flags, run_command
from evm_deploy.commands.export_flags import drop_patterns, weights_flags

PROG = "evm-export convert"


def convert_parser() -> Parser:
    """Return the argument parser of evm-export convert."""
    parser = Parser(
        PROG,
        description="Convert a checkpoint to a safetensors file: the weights of the network, under their own names.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint file of PyTorch or safetensors")
    add("-o", "--out", metavar="FILE", help="file or folder to write to; default CKPT's name with .safetensors")
    weights_flags(add)
    add("--half", action="store_true", help="round weights to float16: half the size; the loaded network stays float32")
    add("--trust", action="store_true", help="RUN THE CODE IN THE FILE if it does not load without it")
    add("--force", action="store_true", help="replace an existing file")
    common_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-export convert` with `argv` and return the exit code."""
    args = convert_parser().parse_args(argv)
    return run_command(PROG, lambda: _convert(args), args)


def _convert(args: argparse.Namespace) -> int:
    from evm_deploy.model.convert import convert

    path = Path(args.checkpoint)
    out = _out(path, args.out)
    require_writable(out, "-o")
    if args.trust:
        warning = f"{PROG}: WARNING: --trust runs the code in {path} with all your rights, if it needs code to load"
        print(escape_controls(warning), file=sys.stderr)
    with Steps(args.quiet)("convert", path.name):
        raw = convert(
            path,
            out,
            weights=args.weights,
            drop=drop_patterns(args.drop),
            half=args.half,
            trust=args.trust,
            force=args.force,
        )
    facts: dict[str, Any] = {"saved": str(out), **raw.facts(), "notes": raw.notes}
    if args.json:
        print(strict_json(facts, indent=1))
        return 0
    dropped = [("Dropped", f"{len(raw.dropped)} keys: {', '.join(sorted(raw.dropped)[:4])}")] if raw.dropped else []
    kind = "averaged weights" if raw.weights == "ema" else "weights"
    lines = [
        ("Converted", f"{len(raw.tensors)} tensors, {kind}, from '{raw.container}'"),
        *dropped,
        *(("Note", note) for note in raw.notes),
        ("Saved", str(out)),
        ("Next", f"evm-export {shlex.quote(str(out))} --target onnx"),
    ]
    print(escape_controls("\n".join(f"{key:<9} {text}" for key, text in lines)))
    return 0


def _out(path: Path, given: str | None) -> Path:
    """Return the file to write: `given`, a file in the folder `given`, or a file beside the checkpoint."""
    from evm_deploy.model.state_dict import short_name

    name = f"{short_name(path.name)}.safetensors"
    if name == path.name:
        name = f"{short_name(path.name)}-converted.safetensors"
    if given is None:
        return path.with_name(name)
    return Path(given) / name if os.path.isdir(given) else Path(given)  # noqa: PTH112  accepts any name
