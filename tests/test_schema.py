"""The published JSON Schemas: they say what Python checks, and each of their rules refuses at its own place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import fastjsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evm_deploy import tasks
from evm_deploy._util.schema import InvalidError, Schema, keys, published
from evm_deploy.bench import record
from evm_deploy.bundle import manifest
from evm_deploy.bundle.manifest import Manifest, inside_bundle
from evm_deploy.data.preprocessing import MAX_CHANNELS, MAX_SIDE, RESIZES
from evm_deploy.data.resizing import INTERPOLATIONS
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.runtimes.base import Batch
from tests.broken import change_manifest, changed_manifest
from tests.records import JUDGED, LAYERS, content

FIGURES = {
    **JUDGED,
    **{f"{name}{of}": 0.5 for name in ("AP", "AP50", "AP75", "mIoU", "pixel_accuracy") for of in ("", "_float")},
}

MANIFEST = published("evm_deploy.bundle", "manifest.schema.json")
RECORD = published("evm_deploy.bench", "record.schema.json")
SCHEMAS = {"manifest": (manifest.SCHEMA, MANIFEST), "record": (record.SCHEMA, RECORD)}
KEYWORDS = {
    *("$schema", "$ref", "title", "description", "definitions", "type", "enum", "not", "if", "then", "pattern"),
    *("required", "properties", "patternProperties", "minProperties", "items", "minItems", "maxItems"),
    *("minimum", "maximum", "exclusiveMinimum"),
}
TYPES = {"string": str, "boolean": bool, "object": dict, "array": list, "integer": int, "number": (int, float)}
WRONG = (None, True, "x", [], {}, 1.5, 224.0, float("nan"), float("inf"), 10**400)
TENSOR = {"name": "image", "dtype": "uint8", "shape": [None, 64, 64, 3]}
FULL_MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    **dict.fromkeys(("name", "target", "artifact"), "x"),
    "plan": {
        "precision": "fp32",
        "scan": "auto",
        "batch": "1:4:8",
        "imgsz": [64, 64],
        "more_imgsz": [[32, 32]],
        "tol": 0.1,
        "labels": ["cat"],
        "chosen": {"value": "x", "reason": "y"},
        "settings": {},
        "engine": {},
        "input": "image",
        "head": "logits",
        "multi_label": False,
        "nms": "graph",
        "score_thr": 0.05,
        "iou": 0.5,
        "max_det": 100,
    },
    "model": {
        "name": "x",
        "task": "raw",
        "checkpoint": {
            **dict.fromkeys(("sha256", "file", "container", "prefix", "weights"), "x"),
            "others": ["x"],
            "dropped": ["x"],
            "origin": {},
        },
        "parameters": 3,
        "details": {"palette": [[3, 3, 3]]},
        "channels": 3,
    },
    "preprocessing": {
        "size": [64, 64],
        "resize": "crop",
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.1, 0.2, 0.3],
    },
    "inputs": [TENSOR],
    "outputs": [TENSOR],
    "scan": {"value": "plugin", "reason": "x", "plugins": {"linux-x86_64": "x"}},
    "details": {},
    "versions": {"onnx": "1"},
    "parity": {"failures": ["x"], "limit": 0.1},
    "accuracy": FIGURES,
    "selftest": {"preprocessing": 1.0, "outputs": {"logits": 0.1}, "apart": 0.01, "scans": {"large_delta": 0.1}},
    "notes": ["x"],
    "files": {"model.onnx": {"sha256": "0" * 64, "size_bytes": 3}},
    **dict.fromkeys(("built", "rejected"), True),
}
STATE = {"clocks_mhz": [1000], "temperatures_c": {"cpu": 40.0}, "throttled": 0, "load": 0.1}
FULL_RECORD = content(
    changes={"bundle": {"calibration": "minmax, smooth off"}},
    accuracy=FIGURES,
    device_ms={"inputs": 0.1},
    energy_mj={"package": 3.0},
    stages_ms={"preprocess": 0.2},
    layers=LAYERS,
    before=STATE,
    after=STATE,
    warnings=["x"],
)
FULL = json.loads(json.dumps({"manifest": FULL_MANIFEST, "record": FULL_RECORD}))  # nothing in it twice
Node = tuple[tuple[Any, ...], dict[str, Any], Any]


def nodes(root: dict[str, Any], node: dict[str, Any], value: Any, at: tuple[Any, ...] = ()) -> Iterator[Node]:
    """Every place of a full example with its rules: path, definition, value."""
    node = root["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    yield at, node, value
    for each in (node, node.get("then", {})):
        for key, inner in each.get("properties", {}).items():
            assert key in value, f"the example lacks {(*at, key)}"
            yield from nodes(root, inner, value[key], (*at, key))
    if "" in node.get("patternProperties", {}):
        assert value, f"the example has nothing in {at}"
        for key, item in value.items():
            yield from nodes(root, node["patternProperties"][""], item, (*at, key))
    if "items" in node:
        yield from nodes(root, node["items"], value[0], (*at, 0))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at the path; without it where `new` is `...`."""
    if not at:
        return new
    copy = inner = deepcopy(value)
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    if new is ...:
        del inner[at[-1]]
    return copy


