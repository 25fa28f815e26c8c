"""samples/web: the library gives what Python gives, and the page in a browser does what it says, offline too."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from evm_deploy._util.files import sha256
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.data.preprocessing import RESIZES, Preprocessing
from evm_deploy.data.resizing import INTERPOLATIONS
from evm_deploy.demo import write_images
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.base import Batch
from tests import segmenter
from tests.broken import (
    BROKEN,
    NO_SELF_TEST,
    change_manifest,
    changed_manifest,
    no_limits,
    other_limits,
    refusal,
)
from tests.test_archive import link, made, of_a_mac
from tests.test_interface import OTHERS, put_another_model, put_another_scan
from tests.test_vectors import CONTENT, PREDICTIONS, expected, is_predicted
from tests.test_vectors import FOLDER as VECTORS
from tests.toolchains import need, without
from tests.web import HEAD, LIBRARY, ROOT, SAMPLE, Browser, MissingError, build, npm, served

pytestmark = [pytest.mark.xdist_group("web"), pytest.mark.browser]  # one build, one browser

DOC = ROOT / "docs" / "embed" / "web.md"
SHOTS = Path(os.environ.get("EVM_WEB_SHOTS", ""))  # where to leave the page's images
IMAGES = 50
EXAMPLE = HEAD + '<input type="file" /><output></output><script type="module" src="/example.ts"></script>'
MAX_KB = 150  # of an image in the docs


# ------------------------------------------------------------------------------------------------ what everything needs


@pytest.fixture(scope="module")
def site(demo_bundle, tmp_path_factory) -> Path:
    """The sample with the demo's bundle, the docs' example and a page that hands out the library."""
    need("node", "chromium")
    (example,) = re.findall(r"```ts\n(.*?)```", DOC.read_text(), re.S)
    try:
        pages = {**LIBRARY, "example.html": EXAMPLE, "example.ts": example}
        return build(tmp_path_factory.mktemp("web") / "site", demo_bundle.path, pages)
    except MissingError as error:
        without(error.toolchain, str(error))


@pytest.fixture(scope="module")
def browser(site) -> Iterator[Browser]:
    with served(site) as address, Browser(address) as opened:
        yield opened


@pytest.fixture
def drive(browser):
    return browser.drive


@pytest.fixture
def library(browser):
    return browser.library


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("digits")
    write_images(folder, count=IMAGES)
    return sorted(folder.glob("*/*.png"), key=lambda path: path.stem)


# ------------------------------------------------------------------------------------------------ the library's numbers


def test_the_vectors_in_a_browser(library):
    """Every preprocessing vector, from the file to the pixels and the tensor."""
    found = library(
        """const found = [];
        for (const { image, preprocessing } of given) {
            const { rgb, width, height } = await evm.decode(await file(image));
            const made = new evm.Preprocessing(preprocessing);
            try {
                const pixels = made.pixels({ rgb, width, height });
                found.push({ width, height, pixels: pixels.toBase64(), tensor: [...made.normalise(pixels)] });
            } catch (error) {
                found.push({ width, height, code: error.code });
            }
        }
        return found;""",
        CONTENT["cases"],
        VECTORS,
    )
    for case, have in zip(CONTENT["cases"], found, strict=True):
        assert (have["width"], have["height"]) == (case["width"], case["height"])
        assert have.get("code") == case.get("code")
        if "code" in case:
            continue
        want = expected(case)
        pixels = np.frombuffer(base64.b64decode(have["pixels"]), np.uint8).reshape(want.shape)
        limit = 1 if case["image"].endswith(".jpg") else 0  # decoders of JPEG may differ by a rounding
        assert np.abs(pixels.astype(int) - want).max() <= limit, case["name"]
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in case["preprocessing"].items()}
        tensor = Preprocessing(**settings).normalise(pixels[None])
        assert np.array_equal(np.array(have["tensor"], np.float32).reshape(tensor.shape), tensor), case["name"]


def test_sizes_at_random_are_pillows(library):
    """Seeded noise and settings: to the last bit."""
    rng = np.random.default_rng(0)
    given, want = [], []
    for kind in INTERPOLATIONS * 20:
        height, width = (int(side) for side in rng.integers(3, 90, 2))
        size = tuple(int(side) for side in rng.integers(8, 70, 2))
        resize, grey = rng.choice(RESIZES), {"mean": (0.37,), "std": (0.5,)} if rng.random() < 0.3 else {}
        spec = Preprocessing(size, float(rng.uniform(0.3, 1)), kind, resize=str(resize), **grey)
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        rgb = base64.b64encode(image.tobytes()).decode()
        given.append({"preprocessing": vars(spec), "width": width, "height": height, "rgb": rgb})
        want.append(base64.b64encode(spec.pixels(image).tobytes()).decode())
    code = """return given.map(({ preprocessing, width, height, rgb }) =>
        new evm.Preprocessing(preprocessing).pixels({ width, height, rgb: Uint8Array.fromBase64(rgb) }).toBase64());"""
    assert library(code, given) == want


OPEN = 'await evm.Model.open(await evm.Bundle.open(%s), { provider: "wasm" })'
MODEL = "const model = " + OPEN % "evm.folderAt('files/bundle')" + ";"
CLASSIFY = f"""{MODEL}
    const found = [];
    for (const name of given) found.push(await model.classifyBlob(await file(name), 5));
    return found;"""


def alike(found: list[list[dict[str, Any]]], bundle: Path, images: list[Path], tolerance: float) -> None:
    with load(bundle, scan="portable") as model:
        expected = model.predict(images)
    for have, want in zip(found, expected, strict=True):
        assert have[0]["label"] == want[0].label
        assert sorted(p["index"] for p in have) == sorted(p.index for p in want)
        scores = {p.index: p.score for p in want}
        assert all(abs(p["score"] - scores[p["index"]]) <= tolerance for p in have)


def test_fifty_digits_are_classified_as_in_python(library, demo_bundle, digits, tmp_path):
    (tmp_path / "bundle").symlink_to(demo_bundle.path)
    (tmp_path / "digits").symlink_to(digits[0].parents[1])
    names = [f"digits/{path.parent.name}/{path.name}" for path in digits]
    alike(library(CLASSIFY, names, tmp_path), demo_bundle.path, digits, 1e-4)


def test_the_predictions_of_the_vectors_in_a_browser(library):
    code = """const place = ({ preprocessing, image: [height, width] }) => new evm.Preprocessing(preprocessing).geometry(width, height);
        const tensor = (type, values, shape) => ({ data: new type(values.flat(2)), shape });
        const detections = given.detections.map((each) => {
            const { boxes, scores, labels, count } = each.outputs;
            const outputs = {
                boxes: tensor(Float32Array, boxes, [1, boxes.length, 4]), scores: tensor(Float32Array, scores, [1, scores.length]),
                labels: tensor(Int32Array, labels, [1, labels.length]),
                ...(count !== undefined && { count: tensor(Int32Array, [count], [1]) }),
            };
            const { resized, offset } = place(each);
            const found = evm.detectionsOf(outputs, 0, { iou: each.iou, most: each.max_det }, place(each), []);
            return { resized, offset, boxes: found.map((d) => d.box), scores: found.map((d) => d.score), labels: found.map((d) => d.index) };
        });
        const label_maps = given.label_maps.map((each) => {
            const type = each.dtype === "uint8" ? Uint8Array : Int32Array;
            const { map, width, height } = place(each).mapToImage(new type(each.map.flat()));
            return Array.from({ length: height }, (_, y) => [...map.subarray(y * width, (y + 1) * width)]);
        });
        return { detections, label_maps };"""  # noqa: E501
    is_predicted(library(code, json.loads(PREDICTIONS.read_bytes())))


@pytest.mark.parametrize("nms", ["graph", "none"])
def test_detections_are_those_of_python(nms, library, detector_bundles, scenes, tmp_path):
    (tmp_path / "bundle").symlink_to(detector_bundles[nms].path)
    (tmp_path / "scenes").symlink_to(scenes[0].parent)
    code = f"""{MODEL}
        const found = [];
        for (const name of given) found.push(await model.detectBlob(await file(name)));
        const said = await model.segment(new Uint8Array(3), 1, 1).catch((error) => error.message);
        return [found, await model.selftest(), said];"""
    found, checks, said = library(code, [f"scenes/{path.name}" for path in scenes], tmp_path)
    with load(tmp_path / "bundle", scan="portable") as model:
        want, names = model.predict(scenes), {check.name: check.limit for check in model.selftest()}
    for have, python in zip(found, want, strict=True):
        assert [d["label"] for d in have] == [d.label for d in python]
        assert np.abs([a["score"] - b.score for a, b in zip(have, python, strict=True)]).max(initial=0) < 1e-4
        off = np.array([d["box"] for d in have]).reshape(-1, 4) - np.array([d.box for d in python]).reshape(-1, 4)
        assert np.abs(off).max(initial=0) < 0.05
    assert {check["name"]: check["limit"] for check in checks} == pytest.approx(names)
    assert all(check["ok"] for check in checks)
    assert said.startswith("no label maps to predict: the bundle gives detections")


def test_label_maps_are_those_of_python(library, segmenter_bundles, scenes, tmp_path):
    (tmp_path / "scenes").symlink_to(scenes[0].parent)
    names = [path.name for path in scenes if path.name != "1.png"]
    for resize, bundle in segmenter_bundles.items():
        (tmp_path / resize).symlink_to(bundle)
        code = f"""const model = {OPEN % f"evm.folderAt('files/{resize}')"}, found = [];
            for (const name of given) {{
                const {{ map, width, height }} = await model.segmentBlob(await file(`scenes/${{name}}`));
                found.push([map.constructor.name, [height, width], [...map]]);
            }}
            return [found, await model.selftest()];"""
        found, checks = library(code, names, tmp_path)
        dtype = "int32" if resize == "stretch" else "uint8"
        for (kind, size, have), name in zip(found, names, strict=True):
            want = segmenter.expected(bundle, np.asarray(Image.open(scenes[0].parent / name)))
            assert kind.lower().startswith(dtype) and tuple(size) == want.shape
            assert have == want.ravel().tolist(), (resize, name)
        assert [(check["name"], check["ok"]) for check in checks][1:] == [
            *(("not in common", True), ("label_map", True))
        ]


@pytest.fixture(scope="module")
def batched_bundle(micro, bundle_of) -> Bundle:
    """Return a bundle unlike the demo's: tensor input, probabilities, a batch from 2 to 3."""
    plan = ExportPlan("onnx", imgsz=(64, 64), input="tensor", head="probs", batch=Batch(2, 2, 3), scan="portable")
    return bundle_of(micro, plan)


