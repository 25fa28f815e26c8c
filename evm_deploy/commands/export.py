"""evm-export: parse, call one public function, print, return a code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.settings import add_flags, all_fields, flag_of, given
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, Steps, common_flags, run_command
from evm_deploy.commands.summary import export_summary
from evm_deploy.errors import UsageError
from evm_deploy.export import settings as target_settings
from evm_deploy.toolchain.platforms import PLATFORMS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from evm_deploy.bundle.bundle import Bundle
    from evm_deploy.export.many import TargetOutcome
    from evm_deploy.export.plan import ExportPlan
    from evm_deploy.export.source import Source


def export_parser() -> Parser:
    parser = Parser(
        "evm-export",
        description="Export a trained EfficientVMamba checkpoint to a verified bundle.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CKPT", help=".ckpt .pth .pt .pth.tar .safetensors; without: the demo's")
    add(
        "--target",
        metavar="T[,T2..]",
        help="onnx (aliases: ort, onnxruntime), openvino (ov), coreml (apple, ios, mlpackage), trt (tensorrt, engine), "
        "trt-rtx (rtx), or all",
    )
    precision = parser.add_mutually_exclusive_group().add_argument
    precision("--precision", metavar="P", help="fp32, fp16, int8, int8-fp16, w8; default fp32, for coreml fp16")
    for short in ("fp16", "int8"):
        precision(
            f"--{short}", dest="precision", action="store_const", const=short, help=f"same as --precision {short}"
        )
    add(
        "--calib",
        metavar="DIR",
        help="images to calibrate int8, or judge w8, with: folder, list of paths, .npz, demo",
    )
    add("--calib-images", default="512", metavar="N", help="how many of them, drawn by a fixed seed, default 512")
    add("--calib-method", default="mse", metavar="M", help="ranges: mse (default), minmax, percentile, entropy, auto")
    add("--smooth", default="auto", metavar="S", help="SmoothQuant for int8: on, off, auto (default, the better one)")
    add("--force-calib", action="store_true", help="take images that look unfit to calibrate with")
    add(
        "--val",
        metavar="DIR",
        help="labelled images to judge int8 or w8 with: class folders, CSV of path,class, demo",
    )
    add("--max-drop", metavar="X", help="points of top-1 that these may lose on --val, default 1.0; exit 5 otherwise")
    add(
        "--imgsz",
        metavar="N|HxW",
        help="input pixels, 224 or 224x288; Core ML: also several, 192,224; default: saved with the weights, else 224",
    )
    add("--batch", default="1", metavar="N|dynamic|MIN:OPT:MAX", help="images per inference, default 1")
    add("--input", default="image", metavar="KIND", help="image: uint8 NHWC RGB, mean/std inside (default); tensor")
    add("--head", metavar="HEAD", help="logits (default), probs, features (four NCHW maps)")
    add(
        "--scan",
        default="auto",
        metavar="S",
        help="auto (default), plugin (native kernel), aot (in TensorRT's engine) or portable: standard ops only",
    )
    add(
        "--device",
        metavar="PROFILE",
        help="a device profile (evm-doctor lists them) or FILE.toml: chooses target, precision and native library",
    )
    add("--platform", metavar="P", help=f"put the native library for this platform in: {', '.join(PLATFORMS)}")
    add("--min-target", metavar="OS", help="Core ML: oldest system to run on: iOS16, iOS17 (default), iOS18")
    add("--opset", metavar="N", help="ONNX opset, 18 to 23, default 20")
    add("--tol", metavar="X", help="largest difference from the float model, relative; default by precision")
    add("--weights", default="ema", metavar="W", help="ema (default, where the file has them) or raw")
    add("--labels", metavar="FILE", help="class names, one per line, in the order of the head")
    add("--mean", metavar="R,G,B", help="of channels scaled to 0..1; default ImageNet's")
    add("--std", metavar="R,G,B", help="likewise")
    add("--crop-pct", metavar="X", help="share of the resized image that the centre crop keeps, default 0.875")
    add("--interpolation", metavar="I", help="bicubic (default) or bilinear")
    add_flags(parser, target_settings.KINDS)
    add("--finish", metavar="BUNDLE", help="build the engine of a bundle that has none, on this machine")
    add("--library", metavar="FILE", help="with --finish: the plugin library of a --scan plugin bundle")
    add("-o", "--out", default="dist", metavar="DIR", help="where bundles go, default dist")
    add("--force", action="store_true", help="replace an existing bundle")
    add("--sign", metavar="KEY", help="sign the bundle with an ed25519 key, a PEM file")
    add("--zip", action="store_true", help="also write <bundle>.zip, which evm-run and load open")
    add("--dry-run", action="store_true", help="check everything, say what would be done, write nothing")
    common_flags(parser)
    add("--config", metavar="FILE", help="TOML with any of these flags as keys; the command line wins")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`evm-export`. Returns the exit code."""
    parser = export_parser()
    args = parser.parse_args(argv)

    def body() -> int:
        settings = args
        if args.config:
            from evm_deploy.commands.config import read_config

            parser.set_defaults(**read_config(Path(args.config), parser))
            settings = parser.parse_args(argv)
        return _export(settings)

    return run_command("evm-export", body, args.verbose)