def place(at: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in at).removeprefix(".")


def fits(node: dict[str, Any], value: Any) -> bool:
    """Whether the type and the bounds of one place take a value, said again, in other words than the validator's."""
    if "enum" in node:
        return any(type(value) is type(each) and value == each for each in node["enum"])
    names = node["type"] if isinstance(node["type"], list) else [node["type"]]
    if value is None:
        return "null" in names
    if not any(isinstance(value, TYPES[name]) for name in names if name != "null"):
        return False
    if isinstance(value, bool):
        return "boolean" in names
    if isinstance(value, int | float):
        low = node.get("exclusiveMinimum", node.get("minimum", -1e15))
        return low <= value <= node.get("maximum", 1e15) and value != node.get("exclusiveMinimum")
    if isinstance(value, str):
        return "pattern" not in node or re.fullmatch(node["pattern"].strip("^$"), value) is not None
    if isinstance(value, dict):
        return not node.get("required")
    return len(value) >= node.get("minItems", 0)


def oversteps(node: dict[str, Any], value: Any) -> Iterator[Any]:
    """Values just beyond each bound of a place."""
    for key, step in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1)):
        if key in node:
            yield node[key] + step
    if "minItems" in node:
        yield value[: node["minItems"] - 1]
    if "maxItems" in node:
        yield [*value, *value[:1] * (node["maxItems"] + 1 - len(value))]


def refused(name: str, value: Any) -> str | None:
    """Where it is refused; None where it is not."""
    try:
        SCHEMAS[name][0](value)
    except InvalidError as error:
        return error.where
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_full_example_fits_and_unknown_keys_do_anywhere(name):
    assert refused(name, FULL[name]) is None
    for at, node, value in nodes(SCHEMAS[name][1], SCHEMAS[name][1], FULL[name]):
        if "properties" in node or "then" in node:
            assert refused(name, changed(FULL[name], at, {**value, "a later key": {}})) is None, at


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_required_key_is(name):
    found = 0
    for at, node, _ in nodes(SCHEMAS[name][1], SCHEMAS[name][1], FULL[name]):
        optional = set(node.get("properties", {})) - set(node.get("required", ()))
        for key in (*node.get("required", ()), *node.get("then", {}).get("required", ())):
            assert refused(name, changed(FULL[name], (*at, key), ...)) == place((*at, key))
            found += 1
        for key in optional:
            assert refused(name, changed(FULL[name], (*at, key), ...)) is None
    assert found > 40


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_type_and_bound_is_kept_at_its_place(name):
    for at, node, value in nodes(SCHEMAS[name][1], SCHEMAS[name][1], FULL[name]):
        for beyond in oversteps(node, value):
            assert refused(name, changed(FULL[name], at, beyond)) == place(at), (at, beyond)
        for wrong in WRONG:
            where = refused(name, changed(FULL[name], at, wrong))
            if not fits(node, wrong) and wrong != {}:
                assert where == place(at), (at, wrong)
            elif fits(node, wrong):
                assert where is None, (at, wrong)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_uses_what_is_checked_here_of_draft_07(name):
    """No keyword that fastjsonschema would pass over; none that forbids a later key."""

    def look(node: Any) -> None:
        if isinstance(node, bool):
            return
        assert set(node) <= KEYWORDS
        for group in ("properties", "patternProperties", "definitions"):
            for each in node.get(group, {}).values():
                look(each)
        for key in ("items", "not", "if", "then"):
            look(node.get(key, True))

    _, schema = SCHEMAS[name]
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema["title"] and schema["description"]
    look(schema)
    fastjsonschema.compile(schema)