def test_tensors_probabilities_and_batches(library, batched_bundle, digits, tmp_path):
    (tmp_path / "bundle").symlink_to(batched_bundle.path)
    (tmp_path / "digits").symlink_to(digits[0].parents[1])
    names = [f"digits/{path.parent.name}/{path.name}" for path in digits[:3]]
    alike(library(CLASSIFY, names, tmp_path), batched_bundle.path, digits[:3], 1e-4)
    code = "return [model.inputs, await model.selftest(), (await model.bench({ warmUp: 1, runs: 3 })).runs];"
    inputs, checks, runs = library(MODEL + code, None, tmp_path)
    assert inputs == [{"name": "tensor", "dtype": "float32", "shape": [None, 3, 64, 64]}] and runs == 3
    assert all(check["ok"] for check in checks) and {"probs", "preprocessing (of 255)"} < {c["name"] for c in checks}


def test_networks_of_other_channels(library, channel_bundles, digits, tmp_path):
    """Grey images as in Python; RGBA is refused, and its self-test has no image."""
    (tmp_path / "bundle").symlink_to(channel_bundles[1].path)
    (tmp_path / "digits").symlink_to(digits[0].parents[1])
    names = [f"digits/{path.parent.name}/{path.name}" for path in digits[:3]]
    alike(library(CLASSIFY, names, tmp_path), channel_bundles[1].path, digits[:3], 1e-4)
    code = """const checks = await model.selftest(), { runs } = await model.bench({ warmUp: 1, runs: 2 });
        try { await model.classify(new Uint8Array(3), 1, 1); } catch (error) { return [checks, runs, error.message]; }
        return [checks, runs, ""];"""
    checks, runs, said = library(MODEL + code, None, tmp_path)
    assert all(check["ok"] for check in checks) and checks[0]["name"] == "preprocessing (of 255)"
    assert (runs, said) == (2, "")
    (tmp_path / "bundle").unlink()
    (tmp_path / "bundle").symlink_to(channel_bundles[4].path)
    checks, runs, said = library(MODEL + code, None, tmp_path)
    assert all(check["ok"] for check in checks) and checks[0]["name"] == "logits"
    assert runs == 2 and said.startswith("the network takes 4 channels: images here are grey or RGB")


