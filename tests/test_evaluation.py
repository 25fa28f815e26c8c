"""Evaluation on --val: candidates are compared on a part; the order of the classes and chance are said."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evm_deploy import cli
from evm_deploy._util.kept import KeptResults
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.calib import evaluation
from evm_deploy.calib.candidate import QuantizationCandidate
from evm_deploy.calib.evaluate import Accuracy, compare_outputs
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.int8 import ImageSets, choose
from evm_deploy.calib.layers import Layer
from evm_deploy.data.images import AT_ONCE, ImageSet, LabelledImages
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.sources import ImageItem
from evm_deploy.demo import digits
from evm_deploy.errors import CalibrationError
from evm_deploy.tasks.classification import CLASSIFICATION
from evm_deploy.tasks.raw import RAW
from evm_deploy.tasks.task import Reading

CLASSES = 4
BLOCKS = ["a", "b", "c"]


def image_set(count):
    """Images whose first pixel is their number, with a label each."""
    items = []
    for i in range(count):
        pixels = np.zeros((4, 4, 3), np.uint8)
        pixels[0, 0] = i // 256, i % 256, 0
        items.append(ImageItem(str(i), pixels, i % CLASSES, decoded=pixels, size=(4, 4)))
    return ImageSet(tuple(items), Preprocessing((4, 4)), order="classes of val got their index by number")


def number(pixels):
    return int(pixels[0, 0, 0]) * 256 + int(pixels[0, 0, 1])


def logits(i, wrong=False):
    return np.eye(CLASSES, dtype=np.float32)[(i + wrong) % CLASSES] * 10


class Evaluated:
    """A quantisation of nothing: a candidate is the set of its blocks in int8; `bad(blocks, i)`: is image i wrong?

    seen: the blocks and the number of images of each pass, in order.
    """

    def __init__(self, bad, max_drop=1.0, float_wrong=lambda i: False):
        self.bad, self.seen, self.floats = bad, [], []
        self.float_wrong = float_wrong
        self.config = SimpleNamespace(
            val="val",
            input="image",
            task=CLASSIFICATION,
            max_drop=max_drop,
            num_classes=CLASSES,
            kept=KeptResults(),
            reading=Reading(),
        )

    @contextmanager
    def open(self, blocks):
        self.seen.append([blocks, 0])

        def run(feeds):
            (pixels,) = feeds["image"]
            self.seen[-1][1] += 1
            return {"logits": logits(number(pixels), self.bad(blocks, number(pixels)))[None]}

        yield SimpleNamespace(inputs={"image": SimpleNamespace(shape=(1,))}, run=run)

    def float_outputs(self, images):
        self.floats.append(0)
        for i in map(number, images.pixels()):
            self.floats[-1] += 1
            yield {"logits": logits(i, self.float_wrong(i))[None]}

    def choose(self, images, names=("off",)):
        layers = [Layer(block, block, "x", "y", block) for block in BLOCKS]
        source = QuantizationCandidate(
            None, layers, BLOCKS, rewrite=lambda model, layers, ranges: frozenset(layer.module for layer in layers)
        )
        steps = []

        @contextmanager
        def step(name, detail):
            steps.append((name, detail))
            yield lambda done, total: steps.append((done, total))

        choices = {name: replace(source, ranges={name: Range(-1.0, 1.0)}) for name in names}
        found = choose(choices, ImageSets(None, images), self.config, self.float_outputs, self.open, step)
        return found, steps


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    monkeypatch.setattr(evaluation, "COMPARED", 100)


def test_few_images_are_evaluated_whole_and_once():
    run = Evaluated(lambda blocks, i: False)
    found, steps = run.choose(image_set(100), names=("off", "on"))
    assert [count for _, count in run.seen] == [100, 100] and run.floats == [100]
    assert found.accuracy.images == 100 and found.accuracy.drop == 0
    assert not any("compared" in text for text in found.remarks)
    assert (99, 100) in steps


def test_candidates_are_compared_on_a_part_and_the_chosen_one_is_evaluated_on_all():
    run = Evaluated(lambda blocks, i: False)
    found, _ = run.choose(image_set(1000), names=("off", "on"))
    assert [count for _, count in run.seen] == [100, 100, 1000] and run.floats == [100, 1000]
    assert found.accuracy.images == 1000
    assert any("compared on 100 images" in text for text in found.remarks)


def test_the_part_is_drawn_by_a_fixed_seed_and_spread_over_all():
    images = image_set(1000)
    part, whole = evaluation.evaluation_stages(images)
    assert part == evaluation.evaluation_stages(image_set(1000))[0] and list(whole) == list(range(1000))
    assert min(part) < 100 and max(part) > 900 and len(set(images.part(part).labels)) == CLASSES


def test_sensitive_blocks_stay_in_float_as_the_part_says():
    run = Evaluated(lambda blocks, i: "b" in blocks and i % 10 == 0)
    found, _ = run.choose(image_set(1000))
    assert found.in_float == ("b",) and found.accuracy.drop == 0 and found.accuracy.images == 1000
    assert found.model == {"a", "c"}
    assert [count for _, count in run.seen] == [100] * 5 + [1000]  # all, each block, without b; the result


def test_a_loss_that_only_all_images_show_is_mended_too():
    part = set(evaluation.evaluation_stages(image_set(1000))[0])
    run = Evaluated(lambda blocks, i: "c" in blocks and i not in part and i % 3 == 0)
    found, _ = run.choose(image_set(1000))
    assert found.accuracy.images == 1000 and found.accuracy.ok and "c" in found.in_float
    assert sum(count == 100 for _, count in run.seen) == 1 + len(BLOCKS)  # sensitivity is measured on the part


def listed(count, broken=()):
    """Images like those of `image_set`, in one colour, not decoded yet; some cannot be read."""
    sources = [np.full((4, 4, 3), (i // 256, i % 256, 0), np.uint8) for i in range(count)]
    items = [
        ImageItem(str(i), Path("gone.png") if i in broken else source, i % CLASSES) for i, source in enumerate(sources)
    ]
    return LabelledImages(Path("val"), items, Preprocessing((4, 4)), order="by number")


def test_images_are_decoded_with_their_shard_and_once(monkeypatch):
    """One shard before the first inference, and at no time more than a few in memory: the others are in a file."""
    monkeypatch.setattr(evaluation, "SHARD", 50)
    events, live, most = [], Counter(), []
    real = Preprocessing.pixels

    def pixels(self, source):
        array = real(self, source).copy()
        events.append("decode")
        live["now"] += 1
        most.append(live["now"])
        weakref.finalize(array, live.subtract, ["now"])
        return array

    monkeypatch.setattr(Preprocessing, "pixels", pixels)
    run = Evaluated(lambda blocks, i: events.append("run") or ("b" in blocks and i % 10 == 0))
    images = listed(1000)
    found, _ = run.choose(images, names=("off", "on"))
    assert found.accuracy.images == 1000 and found.in_float == ("b",)
    assert events.index("run") == 50 and events.count("decode") == 1000 and max(most) <= 4 * AT_ONCE
    assert len({id(item.decoded.base) for item in images.part(range(1000)).items}) == 1
    again, _ = run.choose(image_set(1000), names=("off", "on"))
    assert (again.accuracy, again.tried, again.sensitivity) == (found.accuracy, found.tried, found.sensitivity)


def test_unreadable_images_are_left_out_up_to_a_limit(monkeypatch):
    """Also where all of a shard are."""
    monkeypatch.setattr(evaluation, "SHARD", 10)
    run = Evaluated(lambda blocks, i: False)
    found, _ = run.choose(listed(400, range(100, 112)))
    assert found.accuracy.images == 388 and len(found.skipped) == 12 and "gone.png" in found.skipped[0]
    with pytest.raises(CalibrationError, match="30 of 400 images cannot be read"):
        run.choose(listed(400, range(300, 330)))


def test_a_loss_beyond_repair_is_that_of_all_images():
    run = Evaluated(lambda blocks, i: True)
    found, _ = run.choose(image_set(300))
    assert not found.accuracy.ok and found.accuracy.images == 300 and found.in_float == tuple(BLOCKS)


@pytest.mark.parametrize(
    ("right", "images", "classes", "chance"),
    [
        (8, 160, 32, True),
        (160, 160, 32, False),
        (20, 160, 32, False),
        (0, 160, 32, True),
        (250, 1000, 4, True),
        (300, 1000, 4, False),
        (25000, 50000, 2, True),
        (25600, 50000, 2, False),
        (50, 50000, 1000, True),
        (50000, 50000, 1000, False),
        (1, 1, 2, True),
    ],
)
def test_chance_is_told_from_skill(right, images, classes, chance):
    assert CLASSIFICATION.score.by_chance(right / images, images, classes) == chance


@pytest.mark.parametrize(("wrong", "said"), [(lambda i: i % 4 != 0, True), (lambda i: i % 4 == 0, False)])
def test_a_float_network_at_chance_is_a_remark(wrong, said):
    found, _ = Evaluated(lambda blocks, i: wrong(i), float_wrong=wrong).choose(image_set(200))
    assert any("chance" in text for text in found.remarks) == said
    assert "by number" in found.remarks[0]


def test_tensors_without_an_answer_are_compared_by_error_and_psnr():
    rng = np.random.default_rng(0)
    want = {"a": rng.random((3, 4, 5)), "b": 8 * rng.random((3, 2))}
    have = {name: np.stack([each + 0.1 * np.ptp(each) for each in value]) for name, value in want.items()}
    found = compare_outputs(want, have, RAW)
    noise, signal = (
        sum((value.reshape(3, -1) ** 2).sum(1) for value in values)
        for values in ([have[name] - want[name] for name in want], want.values())
    )
    error = np.sqrt(noise / signal).mean()
    assert found.differences == pytest.approx({"relative_error": error, "psnr_db": 20.0})
    assert f"relative error {100 * error:.2g} %   PSNR 20.0 dB" in str(found) and found.agreement is None
    assert Accuracy.from_dict(json.loads(json.dumps(found.as_dict()))).differences == found.differences
    assert compare_outputs(want, want, RAW).differences["relative_error"] == 0
    assert not compare_outputs(want, {**want, "a": want["a"] * np.inf}, RAW).differences


def test_the_comparison_in_parts_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    want, have = ({"logits": rng.normal(size=(2500, 7)).astype(np.float32)} for _ in range(2))
    whole = compare_outputs(want, have, CLASSIFICATION)
    monkeypatch.setattr("evm_deploy.calib.evaluate.ROWS", 10**6)
    assert compare_outputs(want, have, CLASSIFICATION).sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-9)
    have["logits"][2400, 3] = np.nan
    assert compare_outputs(want, have, CLASSIFICATION).sqnr_db == -np.inf


def class_folders(folder, order):
    """Digits in folders named after `order`."""
    images, labels = digits("heldout")
    for i, (image, label) in enumerate(zip(images[:80], labels[:80], strict=True)):
        path = folder / order[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.mark.parametrize(
    ("order", "code", "says"),
    [
        ([str(i) for i in range(10)], 0, "by name, from the labels"),
        ([str((i + 1) % 10) for i in range(10)], 0, "chance"),
        ([*"012345678", "nine"], 2, "nine"),
    ],
    ids=["right", "rotated", "misspelt"],
)
def test_what_an_export_says_of_its_classes(order, code, says, tmp_path, capsys):
    val = class_folders(tmp_path / "val", order)
    flags = ["--target", "onnx", "--precision", "w8", "--val", str(val), "--max-drop", "5", "-o", str(tmp_path / "o")]
    assert cli.export_main(flags) == code
    said = capsys.readouterr()
    if code:
        assert says in said.err and "labels without images: 9" in said.err
        return
    (bundle,) = (tmp_path / "o").iterdir()
    notes = open_bundle(bundle).manifest.notes
    assert any(says in note for note in notes) and says in said.out
    assert any("chance" in note for note in notes) == (says == "chance")