def _export(args: argparse.Namespace) -> int:
    """Export to every target; one that fails does not stop the others. Returns the largest exit code."""
    from evm_deploy.bundle.signing import private_key
    from evm_deploy.export.many import export_all
    from evm_deploy.export.source import Source
    from evm_deploy.export.target import check_plan
    from evm_deploy.export.targets import get_target

    if args.finish:
        return _finish(args)
    if args.library:
        raise UsageError("--library is for --finish", "leave it out")
    plans = [check_plan(get_target(plan.target), plan) for plan in _plans(args)]
    _refuse_others_flags(args, plans)
    source = Source(_checkpoint(args))
    key = private_key(args.sign) if args.sign else None
    if args.dry_run:
        results, codes = [_dry_run(source, plan, args) for plan in plans], [0]
    else:
        steps = Steps(args.quiet, live=len(plans) == 1)
        outcomes = export_all(source, plans, args.out, force=args.force, step=steps)
        found = {plans.index(each.plan): _reported(each, args, key, len(plans) > 1) for each in outcomes}
        results, codes = map(list, zip(*(found[i] for i in sorted(found)), strict=True))
    if args.json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=1))
    return max(codes)


def _reported(
    outcome: TargetOutcome, args: argparse.Namespace, key: Ed25519PrivateKey | None, several: bool
) -> tuple[dict[str, Any], int]:
    """Sign, zip and print what came of one target. Returns the facts for --json, and the exit code.

    Raises the error of an export to one target alone.
    """
    from evm_deploy.bundle.archive import write_zip
    from evm_deploy.bundle.signing import sign

    bundle, error = outcome.bundle, outcome.error
    if error:
        if not several:
            raise error
        print(escape_controls(f"evm-export: {outcome.plan.target}: {error}"), file=sys.stderr)
        return {"target": outcome.plan.target, "error": str(error), "exit_code": error.exit_code}, error.exit_code
    assert bundle
    if key:
        sign(bundle.path, key)
    packed = {"zip": str(write_zip(bundle.path))} if args.zip else {}
    if not args.json:
        print(escape_controls(export_summary(bundle, outcome.seconds)))
        print(*(f"Zip       {path}" for path in packed.values()), sep="\n", end="\n" * len(packed))
    return {"bundle": str(bundle.path), **packed, "seconds": round(outcome.seconds, 2), **_facts(bundle)}, 0


def _finish(args: argparse.Namespace) -> int:
    from evm_deploy.bundle.signing import private_key, sign
    from evm_deploy.export.pipeline import build_engine

    if args.checkpoint or args.target:
        raise UsageError("--finish takes a bundle, and neither a checkpoint nor --target", "leave these out")
    key = private_key(args.sign) if args.sign else None
    start = time.perf_counter()
    bundle = build_engine(args.finish, library=args.library, step=Steps(args.quiet))
    seconds = time.perf_counter() - start
    if key:
        sign(bundle.path, key)
    if args.json:
        facts = {"bundle": str(bundle.path), "seconds": round(seconds, 2), **_facts(bundle)}
        print(json.dumps(facts, indent=1))
    else:
        print(escape_controls(export_summary(bundle, seconds)))
    return 0


def _facts(bundle: Bundle) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(bundle.manifest.to_json())
    return {"artifact_bytes": bundle.size_bytes, "manifest": manifest}


def _dry_run(source: Source, plan: ExportPlan, args: argparse.Namespace) -> dict[str, Any]:
    """Check everything of an export that can be checked without tracing, and print what it would do."""
    from evm_deploy.bundle.bundle import check_free
    from evm_deploy.export.pipeline import bundle_path, complete, require_toolchain
    from evm_deploy.export.targets import get_target

    target = get_target(plan.target)
    require_toolchain(target, plan)
    spec = source.network(plan).spec
    plan, preprocessing = complete(plan, spec)
    path = bundle_path(args.out, target, plan, spec)
    check_free(path, args.force)
    facts = {
        "Would": f"export {spec.name} -> {target.name} {plan.precision}, {plan.sizes}, batch {plan.batch}",
        "Model": f"{spec.family} {spec.variant}, {spec.parameters:,} parameters, {spec.num_classes or 'no'} classes",
        "Weights": f"{spec.checkpoint['file']}, key '{spec.checkpoint['container']}'",
        "Input": f"{plan.input}, resize {preprocessing.interpolation}, crop {preprocessing.crop_pct}",
        "Output": plan.head,
        "Scan": plan.scan,
        **({"Chosen": f"{plan.chosen.value}, {plan.chosen.reason}"} if plan.chosen else {}),
        **({"Platform": f"{plan.native_library}, native library compiled with ziglang"} if plan.native_library else {}),
        "Bundle": str(path),
    }
    if not args.json:
        print(escape_controls("\n".join(f"{key:<10} {value}" for key, value in facts.items())))
    return facts


