"""The native library in samples/web: WebAssembly kernels between pieces of a graph give what Python gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evm_deploy._util.onnx import inlined
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.demo import CHECKPOINT, write_images
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.runtimes.base import Batch
from evm_deploy.toolchain import cross_compile
from reliability.readers import rehash
from tests.broken import change_manifest
from tests.toolchains import need, without
from tests.toy import toy_network
from tests.web import LIBRARY, Browser, MissingError, build, served

pytestmark = [pytest.mark.xdist_group("web"), pytest.mark.browser]  # one build, one browser

PLATFORM = "browser-wasm32"
INSIDE = f"plugins/{PLATFORM}/evm_onnxruntime.wasm"
REASON = f"native kernel, simd128, from the bundle ({PLATFORM})"
MODEL = """const open = async (options) =>
        evm.Model.open(await evm.Bundle.open(evm.folderAt("files")), { provider: "wasm", ...options });"""
REFUSED = """const refused = async (act) => {
        try { await act(); } catch (error) {
            if (!(error instanceof evm.EvmError)) throw error;
            const kind = ["BundleError", "UsageError"].find((kind) => error instanceof evm[kind]);
            return [kind, error.code, error.where, error.message];
        }
        return null;
    };"""


@pytest.fixture(scope="module")
def bundle(bundle_of) -> Bundle:
    return bundle_of(CHECKPOINT, ExportPlan("onnx", native_library=PLATFORM))


@pytest.fixture(scope="module")
def browser(bundle, tmp_path_factory) -> Iterator[Browser]:
    need("node", "chromium")
    try:
        site = build(tmp_path_factory.mktemp("web") / "site", bundle.path, LIBRARY)
    except MissingError as error:
        without(error.toolchain, str(error))
    with served(site) as address, Browser(address) as opened:
        yield opened


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("digits")
    write_images(folder, count=20)
    return sorted(folder.glob("*/*.png"), key=lambda path: path.stem)


def with_library(bundle: Path, copy: Path) -> Path:
    """A copy of a bundle that carries the library."""
    shutil.copytree(bundle, copy)
    (copy / INSIDE).parent.mkdir(parents=True)
    shutil.copy(cross_compile.library("onnxruntime", PLATFORM), copy / INSIDE)
    change_manifest(copy, lambda content: content["scan"].update(plugins={PLATFORM: INSIDE}))
    rehash(copy, INSIDE)
    return copy


def passed(checks: list[dict[str, Any]], bundle: Path) -> bool:
    """Whether the self-test passed, with the checks and limits of Python."""
    with load(bundle, scan="portable") as model:
        want = {check.name: check.limit for check in model.selftest()}
    assert {check["name"]: check["limit"] for check in checks} == pytest.approx(want)
    return all(check["ok"] for check in checks)


# ----------------------------------------------------------------------------------------------------- what is computed


def test_digits_are_classified_as_in_python(browser, bundle, digits, tmp_path):
    """By the library, and by standard operators if these are asked for."""
    for path in bundle.path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "digits").symlink_to(digits[0].parents[1])
    code = f"""{MODEL}
        const found = [];
        for (const scan of ["auto", "bundled", "portable"]) {{
            const model = await open({{ scan }}), predictions = [];
            for (const name of given) predictions.push(await model.classifyBlob(await file(name), 10));
            found.push([model.scan, predictions, await model.selftest()]);
            await model.close();
        }}
        return found;"""
    names = [f"digits/{path.parent.name}/{path.name}" for path in digits]
    found = browser.library(code, names, tmp_path)
    with load(bundle.path, scan="portable") as model:
        expected = [{p.index: p.score for p in answer} for answer in model.predict(digits, top=10)]
    native = {"value": "plugin", "reason": REASON}
    assert [scan for scan, *_ in found] == [native, native, {"value": "portable", "reason": "as requested"}]
    for _, predictions, checks in found:
        for have, want in zip(predictions, expected, strict=True):
            assert have[0]["index"] == max(want, key=lambda index: want[index])
            assert {p["index"]: p["score"] for p in have} == pytest.approx(want, abs=1e-4)
        assert passed(checks, bundle.path)
    scores = [[p["score"] for answer in predictions for p in answer] for _, predictions, _ in found]
    assert scores[0] == scores[1] != scores[2]  # another order of sums: other code ran


FORMS = {
    "int8": {"precision": "int8", "imgsz": (64, 64)},
    "fp16": {"precision": "fp16"},
    "batches": {"imgsz": (64, 64), "input": "tensor", "head": "probs", "batch": Batch(2, 2, 3)},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_pass_the_self_test(form, browser, bundle_of, images, tmp_path):
    calib = {"calib": str(images)} if form == "int8" else {}
    made = bundle_of(CHECKPOINT, ExportPlan("onnx", **FORMS[form], **calib))
    code = f"{MODEL} const model = await open(); return [model.scan, await model.selftest()];"
    scan, checks = browser.library(code, None, with_library(made.path, tmp_path / "bundle"))
    assert scan == {"value": "plugin", "reason": REASON} and passed(checks, made.path)


def test_scans_of_another_network(browser, tmp_path):
    """Stand-alone scans of a network of others, one of whose blocks runs twice."""
    made = export(Source(toy_network()), ExportPlan("onnx", imgsz=(32, 48)), tmp_path)
    code = f"{MODEL} const model = await open(); return [model.scan, model.outputs, await model.selftest()];"
    scan, outputs, checks = browser.library(code, None, with_library(made.path, tmp_path / "bundle"))
    assert scan["value"] == "plugin" and passed(checks, made.path)
    assert [each["name"] for each in outputs] == ["logits", "map"]


def test_a_subgraph_that_reads_across_the_pieces(browser, copy):
    """The branches of an If, in the last piece, read what the first block gives. The weights are packed floats."""
    model = onnx.load(copy / "model.onnx")
    (first, *_) = (node.output[0] for node in model.graph.node if node.op_type == "EVSSBlock")
    last = model.graph.node[-1]
    last.output[0] = "scores"
    branches = {}
    for name, factor in (("then_branch", 2.0), ("else_branch", 1.0)):
        nodes = [
            helper.make_node("Constant", [], [f"{name}_factor"], value_float=factor),
            helper.make_node("ReduceMean", [first], [f"{name}_mean"], keepdims=0),
            helper.make_node("Mul", ["scores", f"{name}_factor"], [f"{name}_product"]),
            helper.make_node("Add", [f"{name}_product", f"{name}_mean"], [f"{name}_sum"]),
        ]
        branches[name] = helper.make_graph(nodes, name, [], [helper.make_empty_tensor_value_info(f"{name}_sum")])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    model.graph.node.append(helper.make_node("If", ["condition"], ["logits"], **branches))
    for tensor in model.graph.initializer:
        if tensor.name.startswith("layers.0.blocks.0.norm"):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, values.shape, values))
            assert tensor.float_data
    onnx.save(model, copy / "model.onnx")
    rehash(copy, "model.onnx")
    code = f"""{MODEL}
        const data = Uint8Array.from({{ length: 64 * 64 * 3 }}, (_, i) => (i * 37) % 251), found = [];
        for (const scan of ["bundled", "portable"]) {{
            const image = {{ dtype: "uint8", shape: [1, 64, 64, 3], data }};
            const {{ logits }} = await (await open({{ scan }})).run({{ image }});
            found.push([...logits.data]);
        }}
        return found;"""
    native, portable = browser.library(code, None, copy)
    assert native == pytest.approx(portable, abs=1e-4) and np.ptp(portable) > 1


def test_the_page_says_which_scans_run(browser, copy):
    conditions = {query: browser.drive("asked", query=query)["facts"] for query in ("", "?scan=portable")}
    assert REASON in conditions[""]
    assert "portable: as requested" in conditions["?scan=portable"]


# ------------------------------------------------------------------------------------------------------ what is refused

HEAD = b"\0asm\1\0\0\0"
SPOILED = {  # content of the library; what is said of it
    "no module": (b"\x7fELF", "expected magic word"),
    "imports": (HEAD + b"\1\4\1\x60\0\0" + b"\2\x09\1\3env\1f\0\0", "it imports env.f"),
    "nothing inside": (HEAD, "it has no memory"),
    "memory alone": (HEAD + b"\5\3\1\0\1" + b"\7\x0a\1\6memory\2\0", "it has no _initialize"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_file_that_is_no_library(name, browser, copy):
    content, says = SPOILED[name]
    (copy / INSIDE).write_bytes(content)
    rehash(copy, INSIDE)
    found = browser.library(
        f"{MODEL} {REFUSED} return [await refused(() => open()), (await open({{ scan: 'portable' }})).scan.value];",
        None,
        copy,
    )
    *told, message = found[0]
    assert told == ["BundleError", "file.damaged", INSIDE] and says in message
    assert found[1] == "portable"


def test_a_library_of_another_version(browser, copy):
    """The library's own bytes, but for the number that evm_web_version returns."""
    content = (copy / INSIDE).read_bytes()
    body = b"\x04\x00\x41\x01\x0b"  # size, no locals, i32.const 1, end
    at = [i for i in range(len(content)) if content[i : i + len(body)] == body]
    assert len(at) == 1
    (copy / INSIDE).write_bytes(content[: at[0] + 3] + b"\x02" + content[at[0] + 4 :])
    rehash(copy, INSIDE)
    *told, message = browser.library(f"{MODEL} {REFUSED} return refused(() => open());", None, copy)
    assert told == ["BundleError", "file.damaged", INSIDE]
    assert "it has version 2 of the interface, this page uses 1" in message


