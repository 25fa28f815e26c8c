"""Preprocessing and labels that a module carries itself, and the models of timm."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
from torch import nn

from evm_deploy.data import preprocessing
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.network_input import assumed
from evm_deploy.export.pipeline import complete
from evm_deploy.model import Network
from evm_deploy.model.factory import Factory
from evm_deploy.model.foreign import saved
from evm_deploy.model.foreign.door import network_of
from tests.fake_torchvision import torchvision
from tests.toolchains import need

TIMM = {"input_size": (3, 32, 48), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "crop_pct": 0.9}
LABELS = ("ant", "bee", "cat")


class Classifier(nn.Module):
    def __init__(self, **configs):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 4, stride=4)
        for name, value in configs.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.layer(x).mean((2, 3))


def completed(module, task="classification", **plan):
    spec = Network.of(module, task=task).spec
    given = ExportPlan("onnx", "fp32", **plan)
    plan, made = complete(given, spec)
    return plan, made, " / ".join([*spec.notes, *assumed(given, spec, made)])


@pytest.mark.parametrize("attribute", ["pretrained_cfg", "default_cfg"])
def test_settings_and_labels_are_those_of_the_module(attribute):
    module = Classifier(**{attribute: {**TIMM, "interpolation": "bilinear", "label_names": LABELS}})
    plan, made, notes = completed(module)
    assert made == preprocessing.Preprocessing((32, 48), 0.9, "bilinear", TIMM["mean"], TIMM["std"])
    assert plan.labels == LABELS and plan.imgsz == (32, 48)
    assert f"taken from the module's {attribute}: imgsz 32x48, mean 0.5,0.4,0.3" in notes and "assumed" not in notes


def test_flags_replace_the_module_s_and_the_rest_is_assumed():
    module = Classifier(pretrained_cfg={"mean": [0.5, 0.5, 0.5]}, default_cfg={"mean": (0, 0, 0), "crop_pct": 1})
    _, made, notes = completed(module, std=(0.5, 0.5, 0.5))
    assert made.mean == made.std == (0.5, 0.5, 0.5) and made.size == (224, 224)
    assert "size 224x224, resize crop, crop 0.875, interpolation bicubic" in notes.rpartition("assumed")[2]


def test_a_dataclass_and_no_mapping_at_all():
    @dataclass
    class Config:
        input_size: tuple = (3, 64, 64)
        crop_pct: float = 1.0

    assert saved.saved_in(Classifier(pretrained_cfg=Config())).defaults == {"imgsz": "64x64", "crop_pct": 1.0}
    for nothing in (None, 3, "imagenet", Config, {}):
        assert saved.saved_in(Classifier(default_cfg=nothing)) == saved.Saved()


def test_what_cannot_be_taken_is_said():
    config = {
        "input_size": (0, 28, 28),
        "mean": (127.5, 127.5, 127.5),
        "std": (0.1, 0.0, 0.1),
        "crop_pct": 1.14,
        "interpolation": "lanczos",
        "crop_mode": "squash",
        "label_names": "imagenet-1k",
    }
    found = saved.saved_in(Classifier(pretrained_cfg=config))
    assert found.defaults == {}
    (note,) = found.notes
    for key in [*config][:-1]:
        assert f"{key} {config[key]!r}" in note
    for odd in ((), "abc", 3, {"r": 1}, (0.5, None, 0.5), float("nan")):
        assert not saved.saved_in(Classifier(pretrained_cfg={"mean": odd, "crop_pct": float("nan")})).defaults


def test_labels_of_another_number_are_refused_and_raw_has_none():
    module = Classifier(pretrained_cfg={**TIMM, "label_names": [*LABELS, "dog"]})
    with pytest.raises(UsageError, match="4 labels for a head of 3 classes"):
        completed(module)
    assert completed(module, "raw")[0].labels is None
    assert completed(module, labels=LABELS)[0].labels == LABELS


def test_interpolations_are_those_of_preprocessing():
    assert set(saved.INTERPOLATIONS) < set(preprocessing.INTERPOLATIONS)
    assert saved.STRETCH == preprocessing.STRETCH


def test_channels_and_a_squash_are_those_of_the_module():
    config = {"input_size": (1, 32, 48), "mean": (0.5, 0.4, 0.3), "std": (0.2,), "crop_pct": 1.0, "crop_mode": "squash"}
    found = saved.saved_in(Classifier(pretrained_cfg=config))
    assert found.channels == 1 and "crop_mode" not in found.notes[0]
    assert found.defaults == {"imgsz": "32x48", "mean": (0.5,), "std": (0.2,), "resize": "stretch"}
    assert saved.saved_in(Classifier(pretrained_cfg=config), 4).defaults["mean"] == (0.5, 0.4, 0.3, 0.5)


@pytest.mark.slow
def test_a_model_of_timm(tmp_path):
    need("Mambas of PyPI")
    with torchvision():
        network = Factory("timm:mambaout_femto", arguments={"num_classes": 3, "depths": (1, 1, 1, 1)}, imgsz=(64, 64))
        bundle = export(network, ExportPlan("onnx", "fp32", imgsz=(64, 64)), tmp_path)
        with pytest.raises(EvmError, match=r"timm:mambaout_nope fails: RuntimeError: Unknown model \(mambaout_nope\)"):
            network_of(Factory("timm:mambaout_nope"))
    manifest = bundle.manifest
    assert manifest.name == "mambaout_femto-onnx-fp32" and manifest.parity["ok"]
    assert manifest.preprocessing["crop_pct"] == 1.0 and manifest.outputs[0]["shape"][1] == 3
    said = " / ".join(manifest.notes)
    assert "has no scan" in said and "taken from the module's pretrained_cfg" in said and "training mode" not in said


def test_timm_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="timm:mambaout_femto cannot be imported"):
        network_of(Factory("timm:mambaout_femto"))
