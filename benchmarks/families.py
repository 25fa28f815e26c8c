"""Export networks of public Mamba repositories and measure them: the tables of docs/families.md.

    python benchmarks/families.py FOLDER [NAME ..] [--targets onnx,openvino,coreml,trt] [--rounds 12] [-o families.json]

FOLDER holds a git clone of each repository under its own name, such as VMamba and LocalMamba. The packages that they
need beside torch (timm, einops, fvcore, pywavelets ..) have to be installed. The networks (family_cases.py) are the
repositories' own classes, mostly with fewer blocks than in the papers, and with random weights with which every part
matters. Each is exported in float32 to every target, and in int8 to ONNX, by its factory as `evm-export --model` does.
Int8 is calibrated with 88 scenes of `evm_deploy.demo.scenes` of the size of the input, and evaluated on 12 others.

The script prints two rows for each network. The first has differences from the float model relative to the scale of
the output, and the SQNR of int8, or the error of the export. The second compares the native kernel with portable scans
in ONNX Runtime, in turn, one thread, in CPU time of that thread, so that other processes matter less: the whole
network; the most that it could reach with scans that cost nothing, from the native one's times by layer; and the scan
with most steps alone, of at least 784 steps, with the kernel's time over its lower bound of multiply-adds
(scan_states.py). The JSON file has all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from common import interleave, ratio, where
from family_cases import CASES
from scan import ISAS, fma_peak, scan_inputs, scan_session
from scan_states import PER_CHANNEL, PER_STATE

from evm_deploy.bench.layers import measure_layers
from evm_deploy.bench.measurable import examples
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.demo.scenes import write_scenes
from evm_deploy.export import ExportPlan
from evm_deploy.export.many import export_all
from evm_deploy.export.worker import TargetOutcome
from evm_deploy.model.factory import Factory
from evm_deploy.runtimes.registry import plugin_path
from evm_deploy.scan import onnx_function
from evm_deploy.toolchain.plugins import kernel_isa

SCENES, SEED = 100, 11
LEAST_STEPS = 784
HEADS = (
    "| network | commit | depth | input | scans | share | nodes | {targets} | int8 SQNR |",
    "| network | whole network | at most | scan alone | K, D, N, L | kernel / its bound |",
)


def measured(folder: Path, name: str, targets: Sequence[str], rounds: int) -> dict[str, Any]:
    """Export a network to every target, in int8 to ONNX, and compare native and portable scans of the ONNX bundle."""
    case = CASES[name]
    clone = str(folder / Path(case.folders[0]).parts[0])
    commit = subprocess.run(
        ["git", "-C", clone, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=False
    )
    row: dict[str, Any] = {"commit": commit.stdout.strip()}
    with tempfile.TemporaryDirectory() as out:
        write_scenes(Path(out), SCENES, SEED, case.size)
        plans = [ExportPlan(target, "fp32", imgsz=(case.size, case.size)) for target in targets]
        plans += [replace(plan, precision="int8", calib=f"{out}/images") for plan in plans if plan.target == "onnx"]
        factory = Factory(
            "family_cases:build", arguments={"folder": str(folder), "case": name}, imgsz=(case.size, case.size)
        )
        for outcome in export_all(factory, plans, out, cores=1):
            kind = "int8" if outcome.plan.precision == "int8" else outcome.plan.target
            row[kind] = facts(outcome, out)
            if kind == "onnx" and outcome.bundle and row["onnx"]["scans"]:
                row["speed"] = speed(outcome.bundle, rounds)
    return row


def facts(outcome: TargetOutcome, out: str) -> dict[str, Any]:
    """Return the facts of a bundle: parity relative to the output's scale, accuracy of int8, scans and their share."""
    if outcome.bundle is None:
        kept = Path(out).glob(f"*-{outcome.plan.target}-{outcome.plan.precision}-*.rejected/manifest.json")
        accuracy = next((json.loads(path.read_text(encoding="utf-8")).get("accuracy") for path in kept), None)
        return {"error": " ".join(str(outcome.error).split()), "accuracy": accuracy, "seconds": outcome.seconds}
    manifest = json.loads((outcome.bundle.path / "manifest.json").read_text(encoding="utf-8"))
    parity = manifest["parity"]
    scans = {each["name"]: each for each in parity["scans"]}.values()
    return {
        "parity": parity["max_abs"] / (parity["limit"] / ExportPlan(manifest["target"], "fp32").tolerance),
        "worst_scan": max((max(each["ssm"], each["probe"]) for each in scans), default=None),
        "share": [min(each["share"] for each in scans), max(each["share"] for each in scans)] if scans else [],
        "scans": len(scans),
        "nodes": manifest["details"].get("nodes") or manifest["details"].get("operations"),
        "parameters": manifest["model"]["parameters"],
        "notes": manifest["notes"],
        "accuracy": manifest.get("accuracy"),
        "seconds": outcome.seconds,
    }


