"""Faults in Core ML packages, in their numbers and in the lowering are noticed."""

from __future__ import annotations

import shutil

import golden
import numpy as np
import pytest

from evm_deploy import cli
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import ParityError, UsageError
from evm_deploy.export import verify
from evm_deploy.export.coreml import program
from evm_deploy.export.coreml import target as coreml
from evm_deploy.export.coreml.fold_batch_norm import fold_batch_norm
from evm_deploy.export.coreml.scans import CoreMlScanAccess
from evm_deploy.export.pipeline import export
from evm_deploy.export.selftest import make_test_inputs
from evm_deploy.export.target import Artifact
from evm_deploy.runtimes.mil import MilRuntime
from evm_deploy.scan import mil
from evm_deploy.tasks.classification import CLASSIFICATION
from tests.conftest import save_as_released
from tests.coreml import SIZES, plan_for
from tests.test_mil import edited
from tests.toolchains import need

need("coremltools", module=True)


def parity_of(package, coreml_fp32):
    """Return the parity of a package, computed as an export computes it."""
    artifact, module, plan = coreml_fp32
    changed = Artifact(package, artifact.scan, artifact.details)
    test_inputs = make_test_inputs(plan, Preprocessing((64, 64)), count=1)
    with MilRuntime(package) as runtime:
        access = CoreMlScanAccess(changed, None)
        reference = verify.run_reference(module, test_inputs)
        return verify.verify(reference, runtime, access, plan, CLASSIFICATION, float16=False)


def find(block, op_type, name=""):
    return [op for op in block.operations if op.type == op_type and name in op.outputs[0].name]


def source(op, key):
    """The binding of an operation's input, to be read and changed."""
    return op.inputs[key].arguments[0]


def one_step_doubled(block):
    """h = 2 a h instead of a h + x, in one step of one scan."""
    adds = find(block, "add", "evm_scan_layers_0")
    step = next(op for op in adds if op.outputs[0].name.endswith("_add_1"))
    source(step, "y").name = source(step, "x").name


def bias_dropped(block):
    (softplus,) = find(block, "softplus", "evm_scan_layers_1")
    (delta,) = find(block, "add", "evm_scan_layers_1_blocks_0_op_delta")
    source(softplus, "x").name = source(delta, "x").name


def carry_forgotten(block):
    """Break the carry: a round adds the states as they are, not those of the chunks before."""
    (shifted, *_) = find(block, "pad", "evm_scan_layers_0")
    mul = next(op for op in block.operations if op.type == "mul" and source(op, "y").name == shifted.outputs[0].name)
    source(mul, "y").name = source(mul, "x").name


def gates_swapped(block):
    """The two halves of a split that have the same shape."""
    split = next(op for op in find(block, "split") if "scan" not in op.outputs[0].name and len(op.outputs) == 3)
    names = [value.name for value in split.outputs]
    for op in block.operations:
        for value in op.inputs.values():
            for argument in value.arguments:
                if argument.name in names[1:]:
                    argument.name = names[3 - names.index(argument.name)]


@pytest.mark.parametrize("fault", [one_step_doubled, bias_dropped, carry_forgotten, gates_swapped])
@pytest.mark.slow
def test_a_changed_operation_is_noticed(fault, coreml_fp32, tmp_path):
    package = shutil.copytree(coreml_fp32[0].path, tmp_path / "model.mlpackage")
    assert parity_of(package, coreml_fp32).ok
    parity = parity_of(edited(package, fault), coreml_fp32)
    assert any(failure.startswith("scan layers.") for failure in parity.failures), parity.failures


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers.2.1.conv_dw.0.weight", "layers.0.blocks.0.op.in_proj.weight"])
def test_a_scaled_weight_is_noticed(name, coreml_fp32, tmp_path):
    """Scale the weight by one per cent, in the file of the weights."""
    artifact, module, plan = coreml_fp32
    package = shutil.copytree(artifact.path, tmp_path / "model.mlpackage")
    file = package / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    folded = fold_batch_norm(program.channels_first(module, plan), program.example(plan, module.channels))
    parameters = {program.network_path(path): value for path, value in folded.named_parameters()}
    weight = parameters[name].detach().numpy()
    content = file.read_bytes()
    assert content.count(weight.tobytes()) == 1
    file.write_bytes(content.replace(weight.tobytes(), (1.01 * weight).astype(np.float32).tobytes()))
    assert any("logits differ" in failure for failure in parity_of(package, coreml_fp32).failures)


