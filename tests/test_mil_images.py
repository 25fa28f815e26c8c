"""Rules of the MIL runtime for images, each against numpy or a property that defines the operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evm_deploy.runtimes.mil.images import RULES
from evm_deploy.runtimes.mil.rule import UnsupportedError
from evm_deploy.runtimes.mil.rules import all_rules

rng = np.random.default_rng(1)
X = torch.from_numpy(rng.standard_normal((2, 12, 6, 4)).astype(np.float32))


def test_pixels_and_channels():
    y = RULES["pixel_shuffle"](X, 2)
    assert y.shape == (2, 3, 12, 8)
    assert y[1, 2, 5, 6] == X[1, 2 * 4 + 1 * 2 + 0, 2, 3]  # row 5 = 2 * 2 + 1, column 6 = 2 * 3 + 0
    assert torch.equal(RULES["pixel_unshuffle"](y, 2), X)


def test_rows_and_columns_are_repeated():
    y = RULES["upsample_nearest_neighbor"](X, 2.0, 3)
    assert y.shape == (2, 12, 12, 12) and torch.equal(y[:, :, 1::2, 2::3], X)
    with pytest.raises(UnsupportedError, match=r"1\.5 x 1"):
        RULES["upsample_nearest_neighbor"](X, 1.5)


def interpolated(row, size, aligned):
    n = len(row)
    at = np.arange(size) * (n - 1) / (size - 1) if aligned else (np.arange(size) + 0.5) * n / size - 0.5
    return np.interp(at, np.arange(n), row)


@pytest.mark.parametrize("aligned", [True, False])
def test_linear_interpolation(aligned):
    y = RULES["upsample_bilinear"](X, 2, 3, aligned, not aligned)
    want = np.apply_along_axis(interpolated, 2, X.numpy(), 12, aligned)
    want = np.apply_along_axis(interpolated, 3, want, 12, aligned)
    np.testing.assert_allclose(y, want, atol=1e-6)
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS"
    assert torch.equal(RULES["resize_bilinear"](X, 12, 12, mode), y)


def windows(x, rows, columns, stride):
    found = np.lib.stride_tricks.sliding_window_view(x, (rows, columns), (2, 3))
    return found[:, :, :: stride[0], :: stride[1]]


@pytest.mark.parametrize(("stride", "pad"), [([1, 1], None), ([2, 1], [1, 0, 0, 1])])
def test_pooling(stride, pad):
    given = {"kernel_sizes": [3, 2], "strides": stride, "pad_type": "custom", "pad": pad}
    sides = np.reshape([0] * 4 + (pad or [0] * 4), (4, 2))
    low, zero, ones = (np.pad(a, sides, constant_values=v) for a, v in ((X, -np.inf), (X, 0), (np.ones(X.shape), 0)))
    np.testing.assert_allclose(RULES["max_pool"](X, **given), windows(low, 3, 2, stride).max((-2, -1)))
    mean = windows(zero, 3, 2, stride).mean((-2, -1))
    np.testing.assert_allclose(RULES["avg_pool"](X, **given), mean, atol=1e-6)
    alone = mean / windows(ones, 3, 2, stride).mean((-2, -1))
    have = RULES["avg_pool"](X, **given, exclude_padding_from_average=True)
    np.testing.assert_allclose(have, alone, atol=1e-6)
    row = RULES["max_pool"](X[..., 0], [2])
    assert torch.equal(row, torch.maximum(X[:, :, :-1, 0], X[:, :, 1:, 0]))


@pytest.mark.parametrize("op", ["conv", "max_pool", "avg_pool"])
@pytest.mark.parametrize(("stride", "pad"), [(1, [1, 1, 0, 1]), (2, [0, 1, 0, 0]), (3, [0, 0, 0, 1])])
def test_same_pads_what_a_size_of_ceil_needs(op, stride, pad):
    """Windows of 3 x 2 on 6 x 4; where the pad is odd, the larger half comes after."""
    given = {"weight": X[:4, :, :3, :2]} if op == "conv" else {"kernel_sizes": [3, 2]}
    given["strides"] = [stride, stride]
    have = all_rules()[op](X, **given, pad_type="same")
    assert have.shape[2:] == (-(-6 // stride), -(-4 // stride))
    assert torch.equal(have, all_rules()[op](X, **given, pad_type="custom", pad=pad))


@pytest.mark.parametrize(("groups", "strides", "pad"), [(1, [1, 1], None), (4, [2, 3], [1, 0, 0, 2])])
def test_a_transposed_convolution_is_the_adjoint_of_the_convolution(groups, strides, pad):
    weight = torch.from_numpy(rng.standard_normal((12, 8 // groups, 3, 3)).astype(np.float32))
    bias = torch.arange(8.0)
    given = {"strides": strides, "pad_type": "custom", "pad": pad, "groups": groups}
    y = RULES["conv_transpose"](X, weight, **given)
    other = torch.from_numpy(rng.standard_normal(y.shape).astype(np.float32))
    top, bottom, left, right = pad or [0] * 4
    padded = torch.nn.functional.pad(other, [left, right, top, bottom])
    back = torch.nn.functional.conv2d(padded, weight, None, strides, groups=groups)
    torch.testing.assert_close((y * other).sum(), (X * back).sum(), rtol=1e-4, atol=1e-2)
    whole = RULES["conv_transpose"](X, weight, bias, **given, output_shape=list(y.shape))
    torch.testing.assert_close(whole, y + bias.reshape(1, 8, 1, 1))


@pytest.mark.parametrize(
    ("op", "given", "message"),
    [
        ("upsample_bilinear", {"align_corners": False, "half_pixel_centers": False}, "without align_corners"),
        ("resize_bilinear", {"sampling_mode": "DEFAULT"}, "DEFAULT"),
        ("max_pool", {"kernel_sizes": [2, 2], "pad_type": "same_lower"}, "pad_type same_lower"),
        ("avg_pool", {"kernel_sizes": [2, 2], "ceil_mode": True}, "ceil_mode"),
        ("conv_transpose", {"weight": torch.ones(12, 1, 2, 2), "pad_type": "same"}, "pad_type same"),
        ("conv_transpose", {"weight": torch.ones(12, 1, 2, 2), "output_shape": [2, 1, 9, 9]}, "by nature"),
    ],
)
def test_variants_without_a_rule_are_refused(op, given, message):
    with pytest.raises(UnsupportedError, match=message):
        RULES[op](X, **given)
    if op == "max_pool":
        with pytest.raises(UnsupportedError, match="rank 2"):
            RULES[op](X[0, 0], kernel_sizes=[2])