def speed(bundle: Bundle, rounds: int) -> dict[str, Any]:
    """Return portable over native: of the network, of one of its scans alone, and what bounds each."""
    with load(bundle.path, threads=1, scan="plugin") as plugin, load(bundle.path, threads=1, scan="portable") as body:
        feeds = examples(plugin, 1)
        subjects = {"portable": partial(body.run, feeds), "plugin": partial(plugin.run, feeds)}
        network, text = ratio(interleave(subjects, rounds, clock=time.thread_time), "portable", "plugin")
        share = measure_layers(plugin, feeds)["scan_share"]
    found: dict[str, Any] = {"network": network, "network_range": text, "scan_share": share}
    found["at_most"] = network / (1 - share)
    shape = longest_scan(bundle.path / bundle.manifest.artifact)
    return {**found, **scan_speed(*shape, rounds)}


def longest_scan(path: Path) -> tuple[int, int, int, int]:
    """Return K, D, N and L of the scan of an ONNX file that has most steps; of equals the one with most states."""
    model = onnx.load(path)
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}

    def shape(name: str) -> tuple[int, ...]:
        return weights.get(name) or tuple(dim.dim_value for dim in values[name].type.tensor_type.shape.dim)

    scans = [node for node in model.graph.node if node.op_type == onnx_function.OP_TYPE]
    shapes = [(*shape(node.input[0]), shape(node.input[2])[2]) for node in scans]
    _, K, L, D, N = max(shapes, key=lambda each: (each[2], each[1] * each[3] * each[4]))
    return K, D, N, L


def scan_speed(K: int, D: int, N: int, L: int, rounds: int) -> dict[str, Any]:
    """Return portable over native for one scan of at least LEAST_STEPS steps, and native over its multiply-adds."""
    L = max(L, LEAST_STEPS)
    feeds = dict(zip(onnx_function.INPUTS, scan_inputs(L, K, D, N), strict=True))
    library = plugin_path("onnxruntime")
    sessions = {"portable": scan_session(None), "plugin": scan_session(library)}
    subjects = {name: partial(each.run, None, feeds) for name, each in sessions.items()}
    times = interleave(subjects, rounds, clock=time.thread_time)
    faster, text = ratio(times, "portable", "plugin")
    peak = max(fma_peak(*ISAS[kernel_isa(library).removesuffix("vnni")]) or 0 for _ in range(3))
    floor_ms = K * D * L * (N * PER_STATE + PER_CHANNEL) / peak / 1e6 if peak else None
    best = {name: min(each) for name, each in times.items()}
    return {
        "scan": [K, D, N, L],
        "alone": faster,
        "alone_range": text,
        "best_ms": best,
        "of_bound": floor_ms and best["plugin"] / floor_ms,
    }


def lines(name: str, row: dict[str, Any], targets: Sequence[str]) -> tuple[str, str]:
    """Return the two rows of the tables."""
    onnx_, case, found, int8 = row.get("onnx", {}), CASES[name], row.get("speed"), row.get("int8", {})
    first = [
        name,
        row["commit"],
        case.depth,
        str(case.size) if case.size == case.paper else f"{case.size} ({case.paper})",
        onnx_.get("scans", ""),
        "{:.2f} to {:.2f}".format(*onnx_["share"]) if onnx_.get("share") else "",
        onnx_.get("nodes", ""),
        *(f"{row[each]['parity']:.0e}" if "parity" in row[each] else row[each]["error"] for each in targets),
        f"{int8['accuracy']['sqnr_db']:.1f} dB{' (refused)' * ('error' in int8)}"
        if int8.get("accuracy")
        else int8.get("error", ""),
    ]
    second = [name, "no scan"]
    if found:
        shape = ", ".join(map(str, found["scan"]))
        bound = f"{found['of_bound']:.2f}" if found["of_bound"] else ""
        ratios = [f"{found[each]:.1f}" for each in ("network", "at_most", "alone")]
        second = [name, *ratios, shape, bound]
    return "| " + " | ".join(map(str, first)) + " |", "| " + " | ".join(second) + " |"


def main() -> int:
    """Measure the networks and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--targets", default="onnx,openvino,coreml,trt")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("-o", "--out", type=Path, default=Path("families.json"))
    args = parser.parse_args()
    folder, out, targets = args.folder.resolve(), args.out.resolve(), args.targets.split(",")
    os.chdir(Path(__file__).parent)  # of family_cases
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    heads = [head.format(targets=" | ".join(targets)) for head in HEADS]
    print(where(), *heads, sep="\n", flush=True)
    for name in args.names or CASES:
        rows[name] = {**rows.get(name, {}), **measured(folder, name, targets, args.rounds)}
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(*lines(name, rows[name], targets), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
