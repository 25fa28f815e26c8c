"""evm-export: export a checkpoint to one or more targets, or build the engine of an existing bundle."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import native_path, require_writable
from evm_deploy._util.schema import strict_json
from evm_deploy._util.settings import add_flags, all_fields, flag_of, given
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import EXIT_CODES, Parser, Steps, common_flags, run_command
from evm_deploy.commands.convert import drop_patterns
from evm_deploy.commands.convert import main as convert_main
from evm_deploy.commands.summary import export_summary
from evm_deploy.errors import UsageError
from evm_deploy.export import settings as target_settings
from evm_deploy.toolchain.platforms import PLATFORMS

if TYPE_CHECKING:
    from evm_deploy.bundle.bundle import Bundle
    from evm_deploy.export.many import TargetOutcome
    from evm_deploy.export.plan import ExportPlan
    from evm_deploy.export.source import Source
    from evm_deploy.model.network import Network


FINISH_ONLY = {
    "library": "plugin library of a bundle exported with --scan plugin",
    "timing-cache": "TensorRT's timing cache, read and updated by each build",
    "require-signature": "refuse bundles not signed with this ed25519 key (a PEM file)",
}


def export_parser() -> Parser:
    """Return the argument parser of evm-export."""
    parser = Parser(
        "evm-export",
        description="Export a trained EfficientVMamba checkpoint, or with --model another visual Mamba, to ONNX "
        "Runtime, OpenVINO, TensorRT or Core ML, as a verified bundle.",
        epilog="evm-export convert CKPT  writes a checkpoint of any layout to a safetensors file\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("input and model").add_argument
    model(
        "checkpoint",
        nargs="?",
        metavar="CKPT",
        help="checkpoint file of PyTorch or safetensors, whatever its suffix; default: the embedded demo checkpoint",
    )
    model(
        "--weights",
        default="ema",
        metavar="W",
        help="ema (default, if the file has averaged weights), raw, or the name of a set of weights in the file",
    )
    model("--drop", metavar="P[,P2..]", help="patterns of keys to leave out, such as 'aux_head.*'")
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
    model(
        "--multi-label",
        action="store_true",
        help="the classes are independent (trained with a sigmoid): probabilities by sigmoid; implies --head probs",
    )
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
        help="labelled images to evaluate int8 or w8: class folders, list of path and class, .npz, or demo",
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
    for flag, what in FINISH_ONLY.items():
        device(f"--{flag}", metavar="PUB" if flag == "require-signature" else "FILE", help=f"with --finish: {what}")

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
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["convert"]:
        return convert_main(given[1:])
    parser = export_parser()
    args = parser.parse_args(argv)

    def body() -> int:
        if args.config:
            from evm_deploy.commands.config import read_config

            parser.set_defaults(**read_config(Path(args.config), parser))
            vars(args).update(vars(parser.parse_args(argv)))
        return _export(args)

    return run_command("evm-export", body, args)


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
    for flag in FINISH_ONLY:
        if getattr(args, flag.replace("-", "_")):
            raise UsageError(f"--{flag} needs --finish", f"leave --{flag} out")
    require_writable(Path(args.out), "--out", folder=True)
    plans = [check_plan(get_target(plan.target), plan) for plan in _plans(args)]
    _refuse_others_flags(args, plans)
    source = Source(_own_network(args, plans[0]) if args.model else _checkpoint(args))
    if args.calib is None and any(plan.calib for plan in plans):
        print("no --calib given: int8 is calibrated on the demo's own images, as by --calib demo", file=sys.stderr)
    if args.sign:
        private_key(args.sign)  # an unusable key must fail now
    if args.dry_run:
        results, codes = [_dry_run(source, plan, args) for plan in plans], [0]
    else:
        steps = Steps(args.quiet, live=len(plans) == 1)
        outcomes = export_all(source, plans, args.out, force=args.force, sign=args.sign, zipped=args.zip, step=steps)
        found = {plans.index(each.plan): _reported(each, args, len(plans) > 1) for each in outcomes}
        results, codes = map(list, zip(*(found[i] for i in sorted(found)), strict=True))
    if args.json:
        print(strict_json(results[0] if len(results) == 1 else results, indent=1))
    return max(codes)


def _reported(outcome: TargetOutcome, args: argparse.Namespace, several: bool) -> tuple[dict[str, Any], int]:
    """Print the summary of one target, or its error.

    Return the data for --json and the exit code. Raises the error of a failed export, unless `several` targets are
    exported.
    """
    from evm_deploy.bundle.archive import zip_path

    bundle, error = outcome.bundle, outcome.error
    if error:
        if not several:
            raise error
        print(escape_controls(f"evm-export: {outcome.plan.target}: {error}"), file=sys.stderr)
        return {"target": outcome.plan.target, "error": str(error), "exit_code": error.exit_code}, error.exit_code
    assert bundle
    packed = {"zip": str(zip_path(bundle.path))} if args.zip else {}
    if not args.json:
        print(escape_controls(export_summary(bundle, outcome.seconds)))
        print(*(f"Zip       {path}" for path in packed.values()), sep="\n", end="\n" * len(packed))
    return {"bundle": str(bundle.path), **packed, "seconds": round(outcome.seconds, 2), **_facts(bundle)}, 0


def _finish(args: argparse.Namespace) -> int:
    """Build the engine of the bundle --finish on this machine. Return the exit code."""
    from evm_deploy.bundle.signing import SIGNATURE
    from evm_deploy.export.pipeline import build_engine

    if args.checkpoint or args.target:
        raise UsageError("--finish cannot be combined with a checkpoint or --target", "evm-export --finish BUNDLE")
    if args.zip:
        raise UsageError("--finish cannot be combined with --zip", "leave --zip out")
    signature, start = Path(args.finish) / SIGNATURE, time.perf_counter()
    signed = signature.exists()
    bundle = build_engine(
        args.finish,
        library=args.library,
        timing_cache=args.timing_cache,
        sign=args.sign,
        require_signature=args.require_signature,
        step=Steps(args.quiet),
    )
    seconds = time.perf_counter() - start
    if signed and not args.sign:
        print(
            "evm-export: the bundle is no longer signed: its signature did not cover the engine and was removed\n"
            "  sign it again with --sign KEY",
            file=sys.stderr,
        )
    if args.json:
        facts = {"bundle": str(bundle.path), "seconds": round(seconds, 2), **_facts(bundle)}
        print(strict_json({**facts, "signed": bool(args.sign)}, indent=1))
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
    from evm_deploy.calib.int8 import image_sets
    from evm_deploy.export.pipeline import assumed, bundle_path, complete, require_toolchain
    from evm_deploy.export.plan import QUANTIZED
    from evm_deploy.export.quantization import quantization_config
    from evm_deploy.export.targets import get_target

    target = get_target(plan.target)
    require_toolchain(target, plan)
    spec = source.network(plan).spec
    given, (plan, preprocessing) = plan, complete(plan, spec)
    path = bundle_path(args.out, target, plan, spec)
    native_path(path.absolute())
    check_free(path, args.force, args.zip)
    images: dict[str, str] = {}
    if plan.precision in QUANTIZED:
        used, evaluated = image_sets(quantization_config(plan, spec), preprocessing, Steps(args.quiet))
        images |= {"Calibrate": f"{len(used)} images of {plan.calib}"} if used else {}
        images |= {"Evaluate": f"{len(evaluated)} images of {plan.val or plan.calib}"} if evaluated else {}
    facts = {
        "Would": f"export {spec.name} -> {target.runtime.label} {plan.precision}, {plan.sizes}, batch {plan.batch}",
        "Model": f"{spec.family} {spec.variant}, {spec.parameters:,} parameters, {spec.num_classes or 'no'} classes",
        "Weights": f"{spec.checkpoint['file']}, key '{spec.checkpoint['container']}', {spec.checkpoint['weights']}",
        "Input": f"{plan.input}, resize {preprocessing.interpolation}, crop {preprocessing.crop_pct}",
        "Normalise": f"mean {_numbers(preprocessing.mean)}, std {_numbers(preprocessing.std)}",
        **({"Note": "; ".join(notes)} if (notes := assumed(given, spec, preprocessing)) else {}),
        **images,
        "Output": plan.head,
        "Scan": plan.scan,
        **({"Chosen": f"{plan.chosen.value}, {plan.chosen.reason}"} if plan.chosen else {}),
        **({"Platform": f"{plan.native_library}, native library compiled with ziglang"} if plan.native_library else {}),
        "Bundle": str(path),
    }
    if not args.json:
        print(escape_controls("\n".join(f"{key:<10} {value}" for key, value in facts.items())))
    return facts


def _numbers(values: Sequence[float]) -> str:
    return ",".join(map(str, values))


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
            raise UsageError(
                "--target is missing",
                f"choose from: {', '.join(load_targets())}, all\n  {_example(args)}",
            )
        return [_plan(args, name) for name in resolve_names(args.target)]
    profile = find_profile(args.device)
    names = profile.targets if args.target == "all" else resolve_names(args.target) if args.target else [None]
    images, precision = args.calib is not None, args.precision and canonical_precision(args.precision)
    return [_plan(args, **vars(choose(profile, name, precision, scan=args.scan, images=images))) for name in names]


def _plan(args: argparse.Namespace, target: str, **decided: Any) -> ExportPlan:
    """Return the plan of one target. decided: fields that a device profile has chosen. Raises UsageError."""
    from evm_deploy.export.plan import ExportPlan, canonical_precision, parse_imgsz
    from evm_deploy.runtimes.base import Batch

    decided = {"precision": args.precision, "native_library": args.platform, **decided}
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