def _checkpoint(args: argparse.Namespace) -> Path:
    if args.checkpoint:
        return Path(args.checkpoint)
    from evm_deploy.demo import CHECKPOINT

    print(f"no checkpoint given: exporting the embedded demo, {CHECKPOINT.name} (handwritten digits)", file=sys.stderr)
    return CHECKPOINT


def _plans(args: argparse.Namespace) -> list[ExportPlan]:
    """One for each target, those of the device profile where it decides."""
    from evm_deploy.devices.profiles import find_profile
    from evm_deploy.export.device_choice import choose
    from evm_deploy.export.targets import load_targets, resolve_names

    if args.device in PLATFORMS:
        raise UsageError(f"{args.device} is a platform, not a device profile", f"use --platform {args.device}")
    if args.device and args.platform:
        raise UsageError("--device chooses the platform of the native library itself", "leave --platform out")
    if args.device is None:
        if not args.target:
            raise UsageError("--target is missing", f"choose from: {', '.join(load_targets())}, all")
        return [_plan(args, name) for name in resolve_names(args.target)]
    profile = find_profile(args.device)
    names = profile.targets if args.target == "all" else resolve_names(args.target) if args.target else [None]
    images = args.calib is not None
    return [_plan(args, **vars(choose(profile, name, args.precision, scan=args.scan, images=images))) for name in names]


def _plan(args: argparse.Namespace, target: str, **decided: Any) -> ExportPlan:
    from evm_deploy.export.plan import ExportPlan, parse_imgsz
    from evm_deploy.runtimes.base import Batch

    sizes = tuple(map(parse_imgsz, args.imgsz.split(","))) if args.imgsz is not None else ()
    return ExportPlan(
        target=target,
        **{"precision": args.precision, "native_library": args.platform, **decided},
        imgsz=next(iter(sizes), None),
        more_imgsz=sizes[1:],
        batch=Batch.parse(args.batch),
        input=args.input,
        head=args.head,
        scan=args.scan,
        min_target=args.min_target,
        calib=args.calib,
        calib_images=int(_number("--calib-images", args.calib_images, whole=True)),
        calib_method=args.calib_method,
        smooth=args.smooth,
        force_calib=args.force_calib,
        val=args.val,
        max_drop=_number("--max-drop", args.max_drop) if args.max_drop is not None else None,
        opset=int(_number("--opset", args.opset, whole=True)) if args.opset is not None else None,
        tol=_number("--tol", args.tol) if args.tol is not None else None,
        weights=args.weights,
        labels=_labels(Path(args.labels)) if args.labels else None,
        mean=_triple("--mean", args.mean),
        std=_triple("--std", args.std),
        crop_pct=_number("--crop-pct", args.crop_pct) if args.crop_pct is not None else None,
        interpolation=args.interpolation,
        settings=_settings(args, target),
    )


def _settings(args: argparse.Namespace, target: str) -> Any:
    """The target's own settings, of the flags that are for it; None where it has none."""
    from evm_deploy.export.targets import get_target

    kind = get_target(target).settings
    return kind(**given(args, [kind])) if kind else None


def _refuse_others_flags(args: argparse.Namespace, plans: Sequence[ExportPlan]) -> None:
    """Raise UsageError for a flag that is given and that no target of the plans has."""
    from evm_deploy.export.targets import load_targets

    targets = load_targets()
    kinds = [targets[plan.target].settings for plan in plans]
    for name in given(args, target_settings.KINDS).keys() - all_fields(kinds).keys():
        flag = flag_of(all_fields(target_settings.KINDS)[name]).name
        having = ", ".join(target.name for target in targets.values() if name in all_fields([target.settings]))
        raise UsageError(f"{flag} is for {having}", "leave it out")


def _number(flag: str, text: str, whole: bool = False) -> float:
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r} is not a {'whole ' if whole else ''}number") from error


def _triple(flag: str, text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    values = [_number(flag, part) for part in text.split(",")]
    if len(values) != 3:
        raise UsageError(f"{flag} {text!r}: three numbers, red, green, blue, such as 0.485,0.456,0.406")
    return values[0], values[1], values[2]


def _labels(path: Path) -> tuple[str, ...]:
    try:
        labels = tuple(path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--labels {path} cannot be read: {reason}") from error
    if not labels or not all(label.strip() for label in labels):
        raise UsageError(f"--labels {path} is empty or has empty lines", "one class name per line")
    return labels