@pytest.mark.parametrize(
    ("spoil", "code"), [(Path.unlink, "file.missing"), (lambda path: path.write_bytes(b"x"), "file.damaged")]
)
def test_a_library_that_is_not_the_manifests(spoil, code, browser, copy):
    """A damaged library is an error, not a reason to run portable scans in silence."""
    spoil(copy / INSIDE)
    *told, _ = browser.library(f"{MODEL} {REFUSED} return refused(() => open());", None, copy, console="404")
    assert told == ["BundleError", code, INSIDE]


def spoiled_weights(copy: Path, name: str, change: Any) -> None:
    model = onnx.load(copy / "model.onnx")
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    change(tensor)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    rehash(copy, "model.onnx")


def shorter(tensor: TensorProto) -> None:
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:-1], tensor.name))


def cut(tensor: TensorProto) -> None:
    tensor.raw_data = tensor.raw_data[:-4]


def halves(tensor: TensorProto) -> None:
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shorter, "evm::EVSSBlock: norm_bias has 15 on axis 0 (C), x asks for 16"),
        (cut, "layers.0.blocks.0.norm.bias has 60 bytes, its shape [16] asks for 64"),
        (halves, "layers.0.blocks.0.norm.bias has element type 10, EVSSBlock takes 1"),
    ],
)
def test_weights_that_do_not_fit(change, says, browser, copy):
    spoiled_weights(copy, "layers.0.blocks.0.norm.bias", change)
    kind, *_, message = browser.library(f"{MODEL} {REFUSED} return refused(() => open());", None, copy)
    assert kind == "BundleError" and f"the native library, for layers.0.blocks.0/Add_1: {says}" in message