@pytest.fixture(scope="module")
def features_bundle(micro, bundle_of) -> Bundle:
    return bundle_of(micro, ExportPlan("onnx", imgsz=(64, 64), head="features"))


# ------------------------------------------------------------------------------------------ what is wrong, as in Python


TRY = """const said = [];
    const kinds = ["BundleError", "ImageError", "UsageError", "ToolchainError"];
    for (const name of given) {
        try {
            %s
            said.push(null);
        } catch (error) {
            if (!(error instanceof evm.EvmError)) throw error;
            said.push([kinds.find((kind) => error instanceof evm[kind]), error.code, error.where, error.message]);
        }
    }
    return said;"""


@pytest.fixture(scope="module")
def broken(demo_bundle, tmp_path_factory) -> tuple[Path, dict[str, tuple[str, str, str]]]:
    """(folder of broken bundles, and their zips, by name; the error of each in Python)."""
    folder, expected = tmp_path_factory.mktemp("broken"), {}
    for name, spoil in BROKEN.items():
        bundle = folder / name
        shutil.copytree(demo_bundle.path, bundle)
        spoil(bundle)
        expected[name] = refusal(lambda bundle=bundle: load(bundle))
        if bundle.exists():
            write_zip(bundle)
    return folder, expected


def assert_refused(names: Iterable[str], found: list[list[str]], expected: Mapping[str, tuple[str, str, str]]) -> None:
    for name, have in zip(names, found, strict=True):
        assert have, f"{name} is not refused"
        *told, message = have
        assert tuple(told) == expected[name] and message, name


