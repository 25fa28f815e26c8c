"""`pip install evm-deploy[run-onnx]`: what an app installs to run bundles, without torch, and its samples."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from evm_deploy import load
from evm_deploy._util.packages import install_hint
from evm_deploy.demo import write_images
from evm_deploy.errors import UsageError

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "samples" / "python"
PAGE = (ROOT / "docs" / "embed" / "python.md").read_text(encoding="utf-8")
LIMIT = 150e6  # bytes beside the runtime
# only the modules of the named distributions can be imported, as if nothing else were installed
FENCE = """
import runpy, sys
from importlib import metadata
from importlib.machinery import PathFinder

allowed = set(sys.argv[1].split(","))
homes = metadata.packages_distributions()

class Fence:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in homes and not {home.lower().replace("_", "-") for home in homes[top]} & allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Fence())
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@cache
def closure(extra: str) -> dict[str, metadata.Distribution]:
    """What pip installs for evm-deploy with an extra, from the metadata of what is installed here."""
    found: dict[str, metadata.Distribution] = {}
    todo = [(Requirement(f"evm-deploy[{extra}]"))]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in found and not wanted.extras:
            continue
        found[name] = metadata.distribution(name)
        for line in found[name].requires or []:
            needed = Requirement(line)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return found


def size_of(distribution: metadata.Distribution) -> int:
    paths = [Path(str(file.locate())) for file in distribution.files or []]
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_images(folder, "heldout")
    return folder


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process that has only what the run-onnx extra brings."""
    command = [sys.executable, "-c", FENCE, ",".join(closure("run-onnx")), str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_framework_comes_with_it():
    names = set(closure("run-onnx"))
    assert {"evm-deploy", "onnxruntime", "numpy", "pillow", "safetensors"} <= names
    assert not {"torch", "onnx", "onnxscript", "openvino", "coremltools", "scipy"} & names
    assert "openvino" in closure("run-openvino") and "torch" not in closure("run-openvino")
    assert "torch" in closure("onnx")


def test_it_is_small_beside_the_runtime():
    sizes = {name: size_of(distribution) for name, distribution in closure("run-onnx").items()}
    assert sizes["numpy"] > 10e6
    assert sum(sizes.values()) - sizes["onnxruntime"] < LIMIT


def test_the_ten_lines_classify(demo_bundle, digits):
    done = run(SAMPLES / "classify.py", demo_bundle.path, min(digits.glob("3/*.png")))
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and lines[0][1] == "3" and len(lines) == 5, done.stderr
    scores = [float(score) for score, _ in lines]
    assert scores == sorted(scores, reverse=True)


def test_the_fence_holds(tmp_path):
    (tmp_path / "torch.py").write_text("import torch")
    done = run(tmp_path / "torch.py")
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr


def test_errors_are_said_and_not_raised(demo_bundle, tmp_path):
    for arguments, said in {
        (tmp_path / "gone", "cat.jpg"): "does not exist",
        (demo_bundle.path, "cat.jpg"): "error: image cat.jpg does not exist",
    }.items():
        done = run(SAMPLES / "classify.py", *arguments)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_without_the_runtime_the_extra_is_named(demo_bundle, monkeypatch):
    command = [sys.executable, "-c", FENCE, ",".join(set(closure("run-onnx")) - {"onnxruntime"})]
    command += [str(SAMPLES / "classify.py"), str(demo_bundle.path), "cat.jpg"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"onnxruntime is not installed\n  {install_hint('run-onnx')}" in done.stderr


def test_a_folder_becomes_a_table(demo_bundle, digits, tmp_path):
    (tmp_path / "images").symlink_to(digits)
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    try:
        done = run(SAMPLES / "batch.py", demo_bundle.path, f"{tmp_path}/images/")
    finally:
        (digits / "bad.png").unlink()
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert done.returncode == 1 and "left out: image" in done.stderr and "bad.png" in done.stderr
    assert [row["file"] for row in rows] == sorted(str(path) for path in Path(f"{tmp_path}/images").glob("*/*.png"))
    right = [row["label"] == Path(row["file"]).parent.name for row in rows]
    assert np.mean(right) > 0.97
    with load(demo_bundle.path) as model:
        (best,) = model.predict([rows[0]["file"]], top=1)[0]
    assert f"{best.score:.4f}" == rows[0]["score"]


def test_classify_takes_what_preprocessing_gives(demo_bundle, digits):
    paths = sorted(digits.glob("*/*.png"))[:20]  # more than one inference takes
    with load(demo_bundle.path) as model:
        pixels = np.stack([model.preprocessing.pixels(path) for path in paths])
        assert model.classify(pixels, top=3) == model.predict(paths, top=3)
        assert model.classify(pixels[:0]) == []
        for wrong in (pixels.astype(np.float32), pixels[0], pixels[:, :-1]):
            with pytest.raises(UsageError, match=r"pixels must be uint8 \[n, 64, 64, 3\], got"):
                model.classify(wrong)
        with pytest.raises(UsageError, match="top is 0"):
            model.classify(pixels, top=0)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.S), ids=lambda code: code.split("\n")[0])
def test_the_page_runs(code, demo_bundle, digits, tmp_path):
    (tmp_path / "bundle").symlink_to(demo_bundle.path)
    (tmp_path / "cat.jpg").symlink_to(min(digits.glob("3/*.png")))
    (tmp_path / "example.py").write_text(code)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "example.py", "bundle", "cat.jpg"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0 and "3" in done.stdout, done.stderr


def test_the_page_shows_the_sample():
    code = (SAMPLES / "classify.py").read_text().split('"""')[2].strip()
    assert code in PAGE and len(code.splitlines()) <= 12
