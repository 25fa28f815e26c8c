"""samples/ios: its syntax, what it says of bundles against real ones, and its tests, with Debian's Swift."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.selftest import AXES
from evm_deploy.export.coreml.target import TARGET
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.mil import MilRuntime
from tests import swift
from tests.syntax import faults, parsed
from tests.test_vectors import CASES, CONTENT, FOLDER, PREDICTIONS
from tests.toolchains import need

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "samples" / "ios").rglob("*.swift"))
CODE = {path.name: path.read_text(encoding="utf-8") for path in SOURCES}
SCHEMA = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
DOCUMENTED = {word for code in re.findall(r"`([^`\n]+)`", SCHEMA) for word in re.findall(r"\w+", code)}
PLAIN = {"String": str, "Int": int, "Double": (int, float), "Float": (int, float), "Bool": bool}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_syntax(path):
    source = path.read_bytes()
    assert not faults("swift", source)
    apple = re.search(rb"^import (CoreML|ImageIO|SwiftUI|Combine)$", source, re.M)
    assert (b"NOT COMPILED BY THIS PROJECT" in source) == (path.parent.name == "EvmScreen")
    assert (b"NOT RUN BY THIS PROJECT" in source) == (apple is not None and path.parent.name != "EvmScreen")


def test_syntax_of_the_examples():
    for page in (ROOT / "docs" / "embed" / "ios.md", ROOT / "samples" / "ios" / "README.md"):
        (example,) = re.findall(r"```swift\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        assert not faults("swift", example.encode())


@pytest.mark.parametrize("damage", ["brace", "name", "string"])
def test_syntax_that_is_wrong_is_noticed(damage):
    source = CODE["Model.swift"]
    wrong = {
        "brace": source[: source.rindex("}")],
        "name": source.replace("func classify(", "func (", 1),
        "string": source.replace('"top is', "top is", 1),
    }
    assert wrong[damage] != source and faults("swift", wrong[damage].encode())


Struct = dict[str, Any]  # property -> its type as it stands there; nested struct -> Struct


def structs(node: Any) -> Struct:
    """The Decodable structs below a syntax node."""
    found: Struct = {}
    for child in node.children:
        if child.type == "class_declaration" and b": Decodable" in child.text.partition(b"{")[0]:
            name = child.child_by_field_name("name").text.decode()
            body = child.child_by_field_name("body")
            found[name] = structs(body) | {
                key: kind
                for each in body.children
                if each.type == "property_declaration" and "{" not in each.text.decode()
                for key, kind in re.findall(r"let (\w+): (.+)", each.text.decode())
            }
        else:
            found |= structs(child)
    return found


def mismatches(kind: str, value: Any, known: Struct, path: str) -> list[str]:
    """Where a JSON value is not of a Swift type."""
    if kind.endswith("?"):
        return [] if value is None else mismatches(kind[:-1], value, known, path)
    if kind in PLAIN:
        right = isinstance(value, PLAIN[kind]) and (kind == "Bool") == isinstance(value, bool)
        return [] if right else [f"{path} is no {kind}"]
    if match := re.fullmatch(r"\[String: (.+)\]", kind):
        return [m for key, each in value.items() for m in mismatches(match[1], each, known, f"{path}.{key}")]
    if match := re.fullmatch(r"\[(.+)\]", kind):
        return [m for each in value for m in mismatches(match[1], each, known, f"{path}[]")]
    fields = known[kind.rpartition(".")[2]]
    found = []
    for key, field in fields.items():
        if isinstance(field, dict):
            continue
        if key not in value and not field.endswith("?"):
            found.append(f"{path} has no {key}")
        found += mismatches(field, value.get(key), known | fields, f"{path}.{key}") if key in value else []
        if key not in DOCUMENTED:
            found.append(f"{path}.{key} is not documented")
    return found


def manifest_mismatches(source: str, manifest: Any) -> list[str]:
    known = structs(parsed("swift", source.encode()))
    assert len(known["Manifest"]) > 15 and known["Manifest"]["Preprocess"]["crop_pct"] == "Double?"
    return mismatches("Manifest", manifest, known, "manifest")


def test_the_manifest_has_the_keys_and_types_that_swift_reads(coreml_bundle):
    manifest = json.loads((coreml_bundle.path / "manifest.json").read_bytes())
    assert manifest_mismatches(CODE["Manifest.swift"], manifest) == []
    sized = manifest | {"details": {"functions": [{"name": "imgsz_32x32", "imgsz": [32, 32]}]}}
    assert manifest_mismatches(CODE["Manifest.swift"], sized) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("let artifact: String", "let artefact: String", "manifest has no artefact"),
        ("let built: Bool", "let built: String", "manifest.built is no String"),
        ("let shape: [Int?]", "let shape: [String]", r"manifest.inputs\[\].shape\[\] is no String"),
        ("let preprocessing: Double?", "let pixel_limit: Double?", "manifest.selftest.pixel_limit is not documented"),
    ],
)
def test_a_key_that_is_not_there_is_noticed(old, new, message, coreml_bundle):
    manifest = json.loads((coreml_bundle.path / "manifest.json").read_bytes())
    changed = CODE["Manifest.swift"].replace(old, new)
    assert changed != CODE["Manifest.swift"]
    assert any(re.fullmatch(message, found) for found in manifest_mismatches(changed, manifest))


def test_the_vectors_have_the_keys_and_types_that_swift_reads():
    known = structs(parsed("swift", CODE["VectorTests.swift"].encode()))
    known |= structs(parsed("swift", CODE["Manifest.swift"].encode()))["Manifest"]
    content = json.loads((ROOT / "sdk" / "vectors" / "cases.json").read_bytes())
    assert [m for m in mismatches("Vectors", content, known, "vectors") if "is not documented" not in m] == []
    assert len(CASES) == len(content["cases"])


def test_the_predictions_have_the_keys_and_types_that_swift_reads():
    known = structs(parsed("swift", CODE["VectorTests.swift"].encode()))
    known |= structs(parsed("swift", CODE["Manifest.swift"].encode()))["Manifest"]
    content = json.loads(PREDICTIONS.read_bytes())
    assert {*known["Predictions"]} == {"Outputs", "Detected", "Segmented", "detections", "label_maps"}
    known |= known["Predictions"]
    found = mismatches("Predictions", content, known, "vectors")
    assert [each for each in found if "is not documented" not in each] == []


def test_the_self_test_has_what_swift_looks_for(coreml_bundle):
    code = CODE["SelfTest.swift"]
    files = re.findall(r'"(selftest/[\w./]+)"', code)
    assert len(files) == 3 and not [file for file in files if not (coreml_bundle.path / file).is_file()]
    test_inputs = load_file(coreml_bundle.path / "selftest" / "probes.safetensors")
    manifest = coreml_bundle.manifest
    assert {"picture.pixels", manifest.plan["input"], *(o["name"] for o in manifest.outputs)} == set(test_inputs)
    assert 'tensors, "picture.pixels"' in code and "tensors[manifest.plan.input]" in code
    scans = load_file(coreml_bundle.path / "selftest" / "scans.safetensors")
    names = set(json.loads(re.search(r"scanInputs = (\[.+\])", code)[1]))
    axes = re.search(r"scanAxes = \[\n(.+),\n\]", code)[1]
    assert json.loads(f"{{{axes}}}") == AXES | {"y": AXES["u"]} and names == set(AXES)
    (template,) = re.findall(r'"selftest/(scan-.+)"', code)
    assert re.sub(r"\\\((\w)\)", r"{\1}", template) == TARGET.runtime.scan_case
    for scan in {key.partition(":")[0] for key in scans}:
        assert {key.partition(":")[2] for key in scans if key.startswith(f"{scan}:")} == names | {"y"}
        (_, K, L, D), N = scans[f"{scan}:u"].shape, scans[f"{scan}:A"].shape[2]
        file = TARGET.runtime.scan_case.format(K=K, L=L, D=D, N=N)
        with MilRuntime(coreml_bundle.path / "selftest" / file) as runtime:
            assert set(runtime.inputs) == names and set(runtime.outputs) == {"y"}


def test_every_limit_of_the_self_test_is_read(coreml_bundle):
    read = re.findall(r"manifest\.selftest\?\.(\w+)", CODE["SelfTest.swift"])
    assert {*read} == {*coreml_bundle.manifest.selftest, "apart"}  # apart: of detectors and segmenters


def test_codes_of_errors_are_those_of_the_vectors():
    """The codes in the source; the iOS sample reads no zips."""
    told = {code for source in CODE.values() for code in re.findall(r'code: "([^"]+)"', source)}
    assert told == {code for code in CONTENT["codes"] if not code.startswith("zip.")}


def test_places_of_manifests_are_those_of_the_vectors():
    """The key paths that Swift writes itself; those of other types and missing keys are the decoder's."""
    source = CODE["Manifest.swift"] + CODE["Preprocessing.swift"]
    told = re.findall(r'try require\(.+, "([^"]+)", "[^"]+"\)', source)
    known = {re.sub(r"\[\d\]", "[]", case["where"]) for case in CONTENT["manifests"]}
    assert len(told) > 10
    for place in told:
        pattern = re.escape(re.sub(r"\[\\\(i\)\]", "[]", place)).replace(re.escape("\\(name)"), ".*")
        assert any(re.fullmatch(pattern, each) for each in known), place


