"""Checkpoint files as they are found in the wild, and as an attacker would make them."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from evm_deploy.errors import CheckpointError
from evm_deploy.model.families import load_checkpoint

STATE = {k: torch.from_numpy(v) for k, v in golden.model_case("micro_64")["state"].items()}
OTHER = {k: v + 1 if v.is_floating_point() else v for k, v in STATE.items()}


def prefixed(prefix, state=STATE):
    return {prefix + key: value for key, value in state.items()}


def renamed(state):
    names = (("patch_embed.0", "patch_embed.proj"), ("patch_embed.2", "patch_embed.norm"), (".op.", ".self_attention."))
    names += (("classifier.norm", "norm"), ("classifier.head", "head"))
    result = {}
    for key, value in state.items():
        for new, old in names:
            key = key.replace(new, old)
        if key.startswith("layers.") and ".blocks." in key:
            parts = key.split(".")
            parts[4] = "ln_1" if parts[4] == "norm" else parts[4]
            key = ".".join(parts)
        result[key] = value
    return result


LAYOUTS = {
    "plain.pt": STATE,
    "released.ckpt": {"state_dict": prefixed("module.module.")},
    "tool.pth.tar": {"epoch": 3, "model": OTHER, "ema_model": prefixed("module."), "optimizer": {"lr": 0.1}},
    "no_ema.pth.tar": {"epoch": 3, "model": STATE, "ema_model": None},
    "swin.pth": {"model": OTHER, "model_ema": STATE, "max_accuracy": 1.0},
    "detector.pth": {"state_dict": {**prefixed("backbone."), "neck.conv.weight": torch.zeros(3)}, "meta": {}},
    "compiled.pt": {"state_dict": prefixed("_orig_mod.module.")},
    "profiled.pt": {**STATE, "total_ops": torch.zeros(1), "layers.0.total_params": torch.zeros(1)},
    "old_names.pt": renamed(STATE),
    "raw_key.pt": {"raw": STATE},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_loads_the_right_weights(name, tmp_path):
    torch.save(LAYOUTS[name], tmp_path / name)
    model, spec = load_checkpoint(tmp_path / name)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], STATE[key]) for key in STATE)
    assert (spec.details["architecture"]["dim"], spec.num_classes, spec.variant) == (16, 10, "custom")
    assert spec.name == name.split(".")[0]


def test_raw_weights_on_request(tmp_path):
    torch.save(LAYOUTS["swin.pth"], tmp_path / "a.pth")
    model, spec = load_checkpoint(tmp_path / "a.pth", weights="raw")
    assert torch.equal(model.state_dict()["classifier.head.bias"], OTHER["classifier.head.bias"])
    assert spec.checkpoint["container"] == "model"


def test_dropped_keys_are_reported(tmp_path):
    torch.save(LAYOUTS["detector.pth"], tmp_path / "a.pth")
    _, spec = load_checkpoint(tmp_path / "a.pth")
    assert spec.checkpoint["dropped"] == ["neck.conv.weight"]


def test_safetensors_with_metadata(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", metadata={"evm_deploy": json.dumps({"imgsz": 64})})
    model, spec = load_checkpoint(tmp_path / "a.safetensors")
    assert spec.defaults == {"imgsz": 64}
    assert torch.equal(model.state_dict()["patch_embed.0.bias"], STATE["patch_embed.0.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32_and_say_so(dtype, tmp_path):
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in STATE.items()}, tmp_path / "a.pt")
    model, spec = load_checkpoint(tmp_path / "a.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "converted to float32" in spec.notes[0]


@pytest.mark.parametrize(
    ("dim", "depths", "N"), [(24, (1, 2, 3, 1), 16), (40, (2, 1, 1, 2), 8), (56, (0, 1, 1, 1), 16)]
)
def test_any_width_depth_and_state_is_inferred(dim, depths, N, tmp_path):
    shapes = golden.state_shapes(dim, depths, 7)
    if N != 16:
        for key, shape in shapes.items():
            if key.endswith("A_logs"):
                shapes[key] = (shape[0], N)
            if key.endswith("x_proj_weight"):
                shapes[key] = (4, shape[1] - 32 + 2 * N, shape[2])
    state = {k: torch.from_numpy(v) for k, v in golden.seeded_state(shapes, 1).items()}
    torch.save(state, tmp_path / "a.pt")
    model, spec = load_checkpoint(tmp_path / "a.pt")
    assert (spec.details["architecture"]["dim"], spec.details["architecture"]["depths"]) == (dim, depths)
    assert (spec.num_classes, spec.details["architecture"]["d_state"]) == (7, N)
    assert spec.details["architecture"]["dt_ranks"] == (math.ceil(dim / 16), math.ceil(dim / 8))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def without(key):
    return {k: v for k, v in STATE.items() if k != key}


BAD_STATES = {
    "missing": (without("layers.0.blocks.0.op.Ds"), "1 missing: layers.0.blocks.0.op.Ds"),
    "unexpected": ({**STATE, "extra.weight": torch.zeros(2)}, "1 unexpected: extra.weight"),
    "misshapen": (
        {**STATE, "classifier.norm.bias": torch.zeros(3)},
        r"classifier.norm.bias is \[3\], expected \[128\]",
    ),
    "nan": ({**STATE, "classifier.norm.bias": torch.full((128,), float("nan"))}, "classifier.norm.bias holds NaN"),
    "vmamba": ({**STATE, "layers.2.blocks.0.op.Ds": torch.zeros(2)}, "plain VMamba"),
    "resnet": ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "holds no network of a known family"),
    "gap": ({k.replace("blocks.0", "blocks.3"): v for k, v in STATE.items()}, "gaps"),
    "stem": ({**STATE, "patch_embed.0.weight": torch.zeros(16, 3, 2, 2)}, "patch_embed.0.weight has shape"),
    "unfolds": ({**STATE, "classifier.norm.bias": torch.zeros(1).expand(128)}, "more values than the file holds"),
    "sparse": ({**STATE, "classifier.norm.bias": torch.zeros(128).to_sparse()}, "expected a dense float tensor"),
    "no tensors": ({"epoch": 3}, "holds no state dict"),
    "a list": ([1, 2], "holds a list"),
    "two keys": ({**STATE, "head.bias": torch.zeros(10)}, "two keys stand for 'classifier.head.bias'"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_is_refused_with_the_reason(name, tmp_path):
    state, message = BAD_STATES[name]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "settings", ["[]", "{", '{"labels": 5}', '{"mean": ["a"]}', '{"imgsz": true}', '{"crop_pct": "x"}', "[" * 9999]
)
def test_wrong_metadata_is_refused(settings, tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", metadata={"evm_deploy": settings})
    with pytest.raises(CheckpointError, match="metadata 'evm_deploy' is wrong"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_bad_files(tmp_path):
    good = tmp_path / "good.pth"
    torch.save(STATE, good)
    content = good.read_bytes()
    files = {
        "absent.pth": (None, "does not exist"),
        "empty.pth": (b"", "is empty"),
        "half.pth": (content[: len(content) // 2], "truncated or damaged"),
        "text.pth": (b"hello, this is no checkpoint\n" * 50, "not a torch checkpoint|damaged"),
        "text.safetensors": (b"hello, this is no checkpoint\n" * 50, "damaged"),
        "model.onnx": (b"x", "unknown file type"),
    }
    for name, (data, message) in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a directory"):
        load_checkpoint(tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_pickle_is_refused_and_not_executed(save, tmp_path):
    save({"state_dict": STATE, "payload": Payload(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_a_pickle_that_needs_code_says_how_to_convert(tmp_path):
    torch.save({"model": STATE, "config": argparse.Namespace(a=1)}, tmp_path / "swin.pth")
    with pytest.raises(CheckpointError, match=r"Namespace(?s:.*)evm-export convert \S+swin.pth --trust"):
        load_checkpoint(tmp_path / "swin.pth")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_crash(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / "a.pth"
    small = {k: STATE[k] for k in list(STATE)[:3]}
    torch.save(small, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with pytest.raises(CheckpointError):
        load_checkpoint(file)
