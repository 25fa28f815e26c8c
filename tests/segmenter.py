"""A segmenter's bundle made by hand: classes of colours, by a tiny ONNX file in the place of a classifier's network."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from evm_deploy.data.preprocessing import Preprocessing

CLASSES = 16
PALETTE = [[16 * i, 255 - 16 * i, 40] for i in range(CLASSES)]  # of the padded one; the others have none


def label_map(pixels: np.ndarray, dtype: str = "uint8") -> np.ndarray:
    """The classes of pixels (.., 3) uint8: a quarter of red and of green. int32: more than 256 classes."""
    quarters = pixels.astype(np.int32) // 64
    classes = quarters[..., 0] + 4 * quarters[..., 1]
    return (classes if dtype == "uint8" else 100 * classes).astype(dtype)


def expected(bundle: Path, image: np.ndarray) -> np.ndarray:
    """The label map of an image (h, w, 3) uint8, in numpy."""
    content = json.loads((bundle / "manifest.json").read_bytes())
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in content["preprocessing"].items()}
    spec = Preprocessing(**values)
    classes = label_map(spec.pixels(image), content["outputs"][0]["dtype"])
    return spec.geometry(image.shape[1], image.shape[0]).map_to_image(classes)


def network(height: int, width: int, dtype: str) -> onnx.ModelProto:
    """image uint8 (1, H, W, 3) -> label_map (1, H, W), as `label_map` does it."""
    kind = TensorProto.UINT8 if dtype == "uint8" else TensorProto.INT32
    weights = np.array([1, 4, 0], np.int32) * (1 if dtype == "uint8" else 100)
    nodes = [
        helper.make_node("Cast", ["image"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Div", ["whole", "quarter"], ["quarters"]),
        helper.make_node("Mul", ["quarters", "weights"], ["parts"]),
        helper.make_node("ReduceSum", ["parts", "last"], ["classes"], keepdims=0),
        helper.make_node("Cast", ["classes"], ["label_map"], to=kind),
    ]
    constants = {"quarter": np.array(64, np.int32), "weights": weights, "last": np.array([3])}
    graph = helper.make_graph(
        nodes,
        "segmenter",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, height, width, 3])],
        [helper.make_tensor_value_info("label_map", kind, [1, height, width])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def segmenter(bundle: Path, folder: Path, resize: str = "pad", dtype: str = "uint8") -> Path:
    """Copy the bundle of a classifier whose input is `image`, batch 1, and make it a segmenter's."""
    copy = Path(shutil.copytree(bundle, folder / f"segmenter-{resize}-{dtype}"))
    content = json.loads((copy / "manifest.json").read_bytes())
    height, width = content["preprocessing"]["size"]
    onnx.save(network(height, width, dtype), copy / "model.onnx")
    probes = load_file(copy / "selftest" / "probes.safetensors")
    probes = {name: probes[name] for name in ("image", "picture.pixels")}
    probes["label_map"] = label_map(probes["image"], dtype)
    save_file(probes, copy / "selftest" / "probes.safetensors")
    save_file({}, copy / "selftest" / "scans.safetensors")
    content["plan"]["head"], content["scan"] = "label_map", {"value": "portable", "reason": "by hand", "plugins": {}}
    content["model"]["task"] = "segmentation"
    if resize == "pad":
        content["model"]["details"] = {**(content["model"].get("details") or {}), "palette": PALETTE}
    content["outputs"] = [{"name": "label_map", "dtype": dtype, "shape": [1, height, width]}]
    content["selftest"] = {"preprocessing": 255, "apart": 0.0, "outputs": {"label_map": 0.0}, "scans": {}}
    content["preprocessing"]["resize"] = resize
    (copy / "labels.txt").write_text("".join(f"colour {i}\n" for i in range(CLASSES)), encoding="utf-8")
    for name in ("model.onnx", "labels.txt", "selftest/probes.safetensors", "selftest/scans.safetensors"):
        data = (copy / name).read_bytes()
        content["files"][name] = {"sha256": sha256(data).hexdigest(), "size_bytes": len(data)}
    (copy / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return copy
