"""samples/android: its `evm` module, compiled and run on the JVM; the app's code against the declarations it uses."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from evm_deploy._util.files import sha256
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.loaded import LoadedBundle, load
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.tasks.task import Prediction
from tests import kotlin, segmenter
from tests.broken import (
    BROKEN,
    NO_SELF_TEST,
    change_manifest,
    changed_manifest,
    no_limits,
    other_limits,
    refusal,
)
from tests.syntax import faults
from tests.test_archive import of_a_mac
from tests.test_interface import put_another_model
from tests.test_vectors import CASES, CONTENT, FOLDER, PREDICTIONS, expected, is_predicted, preprocessing

pytestmark = [pytest.mark.xdist_group("android"), pytest.mark.jvm]  # one compiler, one JVM

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "samples" / "android"
APP = PROJECT / "app" / "src" / "main"
PAGE = ROOT / "docs" / "embed" / "android.md"
HERE = Path(__file__).parent / "android"
STANDINS = sorted((HERE / "standins").iterdir())


@pytest.fixture(scope="module")
def classpath() -> list[Path]:
    return kotlin.compiled("evm", [*PROJECT.glob("evm/src/**/*.kt"), HERE / "Driver.kt"])


@pytest.fixture(scope="module")
def ask(classpath):
    """ask(do, **what) -> the driver's answer; one process for all. `model`: the bundle whose model `bundle` has."""
    command = [*kotlin.JVM, "-cp", kotlin.joined(classpath), "DriverKt"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:

        def run(do: str, **what: Any) -> Any:
            print(
                json.dumps({"do": do, "model": what.get("bundle"), **what}, default=str), file=driver.stdin, flush=True
            )
            return json.loads(driver.stdout.readline())

        yield run
        driver.stdin.close()


def test_preprocessing_vectors(ask):
    """To the byte: resampling is Pillow's arithmetic, and the decoders agree on these images."""
    for name, case in CASES.items():
        answer = ask("pixels", image=FOLDER / case["image"], preprocessing=case["preprocessing"])
        if "code" in case:
            assert told(answer) == ("ImageError", case["code"], "")
            continue
        want = expected(case)
        assert answer["image"] == [case["width"], case["height"]] and answer["size"] == [*want.shape[1::-1]]
        have = np.frombuffer(base64.b64decode(answer["rgb"]), np.uint8).reshape(want.shape)
        assert np.array_equal(have, want), f"{name}: off by {np.abs(have.astype(int) - want).max()}"
        tensor = np.frombuffer(base64.b64decode(answer["normalised"]), "<f4").reshape(-1, *want.shape[:2])
        assert np.array_equal(tensor, preprocessing(case).normalise(have[None])[0]), name


def test_the_predictions_of_the_vectors(ask):
    is_predicted(ask("predictions", cases=json.loads(PREDICTIONS.read_bytes())))


@pytest.mark.parametrize("nms", ["graph", "none"])
def test_detections_are_those_of_python(nms, ask, detector_bundles, scenes, tmp_path):
    """ONNX Runtime's outputs in Python, decoded in Kotlin; and the self-test."""
    bundle = detector_bundles[nms].path
    with load(bundle, scan="portable") as model:
        want = model.predict(scenes)
        for path, expected in zip(scenes, want, strict=True):
            outputs = model.run({"image": np.repeat(model.preprocessing.pixels(path)[None], 2, axis=0)})
            save_file(outputs, tmp_path / "outputs.safetensors")
            have = ask("predict", bundle=bundle, outputs=tmp_path / "outputs.safetensors", image=path)
            assert [d["label"] for d in have] == [d.label for d in expected]
            assert [d["score"] for d in have] == pytest.approx([d.score for d in expected], abs=1e-5)
            off = np.array([d["box"] for d in have]).reshape(-1, 4) - np.array([d.box for d in expected]).reshape(-1, 4)
            assert np.abs(off).max(initial=0) < 0.01
        limits = {check.name: check.limit for check in model.selftest()}
    checks = ask("selftest", bundle=bundle, spoil="")
    assert {check["name"]: check["limit"] for check in checks} == pytest.approx(limits)
    assert all(check["ok"] for check in checks)
    apart = {check["name"]: float(check["error"]) for check in checks}["not in common"]
    spoilt = {check["name"]: float(check["error"]) for check in ask("selftest", bundle=bundle, spoil="scores")}
    assert apart == 0 < spoilt["not in common"]
    answer = ask("classify", bundle=bundle, outputs=tmp_path / "outputs.safetensors", top=5)
    assert told(answer)[0] == "UsageError" and "no classes to predict" in answer["error"]


def test_label_maps_are_those_of_python(ask, segmenter_bundles, scenes, tmp_path):
    outputs = tmp_path / "outputs.safetensors"
    for resize, bundle in segmenter_bundles.items():
        content = json.loads((bundle / "manifest.json").read_bytes())
        spec, dtype = preprocessing(content), content["outputs"][0]["dtype"]
        for path in scenes[:1] + scenes[2:]:
            image = np.asarray(Image.open(path))
            save_file({"label_map": segmenter.label_map(spec.pixels(image), dtype)[None]}, outputs)
            found = ask("predict", bundle=bundle, outputs=outputs, image=path)
            assert np.array_equal(found, segmenter.expected(bundle, image)), (resize, path)
        checks = ask("selftest", bundle=bundle, spoil="")
        assert [(check["name"], check["ok"]) for check in checks][1:] == [
            *(("not in common", True), ("label_map", True))
        ]


def test_the_orientation_of_damaged_images(ask):
    """Some number, whatever the bytes; the right one where they are whole."""
    rng = random.Random(0)
    for name in ("exif-6.jpg", "exif-6.png"):
        whole = (FOLDER / name).read_bytes()
        assert ask("orientation", file=base64.b64encode(whole).decode()) == 6
        for i in range(200):
            damaged = bytearray(whole[: rng.randrange(1, len(whole)) if i % 4 == 0 else None])
            for _ in range(3):
                damaged[rng.randrange(min(120, len(damaged)))] = rng.choice((0, 0x7F, 0x80, 0xFF))
            assert isinstance(ask("orientation", file=base64.b64encode(damaged).decode()), int)


def told(answer: dict[str, str]) -> tuple[str, str, str]:
    """Kind, code and place of the error in an answer of the driver, whose kind is named as in Python."""
    assert answer["error"]
    return answer["kind"].replace("Exception", "Error"), answer["code"], answer["where"]


def test_broken_bundles_are_refused_as_in_python(ask, demo_bundle, tmp_path):
    for name, damage in BROKEN.items():
        folder = shutil.copytree(demo_bundle.path, tmp_path / name.replace(" ", "-"))
        damage(folder)
        answer = ask("open", bundle=folder, model=demo_bundle.path)
        assert told(answer) == refusal(lambda folder=folder: load(folder)), name
    assert ask("open", bundle=demo_bundle.path) == {"opened": "model.onnx"}


def test_manifests_of_the_vectors(ask, demo_bundle, tmp_path):
    for i, case in enumerate(CONTENT["manifests"]):
        answer = ask("read", bundle=changed_manifest(demo_bundle.path, tmp_path / str(i), case))
        assert told(answer) == ("BundleError", case["code"], case["where"]), case["name"]


def _changed(bundle: Path, **changes: Any) -> Path:
    """A bundle's manifest with other values of its plan and scan, and of itself."""
    content = json.loads((bundle / "manifest.json").read_bytes())
    for part in (content["plan"], content["scan"], content):
        part.update({key: value for key, value in changes.items() if key in part or part is content["scan"]})
    (bundle / "manifest.json").write_text(json.dumps(content))
    return bundle


REFUSED = {
    "target": ({"target": "openvino"}, "is for target 'openvino', this app runs 'onnx'"),
    "native nodes": ({"value": "plugin"}, "the bundle has native nodes only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bundles_that_are_not_for_the_app(name, ask, demo_bundle, tmp_path):
    changes, message = REFUSED[name]
    folder = _changed(shutil.copytree(demo_bundle.path, tmp_path / "bundle"), **changes)
    assert message in ask("open", bundle=folder)["error"]


def test_the_library_of_the_bundle_runs_the_scans_if_the_app_asks(ask, demo_bundle, tmp_path):
    folder = shutil.copytree(demo_bundle.path, tmp_path / "bundle")
    inside = "plugins/android-aarch64/libevm_onnxruntime.so"
    (folder / inside).parent.mkdir(parents=True)
    (folder / inside).write_bytes(b"a library")
    content = json.loads((folder / "manifest.json").read_bytes())
    content["files"][inside] = {"sha256": sha256(folder / inside), "size_bytes": len(b"a library")}
    content["scan"]["plugins"] = {"android-aarch64": inside}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert ask("library", bundle=folder, platform="android-aarch64") == inside
    assert ask("library", bundle=folder, platform="android-x86_64") is None
    _changed(folder, value="plugin")
    assert ask("library", bundle=folder, platform="android-aarch64") == inside
    message = "native nodes only, and libraries for android-aarch64; this app asks for android-x86_64"
    assert message in ask("library", bundle=folder, platform="android-x86_64")["error"]


def test_zips(ask, demo_bundle, tmp_path):
    good = write_zip(shutil.copytree(demo_bundle.path, tmp_path / "good"))
    flat, cut = tmp_path / "flat.zip", tmp_path / "cut.zip"
    with zipfile.ZipFile(flat, "w") as archive:
        for file in (file for file in demo_bundle.path.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(demo_bundle.path).as_posix())
    for path in (good, flat, of_a_mac(good, tmp_path / "mac.zip")):
        assert ask("unpack", zip=path, into=tmp_path / "of" / path.stem) == {"opened": "model.onnx"}
    cut.write_bytes(good.read_bytes()[:-100])
    hostile = [
        cut,
        zipped(tmp_path / "a.zip", ("../outside", b"x")),
        zipped(tmp_path / "b.zip", ("/outside", b"x")),
        zipped(tmp_path / "c.zip", ("b/x", b"x"), ("b/X", b"y")),
        zipped(tmp_path / "d.zip", ("b/zeros", bytes(8 << 20))),
        zipped(tmp_path / "e.zip", ("b/x", b"x")),
        zipped(tmp_path / "f.zip", ("a/manifest.json", b"{}"), ("b/manifest.json", b"{}")),
    ]
    for path in hostile:
        answer = ask("unpack", zip=path, into=tmp_path / "into" / path.stem)
        assert told(answer) == refusal(lambda path=path: load(path)), path.stem
    assert not [*tmp_path.rglob("outside")]


def test_what_is_damaged_anywhere_is_an_error_or_the_bundle(ask, demo_bundle, tmp_path):
    """Zips, most of them in the directory at their end, and manifests: never a crash of the driver."""
    rng = random.Random(0)
    good = write_zip(shutil.copytree(demo_bundle.path, tmp_path / "good")).read_bytes()
    for i in range(40):
        damaged, at = bytearray(good), rng.randrange(len(good) - 900 if i % 4 else 0, len(good))
        damaged[at] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged.zip").write_bytes(damaged[: None if i % 5 else at])
        answer = ask("unpack", zip=tmp_path / "damaged.zip", into=tmp_path / "into" / str(i))
        assert answer.get("opened") == "model.onnx" or answer["error"]
    content = json.loads((demo_bundle.path / "manifest.json").read_bytes())
    for deep in ("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"x":' * 100_000):
        (tmp_path / "good" / "manifest.json").write_text(deep)
        assert ask("open", bundle=tmp_path / "good")["error"]
    for key in ("artifact", "files", "inputs", "outputs", "parity", "plan", "preprocessing", "scan", "target"):
        for wrong in (None, 3, "x", [], {}, [None], {"x": None}):
            (tmp_path / "good" / "manifest.json").write_text(json.dumps({**content, key: wrong}))
            assert "error" in ask("open", bundle=tmp_path / "good"), (key, wrong)


def zipped(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def test_classes_of_50_images_are_those_of_python(ask, demo_bundle, tmp_path):
    """Kotlin's pixels, ONNX Runtime in Python, Kotlin's classes."""
    paths = [tmp_path / f"{i}.png" for i in range(50)]
    for i, path in enumerate(paths):
        Image.fromarray(synthetic_image(60 + 5 * i, 90 + 3 * i, seed=i)).save(path)
    with load(demo_bundle.path) as model:
        spec = demo_bundle.manifest.preprocessing
        answers = [ask("pixels", image=path, preprocessing=spec) for path in paths]
        pixels = [np.frombuffer(base64.b64decode(a["rgb"]), np.uint8).reshape(1, 64, 64, 3) for a in answers]
        logits = np.concatenate([model.run({"image": each})["logits"] for each in pixels])
        want = model.predict(paths)
    save_file({"logits": logits}, tmp_path / "outputs.safetensors")
    same(ask("classify", bundle=demo_bundle.path, outputs=tmp_path / "outputs.safetensors", top=5), want)
    assert len({found[0].label for found in want}) > 1


@pytest.mark.parametrize("head", ["logits", "probs"])
def test_classes_of_awkward_scores_are_those_of_python(head, ask, demo_bundle, tmp_path, monkeypatch):
    """Large ones, and ties."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 10)).astype(np.float32) * rng.choice([0.1, 3, 100], (50, 1)).astype(np.float32)
    rows[7] = 1.5
    rows[8, 3] = rows[8, 5] = rows[8].max() + 1
    if head == "probs":
        rows = np.abs(rows) / np.abs(rows).sum(1, keepdims=True)
    outputs = [{"name": head, "dtype": "float32", "shape": [1, 10]}]
    folder = _changed(shutil.copytree(demo_bundle.path, tmp_path / "bundle"), head=head, outputs=outputs)
    save_file({head: rows}, tmp_path / "outputs.safetensors")
    monkeypatch.setattr(LoadedBundle, "_check_interface", lambda self: None)
    with load(folder) as model:
        monkeypatch.setattr(model, "_answers", lambda pixels: {head: rows[: len(pixels)]})
        monkeypatch.setattr(type(model), "_batch_size", 50)
        want = model.classify(np.zeros((50, 64, 64, 3), np.uint8), top=3)
    same(ask("classify", bundle=folder, outputs=tmp_path / "outputs.safetensors", top=3), want)


@pytest.mark.parametrize("name", ["NaN", "Inf", "more classes"])
def test_scores_that_are_none(name, ask, demo_bundle, tmp_path):
    folder = shutil.copytree(demo_bundle.path, tmp_path / "bundle")
    put_another_model(name, folder)
    with load(folder) as model:
        outputs = model.run({"image": np.zeros((1, 64, 64, 3), np.uint8)})
        want = refusal(lambda: model.predict([folder / "selftest" / "picture.png"]))
    save_file(outputs, tmp_path / "outputs.safetensors")
    answer = ask("classify", bundle=folder, outputs=tmp_path / "outputs.safetensors", top=5)
    assert told(answer) == want
    answer = ask("classify", bundle=_changed(folder, batch="3"), outputs=tmp_path / "outputs.safetensors", top=5)
    gives = f"gives logits float32[1, {outputs['logits'].shape[1]}]"
    assert answer["error"] == f"the model {gives} for image uint8[3, 64, 64, 3]"


@pytest.mark.parametrize("batch", ["1", "3", "dynamic"])
@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_what_the_runtime_is_given(kind, batch, ask, demo_bundle, tmp_path):
    folder = _changed(shutil.copytree(demo_bundle.path, tmp_path / "bundle"), input=kind, batch=batch)
    spec = demo_bundle.manifest.preprocess()
    pixels = spec.pixels(folder / "selftest" / "picture.png")[None]
    want = np.repeat(pixels if kind == "image" else spec.normalise(pixels), 3 if batch == "3" else 1, axis=0)
    fed = ask("feed", bundle=folder)
    assert (fed["name"], fed["dtype"], fed["shape"]) == ("image", str(want.dtype), [*want.shape])
    assert base64.b64decode(fed["bytes"]) == want.tobytes()


@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_what_the_runtime_of_a_grey_network_is_given(kind, ask, demo_bundle, tmp_path):
    def grey(content: dict[str, Any]) -> None:
        content["preprocessing"].update(mean=[0.3], std=[0.2], resize="pad")

    folder = change_manifest(shutil.copytree(demo_bundle.path, tmp_path / "bundle"), grey)
    spec = Manifest.read(_changed(folder, input=kind)).preprocess()
    pixels = spec.pixels(folder / "selftest" / "picture.png")[None]
    want = pixels if kind == "image" else spec.normalise(pixels)
    fed = ask("feed", bundle=folder)
    assert (fed["dtype"], fed["shape"]) == (str(want.dtype), [*want.shape])
    assert base64.b64decode(fed["bytes"]) == want.tobytes()


def test_images_of_a_network_of_four_channels_are_refused(ask, channel_bundles):
    spec = channel_bundles[4].manifest.preprocessing
    answer = ask("pixels", image=FOLDER / "odd.png", preprocessing=spec)
    assert told(answer)[0] == "ImageError" and "takes 4 channels" in answer["error"]
    checks = ask("selftest", bundle=channel_bundles[4].path, spoil="")
    assert "preprocessing (of 255)" not in {check["name"] for check in checks}
    assert all(check["ok"] for check in checks)


def same(answers: list[Any], want: list[list[Prediction]]) -> None:
    for have, python in zip(answers, want, strict=True):
        assert [(p["label"], p["index"]) for p in have] == [(p.label, p.index) for p in python]
        assert [p["score"] for p in have] == pytest.approx([p.score for p in python], rel=1e-12)


@pytest.mark.parametrize("batch", ["2", "dynamic", "1:2:2"])
def test_the_self_test_fills_batches(batch, ask, demo_bundle, tmp_path):
    """Three inputs, two at a time."""
    folder = _changed(shutil.copytree(demo_bundle.path, tmp_path / "bundle"), batch=batch)
    assert all(check["ok"] for check in ask("selftest", bundle=folder, spoil=""))


def test_the_self_test(ask, demo_bundle):
    """Passes with a runtime that answers what is expected; one value changed, or the image turned, fails."""
    with load(demo_bundle.path, scan="portable") as model:
        want = model.selftest()
    checks = ask("selftest", bundle=demo_bundle.path, spoil="")
    assert [check["name"] for check in checks] == [check.name for check in want]
    assert [check["limit"] for check in checks] == pytest.approx([check.limit for check in want], rel=1e-6)
    assert all(check["ok"] for check in checks)
    for spoil, name in (
        ("logits", "logits"),
        ("layers.1.blocks.0.op:y", "scan layers.1.blocks.0.op"),
        ("turned", "preprocessing (of 255)"),
    ):
        failed = [check["name"] for check in ask("selftest", bundle=demo_bundle.path, spoil=spoil) if not check["ok"]]
        assert failed == [name]


@pytest.mark.parametrize("change", [other_limits, no_limits])
def test_limits_are_those_of_the_manifest(change, ask, demo_bundle, tmp_path):
    folder = change_manifest(shutil.copytree(demo_bundle.path, tmp_path / "bundle"), change)
    with load(folder, scan="portable") as model:
        want = {check.name: check.limit for check in model.selftest()}
    scan = "layers.1.blocks.0.op"
    checks = ask("selftest", bundle=folder, spoil=f"{scan}:y")
    assert {check["name"]: check["limit"] for check in checks} == pytest.approx(want)
    failed = [check["name"] for check in checks if not check["ok"]]
    assert failed == ([] if change is other_limits else [f"scan {scan}"])


def test_self_tests_that_are_none(ask, demo_bundle, tmp_path):
    for name, damage in NO_SELF_TEST.items():
        folder = shutil.copytree(demo_bundle.path, tmp_path / name.replace(" ", "-"))
        damage(folder)
        answer = ask("selftest", bundle=folder, model=demo_bundle.path, spoil="")
        with load(folder) as model:
            assert told(answer) == refusal(model.selftest), name


def test_a_self_test_that_is_not_there(ask, demo_bundle, tmp_path):
    folder = shutil.copytree(demo_bundle.path, tmp_path / "bundle")
    content = json.loads((folder / "manifest.json").read_bytes())
    del content["files"]["selftest/scans.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(content))
    for cut in (100, 4, 0):
        file = folder / "selftest" / "scans.safetensors"
        file.write_bytes(file.read_bytes()[:cut])
        answer = ask("selftest", bundle=folder, model=demo_bundle.path, spoil="")
        assert f"bundle {folder} has no readable self-test: selftest/scans.safetensors cannot" in answer["error"]


CONTROL = """
fun control(options: ai.onnxruntime.OrtSession.SessionOptions, view: android.widget.TextView) {
    options.registerCustomOpsLibrary("a name of the C API")
    view.text = 1
}
"""


def test_the_app_is_right_for_what_android_and_onnx_runtime_declare(classpath, tmp_path):
    """With the page's example, against stand-ins for just the declarations that they use, as published; nothing is run.
    What is wrong in a file beside them is noticed, and nothing else."""
    (tmp_path / "Control.kt").write_text(CONTROL)
    (tmp_path / "Page.kt").write_text(re.search(r"```kotlin\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1])
    sources = [*APP.glob("kotlin/**/*.kt"), *STANDINS, tmp_path / "Page.kt", tmp_path / "Control.kt"]
    found = kotlin.diagnostics(sources, classpath, tmp_path / "classes")
    assert [line.partition("Control.kt:")[2].split(":")[0] for line in found] == ["3", "4"], "\n".join(found)
    assert "unresolved reference 'registerCustomOpsLibrary'" in found[0] and "mismatch" in found[1]


def test_the_project_parses_and_names_what_is_there():
    scripts = [*PROJECT.glob("*.kts"), *PROJECT.glob("*/*.kts")]
    assert len(scripts) == 4 and not [script for script in scripts if faults("kotlin", script.read_bytes())]
    assert faults("kotlin", scripts[0].read_bytes() + b"}") and faults("kotlin", b"dependencies { implementation(")
    android = "{http://schemas.android.com/apk/res/android}"
    application = ElementTree.parse(APP / "AndroidManifest.xml").getroot().find("application")
    assert (
        (APP / "kotlin" / "evm" / "sample" / application.find("activity").get(f"{android}name")[1:])
        .with_suffix(".kt")
        .is_file()
    )
    assert application.find("provider").get(f"{android}authorities") == "${applicationId}.images"
    main = (APP / "kotlin" / "evm" / "sample" / "MainActivity.kt").read_text()
    assert '"$packageName.images"' in main
    (shared,) = ElementTree.parse(APP / "res" / "xml" / "images.xml").getroot()
    assert shared.tag == "cache-path" and f'File(cacheDir, "{shared.get("path").strip("/")}")' in main
    strings = ElementTree.parse(APP / "res" / "values" / "strings.xml").getroot()
    assert application.get(f"{android}label") == f"@string/{strings[0].get('name')}"
