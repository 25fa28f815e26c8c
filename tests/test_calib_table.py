"""Calibration tables: measured once, resumed, reused by what they depend on, never taken when damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evm_deploy.calib.table import SAVE_EVERY, CalibrationTable, calibrate
from evm_deploy.errors import CalibrationError

BY_CHANNEL = {"checkpoint_sha256": "abc", "images": {"count": 100, "sha256": "def"}, "channels": ["a:input"]}
IDENTITY = {"checkpoint_sha256": "abc", "images": {"count": 100, "sha256": "def"}}


def activations(seen):
    """Return an iterator over the activations of images, each image different and counted in `seen`."""

    def measured(start):
        for i in range(start, 100):
            seen.append(i)
            yield {
                "a:input": np.array([[i, -1, 0], [1, 99 - i, 0]], np.float32),
                "b:output": np.array([-i], np.float32),
            }

    return measured


def test_a_table_is_measured_once(tmp_path):
    seen, calls = [], []
    first = calibrate(IDENTITY, activations(seen), folder=tmp_path, progress=lambda *done: calls.append(done))
    assert (seen, calls[-1], first.complete) == (list(range(100)), (100, 100), True)
    assert first.histograms["a:input"].total == 600 and first.histograms["b:output"].low == -99
    again = calibrate(IDENTITY, activations(seen), folder=tmp_path)
    assert len(seen) == 100 and again.to_json() == first.to_json()


def test_other_images_or_another_checkpoint_are_another_table(tmp_path):
    calibrate(IDENTITY, activations([]), folder=tmp_path)
    changes = ({"checkpoint_sha256": "other"}, {"images": {"count": 100, "sha256": "other"}}, {"channels": ["a:input"]})
    for change in changes:
        seen = []
        calibrate({**IDENTITY, **change}, activations(seen), folder=tmp_path)
        assert len(seen) == 100


@pytest.mark.parametrize("identity", [IDENTITY, BY_CHANNEL])
@pytest.mark.parametrize("stop", [0, 1, SAVE_EVERY - 1, SAVE_EVERY, SAVE_EVERY + 1, 99])
def test_an_interrupted_calibration_goes_on_and_ends_the_same(stop, identity, tmp_path):
    whole = calibrate(identity, activations([]), folder=tmp_path / "whole")

    def interrupted(start):
        for i, values in enumerate(activations([])(start)):
            if i == stop:
                raise KeyboardInterrupt
            yield values

    with pytest.raises(KeyboardInterrupt):
        calibrate(identity, interrupted, folder=tmp_path)
    seen = []
    table = calibrate(identity, activations(seen), folder=tmp_path)
    assert table.to_json() == whole.to_json()
    assert seen[0] == stop // SAVE_EVERY * SAVE_EVERY
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"done": 100', '"done": 101'),
        lambda text: text.replace('"abc"', '"abd"'),
        lambda text: text.replace('"schema": 1', '"schema": 2'),
        lambda text: json.dumps({**json.loads(text), "tensors": {"a:input": {}}}),
        lambda text: json.dumps({**json.loads(text), "channel_maxima": {}}),
        lambda text: json.dumps({**json.loads(text), "channel_maxima": {"b:output": [1.0]}}),
        lambda text: text.replace("[99.0, 99.0, 0.0]", "[99.0, -99.0, 0.0]"),
        lambda text: text.replace("[99.0, 99.0, 0.0]", "[99.0, NaN, 0.0]"),
        lambda text: "[]",
    ],
)
def test_a_damaged_table_is_refused_and_measured_again(damage, tmp_path):
    table = calibrate(BY_CHANNEL, activations([]), folder=tmp_path)
    path = next(tmp_path.glob("*.json"))
    broken = damage(path.read_text())
    assert broken != path.read_text()
    with pytest.raises(CalibrationError, match="not a calibration table"):
        CalibrationTable.from_json(broken)
    path.write_text(broken)
    seen = []
    assert calibrate(BY_CHANNEL, activations(seen), folder=tmp_path).to_json() == table.to_json()
    assert len(seen) == 100


def test_the_largest_of_each_channel_is_kept_where_asked(tmp_path):
    table = calibrate(BY_CHANNEL, activations([]), folder=tmp_path)
    assert {name: values.tolist() for name, values in table.channel_maxima.items()} == {"a:input": [99, 99, 0]}
    assert not calibrate(IDENTITY, activations([]), folder=tmp_path).channel_maxima


def test_missing_images_and_nan_are_errors_that_say_where(tmp_path):
    with pytest.raises(CalibrationError, match="only 0 of 100 calibration images"):
        calibrate(IDENTITY, lambda start: iter(()), folder=tmp_path)
    bad = iter([{"layers.0:input": np.array([np.nan], np.float32)}])
    with pytest.raises(CalibrationError, match=r"layers\.0:input: an activation is NaN"):
        calibrate(IDENTITY, lambda start: bad, folder=tmp_path)
