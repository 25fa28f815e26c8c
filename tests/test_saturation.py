"""Integer products on x86 CPUs without VNNI: 8-bit weights saturate, 7-bit weights cannot."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest

from evm_deploy.calib.saturation import can_saturate, saturating_weights
from evm_deploy.commands.export_flags import export_parser
from evm_deploy.commands.export_plans import plans_of
from evm_deploy.demo import CHECKPOINT, WORD
from evm_deploy.errors import AccuracyError, UsageError
from evm_deploy.export import quantization
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target
from tests.toolchains import need


def product_without_vnni(activations, weights):
    """uint8 (k,) @ int8 (k, n) as vpmaddubsw and vpmaddwd compute it: sums of two in 16 bits, saturated, then in 32."""
    products = activations.astype(np.int64)[:, None] * weights.astype(np.int64)
    pairs = np.clip(products.reshape(-1, 2, weights.shape[1]).sum(axis=1), -(1 << 15), (1 << 15) - 1)
    return pairs.sum(axis=0)


@pytest.mark.parametrize("largest, exact", [(64, True), (127, False)])
def test_weights_in_seven_bits_give_the_exact_sum(largest, exact):
    g = np.random.default_rng(0)
    weights = g.choice(np.array([-largest, largest], np.int8), (64, 8))
    activations = g.choice(np.array([0, 255], np.uint8), 64)
    want = activations.astype(np.int64) @ weights.astype(np.int64)
    assert (product_without_vnni(activations, weights) == want).all() == exact
    assert can_saturate(weights.T) != exact


@pytest.mark.parametrize(
    "weights, saturates",
    [([64, 64], False), ([65, 64], True), ([-64, -64], False), ([-65, -64], True), ([127, -127], False), ([127], False),
     ([127, 1, -1], False), ([127, 2], True), ([127, 0, 0, 2], True), ([], False)],
)  # fmt: skip
def test_any_two_weights_of_a_channel_may_be_neighbours(weights, saturates):
    """The bound is sharp: with the worst activations the emulated pair saturates, and one less does not."""
    channel = np.array([weights], np.int8)
    assert can_saturate(channel) == saturates
    for i in range(len(weights)):
        for j in range(i):
            pair = channel[:, [j, i]].T
            for activations in np.array([[0, 255], [255, 0], [255, 255]], np.uint8):
                exact = activations.astype(np.int64) @ pair.astype(np.int64)
                saturates |= bool((product_without_vnni(activations, pair) != exact).any())
    assert can_saturate(channel) == saturates


# ------------------------------------------------------------------------------------------------------------ exports


@pytest.fixture(scope="module")
def seven(bundle_of):
    return bundle_of(CHECKPOINT, plan(weight_bits=7))


@pytest.fixture(scope="module")
def eight(bundle_of):
    return bundle_of(CHECKPOINT, plan())


def plan(**changes):
    return ExportPlan("onnx", precision="int8", calib=WORD, calib_images=128, smooth="off", scan="portable", **changes)


@pytest.mark.slow
def test_the_manifest_says_the_bits(seven, eight):
    facts = [bundle.manifest.details["quantization"]["weight_bits"] for bundle in (seven, eight)]
    assert [each["value"] for each in facts] == ["7", "8"]
    assert "is the same on x86 CPUs without VNNI" in facts[0]["reason"]
    assert "can saturate" in facts[1]["reason"] and "--weight-bits 7" in facts[1]["reason"]
    weights = [saturating_weights(onnx.load(str(bundle.path / "model.onnx"))) for bundle in (seven, eight)]
    assert not weights[0] and weights[1]
    assert seven.manifest.accuracy["sqnr_db"] > eight.manifest.accuracy["sqnr_db"] - 3


def test_the_gate_refuses_seven_bits_that_can_saturate(seven):
    """The accuracy of this machine would say nothing about a CPU without VNNI."""
    from evm_deploy.calib.int8 import Quantized

    quantized = Quantized(None, None, None, "", {}, 1, (), {}, (), saturating=())
    quantization.require(seven.manifest, quantized)
    with pytest.raises(AccuracyError, match=r"can saturate on CPUs without VNNI: layers\.0"):
        quantization.require(
            seven.manifest, Quantized(None, None, None, "", {}, 1, (), {}, (), saturating=("layers.0",))
        )


def plan_of(*flags):
    return plans_of(export_parser().parse_args(list(flags)))[0]


def test_the_device_chooses():
    images = ("--calib", WORD, "--target", "onnx", "--int8")
    assert plan_of(*images).weight_bits is None
    assert plan_of(*images, "--weight-bits", "7").weight_bits == 7
    assert plan_of(*images, "--device", "n100").weight_bits is None  # AVX-VNNI
    chosen = plan_of(*images, "--device", "x86-64")
    assert chosen.weight_bits == 7 and "7 bits, which do not saturate without VNNI" in chosen.chosen.reason
    assert plan_of("--target", "onnx", "--precision", "fp32", "--device", "x86-64").weight_bits is None
    with pytest.raises(UsageError, match="--weight-bits 8 with --device x86-64: products of int8 saturate"):
        plan_of(*images, "--device", "x86-64", "--weight-bits", "8")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--int8", "--weight-bits", "6"), "--weight-bits 6: use 7 or 8"),
        (("--int8", "--weight-bits", "x"), "--weight-bits 'x' is not a whole number"),
        (("--precision", "fp32", "--weight-bits", "7"), "--weight-bits is for int8, this export is fp32"),
        (("--weight-bits", "7"), "--weight-bits is for int8, this export is float"),
    ],
)
def test_bad_bits(flags, message):
    with pytest.raises(UsageError, match=message):
        plan_of("--target", "onnx", *flags)


def test_other_targets_have_eight_bits():
    with pytest.raises(UsageError, match="target 'coreml' has no --weight-bits '7'; it has: 8"):
        check_plan(get_target("coreml"), ExportPlan("coreml", precision="int8", calib=WORD, weight_bits=7))


# ------------------------------------------------------------------------------------------------- a CPU without VNNI

RUN = """
import sys
import numpy as np
import onnxruntime as ort
model, images, out, exact = sys.argv[1:]
options = ort.SessionOptions()
options.add_session_config_entry("session.disable_quant_qdq", exact)
options.intra_op_num_threads = 1
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
images = np.load(images)
np.save(out, np.concatenate([session.run(None, {"image": image[None]})[0] for image in images]))
"""


@pytest.mark.cross
@pytest.mark.slow
def test_under_haswell_the_figure_is_that_with_vnni(seven, eight, bundle_of, tmp_path):
    """ONNX Runtime's own int8 layers on an emulated CPU with AVX2 alone: 7 bits cost nothing there, 8 bits 10 dB."""
    need("qemu")
    from evm_deploy.demo import images_path

    with np.load(images_path(WORD, "heldout", "classification")) as file:
        images = np.stack([eight.manifest.preprocess().pixels(digit) for digit in file["images"][:60]])
    plain = bundle_of(CHECKPOINT, ExportPlan("onnx", scan="portable"))

    def outputs(bundle, *emulator, exact="0", count=60):
        np.save(tmp_path / "images.npy", images[:count])
        out = tmp_path / "out.npy"
        command = [
            *emulator,
            sys.executable,
            "-c",
            RUN,
            bundle.path / "model.onnx",
            tmp_path / "images.npy",
            out,
            exact,
        ]
        subprocess.run(command, check=True, capture_output=True)
        return np.load(out).astype(np.float64)

    def decibels(got):
        float32 = want[: len(got)]
        return 10 * np.log10((float32**2).sum() / ((got - float32) ** 2).sum())

    want, exactly, exactly_eight = outputs(plain), outputs(seven, exact="1"), outputs(eight, exact="1")
    assert decibels(exactly) > decibels(exactly_eight) - 3
    haswell, few = ("qemu-x86_64", "-cpu", "Haswell"), 3  # an emulated image takes seconds
    assert abs(decibels(outputs(seven, *haswell, count=few)) - decibels(exactly[:few])) < 1
    saturated = decibels(outputs(eight, *haswell, count=few))
    assert saturated < decibels(exactly_eight[:few]) - 3, "the negative control: 8-bit weights saturate"
