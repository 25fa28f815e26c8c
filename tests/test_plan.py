"""Types and units that Python users pass: converted, or refused before work starts; never a crash later."""

from __future__ import annotations

import enum
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evm_deploy._util.values import BY_ANNOTATION
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.manifest import Decision
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.network_input import assumed
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import CONVERTERS, PREPROCESSING
from evm_deploy.export.settings import KINDS
from evm_deploy.export.tensorrt.settings import EngineSettings
from evm_deploy.model.families import load_checkpoint
from evm_deploy.model.network import Network
from evm_deploy.runtimes.base import Batch
from evm_deploy.runtimes.openvino import OpenVinoSettings
from evm_deploy.runtimes.registry import setting_kinds


def short(value):
    """Return a test's id that is the same in every process, unlike the text of a set or of an object."""
    text = str(sorted(value, key=str)) if isinstance(value, (set, frozenset)) else str(value)
    return type(value).__name__ if " at 0x" in text else text


class Precision(str, enum.Enum):
    INT8 = "int8"


INT8 = {"precision": "int8", "calib": "demo"}
TAKEN = [
    ("imgsz", 64, (64, 64)),
    ("imgsz", np.int32(64), (64, 64)),
    ("imgsz", "64", (64, 64)),
    ("imgsz", "64x48", (64, 48)),
    ("imgsz", [64, 48], (64, 48)),
    ("imgsz", np.array([64, 48]), (64, 48)),
    ("more_imgsz", [[64, 48], "32", (16, 16)], ((64, 48), (32, 32), (16, 16))),
    ("batch", 4, Batch(4, 4, 4)),
    ("batch", np.int64(4), Batch(4, 4, 4)),
    ("batch", "dynamic", Batch(1, 1, None)),
    ("batch", (1, 4, 8), Batch(1, 4, 8)),
    ("batch", Batch(1, 1, None), Batch(1, 1, None)),
    ("opset", np.int64(18), 18),
    ("tol", np.float32(0.5), 0.5),
    ("labels", ["a", "b"], ("a", "b")),
    ("labels", range(2), ("0", "1")),
    ("labels", np.array(["a", "b"]), ("a", "b")),
    ("labels", (f"{i}" for i in range(2)), ("0", "1")),
    ("mean", [0.5, 0.25, 0], (0.5, 0.25, 0.0)),
    ("std", np.array([0.5, 0.25, 1]), (0.5, 0.25, 1.0)),
    ("crop_pct", 1, 1.0),
    ("crop_pct", np.float64(0.5), 0.5),
    ("calib", Path("demo"), "demo"),
    ("val", Path("a b"), "a b"),
    ("calib_images", np.int64(3), 3),
    ("force_calib", np.True_, True),
    ("max_drop", 2, 2.0),
    ("precision", Precision.INT8, "int8"),
    ("chosen", Decision("onnx fp32", "as asked"), Decision("onnx fp32", "as asked")),
]


@pytest.mark.parametrize(("name", "value", "want"), TAKEN, ids=lambda value: short(value)[:20])
def test_what_makes_sense_is_taken(name, value, want):
    plan = ExportPlan("onnx", **{**INT8, **({"val": "x"} if name == "max_drop" else {}), name: value})
    have = getattr(plan, name)
    assert have == want and type(have) is type(want)
    json.dumps(plan.as_dict())  # the manifest holds the plan


