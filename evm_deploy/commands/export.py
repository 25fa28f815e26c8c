"""evm-export: export a checkpoint to one or more targets, or build the engine of an existing bundle."""

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
    from evm_deploy.model.network import Network


def export_parser() -> Parser:
    """Return the argument parser of evm-export."""
    parser = Parser(
        "evm-export",
        description="Export a trained EfficientVMamba checkpoint to ONNX Runtime, OpenVINO, TensorRT or Core ML, as a "
        "verified bundle.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("input and model").add_argument
    model(
        "checkpoint",
        nargs="?",
        metavar="CKPT",
        help=".ckpt, .pth, .pt, .pth.tar or .safetensors file; default: the embedded demo checkpoint",
    )
    model("--weights", default="ema", metavar="W", help="ema (default, if the file has EMA weights) or raw")
    model(
        "--model",
        metavar="MODULE:NAME",
        help="a network of your own: package.module:factory, or file.py:factory; the code is run; CKPT then holds its "
        "state dict",
    )
    model("--model-arg", metavar="K=V[,..]", help="with --model: arguments of the factory, as Python literals")
    model("--outputs", metavar="A,B", help="with --model: names of the outputs, in order")
    model("--task", metavar="TASK", help="with --model: raw (default), classification or features")
    model(
        "--imgsz",
        metavar="N|HxW",
        help="input size in pixels: 224 or 224x288; Core ML also takes several: 192,224; default: the size saved with "
        "the weights, else 224",
    )
    model("--batch", default="1", metavar="N|dynamic|MIN:OPT:MAX", help="images per inference, default 1")
    model(
        "--input",
        default="image",
        metavar="KIND",
        help="image (default): uint8 NHWC RGB, normalised inside the model; tensor: normalised float32 NCHW",
    )
    model("--head", metavar="HEAD", help="output: logits (default), probs, or features (four NCHW feature maps)")
    model("--labels", metavar="FILE", help="class names, one per line, in the order of the model's outputs")

    group = parser.add_argument_group("target and precision")
    target = group.add_argument
    target(
        "--target",
        metavar="T[,T2..]",
        help="onnx: ONNX Runtime (aliases ort, onnxruntime); openvino: OpenVINO (ov); coreml: Core ML (apple, ios, "
        "mlpackage); trt: TensorRT (tensorrt, engine); trt-rtx: TensorRT-RTX (rtx); or all",
    )
    precision = group.add_mutually_exclusive_group().add_argument
    precision(
        "--precision",
        metavar="P",
        help="fp32, fp16, int8, int8-fp16 (int8, the rest float16), or w8 (alias w8a16: weights int8, activations "
        "float); default fp32, for Core ML fp16",
    )
    for short in ("fp16", "int8"):
        precision(
            f"--{short}", dest="precision", action="store_const", const=short, help=f"same as --precision {short}"
        )
    target("--min-target", metavar="OS", help="Core ML: oldest system to support: iOS16, iOS17 (default), iOS18")

    accuracy = parser.add_argument_group("calibration and accuracy").add_argument
    accuracy(
        "--calib",
        metavar="DIR",
        help="images to calibrate int8, or to evaluate w8 without --val: folder, list of paths, .npz, or demo",
    )
    accuracy(
        "--calib-images",
        default="512",
        metavar="N",
        help="number of calibration images, chosen with a fixed seed, default 512",
    )
    accuracy(
        "--calib-method",
        default="mse",
        metavar="M",
        help="activation ranges: mse (default), minmax, percentile, entropy, or auto",
    )
    accuracy(
        "--smooth",
        default="auto",
        metavar="S",
        help="SmoothQuant for int8: on, off, or auto (default): on if accuracy is better",
    )
    accuracy("--force-calib", action="store_true", help="calibrate with images that were found unsuitable")
    accuracy(
        "--val",
        metavar="DIR",
        help="labelled images to evaluate int8 or w8: class folders, CSV of path,class, or demo",
    )
    accuracy(
        "--max-drop",
        metavar="X",
        help="largest accepted top-1 drop on --val in points, default 1.0; exit code 5 if the drop is larger",
    )
    accuracy(
        "--tol",
        metavar="X",
        help="largest accepted relative difference from the float model; default depends on the precision",
    )

    graph = parser.add_argument_group("graph").add_argument
    graph(
        "--scan",
        default="auto",
        metavar="S",
        help="auto (default), plugin (native kernel), aot (kernel compiled into the TensorRT engine), or portable "
        "(standard operators only)",
    )
    graph("--opset", metavar="N", help="ONNX opset, 18 to 23, default 20")

    preprocessing = parser.add_argument_group(
        "preprocessing", "Values saved with the weights replace the defaults."
    ).add_argument
    preprocessing("--mean", metavar="R,G,B", help="mean of each channel, scaled to 0..1; default ImageNet's")
    preprocessing("--std", metavar="R,G,B", help="standard deviation of each channel, scaled to 0..1; likewise")
    preprocessing("--crop-pct", metavar="X", help="share of the resized image kept by the centre crop, default 0.875")
    preprocessing("--interpolation", metavar="I", help="bicubic (default) or bilinear")

    group = parser.add_argument_group("device and engine")
    device = group.add_argument
    device(
        "--device",
        metavar="PROFILE",
        help="device profile (evm-doctor lists them) or FILE.toml: chooses target, precision and native library",
    )
    device(
        "--platform",
        metavar="P",
        help=f"platform of the native library in the bundle: {', '.join(PLATFORMS)}",
    )
    add_flags(group, target_settings.KINDS)
    device("--finish", metavar="BUNDLE", help="build the missing engine of this bundle, on this machine")
    device("--library", metavar="FILE", help="with --finish: plugin library of a bundle exported with --scan plugin")

    group = parser.add_argument_group("output")
    output = group.add_argument
    output("-o", "--out", default="dist", metavar="DIR", help="folder for the bundles, default dist")
    output("--force", action="store_true", help="replace an existing bundle")
    output("--sign", metavar="KEY", help="sign the bundle with this ed25519 private key (a PEM file)")
    output("--zip", action="store_true", help="also write <bundle>.zip, which evm-run and load open")
    output("--dry-run", action="store_true", help="run all checks, print what would be exported, write nothing")
    common_flags(group)
    output("--config", metavar="FILE", help="TOML file with flags as keys; the command line overrides the file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-export` with `argv` and return the exit code."""
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
    """Export to every target and return the largest exit code. A target that fails does not stop the others."""
    from evm_deploy.bundle.signing import private_key
    from evm_deploy.export.many import export_all
    from evm_deploy.export.source import Source
    from evm_deploy.export.target import check_plan
    from evm_deploy.export.targets import get_target

    if args.finish:
        return _finish(args)
    for name in ("model_arg", "outputs", "task"):
        if getattr(args, name) is not None and not args.model:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} needs --model", f"leave {flag} out")
    if args.library:
        raise UsageError("--library needs --finish", "leave --library out")
    plans = [check_plan(get_target(plan.target), plan) for plan in _plans(args)]
    _refuse_others_flags(args, plans)
    source = Source(_own_network(args, plans[0]) if args.model else _checkpoint(args))
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
    """Sign and zip the bundle of one target, and print its summary or its error.

    Return the data for --json and the exit code. Raises the error of a failed export, unless `several` targets are
    exported.
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
    """Build the engine of the bundle --finish on this machine. Return the exit code."""
    from evm_deploy.bundle.signing import private_key, sign
    from evm_deploy.export.pipeline import build_engine

    if args.checkpoint or args.target:
        raise UsageError("--finish cannot be combined with a checkpoint or --target", "evm-export --finish BUNDLE")
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
    """Return size and manifest of a bundle for --json."""
    manifest: dict[str, Any] = json.loads(bundle.manifest.to_json())
    return {"artifact_bytes": bundle.size_bytes, "manifest": manifest}


def _dry_run(source: Source, plan: ExportPlan, args: argparse.Namespace) -> dict[str, Any]:
    """Run every check of an export that needs no trace. Print and return what the export would do."""
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


def _own_network(args: argparse.Namespace, plan: ExportPlan) -> Network:
    """Return the network that --model makes, with the weights of CKPT. Raises EvmErrors."""
    from evm_deploy.model.foreign.door import model_arguments, network_of
    from evm_deploy.tasks import get_task

    return network_of(
        args.model,
        Path(args.checkpoint) if args.checkpoint else None,
        arguments=model_arguments(args.model_arg or ""),
        outputs=args.outputs.split(",") if args.outputs else None,
        task=get_task(args.task or "raw").name,
        imgsz=plan.imgsz or (224, 224),
    )


def _checkpoint(args: argparse.Namespace) -> Path:
    """Return the path of the checkpoint; without one that of the embedded demo, announced on stderr."""
    if args.checkpoint:
        return Path(args.checkpoint)
    from evm_deploy.demo import CHECKPOINT

    print(f"no checkpoint given: exporting the embedded demo, {CHECKPOINT.name} (handwritten digits)", file=sys.stderr)
    return CHECKPOINT


def _plans(args: argparse.Namespace) -> list[ExportPlan]:
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
            raise UsageError("--target is missing", f"choose from: {', '.join(load_targets())}, all")
        return [_plan(args, name) for name in resolve_names(args.target)]
    profile = find_profile(args.device)
    names = profile.targets if args.target == "all" else resolve_names(args.target) if args.target else [None]
    images, precision = args.calib is not None, args.precision and canonical_precision(args.precision)
    return [_plan(args, **vars(choose(profile, name, precision, scan=args.scan, images=images))) for name in names]


def _plan(args: argparse.Namespace, target: str, **decided: Any) -> ExportPlan:
    """Return the plan of one target. decided: fields that a device profile has chosen. Raises UsageError."""
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
    """Return the target's own settings, read from its flags; None if the target has no settings of its own."""
    from evm_deploy.export.targets import get_target

    kind = get_target(target).settings
    return kind(**given(args, [kind])) if kind else None


def _refuse_others_flags(args: argparse.Namespace, plans: Sequence[ExportPlan]) -> None:
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


def _triple(flag: str, text: str | None) -> tuple[float, float, float] | None:
    """Parse `R,G,B` into three numbers; None stays None. Raises UsageError that names the flag."""
    if text is None:
        return None
    values = [_number(flag, part) for part in text.split(",")]
    if len(values) != 3:
        raise UsageError(f"{flag} {text!r}: use three numbers for red, green, blue, such as 0.485,0.456,0.406")
    return values[0], values[1], values[2]


def _labels(path: Path) -> tuple[str, ...]:
    """Read class names, one per line, from a UTF-8 text file. Raises UsageError."""
    try:
        labels = tuple(path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--labels {path} cannot be read: {reason}") from error
    if not labels or not all(label.strip() for label in labels):
        raise UsageError(f"--labels {path} is empty or has empty lines", "write one class name on each line")
    return labels
