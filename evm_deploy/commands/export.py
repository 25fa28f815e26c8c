"""evm-export: export a checkpoint to one or more targets, or build the engine of an existing bundle."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import native_path, require_writable
from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import count_text, escape_controls
from evm_deploy.commands.console import Steps, run_command
from evm_deploy.commands.convert import main as convert_main
from evm_deploy.commands.export_flags import FINISH_ONLY, FINISH_TOO, export_parser
from evm_deploy.commands.export_plans import announce_left_out, plans_of, refuse_others_flags
from evm_deploy.commands.summary import export_summary
from evm_deploy.data.preprocessing import CROP, MAX_CHANNELS
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.bundle.bundle import Bundle
    from evm_deploy.data.preprocessing import Preprocessing
    from evm_deploy.export.plan import ExportPlan
    from evm_deploy.export.worker import TargetOutcome
    from evm_deploy.model.factory import Factory
    from evm_deploy.model.graph_file import GraphFile
    from evm_deploy.model.network import ModelSpec


MODEL, READY = "--model", "an ONNX file"
OWNERS = {
    "model_arg": (MODEL,),
    "outputs": (MODEL, READY),
    "task": (MODEL, READY),
    "channels": (MODEL,),
    "scan_op": (READY,),
}
SUFFIX = ".onnx"  # of ready-made files


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
    from evm_deploy.export.many import export_all, specs
    from evm_deploy.export.source import Source
    from evm_deploy.export.target import check_plan
    from evm_deploy.export.targets import get_target

    if args.finish:
        return _finish(args)
    ready = not args.model and str(args.checkpoint).lower().endswith(SUFFIX)
    for name, owners in OWNERS.items():
        if getattr(args, name) is not None and not any({MODEL: args.model, READY: ready}[each] for each in owners):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} needs {' or '.join(owners)}", f"leave {flag} out")
    for flag in FINISH_ONLY:
        if getattr(args, flag.replace("-", "_")):
            raise UsageError(f"--{flag} needs --finish", f"leave --{flag} out")
    require_writable(Path(args.out), "--out", folder=True)
    plans = [check_plan(get_target(plan.target), plan) for plan in plans_of(args)]
    refuse_others_flags(args, plans)
    if args.model:
        source = Source(_factory(args, plans[0]))
    else:
        source = Source(_graph_file(args) if ready else _checkpoint(args))
    if args.calib is None and any(plan.calib for plan in plans):
        print("no --calib given: int8 is calibrated on the demo's own images, as by --calib demo", file=sys.stderr)
    if not args.device:
        announce_left_out(args.target)
    if args.sign:
        private_key(args.sign)  # an unusable key must fail now
    if args.dry_run:
        found_specs = zip(plans, specs(source, plans), strict=True)
        results, codes = [_dry_run(plan, spec, args) for plan, spec in found_specs], [0]
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

    _refuse_export_flags(args)
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


def _refuse_export_flags(args: argparse.Namespace) -> None:
    """Raise UsageError if an argument is given that --finish does not use: an ignored --dry-run would build."""
    used = {*(flag.replace("-", "_") for flag in FINISH_ONLY), *FINISH_TOO}
    for action in export_parser()._actions:
        if action.dest in used or not hasattr(args, action.dest) or getattr(args, action.dest) == action.default:
            continue
        name = action.option_strings[-1] if action.option_strings else "a checkpoint"
        raise UsageError(f"--finish cannot be combined with {name}", "evm-export --finish BUNDLE")


def _facts(bundle: Bundle) -> dict[str, Any]:
    """Return size and manifest of a bundle for --json."""
    manifest: dict[str, Any] = json.loads(bundle.manifest.to_json())
    return {"artifact_bytes": bundle.size_bytes, "manifest": manifest}


def _dry_run(plan: ExportPlan, spec: ModelSpec, args: argparse.Namespace) -> dict[str, Any]:
    """Run every check of an export that needs no trace. Print and return what the export would do."""
    from evm_deploy.bundle.bundle import check_free
    from evm_deploy.calib.int8 import image_sets
    from evm_deploy.export.network_input import assumed
    from evm_deploy.export.pipeline import bundle_path, complete, require_toolchain
    from evm_deploy.export.plan import QUANTIZED
    from evm_deploy.export.quantization import quantization_config
    from evm_deploy.export.targets import get_target

    target = get_target(plan.target)
    require_toolchain(target, plan)
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
        "Weights": _weights(spec),
        "Input": f"{plan.input}, {count_text(preprocessing.channels, 'channel')}, resize {_resize_text(preprocessing)}",
        "Normalise": f"mean {_numbers(preprocessing.mean)}, std {_numbers(preprocessing.std)}",
        **({"Note": "; ".join(notes)} if (notes := [*spec.notes, *assumed(given, spec, preprocessing)]) else {}),
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


def _resize_text(preprocessing: Preprocessing) -> str:
    share = f" {preprocessing.crop_pct}" if preprocessing.resize == CROP else ""
    return f"{preprocessing.resize}{share}, {preprocessing.interpolation}"


def _numbers(values: Sequence[float]) -> str:
    return ",".join(map(str, values))


def _weights(spec: ModelSpec) -> str:
    saved = spec.checkpoint
    return f"{saved['file']}, key '{saved['container']}', {saved['weights']}" if saved["file"] else "the module's own"


def _factory(args: argparse.Namespace, plan: ExportPlan) -> Factory:
    """Return the network that --model describes, with the weights of CKPT. Its code is not run here."""
    from evm_deploy.model.factory import Factory, model_arguments
    from evm_deploy.tasks import get_task

    return Factory(
        args.model,
        args.checkpoint,
        model_arguments(args.model_arg or ""),
        tuple(args.outputs.split(",")) if args.outputs else None,
        get_task(args.task or "raw").name,
        plan.imgsz,
        _channels(args.channels),
    )


def _channels(text: str | None) -> int | None:
    """Parse --channels; None if the flag is not given. Raises UsageError."""
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,4}", text, re.ASCII) or not 1 <= int(text) <= MAX_CHANNELS:
        raise UsageError(f"--channels {text!r}: use a number from 1 to {MAX_CHANNELS}")
    return int(text)


def _graph_file(args: argparse.Namespace) -> GraphFile:
    """Return the ready-made ONNX file that is given in the place of a checkpoint."""
    from evm_deploy.model.graph_file import GraphFile
    from evm_deploy.tasks import get_task

    outputs = tuple(args.outputs.split(",")) if args.outputs else None
    return GraphFile(args.checkpoint, args.scan_op, outputs, get_task(args.task or "raw").name)


def _checkpoint(args: argparse.Namespace) -> Path:
    """Return the path of the checkpoint; without one that of the embedded demo, announced on stderr."""
    from evm_deploy.demo import CHECKPOINT, checkpoint_path

    if args.checkpoint:
        return checkpoint_path(args.checkpoint)
    print(f"no checkpoint given: exporting the embedded demo, {CHECKPOINT.name} (handwritten digits)", file=sys.stderr)
    return CHECKPOINT
