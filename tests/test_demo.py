"""Embedded demos: scenes with their truth, and checkpoints by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evm_deploy import cli, load
from evm_deploy.bench.layers import measure_layers
from evm_deploy.bench.measurable import examples
from evm_deploy.demo import CHECKPOINTS, checkpoint_path, scenes
from evm_deploy.demo import __main__ as judge
from evm_deploy.errors import CheckpointError, UsageError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.convert import convert
from evm_deploy.model.families import load_checkpoint
from evm_deploy.tasks.detection_labels import read_labels


def test_a_scene_has_its_truth_and_is_the_same_every_time():
    made = [scenes.scene(scenes.HELD_OUT, index) for index in range(20)]
    for index, each in enumerate(made):
        assert each.image.shape == (128, 128, 3) and len(each.boxes) == len(each.labels) > 0
        assert (each.boxes >= 0).all() and (each.boxes <= 128).all() and (each.boxes[:, 2:] > each.boxes[:, :2]).all()
        shown = set(np.unique(each.map).tolist()) - {0}
        assert shown <= {label + 1 for label in each.labels.tolist()}
        again = scenes.scene(scenes.HELD_OUT, index)
        assert all(np.array_equal(getattr(each, name), getattr(again, name)) for name in ("image", "boxes", "map"))
    assert {label for each in made for label in each.labels.tolist()} == set(range(len(scenes.CLASSES)))


def test_scenes_are_those_of_the_training(trained):
    folder = str(trained / "detseg")
    sys.path.insert(0, folder)
    try:
        from scenes import scene
    finally:
        sys.path.remove(folder)
    for seed, index in ((901, 0), (901, 17), (3, 999)):
        there, here = scene(seed, index), scenes.scene(seed, index)
        assert all(np.array_equal(there[name], getattr(here, name)) for name in ("image", "boxes", "labels", "map"))


def test_scenes_are_written_as_labelled_data(tmp_path, capsys):
    assert scenes.main([str(tmp_path), "--count", "3", "--seed", "5"]) == 0
    assert "3 scenes" in capsys.readouterr().out
    labelled, _ = read_labels(tmp_path / "instances.json", scenes.CLASSES, len(scenes.CLASSES))
    for index, each in enumerate(labelled):
        made = scenes.scene(5, index)
        assert np.array_equal(np.asarray(Image.open(each.source)), made.image)
        assert np.array_equal(each.label.boxes, made.boxes) and np.array_equal(each.label.labels, made.labels)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "annotations" / Path(each.source).name)), made.map)


def test_scenes_replace_scenes_and_nothing_else(tmp_path, capsys):
    assert [scenes.main([str(tmp_path / "a b"), "--count", count]) for count in ("3", "2", "2")] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "a b" / "images").iterdir()) == ["0000.png", "0001.png"]
    (tmp_path / "other" / "images").mkdir(parents=True)
    (tmp_path / "file").touch()
    for given, said in (
        (["other"], "holds other files"), (["new", "--count", "-3"], "--count -3"), (["file"], "Not a directory"),
    ):  # fmt: skip
        assert scenes.main([str(tmp_path / given[0]), *given[1:]]) == 2
        assert said in capsys.readouterr().err


def test_the_demo_without_a_bundle_says_what_to_give(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", str(tmp_path / "none")])
    assert judge.main() == 2 and "does not exist" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(SystemExit, match="2"):
        judge.main()
    assert "BUNDLE" in capsys.readouterr().err


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_demo_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # `dist` may have the bundles of `make demo`
    assert checkpoint_path(f"demo:{name}") == CHECKPOINTS[name] and CHECKPOINTS[name].stat().st_size < 3e6
    assert cli.export_main([f"demo:{name}", "--target", "onnx", "--dry-run", "--json"]) == 0
    assert CHECKPOINTS[name].name in json.dumps(json.loads(capsys.readouterr().out))
    (tmp_path / f"demo:{name}").touch()  # a file of that name is that file
    assert checkpoint_path(f"demo:{name}") == Path(f"demo:{name}")


@pytest.mark.slow
def test_the_share_of_the_selection_is_measured(bundle_of):
    bundle = bundle_of(CHECKPOINTS["detector"], ExportPlan("onnx"))
    with load(bundle.path, threads=1) as model:
        layers = measure_layers(model, examples(model, 1))
    parts = [part["ms"] for part in layers["modules"] if part["module"].split(".")[0] == "selection"]
    assert layers["kinds"]["selection"] == pytest.approx(sum(parts), abs=1e-3) and len(parts) == 1
    assert layers["selection_share"] == pytest.approx(sum(parts) / layers["sum_ms"], abs=1e-3)
    assert 0.02 < layers["selection_share"] < 0.9


@pytest.mark.slow
def test_the_word_demo_stands_for_digits_alone(tmp_path, capsys):
    given = ["demo:segmenter", "--target", "onnx", "--int8", "--calib", "demo", "--out", str(tmp_path)]
    assert cli.export_main(given) == 2
    said = capsys.readouterr().err
    assert "handwritten digits for a classifier" in said and "evm_deploy.demo.scenes" in said


def test_a_demo_that_does_not_exist_is_told(capsys):
    with pytest.raises(UsageError, match="there is no demo 'boxes'"):
        checkpoint_path("demo:boxes")
    assert cli.export_main(["demo:boxes", "--target", "onnx"]) == 2
    assert "demo:detector" in capsys.readouterr().err


def test_weights_are_rounded_to_float16(micro, tmp_path):
    out = tmp_path / "half.safetensors"
    raw = convert(micro, out, half=True)
    assert "weights are rounded to float16" in raw.notes and out.stat().st_size < 0.6 * micro.stat().st_size
    (whole, _), (half, _) = load_checkpoint(micro), load_checkpoint(out)
    for name, value in whole.state_dict().items():
        found = half.state_dict()[name]
        assert found.dtype == value.dtype
        assert torch.equal(found, value.half().float() if value.is_floating_point() else value), name
    state = whole.state_dict()
    state["norm.bias" if "norm.bias" in state else next(iter(state))][0] = 70000.0
    torch.save(state, tmp_path / "large.pth")
    with pytest.raises(CheckpointError, match="reaches 70000, the largest float16 is 65504"):
        convert(tmp_path / "large.pth", tmp_path / "large.safetensors", half=True)