def test_broken_bundles_are_refused_as_in_python(library, broken):
    """On a server, where a bundle that is gone cannot be told from a folder that holds none."""
    folder, expected = broken
    names = [name for name in BROKEN if name != "gone"]
    assert_refused(
        names, library(TRY % (OPEN % "evm.folderAt(`files/${name}`)"), names, folder, console="404"), expected
    )


def test_broken_bundles_in_zips_are_refused_too(library, broken):
    folder, expected = broken
    names = [name for name in BROKEN if name not in ("gone", "no manifest")]
    found = library(TRY % (OPEN % "await evm.zipped(await file(`${name}.zip`), `${name}.zip`)"), names, folder)
    assert_refused(names, found, expected)


def test_manifests_of_the_vectors(library, demo_bundle, tmp_path):
    cases = {str(i): case for i, case in enumerate(CONTENT["manifests"])}
    for name, case in cases.items():
        changed_manifest(demo_bundle.path, tmp_path / name, case)
    found = library(TRY % "await evm.Bundle.open(evm.folderAt(`files/${name}`));", [*cases], tmp_path)
    want = {name: ("BundleError", case["code"], case["where"]) for name, case in cases.items()}
    assert_refused(cases, found, want)


def test_other_models_are_refused(library, demo_bundle, digits, tmp_path):
    """Refuse models as Python does, except for strings, which this runtime opens, and the kind of a failed run."""

    def predicted(bundle: Path) -> object:
        with load(bundle) as model:
            return model.predict(digits[:1])

    for name in OTHERS:
        put_another_model(name, Path(shutil.copytree(demo_bundle.path, tmp_path / name)))
    shutil.copy(digits[0], tmp_path / "digit.png")
    classify = f"await ({OPEN % 'evm.folderAt(`files/${name}`)'}).classifyBlob(await file('digit.png'));"
    found = library(TRY % classify, [*OTHERS], tmp_path, console="Gather node")
    want = {name: refusal(lambda name=name: predicted(tmp_path / name)) for name in OTHERS}
    want |= {"strings": ("BundleError", "model.interface", "model.onnx"), "fails": ("ToolchainError", "", "")}
    assert_refused(OTHERS, found, want)


