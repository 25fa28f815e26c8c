"""Shared fixtures: golden cases as checkpoints in the authors' format, and bundles exported once per session."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

# Threads that wait for work sleep, here and in child processes: two workers and their children share the cores, and a
# thread that spins takes the time of one that works. The float run of an export: 0.8 CPU seconds in place of 9.4.
# Read when libgomp is loaded, so before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
pytest_plugins = ["tests.cache", "tests.costs", "tests.sweeps", "tests.toolchains"]
pytest.register_assert_rewrite(*pytest_plugins)
import golden  # noqa: E402

from tests.cache import once  # noqa: E402  isort: skip  before anything that imports `trace`
from evm_deploy._util.own_process import set_up_own_process  # noqa: E402
from evm_deploy.bundle.bundle import Bundle  # noqa: E402
from evm_deploy.demo import CHECKPOINT  # noqa: E402
from evm_deploy.export.plan import ExportPlan  # noqa: E402
from evm_deploy.export.selftest import synthetic_image  # noqa: E402
from evm_deploy.toolchain import cross_compile  # noqa: E402
from evm_deploy.toolchain.compile import Compiler  # noqa: E402
from tests.coreml import built, plan_for  # noqa: E402

TRAINED = Path(__file__).parents[2] / "shared" / "trained"
DEAR = {"compiler", "browser", "jvm", "ssh", "cross", "valgrind", "slow"}  # as in Makefile
torch.set_num_threads(1)
set_up_own_process()


class SleepingSessionOptions(onnxruntime.SessionOptions):
    """SessionOptions of ONNX Runtime whose threads sleep while they wait, too: half the CPU time of a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.add_session_config_entry("session.intra_op.allow_spinning", "0")


