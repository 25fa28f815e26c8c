"""The meaning of scores: a head of one class is a sigmoid, and so is every class of --multi-label, on every target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from evm_deploy import cli
from evm_deploy.bundle.loaded import load
from evm_deploy.calib.evaluate import compare_outputs
from evm_deploy.demo import CHECKPOINT, digits
from evm_deploy.errors import UsageError
from evm_deploy.export.pipeline import complete, export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.families import load_checkpoint
from evm_deploy.tasks.classification import CLASSIFICATION, PROBABILITIES
from evm_deploy.tasks.task import Reading

TARGETS = ["onnx", "openvino", "coreml"]
HEADS = ["logits", "probs"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


@pytest.fixture(scope="module")
def one_class(tmp_path_factory):
    """The demo, whose head is that of the digit 3 alone."""
    with safe_open(CHECKPOINT, "numpy") as file:
        metadata = file.metadata() or {}
    weights = {key: value[3:4] if "classifier.head" in key else value for key, value in load_file(CHECKPOINT).items()}
    path = tmp_path_factory.mktemp("one") / "three.safetensors"
    save_file({key: value.copy() for key, value in weights.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def images():
    found, labels = digits("heldout")
    return found[:24], labels[:24]


@pytest.fixture(scope="module")
def logits(images):
    """Logits of the whole demo in torch."""
    network = load_checkpoint(CHECKPOINT)
    _, preprocessing = complete(ExportPlan("onnx"), network.spec)
    pixels = np.stack([preprocessing.pixels(image) for image in images[0]])
    with torch.inference_mode():
        return network.module(torch.from_numpy(preprocessing.normalise(pixels))).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_one_class_gives_its_sigmoid(target, head, one_class, images, logits, tmp_path):
    bundle = export(one_class, ExportPlan(target, head=head, labels=("three",)), tmp_path)
    with load(bundle.path) as model:
        scores = np.array([found[0].score for found in model.predict(list(images[0]))])
    assert np.abs(scores - sigmoid(logits[:, 3])).max() < 2e-2
    assert scores.min() < 0.2 and scores.max() > 0.9  # negative control: a softmax would give 1 to all
    assert any("one class" in note for note in bundle.manifest.notes)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_multi_label_gives_one_sigmoid_for_each_class(target, images, logits, tmp_path):
    bundle = export(CHECKPOINT, ExportPlan(target, multi_label=True), tmp_path)
    assert bundle.manifest.head == PROBABILITIES and bundle.manifest.plan["multi_label"] is True
    with load(bundle.path) as model:
        found = model.predict(list(images[0]), top=10)
    scores = np.zeros_like(logits, np.float64)
    for row, answer in zip(scores, found, strict=True):
        row[[each.index for each in answer]] = [each.score for each in answer]
    assert np.abs(scores - sigmoid(logits)).max() < 2e-2
    assert np.abs(scores.sum(1) - 1).max() > 0.05  # negative control
    assert any("independent" in note for note in bundle.manifest.notes)


def test_a_softmax_over_several_classes_is_as_ever(demo_bundle, images):
    with load(demo_bundle.path) as model:
        found = model.predict(list(images[0]), top=10)
    assert [sum(each.score for each in answer) for answer in found] == pytest.approx([1] * 24)
    assert not any("class" in note for note in demo_bundle.manifest.notes)


def test_multi_label_from_the_command_line(tmp_path, capsys):
    flags = ["--target", "onnx", "--multi-label", "--dry-run", "-o", str(tmp_path)]
    assert cli.export_main(flags) == 0
    assert "probs" in capsys.readouterr().out
    assert cli.export_main([*flags, "--head", "logits"]) == 2
    with pytest.raises(UsageError, match="--multi-label with --head features"):
        ExportPlan("onnx", head="features", multi_label=True)


@pytest.mark.parametrize("name", HEADS)
def test_accuracy_of_one_class_is_about_absent_and_present(name):
    scores = np.array([[-3.0], [2.0], [0.5], [-0.1]])
    outputs = {name: sigmoid(scores) if name == "probs" else scores}
    labels = np.array([0, 1, 0, 1])
    assert CLASSIFICATION.score.rows(outputs, labels, Reading())["top1"].mean() == 0.5
    turned = {name: 1 - outputs[name] if name == "probs" else -outputs[name]}
    assert CLASSIFICATION.agree(outputs, outputs).all() and not CLASSIFICATION.agree(outputs, turned).any()
    assert compare_outputs(outputs, turned, CLASSIFICATION, labels, limit=1.0).agreement == 0
