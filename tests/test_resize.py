"""--resize crop, stretch and pad: pixels against Pillow and numpy alone, settings, and the way back to the image."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evm_deploy import load
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.commands.export_flags import export_parser
from evm_deploy.commands.export_plans import plans_of
from evm_deploy.data.geometry import Geometry
from evm_deploy.data.preprocessing import RESIZES, Preprocessing
from evm_deploy.data.resizing import INTERPOLATIONS
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.export.network_input import assumed
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.families import load_checkpoint
from tests.broken import change_manifest

FILL = np.array([124, 116, 104], np.uint8)  # ImageNet's mean of 0..255: 123.675, 116.28, 103.53
SIZES = [(300, 406), (37, 41), (1, 1), (1, 900), (900, 1), (64, 96), (3000, 4000), (333, 217)]  # H, W


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, channels), np.uint8)


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel bilinear without antialiasing, in float64, rounded once."""

    def axis(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, old - 1), at - low

    (y0, y1, fy), (x0, x1, fx) = axis(image.shape[0], height), axis(image.shape[1], width)
    rows = image[y0] * (1 - fy[:, None, None]) + image[y1] * fy[:, None, None]
    return (rows[:, x0] * (1 - fx[:, None]) + rows[:, x1] * fx[:, None]).round()


def near(have: np.ndarray, image: np.ndarray, interpolation: str) -> None:
    """Assert that `have` is the whole image in other sizes."""
    height, width = have.shape[:2]
    if interpolation == "bilinear-opencv":
        assert np.abs(have - bilinear(image.astype(float), height, width)).max() <= 1
        return
    how = getattr(Image.Resampling, interpolation.upper())
    across = Image.fromarray(image).resize((width, image.shape[0]), how)
    np.testing.assert_array_equal(have, np.asarray(across.resize((width, height), how)))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_stretch_is_one_resize(size, interpolation):
    image = noise(*size)
    pixels = Preprocessing((64, 96), interpolation=interpolation, resize="stretch").pixels(image)
    assert pixels.shape == (64, 96, 3) and pixels.dtype == np.uint8
    near(pixels, image, interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_pad_keeps_the_aspect_and_fills_right_and_bottom_with_the_mean(size, interpolation):
    image = noise(*size)
    preprocessing = Preprocessing((64, 96), interpolation=interpolation, resize="pad")
    pixels = preprocessing.pixels(image)
    scale = min(64 / size[0], 96 / size[1])
    height, width = (max(1, int(side * scale + 0.5)) for side in size)  # mmcv's rescale_size
    assert pixels.shape == (64, 96, 3) and (height == 64 or width == 96)
    near(pixels[:height, :width], image, interpolation)
    outside = np.ones((64, 96), bool)
    outside[:height, :width] = False
    assert (pixels[outside] == FILL).all()
    padded = preprocessing.normalise(pixels[None])[0].transpose(1, 2, 0)[outside]
    assert (np.abs(padded) <= 0.5 / (255 * np.array(preprocessing.std)) + 1e-6).all()  # mmdet: 0 after normalising
    assert preprocessing.geometry(size[1], size[0]).content == (0, 0, height, width)


def test_the_size_and_factors_are_mmdets():
    """The picture of spec 3 (golden case retina_micro_picture): 300x406 in 192x320 becomes 192x260."""
    place = Preprocessing((192, 320), resize="pad").geometry(406, 300)
    assert place.resized == (192, 260)
    assert place.scale == (0.64, 0.6403940886699507)


@settings(max_examples=200, deadline=None)
@given(
    original=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    resize=st.sampled_from(["stretch", "pad"]),
    channels=st.sampled_from([1, 3]),
)
def test_any_image_fits_and_every_point_comes_back(original, size, resize, channels):
    preprocessing = Preprocessing(size, mean=(0.5,) * channels, std=(0.5,) * channels, resize=resize)
    place = preprocessing.geometry(original[1], original[0])
    (height, width), (top, left, bottom, right) = place.resized, place.content
    assert (top, left) == (0, 0) and (bottom, right) == (height, width)
    assert 1 <= height <= size[0] and 1 <= width <= size[1]
    assert resize == "pad" or (height, width) == size
    corners = np.array([[0, 0, width, height]])
    np.testing.assert_allclose(place.to_image(corners), [[0, 0, original[1], original[0]]], atol=1e-9)
    points = np.random.default_rng(0).uniform(-5, 4000, (7, 3, 2))
    np.testing.assert_allclose(place.to_image(place.to_network(points)), points, atol=1e-6)
    if max(original) <= 800:
        assert preprocessing.pixels(np.zeros((*original, 3), np.uint8)).shape == (*size, channels)


@pytest.mark.parametrize(("resize", "crop"), [("crop", 0.875), ("crop", 1.0), ("stretch", None), ("pad", None)])
@pytest.mark.parametrize("size", [(301, 407), (407, 301), (64, 64), (30, 47)])
def test_a_mark_is_found_where_the_geometry_says(resize, crop, size):
    """Pixels, not formulas: a white block on black, its box in the pixels and back in the image."""
    height, width = size
    box = np.array([0.4 * width, 0.35 * height, 0.6 * width, 0.7 * height]).round()
    image = np.zeros((height, width, 3), np.uint8)
    image[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = 255
    preprocessing = Preprocessing(
        (64, 96), **({"crop_pct": crop} if crop else {}), interpolation="bilinear", mean=(0.0,) * 3, resize=resize
    )
    found = preprocessing.pixels(image)[..., 0] / 255
    rows, columns = found.max(1), found.max(0)
    first, last = (np.array([axis.argmax(), len(axis) - axis[::-1].argmax()]) for axis in (rows >= 0.5, columns >= 0.5))
    seen = np.array([last[0], first[0], last[1], first[1]], float)
    place = preprocessing.geometry(width, height)
    inside = place.to_network(box).clip(0, [96, 64, 96, 64])
    assert np.abs(seen - inside).max() <= 1
    back = place.to_image(inside)
    assert np.abs(back - box).max() <= 1e-6 or resize == "crop"


def test_the_geometry_of_a_crop():
    place = Preprocessing((224, 224)).geometry(500, 300)
    assert place == Geometry((300, 500), (256, 426), (224, 224), (-16, -101))
    assert place.content == (0, 0, 224, 224)
    np.testing.assert_allclose(place.to_image(np.array([0, 0])), [101 / (426 / 500), 16 / (256 / 300)])


@pytest.mark.parametrize("points", [np.zeros(3), np.zeros((2, 5)), np.float64(3)])
def test_points_of_another_shape_are_refused(points):
    with pytest.raises(ValueError, match="x1, y1, x2, y2"):
        Preprocessing((64, 64), resize="pad").geometry(10, 20).to_image(points)


def test_rotated_images_are_placed_upright(tmp_path):
    image = Image.fromarray(noise(40, 90))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    have = Preprocessing((64, 64), resize="pad").pixels(tmp_path / "a.png")
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert upright.size == (40, 90)
    np.testing.assert_array_equal(have, Preprocessing((64, 64), resize="pad").pixels(np.asarray(upright)))
    assert (have[:, 28:] == FILL).all()


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.fixture(scope="module")
def spec():
    return load_checkpoint(CHECKPOINT).spec


def test_the_flag_replaces_the_crop_saved_with_the_weights(spec):
    assert "crop_pct" in spec.defaults
    for resize in ("stretch", "pad"):
        plan = ExportPlan("onnx", "fp32", resize=resize)
        _, preprocessing = complete(plan, spec)
        assert preprocessing.resize == resize and assumed(plan, spec, preprocessing) == []
        assert "crop_pct" not in preprocessing.as_dict()


@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_a_share_without_a_crop_is_refused(resize, spec):
    with pytest.raises(UsageError, match=f"--crop-pct with --resize {resize}") as raised:
        ExportPlan("onnx", resize=resize, crop_pct=0.9)
    assert raised.value.hint == "leave --crop-pct out, or use --resize crop"
    saved = replace(spec, defaults={"resize": resize})
    with pytest.raises(UsageError, match=f"--crop-pct with the checkpoint's resize {resize}"):
        complete(ExportPlan("onnx", "fp32", crop_pct=0.9), saved)
    assert complete(ExportPlan("onnx", "fp32", crop_pct=0.9, resize="crop"), saved)[1].crop_pct == 0.9
    assert complete(ExportPlan("onnx", "fp32"), saved)[1].resize == resize
    with pytest.raises(UsageError, match="the checkpoint's crop_pct with the checkpoint's resize"):
        complete(ExportPlan("onnx", "fp32"), replace(spec, defaults={"resize": resize, "crop_pct": 0.9}))


@pytest.mark.parametrize("wrong", ["letterbox", "", "Pad", "pads"])
def test_other_words_are_refused_with_the_known(wrong, spec):
    with pytest.raises(UsageError, match=f"--resize '{wrong}' is unknown; choose from: crop, stretch, pad"):
        ExportPlan("onnx", resize=wrong)
    with pytest.raises(UsageError, match="the checkpoint's resize"):
        complete(ExportPlan("onnx", "fp32"), replace(spec, defaults={"resize": wrong}))


def test_the_flag_and_the_config_say_it(tmp_path):
    from evm_deploy.commands.config import read_config

    args = export_parser().parse_args(["--target", "onnx", "--resize", "pad", "--interpolation", "bilinear-opencv"])
    (plan,) = plans_of(args)
    assert (plan.resize, plan.interpolation) == ("pad", "bilinear-opencv")
    (tmp_path / "c.toml").write_text('resize = "stretch"\n')
    assert read_config(tmp_path / "c.toml", export_parser())["resize"] == "stretch"


# -------------------------------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module", params=RESIZES)
def bundle(request, bundle_of):
    return bundle_of(CHECKPOINT, ExportPlan("onnx", resize=request.param))


def with_resize(bundle: Path, copy: Path, value: object) -> Path:
    """Return a copy of a bundle with this `resize` in its manifest; `...` leaves it out."""

    def change(content: dict[str, Any]) -> None:
        content["preprocessing"]["resize"] = value
        if value is ...:
            del content["preprocessing"]["resize"]

    shutil.copytree(bundle, copy)
    return change_manifest(copy, change)


def test_the_bundle_says_it_and_does_it(bundle, tmp_path):
    preprocessing = bundle.manifest.preprocess()
    resize = preprocessing.resize
    assert bundle.manifest.preprocessing["resize"] == resize == bundle.manifest.plan["resize"]
    # schema 1 requires crop_pct of older readers: without it they refuse the bundle, and crop nothing wrongly
    assert ("crop_pct" in bundle.manifest.preprocessing) == (resize == "crop")
    text = (bundle.path / "README.md").read_text(encoding="utf-8")
    words = {"crop": "then crop the centre", "stretch": "the aspect ratio is not kept", "pad": "fill the right"}
    assert [key for key, word in words.items() if word in text.replace("\n", " ")] == [resize]
    image = noise(50, 90)
    Image.fromarray(image).save(tmp_path / "a.png")
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())
        ((best, *_),) = model.predict(tmp_path / "a.png")
        pixels = Preprocessing((64, 64), crop_pct=1.0, mean=preprocessing.mean, resize=resize).pixels(image)
        (name,) = model.inputs
        logits = model.run({name: pixels[None]})["logits"][0]
    assert best.index == logits.argmax()


def test_bundles_made_before_are_cropped(demo_bundle, tmp_path):
    bundle = with_resize(demo_bundle.path, tmp_path / "b", ...)
    manifest = Manifest.read(bundle)
    assert "resize" not in manifest.preprocessing and manifest.preprocess().resize == "crop"
    with load(bundle) as model:
        assert all(check.ok for check in model.selftest())


@pytest.mark.parametrize("value", ["letterbox", 3, None])
def test_an_unknown_mode_is_refused_by_its_place(value, demo_bundle, tmp_path):
    with pytest.raises(BundleError) as raised:
        load(with_resize(demo_bundle.path, tmp_path / "b", value))
    assert raised.value.where == "preprocessing.resize"


def test_the_selftest_notices_another_resize(bundle, tmp_path):
    other = "stretch" if bundle.manifest.preprocess().resize != "stretch" else "pad"
    with load(with_resize(bundle.path, tmp_path / "b", other)) as model:
        assert [check.name for check in model.selftest() if not check.ok] == ["preprocessing (of 255)"]