@pytest.mark.slow
def test_a_fault_in_the_lowering_rejects_the_export(monkeypatch, micro, tmp_path, capsys):
    """The carry a step short: chunks after the first start from an older state."""
    right = mil._carry

    def late(mb, h, P, chunks):
        return mb.mul(x=right(mb, h, P, chunks), y=np.float32(0.99))

    monkeypatch.setattr(mil, "_carry", late)
    flags = ["--target", "coreml", "--imgsz", "64", "-o", str(tmp_path), "-q"]
    assert cli.export_main([str(micro), *flags]) == 4
    assert "scan layers.0.blocks.0.op is off by" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["micro_64-coreml-fp16-64x64.rejected"]


def scaled(folder, factor):
    """A checkpoint with one convolution times `factor` and a later one divided by it: float32 can do that."""
    state = dict(golden.model_case("micro_64")["state"])
    for name, by in (("conv_pw.1", factor), ("conv_pw2.0", 1 / factor)):
        state[f"layers.2.1.{name}.weight"] = state[f"layers.2.1.{name}.weight"] * np.float32(by)
    state["layers.2.1.conv_pw.1.bias"] = state["layers.2.1.conv_pw.1.bias"] * np.float32(factor)
    return save_as_released(state, folder / "scaled.ckpt")


def test_weights_that_float16_cannot_hold_are_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"layers.2.1.conv_pw.0.weight reaches .*, the largest float16 is 65504"):
        export(scaled(tmp_path, 1e6), plan_for(imgsz=(32, 32)), tmp_path / "out")


@pytest.mark.slow
def test_what_comes_near_the_end_of_float16_is_noted(coreml_bundle, tmp_path):
    exported = export(scaled(tmp_path, 1e4), plan_for(imgsz=(32, 32)), tmp_path / "out")
    (note,) = [text for text in exported.manifest.notes if "the largest float16 is 65504" in text]
    assert "activations reach" in note
    with MilRuntime(coreml_bundle.path / "model.mlpackage") as runtime:
        runtime.run({"image": np.full((1, 64, 64, 3), 255, np.uint8)})
        assert 0 < runtime.largest < 1000 and coreml.remarks(runtime) == []


@pytest.mark.slow
def test_a_fault_in_one_function_is_noticed(monkeypatch, micro, tmp_path):
    """In the carry over 18 chunks, which 48x48 alone has."""
    right = mil._carry

    def wrong(mb, h, P, chunks):
        return mb.mul(x=right(mb, h, P, chunks), y=np.float32(0.99 if chunks == 18 else 1))

    monkeypatch.setattr(mil, "_carry", wrong)
    with pytest.raises(ParityError) as raised:
        export(micro, plan_for(**SIZES), tmp_path)
    failures = str(raised.value).splitlines()[0].partition(": ")[2].split("; ")
    assert failures and all(text.startswith("portable 48x48: scan layers.0.blocks.0.op") for text in failures)


@pytest.mark.slow
def test_neutral_constants_that_the_converter_removes(micro, tmp_path):
    """D = 1 and a bias of zero, as freshly initialised: their operations are gone, the scan is still checked."""
    state = dict(golden.model_case("micro_64")["state"])
    for key, value in state.items():
        if key.endswith("Ds"):
            state[key] = np.ones_like(value)
        if key.endswith("dt_projs_bias"):
            state[key] = np.zeros_like(value)
    exported = export(save_as_released(state, tmp_path / "fresh.ckpt"), plan_for(imgsz=(32, 32)), tmp_path)
    assert max(scan["ssm"] for scan in exported.manifest.parity["scans"]) < 2e-5