# ------------------------------------------------------------------------------------- compiled and run, with a Swift


@pytest.fixture(scope="module")
def xctest(tmp_path_factory):
    """xctest(bundle or None, suite) -> what the tests of the package print; they must pass. Warnings are errors."""
    need("swift")
    folder = tmp_path_factory.mktemp("swift")
    swift.write_pixels([path for path in FOLDER.iterdir() if path.suffix in (".png", ".jpg")], folder)
    swift.package("swift-build", "--build-tests")

    def run(bundle: Bundle | None, suite: str) -> str:
        environment = {"EVM_IMAGES": str(folder)}
        if bundle:
            swift.write_pixels([bundle.path / "selftest" / "picture.png"], folder)
            environment |= {"EVM_BUNDLE": str(bundle.path), "EVM_RUNTIME": str(folder)}
        with swift.served(folder):
            return swift.package("swift-test", "--skip-build", "--filter", suite, **environment)

    return run


@pytest.mark.compiler
@pytest.mark.xdist_group("swift")
def test_swift_gives_the_vectors(xctest):
    printed = xctest(None, "VectorTests")
    assert "Executed 4 tests, with 0 failures" in printed


@pytest.mark.compiler
@pytest.mark.xdist_group("swift")
def test_without_a_bundle_the_tests_of_bundles_skip(xctest):
    printed = xctest(None, "BundleTests")
    assert re.search(r"Executed \d+ tests, with \d+ tests skipped and 0 failures", printed), printed
    assert re.search(r"testDamageIsNamed'? skipped", printed), printed