#: Values that no field takes, by what its annotation says; `Decision`, `Any` and bare texts have their own below.
WRONG = [object(), b"demo", float("nan"), {"a": 1}, {1, 2}, np.array([None]), np.zeros((2, 2)), 1 + 2j, lambda: 0]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "name", [each.name for each in fields(ExportPlan) if each.name not in ("settings", "platform")]
)
def test_everything_else_is_refused_when_the_plan_is_made(name, value):
    with pytest.raises(EvmError):
        ExportPlan(**{"target": "onnx", **INT8, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("imgsz", value)
            for value in (True, 64.0, 0, -1, [64], (1, 2, 3), "64x", "٦٤", 10**6, [64, 64.0], [True, 1])
        ),
        *(("more_imgsz", value) for value in (64, (192, 224), "192,224", [[64]])),
        *(("batch", value) for value in (0, True, 1.0, (1, 2), (8, 4, 1), Batch(2, 4, None), Batch(4, 2, 1), None)),
        *(
            ("labels", value)
            for value in ("abc", [], [None], [1.5], [True], ["a", " "], ["a\x85"], ["a\n"], ["\udce9"])
        ),
        *(("labels", value) for value in ({0: "a"}, {"a", "b"}, 3, Path("labels.txt"))),
        *(("mean", value) for value in ((123.675, 116.28, 103.53), (0.5, 0.5, 2), 0.5, (), "0.5,0.5,0.5", (-1, 0, 0))),
        *(("std", value) for value in ((58.395, 57.12, 57.375), (0, 1, 1), (1, 1, float("inf")))),
        *(("crop_pct", value) for value in (0, -1, 1.5, 0.005, "0.9", 87.5, True)),
        *(("interpolation", value) for value in ("nearest", 2)),
        *(("calib", value) for value in ("", 3, ["a"], b"a", "a\0")),
        *(("calib_images", value) for value in (0, 1.0, "512", True)),
        *(("force_calib", value) for value in (1, "yes", None)),
        *(("opset", value) for value in (17, 18.0, "18", True)),
        *(("tol", value) for value in (0, 1, "1e-3", True)),
        *(("chosen", value) for value in ("onnx", ("onnx", "as asked"))),
        *((name, None) for name in ("input", "scan", "weights", "calib_method", "smooth", "target")),
    ],
    ids=lambda value: short(value)[:24],
)
def test_near_misses_are_refused_by_the_name_of_the_field(name, value):
    with pytest.raises(UsageError) as caught:
        ExportPlan(**{"target": "onnx", **INT8, name: value})
    assert name.removeprefix("more_").split("_")[0] in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_long_value_is_cut():
    with pytest.raises(UsageError) as caught:
        ExportPlan("onnx", imgsz=b"x" * 100_000)
    assert len(str(caught.value)) < 200


def test_every_field_has_a_converter():
    own = {**BY_ANNOTATION, **CONVERTERS}
    for kind in (ExportPlan, *KINDS, *filter(None, setting_kinds())):
        for each in fields(kind):
            assert each.name in own or str(each.type).removesuffix(" | None") in own, each


@pytest.fixture(scope="module")
def spec():
    return load_checkpoint(CHECKPOINT).spec


@pytest.mark.parametrize(
    "saved",
    [
        {"mean": [123.675, 116.28, 103.53]},
        {"std": (58.395, 57.12, 57.375)},
        {"mean": 0.5},
        {"mean": ["0.5"] * 3},
        {"crop_pct": 87.5},
        {"crop_pct": 0.005},
        {"interpolation": 3},
        {"imgsz": [1, 2, 3]},
        {"imgsz": 0},
        {"labels": "0123456789"},
        {"labels": [None] * 10},
        {"labels": ["x\n"] * 10},
    ],
    ids=short,
)
def test_values_saved_with_the_weights_are_checked_as_flags_are(spec, saved):
    with pytest.raises(UsageError, match=f"{'labels' if 'labels' in saved else 'checkpoint'}"):
        complete(ExportPlan("onnx", "fp32"), replace(spec, defaults=saved))


def test_a_flag_overrides_a_wrong_saved_value(spec):
    wrong = replace(spec, defaults={"mean": [123.0, 116.0, 103.0]})
    _, preprocessing = complete(ExportPlan("onnx", "fp32", mean=(0.5, 0.5, 0.5)), wrong)
    assert preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("known", ["imgsz", *PREPROCESSING])
