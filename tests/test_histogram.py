"""Streaming histograms and the ranges read off them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from evm_deploy.calib.histogram import LEVELS, METHODS, SIDE, Histogram, Range
from evm_deploy.errors import CalibrationError

FLOATS = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-25 else 0)
)


def of(*arrays):
    histogram = Histogram()
    for array in arrays:
        histogram.add(np.asarray(array, np.float32))
    return histogram


def rounded(values, covered):
    """`values` through 8 bits over `covered`, as QuantizeLinear and DequantizeLinear do."""
    scale = (covered.high - covered.low) / LEVELS
    zero = round(-covered.low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, LEVELS) - zero) * scale


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=5))
@pytest.mark.slow
def test_nothing_is_lost_and_everything_is_in_its_bin(arrays):
    histogram, values = of(*arrays), np.concatenate(arrays)
    assert (histogram.total, histogram.low, histogram.high) == (len(values), values.min(), values.max())
    edges = (np.arange(2 * SIDE + 1) - SIDE) * histogram.width
    want, _ = np.histogram(values.astype(np.float64), edges)
    assert np.abs(np.cumsum(histogram.counts) - np.cumsum(want)).max() <= 1  # a value on an edge may round over it
    assert Histogram.from_json(json.loads(json.dumps(histogram.to_json()))).to_json() == histogram.to_json()


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=5))
@pytest.mark.slow
def test_every_method_gives_a_range_with_zero_inside_and_none_beyond_the_values(arrays):
    histogram = of(*arrays)
    whole = histogram.range("minmax")
    for method in (*METHODS, "auto"):
        covered = histogram.range(method)
        assert covered.low <= 0 <= covered.high and covered.low < covered.high
        assert whole.low <= covered.low and covered.high <= whole.high, method
    errors = [histogram.squared_error(histogram.range(method)) for method in METHODS]
    assert histogram.squared_error(histogram.range("auto")) == min(errors)


def test_order_does_not_matter():
    g = np.random.default_rng(0)
    parts = [g.standard_normal(500) * scale for scale in (0.01, 1, 30)]
    assert of(*parts).to_json() == of(*parts[::-1]).to_json()


def test_the_squared_error_is_that_of_the_values():
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    histogram = of(values)
    for covered in (Range(-3, 3), Range(-1, 2), histogram.range("minmax")):
        measured = float(((values - rounded(values, covered)) ** 2).mean())
        assert histogram.squared_error(covered) == pytest.approx(measured, rel=0.03)


def test_outliers_are_clipped_by_all_but_minmax():
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    values[0] = 60
    histogram = of(values)
    assert histogram.range("minmax").high == 60
    assert histogram.range("percentile").high == pytest.approx(3.9, abs=0.2)
    for method in ("mse", "entropy"):
        assert 3 < histogram.range(method).high < 45, method
    assert histogram.range("auto").high < 45


def test_one_sided_values_keep_their_zero():
    histogram = of(np.random.default_rng(0).uniform(2, 3, 1000))
    assert histogram.range("minmax").low == 0


def test_constant_and_zero_tensors_have_a_range():
    for value, want in ((0, Range(0, 1)), (5, Range(0, 5)), (-5, Range(-5, 0))):
        assert of(np.full(10, value)).range("minmax") == want


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        of([1.0, bad])


def test_an_empty_histogram_has_no_range():
    with pytest.raises(CalibrationError, match="no values"):
        Histogram().range("minmax")


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [-1]},
        {"first": 5000},
        {"first": -1},
        {"width": 0},
        {"width": float("nan")},
        {"low": 9.0},
        {"counts": "x"},
    ],
)
def test_what_is_no_histogram_is_refused(change):
    data = {**of([1.0, 2.0]).to_json(), **change}
    with pytest.raises((ValueError, TypeError, KeyError)):
        Histogram.from_json(data)
