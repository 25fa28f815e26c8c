"""Make the plans of an export from the flags of evm-export, one plan for each target."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.settings import all_fields, flag_of, given
from evm_deploy.commands.export_flags import drop_patterns
from evm_deploy.errors import UsageError
from evm_deploy.export import settings as target_settings
from evm_deploy.toolchain.platforms import PLATFORMS

if TYPE_CHECKING:
    from evm_deploy.export.plan import ExportPlan


def plans_of(args: argparse.Namespace) -> list[ExportPlan]:
    """Return one plan for each target. A device profile chooses what the command line leaves open.

    Raises UsageError for flags that cannot be combined.
    """
    from evm_deploy.devices.profiles import find_profile
    from evm_deploy.export.device_choice import choose
    from evm_deploy.export.plan import canonical_precision
    from evm_deploy.export.targets import load_targets, resolve_names

    if args.device in PLATFORMS:
        raise UsageError(f"{args.device} is a platform, not a device profile", f"use --platform {args.device}")
    if args.device and args.platform:
        raise UsageError("--device and --platform cannot be combined", "leave --platform out: --device sets it")
    if args.device is None:
        if not args.target:
            raise UsageError(
                "--target is missing",
                f"choose from: {', '.join(load_targets())}, all\n  {_example(args)}",
            )
        return [_plan(args, name) for name in resolve_names(args.target)]
    profile = find_profile(args.device)
    names = profile.targets if args.target == "all" else resolve_names(args.target) if args.target else [None]
    images, precision = args.calib is not None, args.precision and canonical_precision(args.precision)
    asked: dict[str, Any] = {"scan": args.scan, "images": images, "weight_bits": _weight_bits(args)}
    return [_plan(args, **vars(choose(profile, name, precision, **asked))) for name in names]


def announce_left_out(target: str | None) -> None:
    """Print the targets that `--target all` leaves out on stderr, each with the cure."""
    from evm_deploy.export.targets import left_out

    for name, hint in left_out().items() if target == "all" else ():
        print(f"--target all leaves out {name}, whose packages are missing\n  {hint}", file=sys.stderr)


def _example(args: argparse.Namespace) -> str:
    """Return a command line to type, for the checkpoint that was given, else for the demo and for any checkpoint."""
    if args.checkpoint:
        return f"evm-export {shlex.quote(args.checkpoint)} --target onnx"
    return "evm-export --target onnx exports the embedded demo, evm-export CKPT --target onnx your own network"


def _calib(args: argparse.Namespace, precision: str | None) -> str | None:
    """Return --calib. Int8 of the embedded demo is calibrated on the demo's own images by default."""
    from evm_deploy.demo import CHECKPOINT, WORD
    from evm_deploy.export.plan import CALIBRATED

    given: str | None = args.calib
    demo = args.checkpoint is None or Path(args.checkpoint).resolve() == CHECKPOINT.resolve()
    return WORD if given is None and precision in CALIBRATED and demo else given


def _plan(args: argparse.Namespace, target: str, **decided: Any) -> ExportPlan:
    """Return the plan of one target. decided: fields that a device profile has chosen. Raises UsageError."""
    from evm_deploy.export.plan import ExportPlan, canonical_precision, parse_imgsz
    from evm_deploy.runtimes.base import Batch

    asked = {"precision": args.precision, "native_library": args.platform, "weight_bits": _weight_bits(args)}
    decided = {**asked, **decided}
    sizes = tuple(map(parse_imgsz, args.imgsz.split(","))) if args.imgsz is not None else ()
    return ExportPlan(
        target=target,
        **decided,
        imgsz=next(iter(sizes), None),
        more_imgsz=sizes[1:],
        batch=Batch.parse(args.batch),
        input=args.input,
        head=args.head,
        scan=args.scan,
        min_target=args.min_target,
        calib=_calib(args, decided["precision"] and canonical_precision(decided["precision"])),
        calib_images=int(_number("--calib-images", args.calib_images, whole=True)),
        calib_method=args.calib_method,
        smooth=args.smooth,
        force_calib=args.force_calib,
        val=args.val,
        max_drop=_number("--max-drop", args.max_drop) if args.max_drop is not None else None,
        opset=int(_number("--opset", args.opset, whole=True)) if args.opset is not None else None,
        tol=_number("--tol", args.tol) if args.tol is not None else None,
        weights=args.weights,
        drop=drop_patterns(args.drop),
        multi_label=args.multi_label,
        labels=_labels(Path(args.labels)) if args.labels else None,
        mean=_numbers("--mean", args.mean),
        std=_numbers("--std", args.std),
        resize=args.resize,
        crop_pct=_number("--crop-pct", args.crop_pct) if args.crop_pct is not None else None,
        interpolation=args.interpolation,
        nms=args.nms,
        score_thr=_number("--score-thr", args.score_thr) if args.score_thr is not None else None,
        iou=_number("--iou", args.iou) if args.iou is not None else None,
        max_det=int(_number("--max-det", args.max_det, whole=True)) if args.max_det is not None else None,
        layout=args.layout,
        settings=_settings(args, target),
    )


def _weight_bits(args: argparse.Namespace) -> int | None:
    """Return --weight-bits; None if it is not given. Raises UsageError."""
    return None if args.weight_bits is None else int(_number("--weight-bits", args.weight_bits, whole=True))


def _settings(args: argparse.Namespace, target: str) -> Any:
    """Return the target's own settings, read from its flags; None if the target has no settings of its own."""
    from evm_deploy.export.targets import get_target

    kind = get_target(target).settings
    return kind(**given(args, [kind])) if kind else None


def refuse_others_flags(args: argparse.Namespace, plans: Sequence[ExportPlan]) -> None:
    """Raise UsageError if a flag is given that belongs to none of the plans' targets."""
    from evm_deploy.export.targets import load_targets

    targets = load_targets()
    kinds = [targets[plan.target].settings for plan in plans]
    for name in given(args, target_settings.KINDS).keys() - all_fields(kinds).keys():
        flag = flag_of(all_fields(target_settings.KINDS)[name]).name
        having = ", ".join(target.name for target in targets.values() if name in all_fields([target.settings]))
        raise UsageError(f"{flag} only works with --target {having}", f"leave {flag} out")


def _number(flag: str, text: str, whole: bool = False) -> float:
    """Parse a number, or a whole number. Raises UsageError that names the flag."""
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r} is not a {'whole ' if whole else ''}number") from error


def _numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    """Parse `V[,V..]`, one number for each channel; None stays None. Raises UsageError that names the flag."""
    return None if text is None else tuple(_number(flag, part) for part in text.split(","))


def _labels(path: Path) -> tuple[str, ...]:
    """Read class names, one per line, from a UTF-8 text file. Empty lines at the end are dropped. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--labels {path} cannot be read: {reason}") from error
    if text.lstrip().startswith(("[", "{")):
        raise UsageError(f"--labels {path} is JSON, not text", "write one class name on each line, in order")
    labels = [line.strip() for line in text.rstrip().split("\n")]  # read_text has made \n of \r\n and \r
    if labels == [""]:
        raise UsageError(f"--labels {path} is empty", "write one class name on each line, in order")
    if "" in labels:
        raise UsageError(
            f"--labels {path}: line {labels.index('') + 1} is empty", "write one class name on each line, in order"
        )
    return tuple(labels)