def test_the_schemas_say_what_python_knows():
    known = MANIFEST["properties"]
    assert known["preprocessing"]["properties"]["interpolation"]["enum"] == list(INTERPOLATIONS)
    assert known["preprocessing"]["properties"]["resize"]["enum"] == list(RESIZES)
    assert {known["preprocessing"]["properties"][key]["maxItems"] for key in ("mean", "std")} == {MAX_CHANNELS}
    assert known["preprocessing"]["properties"]["size"]["items"]["maximum"] == MAX_SIDE
    assert known["model"]["properties"]["task"]["enum"] == [*sorted(task.name for task in tasks.TASKS), None]
    assert known["schema_version"]["enum"] == [manifest.SCHEMA_VERSION]
    assert set(known) == set(Manifest.__dataclass_fields__)
    assert RECORD["properties"]["schema_version"]["enum"] == [record.SCHEMA_VERSION]
    assert {*RECORD["required"], *record.OPTIONAL} == set(RECORD["properties"])
    assert set(RECORD["properties"]) == set(record.Record.__dataclass_fields__)
    shared = set(MANIFEST["definitions"]) & set(RECORD["definitions"])
    assert "accuracy" in shared
    assert all(MANIFEST["definitions"][key] == RECORD["definitions"][key] for key in shared)


@given(
    st.text(st.sampled_from('a./\\:\0 {}[]%"?*\n'), max_size=9)
    | st.lists(st.sampled_from(["nul", "NUL", "Com1", "com0", "lpt³", "CONOUT$", ".", "/", "a", " "])).map("".join)
)
def test_a_name_leaves_the_bundle_as_in_zips(name):
    where = refused("manifest", changed(FULL_MANIFEST, ("files", name), FULL_MANIFEST["files"]["model.onnx"]))
    assert where == (None if inside_bundle(name) else f"files.{name}")


@given(st.text(st.sampled_from("0129:-dx\n"), max_size=9) | st.sampled_from(["dynamic", "1:4:8", "4:2:1"]))
def test_a_batch_of_python_is_one_of_the_schema(batch):
    try:
        Batch.parse(batch)
    except UsageError:
        return
    assert refused("manifest", changed(FULL_MANIFEST, ("plan", "batch"), batch)) is None


def test_order_of_sizes_is_checked_beside_the_schema(demo_bundle, tmp_path):
    bundle = changed_manifest(demo_bundle.path, tmp_path / "b", {"at": ["plan", "batch"], "value": "4:2:1"})
    with pytest.raises(BundleError, match="is not a batch") as raised:
        Manifest.read(bundle)
    assert raised.value.where == "plan.batch"


@pytest.mark.parametrize("bundle", ["demo_bundle", "coreml_bundle"])
def test_manifests_of_exports_fit(bundle, request):
    assert refused("manifest", json.loads(request.getfixturevalue(bundle).manifest.to_json())) is None


def test_older_manifests_open(demo_bundle, tmp_path):
    def older(content: dict[str, Any]) -> None:
        content.pop("selftest")
        content["plan"].pop("more_imgsz", None)
        content["model"].pop("task", None)

    bundle = changed_manifest(demo_bundle.path, tmp_path / "b", {"at": ["notes"], "value": []})
    assert Manifest.read(change_manifest(bundle, older)).selftest == {}


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "1e999", "NaN", "-0"])
def test_whatever_comes_is_refused_by_name(text, demo_bundle, tmp_path):
    value = json.loads(text)
    bundle = changed_manifest(demo_bundle.path, tmp_path / "b", {"at": ["parity", "failures"], "value": value})
    with pytest.raises(BundleError) as raised:
        Manifest.read(bundle)
    assert raised.value.code in ("manifest.invalid", "manifest.damaged")


def test_a_small_schema_names_places_too():
    schema = Schema(lambda: keys(error=keys(type={"type": "string"})))
    schema({"error": {"type": "x"}})
    for value, where in (({}, "error"), ({"error": {}}, "error.type"), ({"error": {"type": 1}}, "error.type"), (3, "")):
        with pytest.raises(InvalidError) as raised:
            schema(value)
        assert raised.value.where == where