onnxruntime.SessionOptions = SleepingSessionOptions


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a module on one worker, which builds its fixtures once; modules with dear tests come first."""
    dear = {item.path for item in items if DEAR & {mark.name for mark in item.iter_markers()}}
    items.sort(key=lambda item: item.path not in dear)
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Seed torch before each fixture: random weights and inputs do not depend on the order of tests."""
    torch.manual_seed(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup() -> None:
    """Seed torch before each test, after the fixtures."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _zig_compiles_its_libraries_once(shared_folder) -> Iterator[None]:
    """Let ziglang keep for the run what it compiles of its own: 25 CPU seconds for each module of WebAssembly."""
    real = cross_compile.zig_compiler

    @wraps(real)
    def keeping(target: str, architecture: str, cache: Path) -> Compiler:
        return real(target, architecture, shared_folder / "zig")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_compile, "zig_compiler", keeping)
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect() -> None:
    """Leave out of garbage collection what is loaded: the collections of a trace took a quarter of its time."""
    gc.collect()
    gc.freeze()


def save_as_released(state: dict[str, Any], path: Path) -> Path:
    """In the layout of the authors' released files."""
    torch.save({"state_dict": {f"module.module.{k}": torch.from_numpy(v) for k, v in state.items()}}, path)
    return path


@pytest.fixture(scope="session")
def checkpoint(shared_folder):
    """checkpoint(case name) -> path of its seeded weights on disk."""

    def make(name: str) -> Path:
        def save(folder: Path) -> None:
            save_as_released(golden.model_case(name)["state"], folder / f"{name}.ckpt")

        return once(shared_folder / "checkpoints" / name, save) / f"{name}.ckpt"

    return make


@pytest.fixture(scope="session")
def micro(checkpoint) -> Path:
    return checkpoint("micro_64")


@pytest.fixture(scope="session")
def of_channels(shared_folder):
    """of_channels(n) -> a checkpoint of the smallest golden model whose stem reads n channels."""

    def make(channels: int) -> Path:
        def save(folder: Path) -> None:
            state = dict(golden.model_case("micro_64")["state"])
            stem = state["patch_embed.0.weight"]
            state["patch_embed.0.weight"] = np.concatenate([stem] * 2, 1)[:, :channels]
            save_as_released(state, folder / f"micro{channels}.ckpt")

        return once(shared_folder / "checkpoints" / f"micro{channels}", save) / f"micro{channels}.ckpt"

    return make


@pytest.fixture(scope="session")
def channel_bundles(of_channels, bundle_of) -> dict[int, Bundle]:
    """Bundles of networks that read grey images and RGBA."""
    return {
        channels: bundle_of(
            of_channels(channels),
            ExportPlan("onnx", imgsz=(64, 96), resize="pad", mean=(0.4,) * channels, std=(0.25,) * channels),
        )
        for channels in (1, 4)
    }


@pytest.fixture(scope="session")
def micro_bundle(micro, bundle_of) -> Bundle:
    """The smallest golden model, exported with default flags at 64x64."""
    return bundle_of(micro, ExportPlan("onnx", imgsz=(64, 64)))


@pytest.fixture(scope="session")
def coreml_bundle(micro, bundle_of) -> Bundle:
    """The same for Core ML: float16, image input."""
    return bundle_of(micro, ExportPlan("coreml", imgsz=(64, 64)))


@pytest.fixture(scope="session")
def coreml_fp32(micro, tmp_path_factory):
    """(artifact, float module, plan) of the same in float32."""
    return built(micro, tmp_path_factory.mktemp("fp32"), plan_for(precision="fp32"))


@pytest.fixture(scope="session")
def named_detector(tmp_path_factory) -> Path:
    """A golden RetinaNet with class names of many scripts."""
    from tests import detectors

    state = detectors.tensors(detectors.case("retina_micro"))
    meta = {"dataset_meta": {"classes": detectors.CLASSES}}
    return detectors.save(tmp_path_factory.mktemp("named") / "街.pth", state, meta)


@pytest.fixture(scope="session")
def detector_bundles(named_detector, bundle_of) -> dict[str, Bundle]:
    """Return the bundles of `named_detector` with both values of --nms, two images an inference."""
    plans = {nms: ExportPlan("onnx", imgsz=(96, 128), batch=2, nms=nms) for nms in ("graph", "none")}
    return {nms: bundle_of(named_detector, plan) for nms, plan in plans.items()}


@pytest.fixture(scope="session")
def segmenter_bundles(demo_bundle, tmp_path_factory) -> dict[str, Path]:
    """Segmenters made by hand: resize -> bundle. The stretched one gives int32."""
    from tests.segmenter import segmenter

    folder = tmp_path_factory.mktemp("segmenters")
    dtypes = {"pad": "uint8", "crop": "uint8", "stretch": "int32"}
    return {resize: segmenter(demo_bundle.path, folder, resize, dtype) for resize, dtype in dtypes.items()}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> list[Path]:
    """Images of other sizes than any input."""
    folder = tmp_path_factory.mktemp("scenes")
    sizes = ((300, 400), (1, 1), (77, 20), (96, 128), (131, 500))
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(synthetic_image(height, width, i)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A video of `tests.films`."""
    from tests.films import film

    return film(tmp_path_factory.mktemp("film") / "clip.mp4")


@pytest.fixture(scope="session")
def demo_bundle(bundle_of) -> Bundle:
    return bundle_of(CHECKPOINT, ExportPlan("onnx"))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """120 images without labels, to calibrate or judge with."""
    folder = tmp_path_factory.mktemp("calibration")
    for i in range(120):
        Image.fromarray(synthetic_image(80, 90, seed=1000 + i)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def trained() -> Path:
    """The trained T; not part of the project, so tests that need it skip where it is absent."""
    if not TRAINED.is_dir():
        pytest.skip("the trained T (../shared/trained) is not beside this checkout")
    return TRAINED


@pytest.fixture(scope="session")
def glyphs(trained):
    """glyphs(count, seed, size) -> images that the trained T was made for, and their classes."""
    sys.path.insert(0, str(trained))
    from glyphs import glyphs

    return glyphs


@pytest.fixture(scope="session")
def labelled_glyphs(glyphs, tmp_path_factory) -> Path:
    """500 images that the trained T has not seen, in class folders."""
    folder = tmp_path_factory.mktemp("val")
    for i, (image, label) in enumerate(zip(*glyphs(500, 7, 64), strict=True)):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