def test_limits_are_those_of_the_manifest(library, demo_bundle, tmp_path):
    changes = {"other": other_limits, "none": no_limits}
    for name, change in changes.items():
        change_manifest(Path(shutil.copytree(demo_bundle.path, tmp_path / name)), change)
    code = f"""const found = [];
        for (const name of given) found.push(await ({OPEN % "evm.folderAt(`files/${name}`)"}).selftest());
        return found;"""
    for name, checks in zip(changes, library(code, [*changes], tmp_path), strict=True):
        with load(tmp_path / name, scan="portable") as model:
            want = {check.name: check.limit for check in model.selftest()}
        assert {check["name"]: check["limit"] for check in checks} == pytest.approx(want)
        assert [check["name"] for check in checks if not check["ok"]] == (["logits"] if name == "other" else [])


def test_self_tests_that_are_none(library, demo_bundle, tmp_path):
    want = {}
    for name, damage in {**NO_SELF_TEST, "another scan": put_another_scan}.items():
        damage(Path(shutil.copytree(demo_bundle.path, tmp_path / name)))
        with load(tmp_path / name) as model:
            want[name] = refusal(model.selftest)
    found = library(TRY % f"await ({OPEN % 'evm.folderAt(`files/${name}`)'}).selftest();", [*want], tmp_path)
    assert_refused(want, found, want)


