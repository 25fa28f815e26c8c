"""The C++ SDK does what Python does: the same pixels, classes, self-tests, outputs, in ONNX Runtime and OpenVINO."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from evm_deploy import load, plugin_path
from evm_deploy.bench import bench
from evm_deploy.bench.record import Settings
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.demo import CHECKPOINT, write_images
from evm_deploy.errors import ImageError, UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.runtimes.base import Batch
from tests import segmenter
from tests.broken import no_limits, other_limits
from tests.sdk_cpp import ROOT, SCRIPTS, Model, build, changed, classify, drive, package, run
from tests.test_vectors import CASES, FOLDER, PREDICTIONS, expected, is_predicted, preprocessing
from tests.toolchains import need, tensorrt_headers

pytestmark = [pytest.mark.xdist_group("sdk"), pytest.mark.compiler]  # its builds take both cores


@pytest.fixture(scope="session")
def images_50(tmp_path_factory) -> list[Path]:
    """30 digits of the demo, 20 synthetic images of odd sizes."""
    from evm_deploy.demo import digits

    folder = tmp_path_factory.mktemp("fifty")
    images, _ = digits("heldout")
    rng = np.random.default_rng(5)
    others = [synthetic_image(int(rng.integers(20, 300)), int(rng.integers(20, 300)), seed) for seed in range(20)]
    paths = []
    for i, image in enumerate([*images[-30:], *others]):
        paths.append(folder / f"{i:02d}.png")
        Image.fromarray(image).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def bundles(micro, demo_bundle, bundle_of) -> dict[str, Path]:
    """Return bundles of every kind of input, output, batch and size."""
    labels = tuple(f"kind {i}" for i in range(10))
    onnx = {"input": "tensor", "head": "probs", "imgsz": (64, 96), "batch": Batch(2, 2, 3), "labels": labels}
    openvino = {"scan": "portable", "head": "features", "imgsz": (96, 64), "batch": Batch(1, 1, None)}
    plans = {
        "tensor": (micro, ExportPlan("onnx", **onnx)),
        "openvino": (CHECKPOINT, ExportPlan("openvino", batch=Batch(3, 3, 3))),
        "portable": (micro, ExportPlan("openvino", **openvino)),
    }
    made = {name: bundle_of(checkpoint, plan).path for name, (checkpoint, plan) in plans.items()}
    return {"image": demo_bundle.path, **made}


def test_the_vectors(tmp_path):
    """Decoded and preprocessed in C++, under AddressSanitizer: to the bit."""
    commands, names = [], []
    for name, case in CASES.items():
        spec = preprocessing(case)
        commands.append(
            (
                *("pixels", *spec.size, spec.crop_pct, spec.interpolation, spec.resize),
                *(",".join(map(str, spec.mean)), FOLDER / case["image"], tmp_path / name),
            )
        )
        names.append(name)
    for name, answer in zip(names, drive(*commands), strict=True):
        case = CASES[name]
        if "code" in case:
            assert answer.startswith(f"error: ImageError\t{case['code']}\t\t"), answer
            continue
        assert answer == "ok ", name
        want = expected(case).astype(int)
        have = np.fromfile(tmp_path / name, np.uint8).reshape(want.shape)
        assert np.abs(have - want).max() == 0, name


def test_the_predictions_of_the_vectors(tmp_path):
    """Boxes and label maps, under AddressSanitizer."""
    assert drive(("predictions", PREDICTIONS, tmp_path / "found.json")) == ["ok "]
    is_predicted(json.loads((tmp_path / "found.json").read_bytes()))


@pytest.mark.parametrize("nms", ["graph", "none"])
def test_detections_are_those_of_python(nms, detector_bundles, scenes, tmp_path):
    """In the API for C and in the sample, which draws them."""
    bundle = detector_bundles[nms].path
    with load(bundle, scan="portable", threads=1) as python:
        want = python.predict(scenes)
        limits = {check.name: check.limit for check in python.selftest()}
    rgb = [np.asarray(Image.open(path)) for path in scenes]
    with Model(bundle, scan="portable", threads=1) as model:
        for image, expected in zip(rgb, want, strict=True):
            found = model.detect(image)
            assert [d.index for d in found] == [d.index for d in expected]
            assert np.abs([a.score - b.score for a, b in zip(found, expected, strict=True)]).max(initial=0) < 1e-5
            boxes = np.array([[*a.box] for a in found]) - [b.box for b in expected]
            assert np.abs(boxes).max(initial=0) < 1e-2
        checks = model.selftest()
        assert {name: limit for name, (_, limit) in checks.items()} == pytest.approx(limits)
        assert all(error <= limit for error, limit in checks.values())
        with pytest.raises(UsageError, match="no classes to predict: the bundle gives detections"):
            model.classify(rgb)
        with pytest.raises(UsageError, match="no label maps to predict: the bundle gives detections"):
            model.segment(rgb[0])
    flags = ("--scan", "portable", "--min-score", "0.5", "--save", tmp_path / "drawn")
    rows = json.loads(classify(bundle, *scenes, "--json", *flags).stdout)
    for row, path, expected in zip(rows, scenes, want, strict=True):
        over = [d for d in expected if d.score >= 0.5]
        assert [d["label"] for d in row["detections"]] == [d.label for d in over]
        copy = Image.open(row["saved"])
        assert copy.size == Image.open(path).size and (not over or np.any(np.asarray(copy) != Image.open(path)))
    again = classify(bundle, scenes[0], *flags).stdout.splitlines()
    assert len(again) == 1 + len(rows[0]["detections"]) and (tmp_path / "drawn" / "0-2.png").is_file()
    done = classify(bundle, scenes[0], "--scan", "portable", "--save", scenes[0])
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_label_maps_are_those_of_python(segmenter_bundles, scenes, tmp_path):
    for resize, bundle in segmenter_bundles.items():
        with Model(bundle, threads=1) as model:
            for path in scenes[:1] + scenes[2:]:
                image = np.asarray(Image.open(path))
                assert np.array_equal(model.segment(image), segmenter.expected(bundle, image)), (resize, path)
            checks = model.selftest()
            assert checks["not in common"] == checks["label_map"] == (0, 0) and len(checks) == 3
            with pytest.raises(UsageError, match="no boxes to predict: the bundle gives label_map"):
                model.detect(image)
    row = json.loads(classify(segmenter_bundles["pad"], scenes[0], "--json", "--save", tmp_path).stdout)[0]
    shares = [each["share"] for each in row["classes"]]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert row["classes"][0]["label"].startswith("colour ")
    drawn, before = (np.asarray(Image.open(path)).astype(int) for path in (row["saved"], scenes[0]))
    classes = segmenter.expected(segmenter_bundles["pad"], before.astype(np.uint8))
    assert np.array_equal(drawn, (before + np.array(segmenter.PALETTE)[classes]) // 2)


@pytest.mark.parametrize("name", ["exif-5", "grey-16-bit", "transparent", "palette", "one-bit"])
def test_images_are_decoded_as_python_does(name, tmp_path):
    from evm_deploy.data.reading import read_image

    case = CASES[name]
    want = np.asarray(read_image(FOLDER / case["image"])).astype(int)
    assert drive(("image", FOLDER / case["image"], tmp_path / "rgb")) == [f"ok {want.shape[1]} {want.shape[0]}"]
    have = np.fromfile(tmp_path / "rgb", np.uint8).reshape(want.shape)
    assert np.abs(have - want).max() == 0


def test_arrays_are_preprocessed_to_the_bit(demo_bundle):
    """And strides are heeded."""
    from evm_deploy.data.reading import read_image

    with Model(demo_bundle.path) as model, load(demo_bundle.path) as python:
        for case in CASES.values():
            if case["image"] == "too-narrow.png":
                continue
            rgb = np.ascontiguousarray(read_image(FOLDER / case["image"]))
            want = python.preprocessing.pixels(rgb)
            assert np.array_equal(model.preprocess(rgb), want), case["name"]
            wide = np.zeros((rgb.shape[0], rgb.shape[1] + 3, 3), np.uint8)
            wide[:, : rgb.shape[1]] = rgb
            assert np.array_equal(model.preprocess(wide[:, : rgb.shape[1]]), want), case["name"]


def test_any_size_is_preprocessed_to_the_bit(demo_bundle, tmp_path):
    """Noise, which shows the order of the passes."""
    rng = np.random.default_rng(8)
    specs = [
        {"size": [48, 64]},
        {"size": [100, 30], "interpolation": "bilinear"},
        {"size": [64, 64], "crop_pct": 0.7},
        {"size": [90, 64], "resize": "stretch", "mean": [0.5], "std": [0.5]},
        {"size": [64, 90], "resize": "pad"},
        {"size": [90, 64], "resize": "pad", "interpolation": "bilinear-opencv", "mean": [0.3], "std": [0.5]},
    ]
    for i, spec in enumerate(specs):
        bundle = changed(
            demo_bundle.path, tmp_path / str(i), lambda content, spec=spec: content["preprocessing"].update(spec)
        )
        with Model(bundle) as model, load(bundle) as python:
            for high in (40, 400, 40, 400, 1000):
                height, width = rng.integers(8, [high, high // rng.integers(1, 5)])
                noise = rng.integers(0, 256, (height, width, 3), np.uint8)
                assert np.array_equal(model.preprocess(noise), python.preprocessing.pixels(noise)), (
                    spec,
                    height,
                    width,
                )


def test_normalising(tmp_path):
    case = CASES["imagenet"]
    spec: Preprocessing = preprocessing(case)
    assert drive(("normalised", *spec.size, FOLDER / case["image"], tmp_path / "tensor")) == ["ok "]
    have = np.fromfile(tmp_path / "tensor", np.float32).reshape(3, *spec.size)
    np.testing.assert_allclose(have, spec.normalise(spec.pixels(FOLDER / case["image"])[None])[0], rtol=0, atol=1e-6)
    for c, y, x, value in case["normalised"]:
        assert have[c, y, x] == pytest.approx(value, abs=1e-6)


def said(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as raised:
        call()
    return str(raised.value)


def lowerings(name: str) -> list[tuple[str, dict[str, object]]]:
    """(Python's scan, options of C++) for each way that a bundle's scans run here."""
    if name == "openvino":
        return [("bundled", {"scan": "bundled"})]
    return [("portable", {"scan": "portable"}), ("plugin", {"scan": "plugin", "plugin": plugin_path("onnxruntime")})]


@pytest.mark.parametrize("name", ["image", "tensor", "openvino"])
def test_the_same_five_best_on_50_images(name, bundles, images_50):
    for scan, options in lowerings(name):
        with load(bundles[name], scan=scan, threads=1) as model:
            want = model.predict(images_50)
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        done = classify(bundles[name], *images_50, "--threads", 1, "--json", *flags)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)
        assert [row["image"] for row in rows] == [str(path) for path in images_50]
        for row, best in zip(rows, want, strict=True):
            assert [(p["label"], p["index"]) for p in row["top"]] == [(p.label, p.index) for p in best]
            assert [p["score"] for p in row["top"]] == pytest.approx([p.score for p in best], abs=1e-5)


def test_the_c_abi_gives_the_same(bundles, images_50):
    rgb = [np.asarray(Image.open(path).convert("RGB")) for path in images_50[:7]]
    for name in ("image", "tensor"):
        with Model(bundles[name], threads=1) as model, load(bundles[name], scan="portable", threads=1) as python:
            for row, expected in zip(model.classify(rgb, 3), python.predict(rgb, 3), strict=True):
                assert [index for index, _ in row] == [p.index for p in expected]
                assert [model.label(index) or f"class {index}" for index, _ in row] == [p.label for p in expected]
            assert model.label(10**6) is None
            assert len(model.classify(rgb[:1], 1000)[0]) == python.manifest.model["num_classes"]


@pytest.mark.parametrize("name", ["image", "tensor", "openvino", "portable"])
def test_outputs_and_self_tests_are_the_same(name, bundles):
    options = {"scan": "bundled" if name == "openvino" else "portable", "threads": 1}
    with Model(bundles[name], **options) as model, load(bundles[name], **options) as python:
        (spec,) = python.inputs.values()
        rng = np.random.default_rng(3)
        value = rng.integers(0, 255, (spec.shape[0] or 5, *spec.shape[1:])).astype(spec.dtype)
        have, want = model.run(value), python.run({spec.name: value})
        assert set(have) == set(want)
        for output, expected in want.items():
            np.testing.assert_allclose(have[output], expected, rtol=1e-5, atol=1e-5)
        checks = model.selftest()
        assert {c.name: c.limit for c in python.selftest()} == pytest.approx(
            {n: limit for n, (_, limit) in checks.items()}
        )
        assert all(error <= limit for error, limit in checks.values())
        misfit = value[:0] if spec.shape[0] is None else np.concatenate([value, value])
        assert spec.name in said(lambda: model.run(misfit)) and said(lambda: python.run({spec.name: misfit}))
        if name == "portable":
            shot = synthetic_image(9, 9, 0)
            assert said(lambda: model.classify([shot])) and said(lambda: python.predict([shot]))


@pytest.mark.parametrize("change", [other_limits, no_limits])
def test_limits_are_those_of_the_manifest(change, bundles, tmp_path):
    bundle = changed(bundles["image"], tmp_path, change)
    with Model(bundle, scan="portable") as model, load(bundle, scan="portable") as python:
        checks, want = model.selftest(), {check.name: check.limit for check in python.selftest()}
    assert {name: limit for name, (_, limit) in checks.items()} == pytest.approx(want)
    failed = [name for name, (error, limit) in checks.items() if error > limit]
    assert failed == (["logits"] if change is other_limits else [])


def test_a_self_test_can_fail(bundles, tmp_path):
    """The negative control of the test above: other labels of the same bundle pass, another preprocessing does not."""
    bundle = changed(
        bundles["image"], tmp_path, lambda content: content["preprocessing"].update(interpolation="bilinear")
    )
    with Model(bundle) as model:
        error, limit = model.selftest()["preprocessing (of 255)"]
        assert error > limit
    done = classify(bundle, "--selftest")
    assert done.returncode == 4 and "FAILED" in done.stdout


def test_the_sample_prints_what_evm_run_prints(bundles, images_50, capsys):
    from evm_deploy import cli

    flags = [str(bundles["image"]), "--selftest", "--scan", "portable", "--top", "3", *map(str, images_50[:2])]
    assert cli.run_main(flags) == 0
    python = capsys.readouterr().out
    done = classify(*flags)
    blank = re.compile(r"\d\.\de-\d\d  limit")  # errors may differ in their last digit
    assert blank.sub("limit", done.stdout) == blank.sub("limit", python)


def test_the_bench_is_like_evm_bench(bundles):
    """Here that it measures the same thing; within 5 %: benchmarks/cpp_sdk.py, on a machine with nothing else to do."""
    done = classify(bundles["image"], "--bench", "--threads", 1, "--scan", "portable", "--seconds", 3, "--json")
    found = json.loads(done.stdout)
    python = bench(bundles["image"], Settings(threads=1, scan="portable", limit_s=3)).summary_ms
    assert found["min"] <= found["p50"] <= found["p90"] <= found["p95"] <= found["p99"] <= found["max"]
    assert found["runs"] >= 75 or not found["stable"]
    assert 0.3 < found["p50"] / python["p50"] < 3


def test_an_app_in_c99(bundles):
    found = run([build("release") / "app", bundles["image"], "selftest"]).splitlines()
    assert (
        re.fullmatch(r"\d 0\.\d{4}", found[0]) and len(found) >= 5 and all(line.endswith(" ok") for line in found[1:])
    )


def test_the_documented_apps_build_against_an_installed_sdk(tmp_path, bundles):
    """docs/embed/cpp.md, word for word."""
    blocks = dict(re.findall(r"```(cpp|cmake|c)\n(.*?)```", (ROOT / "docs" / "embed" / "cpp.md").read_text(), re.S))
    sdk, app = tmp_path / "sdk", tmp_path / "app"
    run([SCRIPTS / "cmake", "--install", build("release") / "sample" / "sdk", "--prefix", sdk])
    app.mkdir()
    (app / "main.cpp").write_text(blocks["cpp"])
    (app / "CMakeLists.txt").write_text(blocks["cmake"])
    (app / "main.c").write_text(blocks["c"])
    settings = [f"-DCMAKE_PREFIX_PATH={sdk}", f"-DOpenVINO_DIR={package('openvino') / 'cmake'}"]
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    run(["cmake", "-S", app, "-B", tmp_path / "out", "-G", "Ninja", *settings], environment)
    run(["cmake", "--build", tmp_path / "out"], environment)
    lines = run([tmp_path / "out" / "app", bundles["image"]]).splitlines()
    assert len(lines) >= 10 and re.fullmatch(r"\d [01]\.\d+", lines[0]) and lines[-1].endswith(" ok")
    assert subprocess.run([tmp_path / "out" / "app", tmp_path], capture_output=True).returncode == 2
    libraries = [
        "-levm",
        "-lstdc++",
        f"-L{sdk / 'lib'}",
        f"-Wl,-rpath,{sdk / 'lib'}",
        f"-Wl,-rpath-link,{package('openvino') / 'libs'}",
    ]
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{sdk / 'include'}"]
    run(["gcc", *strict, app / "main.c", "-o", tmp_path / "c", *libraries])
    assert re.fullmatch(r"\d 0\.\d{3}\n", run([tmp_path / "c", bundles["image"]]))


def test_threads_share_openvino(bundles, images_50):
    """8 threads, each the same as one alone."""
    rgb = [np.asarray(Image.open(path).convert("RGB")) for path in images_50[:8]]
    with Model(bundles["openvino"], scan="bundled", threads=1) as model, ThreadPoolExecutor(8) as pool:
        want = [model.classify([one]) for one in rgb]
        assert [*pool.map(lambda one: model.classify([one]), rgb * 5)] == want * 5


def test_tensorrt_against_stand_ins(tmp_path):
    """Engine and CUDA are those of sdk/cpp/tests/tensorrt, under AddressSanitizer."""
    assert run([build("address") / "tensorrt", tmp_path]) == "ok\n"


def test_tensorrt_compiles_with_nvidias_headers():
    need("TensorRT's headers")
    include = tensorrt_headers()
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    headers = cuda if (cuda / "cuda_runtime_api.h").is_file() else ROOT / "sdk" / "cpp" / "tests" / "tensorrt"
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-isystem", include, "-isystem", headers]
    source = ROOT / "sdk" / "cpp"
    run(["g++", *flags, f"-I{source / 'include'}", source / "src" / "tensorrt.cpp"])


def test_networks_of_other_channels(channel_bundles, images_50):
    """Grey images as in Python; RGBA is refused, and its tensors run."""
    rgb = [np.asarray(Image.open(path).convert("RGB")) for path in images_50[:7]]
    bundle = channel_bundles[1].path
    with Model(bundle, scan="portable", threads=1) as model, load(bundle, scan="portable", threads=1) as python:
        for image in rgb:
            have, want = model.preprocess(image), python.preprocessing.pixels(image)
            assert have.shape == (64, 96, 1) and np.array_equal(have, want)
        for row, best in zip(model.classify(rgb, 3), python.predict(rgb, 3), strict=True):
            assert [index for index, _ in row] == [p.index for p in best]
        checks = model.selftest()
        assert set(checks) == {check.name for check in python.selftest()} and "preprocessing (of 255)" in checks
        assert all(error <= limit for error, limit in checks.values())
    bundle = channel_bundles[4].path
    with Model(bundle, scan="portable", threads=1) as model, load(bundle, scan="portable", threads=1) as python:
        for act in (lambda: model.preprocess(rgb[0]), lambda: model.classify(rgb)):
            with pytest.raises(ImageError, match="the network takes 4 channels: this SDK reads grey and RGB"):
                act()
        value = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 4), np.uint8)
        np.testing.assert_allclose(model.run(value)["logits"], python.run({"image": value})["logits"], atol=1e-5)
        checks = model.selftest()
        assert "preprocessing (of 255)" not in checks and all(error <= limit for error, limit in checks.values())


def test_one_unreadable_image_costs_that_image(bundles, images_50, tmp_path):
    whole = Path(images_50[0]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 9000)).save(tmp_path / "narrow.png")
    bad = [tmp_path / "cut.png", tmp_path / "narrow.png", tmp_path / "gone.png"]
    given = [images_50[0], bad[0], *images_50[1:20], bad[1], bad[2], images_50[20]]
    done, good = classify(bundles["image"], *given, "--json"), classify(bundles["image"], *images_50[:21], "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 2 and [row["image"] for row in rows] == list(map(str, given))
    assert [row for row in rows if "top" in row] == json.loads(good.stdout)
    assert all(f"{path.name}" in done.stderr and "evm-classify: image" in done.stderr for path in bad)


def test_a_head_of_one_class_is_a_sigmoid(tmp_path):
    weights = {k: v[3:4].copy() if "classifier.head" in k else v for k, v in load_file(CHECKPOINT).items()}
    save_file(weights, tmp_path / "three.safetensors")
    bundle = export(tmp_path / "three.safetensors", ExportPlan("onnx", imgsz=(64, 64)), tmp_path / "out")
    write_images(tmp_path / "digits", "heldout", 8)
    files = sorted((tmp_path / "digits").rglob("*.png"))
    with load(bundle.path) as model:
        want = [found[0].score for found in model.predict(files)]
    rows = json.loads(classify(bundle.path, *files, "--json").stdout)
    have = [row["top"][0]["score"] for row in rows]
    assert np.abs(np.array(have) - want).max() < 1e-4 and min(want) < 0.6
