"""Networks of tests/foreign_package.py through every target, and modules that no artifact could reproduce."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from importlib import import_module

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import evm_deploy
from evm_deploy import cli, load
from evm_deploy.commands.summary import export_summary
from evm_deploy.errors import UsageError
from evm_deploy.export import ExportPlan, export, verify
from evm_deploy.export.source import Source
from evm_deploy.model import Network
from tests.targets import MANY_NETWORKS

with evm_deploy.cpu_mamba():
    from tests import foreign_copies, foreign_package

SIZE = (32, 48)


def network(*names, blocks=foreign_package.BLOCKS):
    """Return a network whose scans carry a part of the output: D small, B and C large."""
    torch.manual_seed(0)
    module = foreign_package.Network(*names, blocks=blocks)
    with torch.no_grad():
        for path, value in module.named_parameters():
            if path.endswith((".D", ".D_b")):
                value.fill_(0.03)
            elif "x_proj" in path:
                value.mul_(3)
    return Network.of(module, torch.rand(1, 3, *SIZE), name="foreign")


@pytest.fixture(scope="module")
def every_block():
    """Return a Source of a network of every block, traced once."""
    return Source(network(*foreign_package.BLOCKS))


ALIKE = ("coreml", "trt-rtx", "litert")  # `auto` is `portable` there


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "scan"),
    [
        *((target, "auto") for target in MANY_NETWORKS),
        *((target, "portable") for target in MANY_NETWORKS if target not in ALIKE),
    ],
)
def test_every_entry_point_on_every_target(target, scan, every_block, tmp_path):
    manifest = export(every_block, ExportPlan(target, "fp32", scan=scan), tmp_path).manifest
    parity = manifest.parity
    assert target not in ALIKE or manifest.scan["value"] == "portable"
    assert parity["ok"] and parity["max_abs"] <= 1e-5 * parity["limit"] / ExportPlan("onnx", "fp32").tolerance
    names = {each["name"] for each in parity["scans"]}
    assert len(names) == 20 and {"blocks.module.mamba#2", "blocks.core#2", "blocks.own_loop"} <= names
    assert all(max(each["ssm"], each["probe"]) < 2e-5 for each in parity["scans"])
    assert min(each["share"] for each in parity["scans"]) > 0.01
    assert [each["name"] for each in manifest.outputs] == ["logits", "maps"]


@pytest.fixture(scope="module")
def every_copy():
    """Return a Source of a network of the blocks that bring kernels of their own, traced once."""
    return Source(network(*foreign_copies.BLOCKS, blocks=foreign_copies.BLOCKS))


@pytest.mark.slow
@pytest.mark.parametrize("target", MANY_NETWORKS)
def test_copies_of_kernels_on_every_target(target, every_copy, tmp_path):
    manifest = export(every_copy, ExportPlan(target, "fp32"), tmp_path).manifest
    parity = manifest.parity
    assert parity["ok"] and parity["max_abs"] <= 1e-5 * parity["limit"] / ExportPlan("onnx", "fp32").tolerance
    names = {each["name"] for each in parity["scans"]}
    assert names == {"blocks.windows", "blocks.by_vmamba", "blocks.simple.mamba", "blocks.simple.mamba#2"}
    assert min(each["share"] for each in parity["scans"]) > 0.01


@pytest.mark.slow
def test_a_network_runs_tests_itself_and_has_no_scatter(tmp_path):
    given = network("softplused", "vmamba", "mamba2", "interface")
    bundle = export(given, ExportPlan("onnx", "fp32"), tmp_path)
    kinds = Counter(node.op_type for node in onnx.load(bundle.path / "model.onnx").graph.node)
    assert kinds["SelectiveScan"] == 3 and not [kind for kind in kinds if kind.startswith("Scatter")]
    pixels = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())
        have = model.run({"image": pixels})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad(), evm_deploy.model.foreign.foreign_code():
        want = given.module(x)
    assert np.abs(have["logits"] - want["logits"].numpy()).max() <= 1e-5 * want["logits"].abs().max()
    assert np.abs(have["maps"] - want["maps"][0].numpy()).max() <= 1e-5 * want["maps"][0].abs().max()


@pytest.mark.slow
def test_an_export_whose_scans_carry_nothing_says_so(tmp_path):
    given = network("core", "interface")
    with torch.no_grad():
        for block in given.module.blocks.values():
            block.bias.fill_(-30.0)  # dt of 1e-13
            block.dt_proj.weight.fill_(0.0)
            block.mix = lambda u, z, delta, A, B, C, self=block: foreign_package.Nrow.mix(self, u, z, delta, A, B, C)
    manifest = export(given, ExportPlan("onnx", "fp32"), tmp_path).manifest
    assert max(scan["share"] for scan in manifest.parity["scans"]) < 0.01
    assert any("of any scan's output" in note for note in manifest.notes)
    assert not verify.blind(replace(verify.Parity(0, 1, 1, 1, 1, (), ()), scans=()))


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_a_network_without_scans_gets_no_native_library(target, tmp_path):
    bundle = export(Network.of(nn.Conv2d(3, 4, 1), torch.rand(1, 3, 8, 8)), ExportPlan(target, "fp32"), tmp_path)
    scan = bundle.manifest.scan
    assert scan == {
        "value": "portable",
        "reason": "the network has no Mamba-1 scan: standard operations only",
        "nodes": [],
    }
    assert not (bundle.path / "plugins").exists()


def test_mamba2_is_said():
    notes = network("mamba2", "mamba2_fused").spec.notes
    assert notes[-1:] == ("Mamba-2 scans: 2, in standard operations, chunk by chunk, without a native kernel",)
    assert not [note for note in notes if "no scan" in note]


def test_writes_into_a_tensor_are_no_scatters(tmp_path):
    class Writes(nn.Module):
        def forward(self, x):
            y = x.new_zeros(x.shape[0], 4, *x.shape[2:])
            y[:, 0] = x[:, 2]
            y[:, 1:3] = x[:, :2]
            y[:, -1] = 2 * x[:, 1]
            return y

    bundle = export(Network.of(Writes(), torch.rand(1, 3, 8, 8)), ExportPlan("onnx", "fp32"), tmp_path)
    kinds = {node.op_type for node in onnx.load(bundle.path / "model.onnx").graph.node}
    assert "Concat" in kinds and not [kind for kind in kinds if kind.startswith("Scatter")]


# ----------------------------------------------------------------------------------------------------------- outputs


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make, self.layer = make, nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.make(self.layer(x))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: y.mean((2, 3)), ["logits"]),
        (lambda y: (y, None, y.mean(1)), ["output0", "output2"]),
        (lambda y: [y], ["output"]),
        (lambda y: {"mask": y, "sides": [y, (y, y)]}, ["mask", "sides0", "sides10", "sides11"]),
    ],
)
def test_outputs_of_any_form_have_names(make, names):
    assert list(Network.of(Returns(make), torch.rand(1, 3, 8, 8)).spec.outputs) == names


def test_names_of_ones_own():
    spec = Network.of(Returns(lambda y: (y, y)), torch.rand(1, 3, 8, 8), outputs=["a", "b"]).spec
    assert spec.outputs == ("a", "b")
    with pytest.raises(UsageError, match=r"has 2 outputs .*, but 1 names were given"):
        Network.of(Returns(lambda y: (y, y)), torch.rand(1, 3, 8, 8), outputs=["a"])


def test_what_an_example_says():
    module = Returns(lambda y: y.mean((2, 3)))
    spec = Network.of(module, torch.rand(1, 3, 16, 24), task="classification").spec
    assert spec.defaults["imgsz"] == "16x24" and spec.num_classes == 4 and not module.training
    assert [note.partition(":")[0] for note in spec.notes] == [
        "the module was in training mode",
        "the network has no scan that evm-deploy knows",
    ]


def test_a_network_without_scans_is_not_said_to_run_scans(tmp_path, capsys):
    network = Network.of(Returns(lambda y: y.mean((2, 3))), torch.rand(1, 3, 16, 24), task="classification")
    bundle = export(network, ExportPlan("onnx"), tmp_path)
    summary = export_summary(bundle, 1.0)
    assert "no scans" in summary and "\nScan" not in summary
    assert cli.run_main([str(bundle.path), "--selftest"]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("PASSED\n") and "scans" not in said.out + said.err


# --------------------------------------------------------------------------------------------------------- bad input


torch_map = import_module("torch._higher_order_ops.map").map


class Branches(nn.Module):
    def forward(self, x):
        if x.mean() > 0:
            return x
        return -x


def unrolled(y):
    for _ in range(31_000):
        y = y + 1
    return y


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: torch.nn.functional.dropout(y, 0.5, True), "is random at inference: output output differs"),
        (lambda y: "text", "the network returns a str"),
        (lambda y: y.no_such_method(), r"does not run on an input \[1, 3, 8, 8\]: AttributeError: .*test_foreign_exp"),
        (unrolled, r"one run of the network is 31\d+ operations, 31000 of them at .*test_foreign_export.py:\d+"),
        (lambda y: torch.cond(y.sum() > 0, torch.neg, torch.abs, (y,)), r"torch's operator cond \(.*_export.py:\d+\)"),
        (lambda y: torch_map(torch.neg, y), r"torch's operator map \(.*test_foreign_export.py:\d+\), and no artifact"),
    ],
)
def test_what_no_artifact_could_reproduce_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        Network.of(Returns(make), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("example", [torch.rand(1, 16), torch.rand(1, 3, 4, 8, 8), torch.ones(1, 3, 8, 8).long()])
def test_inputs_that_are_no_images_are_refused(example):
    with pytest.raises(UsageError, match="the example input is torch"):
        Network.of(Branches(), example)


@pytest.mark.parametrize("target", ["onnx"])
def test_a_branch_on_data_is_named(target, tmp_path):
    given = Network.of(Branches(), torch.rand(1, 3, 8, 8))
    assert any(__file__ in note and "reads the value of a tensor" in note for note in given.spec.notes)
    with pytest.raises(UsageError, match=r"depends on the values of its input: .*test_foreign_export.py:\d+"):
        export(given, ExportPlan(target, "fp32"), tmp_path)


@torch.library.custom_op("evm_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)
HERE = rf"\({re.escape(__file__)}:\d+\)"


@pytest.mark.parametrize(
    ("target", "function", "message"),
    [
        ("onnx", torch.special.bessel_j0, rf"calls prims\.bessel_j0 {HERE}, which has no ONNX function"),
        ("onnx", doubled, rf"calls evm_test\.doubled {HERE}, which has no ONNX function"),
        *(
            pytest.param(
                *("coreml", function, f"calls {name} {HERE}, which coremltools .* does not convert"),
                marks=pytest.mark.slow,
            )
            for function, name in (
                (torch.special.bessel_j0, "special_bessel_j0"),
                (lambda x: doubled(x), "evm_test::doubled"),
            )
        ),
    ],
)
def test_an_operation_that_a_target_lacks_is_named(target, function, message, tmp_path, caplog):
    given = Network.of(Returns(function), outputs=["y"])
    with pytest.raises(UsageError, match=message) as raised:
        export(given, ExportPlan(target, "fp32", imgsz=(8, 8)), tmp_path)
    assert raised.value.hint == "write it with other operations of torch"
    assert not caplog.records  # coremltools logs it, too


@pytest.mark.slow
def test_a_network_that_cannot_be_copied_is_refused_where_a_copy_is_needed(tmp_path):
    given = Network.of(Returns(doubled), outputs=["y"])  # holds the operator as an attribute
    with pytest.raises(UsageError, match="cannot be copied, as Core ML needs it: TypeError: cannot pickle") as raised:
        export(given, ExportPlan("coreml", "fp32", imgsz=(8, 8)), tmp_path)
    assert "copy.deepcopy" in raised.value.hint


def test_an_output_too_many_is_named(tmp_path):
    given = Network.of(Returns(lambda y: (y, y)), outputs=["a"])
    with pytest.raises(UsageError, match="returns 2 tensors, but its outputs are a"):
        export(given, ExportPlan("onnx", "fp32", imgsz=(8, 8)), tmp_path)


@pytest.mark.parametrize("scan", ["aot", "plugin"])
def test_tensorrts_plugins_refuse_a_scan_without_softplus(scan, tmp_path):
    from evm_deploy.export.description import native_metadata
    from evm_deploy.export.hub.graph import trace
    from evm_deploy.export.pipeline import complete
    from evm_deploy.export.tensorrt.graph import tensorrt_graph

    source = Source(network("softplused"))
    plan, preprocessing = complete(ExportPlan("trt", "fp32", scan=scan), source.network(None).spec)
    graph = trace(
        source.reference(plan, preprocessing), plan, native_metadata(plan, source.network(plan).spec, preprocessing)
    )
    with pytest.raises(UsageError, match=f"gets dt without softplus, and the kernel of --scan {scan} computes"):
        tensorrt_graph(graph.model, plan)
