"""Mean and std inside the first convolution: exact where it folds, untouched where it would not be."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from evm_deploy.export.hub.fold_normalisation import fold_normalisation

SCALE, SHIFT = (np.float32([0.017, 0.018, 0.016]), np.float32([-2.1, -2.0, -1.8]))
RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.standard_normal((6, 3, 3, 3)).astype(np.float32), RNG.standard_normal(6).astype(np.float32)
PIXELS = RNG.integers(0, 256, (2, 9, 11, 3), np.uint8)


def stem(pads, *extra, **outputs):
    """uint8 NHWC -> normalised -> the first convolution, and whatever else reads its constants."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["shifted"]),
        helper.make_node("Transpose", ["shifted"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["first", "weight", "bias"], ["y"], pads=pads),
        *extra,
    ]
    constants = {"scale": SCALE, "shift": SHIFT, "weight": WEIGHT, "bias": BIAS}
    graph = helper.make_graph(
        nodes,
        "stem",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [2, 9, 11, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
            for name, rank in {"y": 4, **outputs}.items()
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model):
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": PIXELS})


def close(got, want):
    return np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def convolved(x, weight, bias, padding):
    return F.conv2d(torch.from_numpy(x.transpose(0, 3, 1, 2)).double(), weight, bias, padding=padding).numpy()


@pytest.mark.parametrize("padding", [0, 1])
def test_exact_with_and_without_padding(padding):
    model = stem([padding] * 4)
    assert fold_normalisation(model) == 1 - padding
    weight, bias = torch.from_numpy(WEIGHT).double(), torch.from_numpy(BIAS).double()
    want = convolved(PIXELS * SCALE.astype(float) + SHIFT, weight, bias, padding)
    assert close(run(model)[0], want)
    scale, shift = torch.from_numpy(SCALE).double(), torch.from_numpy(SHIFT).double()
    folded = (weight * scale[:, None, None], bias + torch.einsum("ochw,c->o", weight, shift))
    assert close(convolved(PIXELS, *folded, padding), want) == (padding == 0)  # a padded zero is no pixel


@pytest.mark.parametrize(("shared", "rank"), [("weight", 4), ("bias", 1), ("scale", 1), ("shift", 1)])
def test_constants_that_others_read_stay(shared, rank):
    """Equal constants are stored once, as a pass of the exporter leaves them."""
    model = stem([0] * 4, helper.make_node("Neg", [shared], ["other"]), other=rank)
    before = run(model)
    assert fold_normalisation(model) == 1
    assert [node.op_type for node in model.graph.node] == ["Cast", "Transpose", "Conv", "Neg"]
    after = run(model)
    assert close(after[0], before[0])
    np.testing.assert_array_equal(after[1], before[1])
    assert len(model.graph.initializer) == 3