@pytest.mark.compiler
@pytest.mark.xdist_group("swift")
@pytest.mark.parametrize("kind", ["image", "tensor", "detector"])
def test_swift_runs_bundles(kind, xctest, coreml_bundle, micro, named_detector, bundle_of):
    """Self-test, predictions, errors and the command, which fails if outputs are wrong by 1."""
    bundle = {
        "image": lambda: coreml_bundle,
        "tensor": lambda: bundle_of(micro, ExportPlan("coreml", "fp32", imgsz=(32, 32), input="tensor", batch=2)),
        "detector": lambda: bundle_of(named_detector, ExportPlan("coreml", "fp32", imgsz=(96, 128))),
    }[kind]()
    printed = xctest(bundle, "BundleTests")
    assert "0 failures" in printed and "evm-run-coreml: PASSED" in printed, printed
    assert len(re.findall(r"' skipped", printed)) == (kind == "detector")
    have = re.findall(r"^evm-run-coreml: (\d\.\d{3})  (\S+)", printed, re.M)
    with load(bundle.path) as model:
        (want,) = model.predict(bundle.path / "selftest" / "picture.png", top=5)
    assert [label for _, label in have] == [each.label.split()[0] for each in want] and want
    assert [float(score) for score, _ in have] == pytest.approx([each.score for each in want], abs=1e-3)


@pytest.mark.compiler
@pytest.mark.xdist_group("swift")
def test_swift_for_apple_compiles_against_stand_ins(tmp_path):
    """Core ML, ImageIO and the example of the page, as far as tests/ios declares Apple's modules."""
    need("swift")
    module = ("swiftc", "-warnings-as-errors", "-parse-as-library", "-I", tmp_path, "-emit-module", "-module-name")
    for name in ("CoreVideo", "ImageIO", "CoreML", "Accelerate"):
        swift.run(*module, name, "-o", tmp_path / f"{name}.swiftmodule", ROOT / "tests" / "ios" / f"{name}.swift")
    sources = swift.PACKAGE / "Sources"
    files = sorted((sources / "EvmBundle").glob("*.swift"))
    swift.run(*module, "EvmBundle", "-o", tmp_path / "EvmBundle.swiftmodule", *files)
    page = (ROOT / "docs" / "embed" / "ios.md").read_text(encoding="utf-8")
    (tmp_path / "example.swift").write_text(re.findall(r"```swift\n(.*?)```", page, re.S)[0])
    check = ("swiftc", "-warnings-as-errors", "-typecheck", "-I", tmp_path)
    swift.run(*check, *sorted((sources / "EvmRun").glob("*.swift")))
    swift.run(*check, tmp_path / "example.swift")