def hostile(folder: Path, bundle: Path) -> list[Path]:
    """Zips that are refused, in every way."""
    good = write_zip(bundle).read_bytes()
    flipped, locked = bytearray(good), bytearray(good)
    flipped[len(good) // 2] ^= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    for name, content in {"cut": good[: len(good) // 2], "empty": b"", "flipped": flipped, "locked": locked}.items():
        (folder / f"{name}.zip").write_bytes(content)
    entries: dict[str, list[Any]] = {
        "several": [("a/manifest.json", b"{}"), ("b/manifest.json", b"{}")],
        "parent": [("../evil", b"x")],
        "absolute": [("/etc/evil", b"x")],
        "inner": [("b/../../evil", b"x")],
        "backslash": [("b\\..\\evil", b"x")],
        "drive": [("C:evil", b"x")],
        "link": [(link("b/model.onnx"), b"/etc/passwd")],
        "twice": [("b/manifest.json", b"{}"), ("b/Manifest.json", b"{}")],
        "bomb": [("b/zeros", bytes(8 << 20))],
        "other": [("b/readme.txt", b"x")],
        "many": [(f"b/{i}", b"") for i in range(10_001)],
    }
    assert stat.S_ISLNK(link("x").external_attr >> 16)
    return [*folder.glob("*.zip"), *(made(folder / f"{name}.zip", *content) for name, content in entries.items())]


def test_hostile_zips_are_refused_as_in_python(library, demo_bundle, tmp_path):
    paths = hostile(tmp_path, demo_bundle.path)
    liar = made(tmp_path / "liar.zip", ("b/zeros", bytes(8 << 20)))  # the directory claims 10 bytes
    data = bytearray(liar.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (10).to_bytes(4, "little")
    liar.write_bytes(data)
    names = [path.name for path in paths]
    found = library(TRY % "await evm.zipped(await file(name), name);", [*names, "liar.zip"], tmp_path)
    want = {path.name: refusal(lambda path=path: load(path)) for path in paths}
    assert_refused([*names, "liar.zip"], found, {**want, "liar.zip": ("BundleError", "zip.refused", "b/zeros")})


def test_good_zips_open(library, demo_bundle, digits, tmp_path):
    """Open a zip as evm-export writes it, one without a folder, a stored one, and one with a Mac's files."""
    shutil.copy(write_zip(demo_bundle.path), tmp_path / "whole.zip")
    of_a_mac(tmp_path / "whole.zip", tmp_path / "mac.zip")
    files = [path for path in demo_bundle.path.rglob("*") if path.is_file()]
    for name, method in (("flat", zipfile.ZIP_DEFLATED), ("stored", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", method) as file:
            for path in files:
                file.write(path, path.relative_to(demo_bundle.path))
    shutil.copy(digits[0], tmp_path / "digit.png")
    code = """const labels = [];
        for (const name of given) {
            const bundle = await evm.Bundle.open(await evm.zipped(await file(name)));
            const model = await evm.Model.open(bundle, { provider: "wasm" });
            labels.push((await model.classifyBlob(await file("digit.png")))[0].label);
        }
        return labels;"""
    assert library(code, ["whole.zip", "flat.zip", "stored.zip", "mac.zip"], tmp_path) == [digits[0].parent.name] * 4


def test_usage_errors_are_those_of_python(library, demo_bundle, features_bundle, digits, tmp_path):
    (tmp_path / "demo").symlink_to(demo_bundle.path)
    (tmp_path / "features").symlink_to(features_bundle.path)
    code = f"""const open = async (name) => {OPEN % "evm.folderAt(`files/${name}`)"}
        const [demo, features] = [await open("demo"), await open("features")];
        const zeros = (n) => new Uint8Array(n);
        const acts = {{
            top: () => demo.classify(zeros(3), 1, 1, 0),
            features: () => features.classify(zeros(3), 1, 1),
            shape: () => demo.run({{ image: {{ dtype: "uint8", shape: [1, 32, 32, 3], data: zeros(3072) }} }}),
            dtype: () => demo.run({{ image: {{ dtype: "float32", shape: [1, 64, 64, 3], data: zeros(12288) }} }}),
            name: () => demo.run({{ pixels: {{ dtype: "uint8", shape: [1, 64, 64, 3], data: zeros(12288) }} }}),
            bytes: async () => demo.classify(zeros(5), 1, 1),
            provider: () => evm.Model.open(demo.bundle, {{ provider: "tpu" }}),
            threads: () => evm.Model.open(demo.bundle, {{ provider: "wasm", threads: demo.threads + 1 }}),
            fraction: () => evm.Model.open(demo.bundle, {{ provider: "wasm", threads: 1.5 }}),
            file: async () => demo.classifyBlob(new File(["text"], "cat.png")),
        }};
        {TRY.replace("name of given", "act of Object.values(acts)") % "await act();"}"""
    names = ("top", "features", "shape", "dtype", "name", "bytes", "provider", "threads", "fraction", "file")
    found = dict(zip(names, library(code, None, tmp_path), strict=True))
    zeros = np.zeros((1, 64, 64, 3), np.uint8)
    with load(demo_bundle.path) as demo, load(features_bundle.path) as features:
        want = {
            "top": refusal(lambda: demo.predict([zeros[0]], top=0)),
            "features": refusal(lambda: features.predict([zeros[0]])),
            "shape": refusal(lambda: demo.run({"image": zeros[:, :32, :32]})),
            "dtype": refusal(lambda: demo.run({"image": zeros.astype(np.float32)})),
            "name": refusal(lambda: demo.run({"pixels": zeros})),
        }
    assert_refused(want, [found[name] for name in want], want)
    assert "got 5 bytes for [1, 1, 3]" in found["bytes"][-1]
    assert "choose from: auto, wasm, webgpu" in found["provider"][-1]
    assert "threads already" in found["threads"][-1]
    assert found["fraction"][-1] == "threads is 1.5, it must be a whole number from 1"
    assert found["file"][-1] == "image cat.png is not an image that this browser can read"


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_draws_boxes_and_label_maps(drive, detector_bundles, segmenter_bundles, scenes):
    bundles = [detector_bundles["none"].path, segmenter_bundles["pad"]]
    shots = [SHOTS / f"web-{name}.png" for name in ("boxes", "label-map")] if SHOTS.name else []
    boxes, maps = drive("drawn", bundles=bundles, image=scenes[0], shots=shots)["seen"]
    with load(bundles[0], scan="portable") as model:
        found = [each for each in model.predict(scenes[0])[0] if each.score >= 0.3]
    assert [row[0] for row in boxes["rows"]] == [each.label for each in found[:20]]
    assert "detector, 5 classes" in boxes["facts"]
    assert 0 < boxes["drawn"] < 1 and boxes["headline"].split()[0].isdigit()
    assert maps["drawn"] == 1 and maps["alpha"] == 128 and "segmenter, 16 classes" in maps["facts"]
    assert maps["rows"][0][0].startswith("colour ")
    corner = segmenter.expected(bundles[1], np.asarray(Image.open(scenes[0])))[0, 0]
    assert np.abs(np.subtract(maps["corner"], segmenter.PALETTE[corner])).max() <= 2  # alpha is multiplied in and out


def test_the_page_classifies_and_tests_itself(drive, demo_bundle, digits):
    seen = drive("page", images=digits[:10])
    with load(demo_bundle.path, scan="portable") as model:
        expected = model.predict(digits[:10])
        names = [check.name for check in model.selftest()]
    for have, want in zip(seen["answers"], expected, strict=True):
        assert have["headline"] == f"{want[0].label} {100 * want[0].score:.1f} %"
        assert have["rows"][0] == [want[0].label, f"{100 * want[0].score:.1f} %"] and len(have["rows"]) == 5
        assert float(have["inference"].split()[0]) > 0
    assert seen["checks"]["caption"] == "PASSED" and [row[0] for row in seen["checks"]["rows"]] == names
    assert [row[0] for row in seen["latency"]["rows"]] == ["p50", "p90", "p99", "fastest"]
    assert re.fullmatch(r"WebAssembly, \d threads?: WebGPU has no adapter on this device", seen["conditions"])


def tampered(bundle: Path, folder: Path) -> Path:
    """A copy that expects another logit, hashes in order."""
    copy = folder / "tampered"
    shutil.copytree(bundle, copy)
    file = copy / "selftest" / "probes.safetensors"
    tensors = load_file(file)
    tensors["logits"][0, 0] += 1e-2
    save_file(tensors, file)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["selftest/probes.safetensors"]["sha256"] = sha256(file)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_another_bundle_replaces_the_first(
    drive, demo_bundle, batched_bundle, features_bundle, broken, digits, tmp_path
):
    """A zip dropped, a folder chosen, feature maps; a damaged one leaves the one before; a self-test that fails."""
    zipped = shutil.copy(write_zip(batched_bundle.path), tmp_path / "micro.zip")
    damaged = shutil.copy(broken[0] / "one bit.zip", tmp_path / "damaged.zip")
    folders = [features_bundle.path, tampered(demo_bundle.path, tmp_path)]
    given = [{"zip": zipped}, {"zip": damaged}, *({"folder": folder} for folder in folders)]
    micro, spoiled, features, wrong = drive("replaced", bundles=given, image=digits[0])["seen"]
    with load(batched_bundle.path, scan="portable") as model:
        want = model.predict(digits[:1])[0]
    assert micro["answer"]["rows"][0][0] == want[0].label and micro["problem"] is None
    assert batched_bundle.manifest.name in micro["facts"] and micro["checks"]["caption"] == "PASSED"
    assert "model.onnx is damaged (its sha256 differs)" in spoiled["problem"]
    assert batched_bundle.manifest.name in spoiled["facts"] and spoiled["answer"]["rows"] == micro["answer"]["rows"]
    assert features["answer"] is None and "feature maps" in features["facts"]
    assert features["checks"]["caption"] == "PASSED" and len(features["checks"]["rows"]) > 4
    failed = [row[0] for row in wrong["checks"]["rows"] if float(row[1]) > float(row[2])]
    assert wrong["checks"]["caption"] == "FAILED" and failed == ["logits"]


def test_files_that_are_no_images(drive, digits, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((VECTORS / "odd.png").read_bytes()[:100])
    narrow = Image.fromarray(np.zeros((9000, 1, 3), np.uint8))
    narrow.save(tmp_path / "narrow.png")
    images = [tmp_path / name for name in ("text.png", "cut.png", "narrow.png")]
    seen = drive("problems", images=images, good=digits[0])
    unreadable = "image {} is not an image that this browser can read"
    want = [unreadable.format("text.png"), unreadable.format("cut.png")]
    assert [text.strip() for text in seen["said"]] == [
        *want,
        "image narrow.png is 1x9000: too narrow to be cropped to 64x64",
    ]
    assert seen["answer"]["headline"].startswith(digits[0].parent.name) and not seen["problem"]


def test_it_works_offline_once_loaded(drive, digits):
    seen = drive("offline", console="net::ERR", image=digits[0])
    assert seen["gone"] and len(seen["console"]) == 1, "there was a network, or something else was missing"
    assert seen["answer"]["headline"].startswith(digits[0].parent.name)
    assert seen["checks"]["caption"] == "PASSED"
    assert len(seen["caches"]) == 1 and re.fullmatch(r"evm-[0-9a-f]{12}", seen["caches"][0])


def test_the_camera_runs_only_when_asked(drive):
    seen = drive("camera")
    assert not seen["asked"] and seen["state"] == "ended" and seen["pressed"] == "false"
    assert seen["first"] and seen["later"]


def test_the_pages_policy(drive):
    seen = drive("policy", console="Content Security Policy")
    refused = [line for line in seen["console"] if "Content Security Policy" in line]
    assert not seen["ran"] and seen["away"] and len(refused) >= 2
    assert seen["nameless"] == [] and seen["isolated"]


def test_providers_are_as_asked_or_said(drive):
    """No silent fallback: WebGPU asked for and not there is an error that offers WebAssembly."""
    seen = drive("asked", query="?provider=webgpu")
    assert "with webgpu" in seen["problem"] and "Use WebAssembly" in seen["problem"]
    assert re.fullmatch(r"WebAssembly, \d threads?: as requested", seen["conditions"])
    assert drive("asked", query="?provider=wasm&threads=2")["conditions"] == "WebAssembly, 2 threads: as requested"
    assert "choose from: auto, wasm, webgpu" in drive("asked", query="?provider=tpu&threads=1")["problem"]


@pytest.mark.skipif("EVM_WEBGPU" not in os.environ, reason="half a minute in software: EVM_WEBGPU=1 runs it")
def test_webgpu_gives_what_python_gives(drive, demo_bundle, digits):
    """On Chromium's adapter in software, asked for: by itself the page would not take it."""
    seen = drive("gpu", console="powerPreference|No available adapters", images=digits[:1])
    assert seen["conditions"] == "WebGPU: as requested" and seen["checks"]["caption"] == "PASSED"
    with load(demo_bundle.path, scan="portable") as model:
        expected = model.predict(digits[:1])
    assert [have["rows"][0][0] for have in seen["answers"]] == [want[0].label for want in expected]
    assert re.search("WebAssembly, .*: WebGPU would run in software .*swiftshader", seen["by itself"])


def test_the_docs_example_runs(drive, demo_bundle, digits):
    with load(demo_bundle.path, scan="portable") as model:
        want = model.predict(digits[:1])[0][0]
    assert drive("example", "No available adapters", image=digits[0])["output"] == f"{want.label} {want.score:.3f}"


@pytest.mark.parametrize(
    ("name", "scheme", "width", "height"), [("light", "light", 1200, 1060), ("phone", "dark", 390, 1500)]
)
def test_what_the_page_looks_like(drive, digits, tmp_path, name, scheme, width, height):
    """Nothing sticks out, its colours are there; with EVM_WEB_SHOTS=FOLDER the images stay."""
    folder = SHOTS if str(SHOTS) != "." else tmp_path
    file = folder / f"{name}.png"
    seen = drive("screenshot", image=digits[3], file=file, scheme=scheme, width=width, height=height)
    assert seen["scroll"] <= seen["width"]
    with Image.open(file) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
    paper = {"light": (0xFC, 0xFC, 0xFB), "dark": (0x14, 0x16, 0x18)}
    shipped = {"light": (0x00, 0x72, 0xB2), "dark": (0x56, 0xB4, 0xE9)}
    other = "dark" if scheme == "light" else "light"
    assert colours[paper[scheme]] > width * height / 2 and colours.get(paper[other], 0) < 50
    assert colours[shipped[scheme]] > width  # the button, the first bar


# -------------------------------------------------------------------------------------------------------- the scripts


def test_the_bundle_script_refuses_what_the_page_would(site, demo_bundle, broken):
    for name, want in {
        "one bit": "is damaged (its sha256 differs)",
        "artifact missing": "is missing",
        "a name that leaves": "leaves the bundle",
        "no manifest": "is not a bundle",
    }.items():
        done = npm(site, "run", "-s", "bundle", "--", str(broken[0] / name))
        assert done.returncode == 2 and want in done.stderr and "    at " not in done.stderr, done.stderr
    kept = site / "public" / "bundle" / "manifest.json"
    assert kept.read_bytes() == (demo_bundle.path / "manifest.json").read_bytes()


def test_what_is_committed():
    """No download addresses in the lock, a small image in the docs."""
    lock = json.loads((SAMPLE / "package-lock.json").read_text())
    assert not any("resolved" in package for package in lock["packages"].values())
    assert all(package.get("integrity") for path, package in lock["packages"].items() if path)
    assert (ROOT / "docs" / "embed" / "web.png").stat().st_size < MAX_KB << 10
