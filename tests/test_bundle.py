"""Bundles: contents, hashes, damage, interruption, and use."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from evm_deploy import cli
from evm_deploy._util.text import command
from evm_deploy.bundle.bundle import check_free, open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.readme import cpp_call
from evm_deploy.demo import digits, write_images
from evm_deploy.errors import BundleError, ImageError, UsageError
from evm_deploy.export import pipeline
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch


@pytest.fixture
def copy(micro_bundle, tmp_path):
    return shutil.copytree(micro_bundle.path, tmp_path / "bundle")


def edit_manifest(folder, **changes):
    content = json.loads((folder / "manifest.json").read_text())
    content.update(changes)
    (folder / "manifest.json").write_text(json.dumps(content))


def test_every_file_is_in_the_manifest(demo_bundle):
    files = {p.relative_to(demo_bundle.path).as_posix() for p in demo_bundle.path.rglob("*") if p.is_file()}
    assert files == set(demo_bundle.manifest.files) | {"manifest.json"}
    assert {"model.onnx", "labels.txt", "README.md", "selftest/scan.onnx"} <= files
    assert open_bundle(demo_bundle.path).manifest.to_json() == demo_bundle.manifest.to_json()


@pytest.mark.parametrize("name", ["model.onnx", "selftest/probes.safetensors", "README.md"])
def test_a_flipped_byte_is_noticed(name, copy, capsys):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert cli.run_main([str(copy), "--selftest"]) == 2
    assert f"{name} is damaged" in capsys.readouterr().err


def test_a_missing_file_is_named(copy):
    (copy / "selftest" / "picture.png").unlink()
    with pytest.raises(BundleError, match=r"selftest/picture.png is missing"):
        load(copy)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schema_version": 99}, r"schema 99.*(?s:.*)pip install -U"),
        ({"schema_version": "1"}, "no schema_version"),
        ({"files": {"../../etc/passwd": {"sha256": "0" * 64}}}, "leaves the bundle"),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64}}}, "leaves the bundle"),
        ({"artifact": "other.onnx"}, "not among the files"),
        ({"plan": {"target": "onnx", "batch": "many"}}, "not a valid manifest"),
        ({"plan": None}, "not a valid manifest"),
        ({"preprocessing": {"size": [4, 4], "std": [0, 0, 0]}}, "not a valid manifest"),
        ({"preprocessing": {"size": [10**9, 10**9]}}, "not a valid manifest"),
        ({"target": "toaster"}, "toaster"),
        ({"rejected": True}, "was rejected"),
    ],
)
def test_a_wrong_manifest_is_refused(changes, message, copy):
    edit_manifest(copy, **changes)
    with pytest.raises((BundleError, UsageError), match=message):
        load(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\x00"])
def test_a_manifest_that_is_none(content, copy):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError):
        load(copy)


def test_unknown_fields_of_the_same_schema_are_ignored(copy):
    edit_manifest(copy, comment="written by a later minor version")
    assert load(copy).manifest.target == "onnx"


def test_not_a_bundle(tmp_path):
    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path, "not a bundle"), (__file__, "is a file")):
        with pytest.raises(BundleError, match=message):
            load(path)


def test_the_hint_for_a_path_that_is_no_bundle_names_the_nearest_bundle(copy, tmp_path):
    for path in (copy / "model.onnx", copy / "selftest", copy / "no.onnx"):
        with pytest.raises(BundleError) as refused:
            load(path)
        assert refused.value.hint == f"give the folder of the bundle:  {command(copy)}"
    with pytest.raises(BundleError) as refused:
        load(copy.parent)
    assert refused.value.hint == f"give one of the bundles inside:  {command(copy)}"


def test_predictions_are_those_of_the_torch_model(demo_bundle, tmp_path):
    import torch

    from evm_deploy.demo import CHECKPOINT

    images, labels = digits("heldout")
    assert len(images) == 599
    with load(demo_bundle.path, threads=1) as bundle:
        found = np.array([top[0].index for top in bundle.predict(images, top=1)])
        pixels = np.stack([bundle.preprocessing.pixels(image) for image in images])
        first = bundle.predict(images[:1])[0]
    assert len(first) == 5 and first[0].label == str(labels[0])
    assert sum(p.score for p in first) <= 1 and first[0].score >= first[1].score
    model, _ = load_checkpoint(CHECKPOINT)
    with torch.inference_mode():
        want = model(torch.from_numpy(bundle.preprocessing.normalise(pixels))).argmax(1).numpy()
    assert (found == want).all()
    assert (found == labels).mean() >= 0.98
    assert write_images(tmp_path, count=3) == 3
    assert cli.run_main([str(demo_bundle.path), *map(str, tmp_path.glob("*/*.png")), "--top", "1"]) == 0


@pytest.mark.parametrize("batch", ["1", "3", "dynamic", "2:2:4"])
@pytest.mark.parametrize("kind", ["image", "tensor"])
@pytest.mark.slow
def test_predict_fills_up_any_batch(batch, kind, micro, micro_bundle, bundle_of):
    plan = ExportPlan("onnx", imgsz=(64, 64), batch=Batch.parse(batch), input=kind)
    images = [np.random.default_rng(i).integers(0, 256, (70, 90, 3), np.uint8) for i in range(7)]
    with load(bundle_of(micro, plan).path) as bundle, load(micro_bundle.path) as single:
        got, want = bundle.predict(images, top=3), single.predict(images, top=3)
        assert all(check.ok for check in bundle.selftest())
    for a, b in zip(got, want, strict=True):
        assert [p.index for p in a] == [p.index for p in b]
        np.testing.assert_allclose([p.score for p in a], [p.score for p in b], atol=1e-5)


def test_wrong_feeds_name_both_sides(micro_bundle):
    with load(micro_bundle.path) as bundle:
        good = np.zeros((1, 64, 64, 3), np.uint8)
        for feeds, message in (
            ({}, "got none"),
            ({"x": good}, "got x"),
            ({"image": good.astype(np.float32)}, "got float32"),
            ({"image": good[0]}, r"got uint8\[64, 64, 3\]"),
            ({"image": np.repeat(good, 2, 0)}, r"got uint8\[2"),
            ({"image": good.tolist()}, "got list"),
        ):
            with pytest.raises(UsageError, match=message):
                bundle.run(feeds)
        with pytest.raises(ImageError):
            bundle.predict(["no.png"])


@pytest.mark.slow
def test_feature_bundles_do_not_classify(micro, tmp_path):
    bundle = export(micro, ExportPlan("onnx", imgsz=(64, 64), head="features"), tmp_path)
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())
        with pytest.raises(UsageError, match="feature maps"):
            model.predict([np.zeros((9, 9, 3), np.uint8)])


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(monkeypatch, micro, tmp_path, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("evm_deploy.export.selftest.write", full)
    assert cli.export_main([str(micro), "--target", "onnx", "--imgsz", "64", "-o", str(tmp_path), "-q"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(micro, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    flags = [str(micro), "--target", "onnx", "--imgsz", "64", "-q", "-o"]
    assert cli.export_main([*flags, str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_force_keeps_the_old_bundle_until_the_new_one_is_good(monkeypatch, micro, tmp_path):
    plan = ExportPlan("onnx", imgsz=(64, 64))
    old = export(micro, plan, tmp_path)
    monkeypatch.setattr(pipeline.selftest, "write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(micro, plan, tmp_path, force=True)
    assert open_bundle(old.path).manifest.to_json() == old.manifest.to_json()
    assert len(list(tmp_path.iterdir())) == 1


def test_force_never_replaces_what_is_no_bundle(micro, tmp_path):
    plan = ExportPlan("onnx", imgsz=(64, 64))
    precious = tmp_path / "micro_64-onnx-fp32-64x64"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="not a bundle"):
        export(micro, plan, tmp_path, force=True)
    assert (precious / "thesis.tex").exists()


@pytest.mark.parametrize("after_s", [0, 1.5])  # the second one hits inside torch.export, which swallows exceptions
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_an_interrupted_export_leaves_no_bundle_and_the_next_one_works(how, after_s, micro, tmp_path):
    code = "from evm_deploy.cli import export_main; raise SystemExit(export_main())"
    command = [sys.executable, "-c", code, str(micro), "--target", "onnx", "--imgsz", "64", "-o", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".micro*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(after_s)
    os.kill(process.pid, how)
    _, err = process.communicate(timeout=60)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert "interrupted" in err and "Traceback" not in err
        assert list(tmp_path.iterdir()) == []
    export(micro, ExportPlan("onnx", imgsz=(64, 64)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["micro_64-onnx-fp32-64x64"]


@pytest.mark.slow
def test_an_export_interrupted_between_its_two_renames_keeps_the_old_bundle(micro, tmp_path):
    old = export(micro, ExportPlan("onnx", imgsz=(64, 64)), tmp_path).path
    code = """
