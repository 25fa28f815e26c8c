"""Resize, crop and conversion of every kind of image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evm_deploy.data.preprocessing import Preprocessing, read_rgb
from evm_deploy.errors import ImageError

RNG = np.random.default_rng(0)


def photo(height, width):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (224, 224), (37, 41), (1000, 257)])
def test_square_sizes_follow_the_authors_evaluation(size):
    """Shorter side to 256 bicubic, longer side rounded down, centre crop 224 with the offset rounded half to even."""
    image = Image.fromarray(photo(*size))
    height, width = size
    new = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
    resized = image.resize((new[0], height), Image.Resampling.BICUBIC).resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - 224) / 2), round((new[1] - 224) / 2)
    want = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    np.testing.assert_array_equal(Preprocessing((224, 224)).pixels(image), want)


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    size=st.tuples(st.integers(4, 200), st.integers(4, 200)),
    crop=st.floats(0.3, 1),
)
def test_any_image_fits_any_size(source, size, crop):
    pixels = Preprocessing(size, crop_pct=crop)
    try:
        got = pixels.pixels(np.zeros((*source, 3), np.uint8))
    except ImageError as error:
        assert "too narrow" in str(error) and max(source) > 30 * min(source)
    else:
        assert got.shape == (*size, 3) and got.dtype == np.uint8


def test_the_order_of_passes_is_no_matter_of_pillows_version():
    """A tall image to two thirds: the width first. Pillow 13 takes the height first, and rounds otherwise."""
    noise = np.random.default_rng(0).integers(0, 256, (87, 33, 3), np.uint8)
    wide, how = Image.fromarray(noise), Image.Resampling.BICUBIC
    across = wide.resize((22, 87), how)
    down = across.transpose(Image.Transpose.ROTATE_90).resize((58, 22), how).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(Preprocessing((58, 22), crop_pct=1.0).pixels(noise), np.asarray(down))
    other = wide.resize((33, 58), how).resize((22, 58), how)
    assert np.abs(np.asarray(other).astype(int) - np.asarray(down)).max() > 1


def test_same_size_without_crop_is_left_alone():
    image = photo(64, 64)
    np.testing.assert_array_equal(Preprocessing((64, 64), crop_pct=1.0).pixels(image), image)


def test_normalise_is_the_papers_formula():
    pre = Preprocessing((4, 5))
    pixels = photo(4, 5)[None]
    want = (pixels / 255 - np.array(pre.mean)) / np.array(pre.std)
    np.testing.assert_allclose(pre.normalise(pixels), want.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_file_kinds(tmp_path):
    rgb = np.full((20, 30, 3), 100, np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(tmp_path / "alpha.png")
    Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(np.full((20, 30), 100 * 257, np.uint16)).save(tmp_path / "sixteen.png")
    for path in tmp_path.iterdir():
        got = np.asarray(read_rgb(path)).astype(int)
        assert got.shape == (20, 30, 3), path
        assert np.abs(got - 100).max() <= 2, path


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(photo(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to be upright
    image.save(tmp_path / "a.png", exif=exif)
    assert read_rgb(tmp_path / "a.png").size == (20, 30)
    with Image.open(tmp_path / "a.png") as opened:  # an app that hands over the image instead of its path
        assert read_rgb(opened).size == (20, 30)


@pytest.mark.parametrize(
    "content, message",
    [(None, "does not exist"), (b"", "not an image"), (b"text" * 99, "not an image"), ("half", "cannot be read")],
)
def test_bad_files_are_named(content, message, tmp_path):
    file = tmp_path / "cat.png"
    if content == "half":
        Image.fromarray(photo(90, 90)).save(file)
        content = file.read_bytes()[:3000]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ImageError, match=f"cat.png.*{message}"):
        Preprocessing((32, 32)).pixels(file)


@pytest.mark.parametrize("array", [np.zeros((3, 3)), np.zeros((3, 3, 2), np.uint8), np.zeros((0, 3, 3), np.uint8)])
def test_bad_arrays_are_refused(array):
    with pytest.raises(ImageError, match="array image"):
        Preprocessing((32, 32)).pixels(array)
