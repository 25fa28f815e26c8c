"""Layout `triton`: the bundle is a model in a model repository of Triton Inference Server.

    NAME/config.pbtxt                 configuration of the model
    NAME/1/model.onnx                 the artifact, as version 1
    NAME/plugins/PLATFORM/..          native library, loaded by `model_operations`
    NAME/labels.txt                   `label_filename` of a classifier's output
    NAME/manifest.json, selftest/ ..  the bundle; Triton ignores folders that are no number

Sources: message ModelConfig in model_config.proto of triton-inference-server/common (83adf7c), whose names are used
here; src/onnxruntime.cc and onnxruntime_utils.cc of its onnxruntime_backend (00fd3e8), which compares names, types and
dims with the file and passes `op_library_filename` to ONNX Runtime unchanged; src/openvino.cc of its openvino_backend
(db19304).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.files import move
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.errors import UsageError
from evm_deploy.export.layout import Layout
from evm_deploy.tasks.classification import CLASSIFICATION

if TYPE_CHECKING:
    from evm_deploy.export.plan import ExportPlan

NAME = "triton"
CONFIG, LABELS, VERSION = "config.pbtxt", "labels.txt", "1"
BATCHING, OTHER = "onnxruntime", "openvino"  # the second takes only requests of max_batch_size images, if that is set
BACKENDS = {"onnx": BATCHING, "openvino": OTHER}  # target -> Triton's backend
DATA_TYPES = {
    "bool": "TYPE_BOOL",
    **{f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
}


def check(plan: ExportPlan) -> None:
    """Raise UsageError for a plan whose bundle no backend of Triton takes."""
    backend = BACKENDS.get(plan.target)
    if backend is None:
        raise UsageError(
            f"--layout {NAME} takes bundles of {' and '.join(BACKENDS)}, not of {plan.target}",
            f"use --target {' or '.join(BACKENDS)}, or leave --layout out",
        )
    if plan.native_library and not plan.native_library.startswith("linux-"):
        raise UsageError(
            f"--layout {NAME} is for servers on Linux, which cannot load a library for {plan.native_library}",
            "use --platform linux-x86_64 or linux-aarch64",
        )
    if backend == BATCHING and not plan.batch.static and (plan.batch.max is None or plan.batch.min > 1):
        raise UsageError(
            f"--layout {NAME} needs a smallest batch of 1 and a largest one: --batch {plan.batch} has not both",
            "use a range such as --batch 1:4:8, or one number",
        )
    if backend == OTHER and plan.scan != "portable":
        raise UsageError(
            f"--layout {NAME}: Triton brings an OpenVINO of its own, and the extension of --scan {plan.scan} fits one "
            "release of OpenVINO",
            "add --scan portable",
        )


def arrange(folder: Path, manifest: Manifest, where: str) -> Manifest:
    """Move the artifact into the folder of version 1 and write config.pbtxt. Returns the manifest.

    where: path of the bundle on the server. Raises UsageError for tensors that Triton cannot describe.
    """
    text = config(manifest, where)
    (folder / VERSION).mkdir()
    for file in sorted(folder.glob(f"{Path(manifest.artifact).stem}.*")):  # the weights of an IR are beside it
        move(file, folder / VERSION / file.name)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return replace(manifest, artifact=f"{VERSION}/{manifest.artifact}", notes=[*manifest.notes, *remarks(manifest)])


def remarks(manifest: Manifest) -> list[str]:
    """Return a note if the scans could run on a native library and the bundle has none."""
    if "plugin" not in manifest.scan["value"] or manifest.plugins:
        return []
    return ["Triton will run the scans without native library, which is slower: --platform linux-x86_64 adds it"]


def config(manifest: Manifest, where: str) -> str:
    """Return the text of config.pbtxt. where: path of the bundle on the server.

    The model's name is left out: Triton takes the folder's. Raises UsageError for tensors that Triton cannot describe.
    """
    backend, batch = BACKENDS[manifest.target], manifest.batch
    largest = 0 if batch.static or backend != BATCHING else batch.max or 0
    labelled = manifest.task == CLASSIFICATION.name and manifest.plan["labels"] and (largest or batch.max == 1)
    labels = (f"label_filename: {quoted(LABELS)}",) if labelled else ()
    libraries = ", ".join(quoted(f"{where}/{library}") for library in manifest.plugins.values())
    parts = [
        "# Model of Triton Inference Server, written by evm-deploy from manifest.json",
        f"backend: {quoted(backend)}",
        f"max_batch_size: {largest}",
        tensors("input", manifest.inputs, bool(largest)),
        tensors("output", manifest.outputs, bool(largest), labels),
        "instance_group [ { kind: KIND_CPU } ]",
        *(["dynamic_batching { }"] if largest else []),
        *([f"model_operations {{ op_library_filename: [ {libraries} ] }}"] if libraries else []),
    ]
    return "\n".join(parts) + "\n"


def tensors(field: str, specs: Sequence[Mapping[str, Any]], batched: bool, first: Sequence[str] = ()) -> str:
    """Return the field `input` or `output`. first: further lines of the first tensor. Raises UsageError."""
    blocks = []
    for index, spec in enumerate(specs):
        lines = [f"name: {quoted(spec['name'])}", *described(spec, batched), *(first if index == 0 else ())]
        blocks.append("  {\n" + "".join(f"    {line}\n" for line in lines) + "  }")
    return f"{field} [\n" + ",\n".join(blocks) + "\n]"


def described(spec: Mapping[str, Any], batched: bool) -> list[str]:
    """Return type and dims of a tensor, without the batch if Triton makes the batches. Raises UsageError."""
    name, dtype, shape = spec["name"], spec["dtype"], list(spec["shape"])
    if dtype not in DATA_TYPES:
        raise UsageError(f"--layout {NAME}: {name} is {dtype}, which Triton does not have", "leave --layout out")
    if batched and shape[:1] != [None]:
        raise UsageError(f"--layout {NAME}: {name} has no batch, so that Triton cannot batch it", "use --batch 1")
    dims = [-1 if side is None else side for side in shape[batched:]]
    scalar = ["reshape { shape: [ ] }"] if batched and not dims else []
    return [f"data_type: {DATA_TYPES[dtype]}", f"dims: [ {', '.join(map(str, dims or [1]))} ]", *scalar]


def quoted(text: str) -> str:
    """Return a string of protobuf's text format: in quotes, with quotes, backslashes and controls escaped in octal."""
    return '"' + re.sub(r'["\\\x00-\x1f\x7f]', lambda found: f"\\{ord(found[0]):03o}", text) + '"'


LAYOUT = Layout(NAME, "/models", {CONFIG: "configuration of the model for Triton Inference Server"}, check, arrange)
