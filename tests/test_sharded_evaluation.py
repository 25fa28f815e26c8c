"""evm-eval: the figures do not depend on shards, order or interruptions; images are decoded with their shard."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evm_deploy import cli
from evm_deploy.demo import CHECKPOINT, digits
from evm_deploy.errors import BundleError, CalibrationError, UsageError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.sweep import shards
from evm_deploy.sweep.engine import LocalEngine
from evm_deploy.sweep.evaluate import evaluate
from evm_deploy.sweep.packed import packed, read_rows, unpacked, write_rows
from evm_deploy.sweep.shards import Shard, accuracy, evaluated, labelled_for
from evm_deploy.tasks import get_task

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def half(bundle_of) -> Path:
    """The demo in float16: its outputs differ from the float32 ones."""
    return bundle_of(CHECKPOINT, ExportPlan("onnx", "fp16")).path


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> Path:
    """90 digits in class folders."""
    folder = tmp_path_factory.mktemp("val")
    images, labels = digits("heldout")
    for i, (image, label) in enumerate(zip(images[:90], labels[:90], strict=True)):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.mark.slow
def test_shards_add_up_to_the_same_digits(half, demo_bundle, val, monkeypatch, tmp_path):
    whole = evaluate(half, str(val), demo_bundle.path).accuracy
    assert (whole.images, whole.metric) == (90, "top1") and 30 < whole.sqnr_db < 120 and whole.reached > 0.9
    monkeypatch.setattr(shards, "SHARD", 7)
    cut = labelled_for(half, str(val)).parts()
    parts = [unpacked(packed(evaluated(Shard(str(half), str(demo_bundle.path), items), 1))) for items in cut]
    assert len(parts) == 13
    for seed in range(3):
        random.Random(seed).shuffle(parts)
        assert accuracy(parts, get_task("classification"), "val") == whole
    write_rows(tmp_path / "rows.npz", parts[0])
    assert accuracy([read_rows(tmp_path / "rows.npz"), *parts[1:]], get_task("classification"), "val") == whole
    changed = replace(parts[0], rows={**parts[0].rows, "sqnr_db": parts[0].rows["sqnr_db"] + 1e-9})
    assert accuracy([changed, *parts[1:]], get_task("classification"), "val") != whole


def test_images_are_decoded_with_their_shard(half, val, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 30)
    seen, real = [], shards.decoded_images

    def decoded(items, preprocessing):
        seen.append(len(items))
        return real(items, preprocessing)

    monkeypatch.setattr(shards, "decoded_images", decoded)
    labelled_for(half, str(val)).parts()
    assert seen == []
    assert evaluate(half, str(val)).accuracy.images == 90 and seen == [30, 30, 30]


def test_an_interrupted_evaluation_continues(half, val, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 30)

    class Interrupted(LocalEngine):
        left = 2

        def next(self):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().next()

    with pytest.raises(KeyboardInterrupt):
        evaluate(half, str(val), engine=Interrupted())
    found = evaluate(half, str(val))
    assert found.taken == 2 and found.accuracy == evaluate(half, str(val)).accuracy
    assert evaluate(half, str(val)).taken == 0  # what is complete is not kept


def test_figures_are_printed(half, demo_bundle, val, capsys):
    assert cli.eval_main([str(half), "--val", str(val), "-q"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Accuracy  top-1 ") and "(90 images)\n" in shown and "float" not in shown
    assert "Note      classes of" in shown
    assert cli.eval_main([str(half), "--val", str(val), "--reference", str(demo_bundle.path), "--json", "-q"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 90 and facts["drop"] == pytest.approx(100 * (facts["top1_float"] - facts["top1"]))
    assert facts["skipped"] == [] and facts["agreement"] > 0.9


def test_unreadable_images_are_named_and_limited(half, tmp_path, capsys):
    images, labels = digits("heldout")
    for i in range(40):
        path = tmp_path / "val" / str(labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    broken = next((tmp_path / "val").rglob("7.png"))
    broken.write_bytes(b"no image")
    assert cli.eval_main([str(half), "--val", str(tmp_path / "val"), "-q"]) == 0
    shown = capsys.readouterr().out
    assert "39 images" in shown and "left out" in shown and "7.png" in shown
    for i in range(8, 12):
        next((tmp_path / "val").rglob(f"{i}.png")).write_bytes(b"no image")
    with pytest.raises(CalibrationError, match="5 of 40 images cannot be read"):
        evaluate(half, str(tmp_path / "val"))


def test_what_cannot_be_evaluated_is_said(half, micro_bundle, val, tmp_path):
    with pytest.raises(UsageError, match="cannot be compared: task, outputs or preprocessing differ"):
        evaluate(half, str(val), micro_bundle.path)
    with pytest.raises(BundleError, match="is not a bundle"):
        evaluate(tmp_path, str(val))
    np.savez(tmp_path / "val.npz", images=np.zeros((2, 8, 8), np.uint8), labels=[0, 10])
    with pytest.raises(CalibrationError, match="label 10, but the head has 10 classes"):
        evaluate(half, str(tmp_path / "val.npz"))
