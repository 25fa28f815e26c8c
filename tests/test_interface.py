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

from evm_deploy import cli_run
from evm_deploy.inference import load
from reliability.readers import rehash

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
        r"'image' of type tensor\(string\), which is no array of numbers",
    ),
    "fails": ([IMAGE], [VALUE("logits", TensorProto.FLOAT, ["n", "k"])], OUT_OF_RANGE, "cannot run the model"),
    "NaN": ([IMAGE], [LOGITS], [constant(np.full((1, 10), np.nan, "f"))], "gives NaN or Inf here"),
    "Inf": ([IMAGE], [LOGITS], [constant(np.full((1, 10), np.inf, "f"))], "gives NaN or Inf here"),
}


@pytest.fixture
def bundle(demo_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(demo_bundle.path, tmp_path / "bundle"))


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(name, bundle, capsys):
    inputs, outputs, nodes, said = OTHERS[name]
    opsets = [helper.make_opsetid("", 20)]
    graph = helper.make_graph(nodes, "other", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), bundle / "model.onnx")
    rehash(bundle, "model.onnx")
    assert cli_run.run_main([str(bundle), str(bundle / "selftest" / "picture.png")]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert re.search(said, shown.err), shown.err
    assert cli_run.run_main([str(bundle), "--selftest"]) in (2, 4)
    assert "internal error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "said"),
    [(b"cat\ndog\n", "labels.txt has 2"), (b"\xff\xfe" * 10, "is not UTF-8")],
    ids=["too few", "no text"],
)
def test_labels_that_do_not_fit_are_refused(labels, said, bundle, capsys):
    (bundle / "labels.txt").write_bytes(labels)
    rehash(bundle, "labels.txt")
    assert cli_run.run_main([str(bundle), str(bundle / "selftest" / "picture.png")]) == 2
    assert said in capsys.readouterr().err


def test_sizes_that_a_runtime_does_not_tell_are_no_difference(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["outputs"][0]["shape"] = [None, None]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with load(bundle) as model:
        assert all(check.ok for check in model.selftest())