import os, pathlib, signal
from evm_deploy.cli import export_main
rename = pathlib.Path.rename
def interrupted(self, target):
    result = rename(self, target)
    if str(target).endswith(".old"):
        os.kill(os.getpid(), signal.SIGTERM)
    return result
pathlib.Path.rename = interrupted
raise SystemExit(export_main())
"""
    command = [
        sys.executable,
        "-c",
        code,
        str(micro),
        "--target",
        "onnx",
        "--imgsz",
        "64",
        "-o",
        str(tmp_path),
        "--force",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "interrupted" in done.stderr) == (130, True)
    assert list(tmp_path.iterdir()) == [old]
    open_bundle(old)


def test_folders_that_may_not_be_looked_into(micro, tmp_path, monkeypatch):
    """Let stat fail inside the folders, as for a user who is not root."""
    secret, stat = tmp_path / "secret", os.stat

    def refused(path, *args, **kwargs):
        if str(path).startswith(f"{secret}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    secret.mkdir()
    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(BundleError, match=r"bundle .*secret/bundle cannot be read: Permission denied"):
        open_bundle(secret / "bundle")
    with pytest.raises(BundleError, match=r"cannot write to .*secret: Permission denied\n  choose another --out"):
        check_free(secret / "bundle", force=True)


def test_the_readmes_cpp_line_calls_the_function_of_the_task(demo_bundle):
    calls = {"classification": "classify", "detection": "detect", "segmentation": "segment", "raw": "run"}
    for task, function in calls.items():
        manifest = replace(demo_bundle.manifest, model={**demo_bundle.manifest.model, "task": task})
        assert f"model.{function}(" in cpp_call(manifest)