@pytest.mark.parametrize("by", ["flag", "checkpoint"])
def test_what_was_assumed_is_noted_and_what_was_given_is_not(spec, known, by):
    value = {"imgsz": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bilinear"}
    value = {**value, "resize": "stretch"}[known]
    plan = ExportPlan("onnx", "fp32", **({known: value} if by == "flag" else {}))
    bare = replace(spec, defaults={known: value} if by == "checkpoint" else {})
    (note,) = assumed(plan, bare, complete(plan, bare)[1])
    words = {"imgsz": "size 224x224", "mean": "mean 0.485", "std": "std 0.229", "crop_pct": "crop 0.875"}
    words |= {"interpolation": "interpolation bicubic", "resize": "resize crop"}
    said = {"crop_pct": {"crop_pct", "resize"}, "resize": {"crop_pct", "resize"}}.get(known, {known})
    for key, word in words.items():
        assert (word in note) == (key not in said), note


def test_nothing_is_assumed_for_a_checkpoint_that_says_everything(spec):
    plan = ExportPlan("onnx", "fp32")
    assert assumed(plan, spec, complete(plan, spec)[1]) == []


SETTINGS = [kind for kind in (*KINDS, *setting_kinds()) if kind]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, each.name) for kind in SETTINGS for each in fields(kind)],
    ids=lambda value: short(value)[-16:],
)
def test_settings_refuse_what_they_cannot_mean(kind, name, value):
    with pytest.raises(UsageError):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value", "want"),
    [
        (EngineSettings, "workspace_mib", np.int64(64), 64),
        (EngineSettings, "sms", [86, np.int32(89)], (86, 89)),
        (EngineSettings, "defer", np.False_, False),
        (OpenVinoSettings, "cache", Path("a b"), "a b"),
    ],
)
def test_settings_take_what_makes_sense(kind, name, value, want):
    assert getattr(kind(**{name: value}), name) == want


@pytest.mark.parametrize(
    "wrong",
    [
        *({"threads": value} for value in (0, -1, "2", 1.0, True, [1], np.array([1, 2]))),
        *({"streams": value} for value in (0, "2", 1.5, None)),
        *({"scan": value} for value in (None, 3, "fast", ["auto"])),
        *({"require_signature": value} for value in (3, b"key.pem", "", ["a"])),
        *({"path": value} for value in (None, 3, b"bundle", "", ["a"], {})),
        *({"cache": value} for value in (3, b"a", np.array([1, 2]))),
        *({"device": value} for value in (0, ["GPU"], np.array(["GPU", "CPU"]))),
        {"cuda_graph": np.array([True, False])},
        {"cuda_graph": "yes"},
        {"batch": 4},
    ],
    ids=short,
)
def test_load_refuses_what_it_cannot_mean(micro_bundle, wrong):
    with pytest.raises(EvmError):
        load(**{"path": micro_bundle.path, **wrong})


def test_load_and_predict_take_numpy_numbers_and_paths(micro_bundle):
    with load(micro_bundle.path, threads=np.int64(1), streams=np.int32(1)) as model:
        images = np.zeros((1, 64, 64, 3), np.uint8)
        assert len(model.predict(images, top=np.int64(2))[0]) == 2
        for top in (2.0, "2", None, 0, True):
            with pytest.raises(UsageError, match="top"):
                model.predict(images, top=top)


@pytest.mark.parametrize(
    "source", [None, 3, b"a.ckpt", ["a.ckpt"], torch.nn.Linear(1, 1), {}], ids=lambda x: type(x).__name__
)
def test_export_refuses_sources_that_are_none(tmp_path, source):
    with pytest.raises(UsageError, match="source"):
        export(source, ExportPlan("onnx"), tmp_path)


def test_export_refuses_other_plans_and_folders(tmp_path):
    for plan in ("onnx", None, {"target": "onnx"}):
        with pytest.raises(UsageError, match="plan"):
            export(CHECKPOINT, plan, tmp_path)
    for out in (None, 3, b"dist", ""):
        with pytest.raises(UsageError, match="out"):
            export(CHECKPOINT, ExportPlan("onnx"), out)


@pytest.mark.parametrize(
    ("module", "outputs"),
    [
        (torch.nn.Linear(1, 1), "logits"),
        (torch.nn.Linear(1, 1), [1]),
        (torch.nn.Linear(1, 1).double(), ["y"]),
        (torch.nn.Linear(1, 1).bfloat16(), ["y"]),
        (torch.nn.Linear(1, 1, device="meta"), ["y"]),
    ],
    ids=short,
)
def test_networks_are_float32_on_the_cpu_with_a_list_of_outputs(module, outputs):
    assert Network.of(torch.nn.Linear(1, 1), outputs=["y"]).spec.outputs == ("y",)
    with pytest.raises(UsageError):
        Network.of(module, outputs=outputs)