def test_a_file_that_is_no_model(browser, copy):
    content = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(content[: len(content) // 2])
    rehash(copy, "model.onnx")
    kind, *_ = browser.library(f"{MODEL} {REFUSED} return refused(() => open());", None, copy)
    assert kind == "BundleError"


def test_choices_that_are_not_there(browser, bundle, tmp_path):
    for name in ("native", "none", "other", "portable", "inlined"):
        shutil.copytree(bundle.path, tmp_path / name)
    onnx.save(inlined(onnx.load(bundle.path / "model.onnx")), tmp_path / "inlined" / "model.onnx")
    rehash(tmp_path / "inlined", "model.onnx")
    change_manifest(tmp_path / "none", lambda content: content["scan"].update(plugins={}))
    change_manifest(tmp_path / "other", lambda content: content["scan"].update(plugins={"linux-x86_64": INSIDE}))
    change_manifest(tmp_path / "portable", lambda content: content["scan"].update(value="portable"))
    code = f"""{REFUSED} const found = {{}};
        const open = async (name, scan, provider = "wasm") =>
            evm.Model.open(await evm.Bundle.open(evm.folderAt(`files/${{name}}`)), {{ provider, scan }});
        for (const name of ["none", "other", "portable", "inlined"])
            found[name] = [(await open(name, "auto")).scan, await refused(() => open(name, "bundled"))];
        found.webgpu = await refused(() => open("native", "bundled", "webgpu"));
        found.unknown = await refused(() => open("native", "plugin"));
        return found;"""
    found = browser.library(code, None, tmp_path)
    want = {
        "none": f"no native library for {PLATFORM} in the bundle; available: none",
        "other": f"no native library for {PLATFORM} in the bundle; available: linux-x86_64",
        "portable": "the bundle has portable scans only",
        "inlined": "the library computes no node at the top of the graph",
    }
    for name, reason in want.items():
        scan, refused = found[name]
        assert scan == {"value": "portable", "reason": reason}
        assert refused == ["UsageError", "", "", f"native kernels are not available: {reason}"]
    assert found["webgpu"] == ["UsageError", "", "", "native kernels are not available: WebGPU runs no native kernels"]
    assert "choose from: auto, bundled, portable" in found["unknown"][-1]
    assert json.loads((bundle.path / "manifest.json").read_text())["scan"]["plugins"] == {PLATFORM: INSIDE}
