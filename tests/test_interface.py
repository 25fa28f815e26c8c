"""Bundles whose files are whole, by their hashes, but do not belong together."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evm_deploy import cli
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.selftest import AXES
from reliability.readers import rehash
from tests.broken import BROKEN

VALUE = helper.make_tensor_value_info
IMAGE = VALUE("image", TensorProto.UINT8, [1, 64, 64, 3])
LOGITS = VALUE("logits", TensorProto.FLOAT, [1, 10])


def constant(value: np.ndarray, name: str = "logits") -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


ROW = constant(np.ones((1, 10), np.float32))
OUT_OF_RANGE = [  # only once it runs
    constant(np.array([0]), "axis"),
    constant(np.ones((1, 10), np.float32), "rows"),
    helper.make_node("Cast", ["image"], ["numbers"], to=TensorProto.INT64),
    helper.make_node("ReduceSum", ["numbers"], ["sum"], keepdims=0),
    helper.make_node("Unsqueeze", ["sum", "axis"], ["index"]),
    helper.make_node("Gather", ["rows", "index"], ["logits"]),
]


def reshaped(count: int, *shape: int) -> list[onnx.NodeProto]:
    """Return nodes that make ones of a shape that is known at run time alone."""
    return [
        constant(np.ones(count, np.float32), "ones"),
        constant(np.array(0), "zero"),
        constant(np.array(shape), "shape"),
        *OUT_OF_RANGE[2:4],
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "shape"], ["told"]),
        helper.make_node("Reshape", ["ones", "told"], ["logits"]),
    ]


UNLIKE = r"the manifest says image uint8\[1, 64, 64, 3\], logits float32\[1, 10\]"
FLOATS = VALUE("logits", TensorProto.FLOAT, [])
OTHERS = {  # inputs, outputs, nodes of another model; what is said of it
    "another name": ([VALUE("x", TensorProto.UINT8, [1, 64, 64, 3])], [LOGITS], [ROW], UNLIKE),
    "two inputs": ([IMAGE, VALUE("y", TensorProto.FLOAT, [1])], [LOGITS], [ROW], UNLIKE),
    "no input": ([], [LOGITS], [ROW], UNLIKE),
    "another size": ([VALUE("image", TensorProto.UINT8, [1, 32, 32, 3])], [LOGITS], [ROW], UNLIKE),
    "floats in": ([VALUE("image", TensorProto.FLOAT, [1, 64, 64, 3])], [LOGITS], [ROW], UNLIKE),
    "no classes": ([IMAGE], [VALUE("logits", TensorProto.FLOAT, [1, 0])], [constant(np.ones((1, 0), "f"))], UNLIKE),
    "a scalar": ([IMAGE], [FLOATS], [constant(np.ones((), "f"))], UNLIKE),
    "strings": (
        [VALUE("image", TensorProto.STRING, [1])],
        [VALUE("logits", TensorProto.STRING, [1])],
        [helper.make_node("Identity", ["image"], ["logits"])],
        r"'image' of the model has type tensor\(string\), not an array of numbers",
    ),
    "fails": ([IMAGE], [VALUE("logits", TensorProto.FLOAT, ["n", "k"])], OUT_OF_RANGE, "cannot run the model"),
    "more classes": ([IMAGE], [LOGITS], reshaped(20, 1, 20), "has 20 classes; labels.txt has 10"),
    "more rows": ([IMAGE], [LOGITS], reshaped(10, 2, 5), r"gives logits float32\[2, 5\] for image uint8\[1, 64, 64, 3"),
    "NaN": ([IMAGE], [LOGITS], [constant(np.full((1, 10), np.nan, "f"))], "gives NaN or Inf on this device"),
    "Inf": ([IMAGE], [LOGITS], [constant(np.full((1, 10), np.inf, "f"))], "gives NaN or Inf on this device"),
}


@pytest.fixture
def bundle(demo_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(demo_bundle.path, tmp_path / "bundle"))


def put_another_model(name: str, bundle: Path) -> str:
    """Replace a bundle's model by a model of OTHERS. Returns the expected error."""
    inputs, outputs, nodes, said = OTHERS[name]
    put(helper.make_graph(nodes, "other", inputs, outputs), bundle, "model.onnx")
    return said


def put_another_scan(bundle: Path) -> None:
    """In the place of the self-test's: what it gives is no y of a scan."""
    inputs = [VALUE(tensor, TensorProto.FLOAT, [*axes]) for tensor, axes in AXES.items()]
    y = VALUE("y", TensorProto.FLOAT, [1])
    put(helper.make_graph([constant(np.ones(1, np.float32), "y")], "other", inputs, [y]), bundle, "selftest/scan.onnx")


def put(graph: onnx.GraphProto, bundle: Path, file: str) -> None:
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), bundle / file)
    rehash(bundle, file)


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(name, bundle, capsys):
    said = put_another_model(name, bundle)
    assert cli.run_main([str(bundle), str(bundle / "selftest" / "picture.png")]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert re.search(said, shown.err), shown.err
    assert cli.run_main([str(bundle), "--selftest"]) in (2, 4)
    assert "internal error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("labels are no text", "labels.txt is not UTF-8"),
        ("too few labels", "has 10 classes; labels.txt has 2"),
        ("another output", r"the manifest says .*, scores float32\[1, 10\]"),
        ("another input size", r"the manifest says image uint8\[1, 32, 32, 3\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(name, said, bundle, capsys):
    BROKEN[name](bundle)
    assert cli.run_main([str(bundle), str(bundle / "selftest" / "picture.png")]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_scan_that_is_none_is_refused(bundle, capsys):
    put_another_scan(bundle)
    assert cli.run_main([str(bundle), "--selftest"]) == 2
    assert "has no readable self-test: selftest/scan.onnx gives no output y" in capsys.readouterr().err


def test_sizes_that_a_runtime_does_not_tell_are_no_difference(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["outputs"][0]["shape"] = [None, None]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with load(bundle) as model:
        assert all(check.ok for check in model.selftest())
