"""Every target with every resize, and with networks of 1, 3 and 4 input channels, as images and as tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evm_deploy.bundle import selftest
from evm_deploy.data.preprocessing import RESIZES, Preprocessing
from evm_deploy.errors import UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.export.target import open_here
from evm_deploy.export.targets import load_targets
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import RunOptions
from tests.contract.test_targets import precision_of, tolerance_of
from tests.targets import scan_of
from tests.toolchains import need_target

every_target = pytest.mark.parametrize("target", load_targets().values(), ids=list(load_targets()))
pytestmark = pytest.mark.slow
MEAN, STD = (0.4, 0.5, 0.6, 0.7), (0.2, 0.25, 0.3, 0.35)


@pytest.fixture(autouse=True)
def has_its_packages(target):
    need_target(target.name)


@pytest.fixture(autouse=True)
def on_no_device(monkeypatch):
    """Nothing is finished: the device is another machine."""
    monkeypatch.setattr("evm_deploy.export.pipeline.engine_built_here", lambda plan: False)


@every_target
@pytest.mark.parametrize("resize", RESIZES)
def test_the_bundle_resizes_as_asked(target, resize, micro, tmp_path):
    plan = ExportPlan(target.name, precision_of(target), imgsz=(64, 96), scan=scan_of(target.name), resize=resize)
    made = export(Source(micro), plan, tmp_path)
    assert made.manifest.preprocess() == Preprocessing((64, 96), resize=resize)
    assert f"resize {resize}" not in made.manifest.notes[0]
    with open_here(target, made.path / made.manifest.artifact, RunOptions()) as runtime:
        checks = selftest.run(made, target.runtime, runtime, RunOptions())
    assert checks[0].name == "preprocessing (of 255)" and all(check.ok for check in checks)


@every_target
@pytest.mark.parametrize("kind", ["image", "tensor"])
@pytest.mark.parametrize("channels", [1, 4])
def test_networks_of_other_channels(target, kind, channels, of_channels, tmp_path):
    checkpoint = of_channels(channels)
    given = {"mean": MEAN[:channels], "std": STD[:channels]}
    plan = ExportPlan(target.name, precision_of(target), imgsz=(64, 96), input=kind, scan=scan_of(target.name), **given)
    if kind == "image" and channels not in target.image_channels:
        with pytest.raises(UsageError, match=r"images of 1 or 3 channels, the network has 4") as raised:
            export(checkpoint, plan, tmp_path)
        assert raised.value.hint.startswith("add --input tensor")
        return
    made = export(checkpoint, plan, tmp_path)
    assert made.manifest.model["channels"] == channels and made.manifest.preprocess().channels == channels
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 96, channels), np.uint8)
    scaled = (pixels / 255 - MEAN[:channels]) / STD[:channels]
    tensor = np.float32(scaled.transpose(0, 3, 1, 2))
    with torch.no_grad():
        want = load_checkpoint(checkpoint).module(torch.from_numpy(tensor)).numpy()
    with open_here(target, made.path / made.manifest.artifact, RunOptions()) as runtime:
        ((name, spec),) = runtime.inputs.items()
        assert spec.shape == ((1, 64, 96, channels) if kind == "image" else (1, channels, 64, 96))
        have = runtime.run({name: pixels if kind == "image" else tensor})["logits"]
        checks = selftest.run(made, target.runtime, runtime, RunOptions())
    np.testing.assert_allclose(have, want, atol=tolerance_of(target, 2e-4))
    assert checks[0].name == "preprocessing (of 255)" and all(check.ok for check in checks)
