"""Resize, crop and conversion of every kind of image."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.reading import read_image
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
        got = np.asarray(read_image(path)).astype(int)
        assert got.shape == (20, 30, 3), path
        assert np.abs(got - 100).max() <= 2, path


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(photo(20, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to be upright
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").size == (20, 30)
    with Image.open(tmp_path / "a.png") as opened:  # an app that hands over the image instead of its path
        assert read_image(opened).size == (20, 30)


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


GREY = np.linspace(0, 255, 48 * 64).reshape(48, 64)
STEPS_OF = {"1": 255, "P": 60, "PA": 60}  # how far two levels of these modes are apart


def in_mode(mode):
    """A gradient from black to white, as wide as the mode goes."""
    rgb = Image.fromarray(np.dstack([GREY] * 3).round().astype(np.uint8))
    if mode.startswith("I"):
        values = (GREY * 257).round()
        if mode == "I":
            return Image.fromarray(values.astype(np.int32))
        return Image.frombytes(mode, (64, 48), values.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(rgb, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    return rgb.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)


MODES = "1 L P RGB RGBA RGBX RGBa CMYK YCbCr LAB HSV LA La PA F I I;16 I;16L I;16B I;16N"


@pytest.mark.parametrize("mode", MODES.split())
@pytest.mark.filterwarnings("error")
def test_every_mode_of_pillow_keeps_its_brightness(mode):
    got = np.asarray(read_image(in_mode(mode))).astype(float)
    assert np.abs(got - GREY[..., None]).max() <= STEPS_OF.get(mode, 4)
    assert np.abs(got - GREY[..., None]).mean() <= STEPS_OF.get(mode, 4) / 2
    assert got.min() <= 8 and got.max() >= 247  # negative control: what clips is all black or all white


@pytest.mark.parametrize(
    ("dtype", "high", "top"),
    [
        (np.float32, 1.0, 1.0),
        (np.float32, 255.0, 255.0),
        (np.int32, 65535, 65535),
        (np.uint16, 65535, 65535),
        (np.uint16, 30000, 65535),
    ],
)
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_deep_values_of_a_known_range_are_scaled(dtype, high, top, suffix, tmp_path):
    if suffix == "png" and dtype != np.uint16:
        pytest.skip("PNG holds 16 bits")
    Image.fromarray((GREY / 255 * high).astype(dtype)).save(tmp_path / f"a.{suffix}")
    got = np.asarray(read_image(tmp_path / f"a.{suffix}")).astype(float)
    assert np.abs(got - GREY[..., None] * high / top).max() <= 1.5


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.float32) - 128,  # standardised
        (GREY * 257).astype(np.float32),  # 0..65535 as float
        np.where(GREY > 200, np.nan, GREY).astype(np.float32),
        np.where(GREY > 200, np.inf, GREY / 255).astype(np.float32),
        GREY.astype(np.int32),  # 0..255: Pillow's convert("I")
        GREY.astype(np.uint16),  # would be black
        GREY.astype(np.int32) - 9,
        (GREY * 66000).astype(np.int32),
    ],
)
def test_deep_values_of_an_uncertain_range_are_refused(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    for image in (tmp_path / "a.tif", Image.fromarray(values)):
        with pytest.raises(ImageError, match=r"values .* to .* in mode"):
            read_image(image)


def test_black_is_black_in_every_depth():
    for dtype in (np.float32, np.int32, np.uint16):
        assert np.asarray(read_image(Image.fromarray(np.zeros((4, 4), dtype)))).max() == 0


def tiff(bits, content, photometric):
    """A TIFF file of 4 x 1 pixels."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(content)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    at = 8 + len(content)
    return struct.pack("<2sHI", b"II", 42, at) + content + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "content", "photometric", "want"),
    [
        (12, bytes.fromhex("000fff800400"), 1, [0, 255, 127, 64]),
        (16, np.array([0, 65535, 32768, 16384], "<u2").tobytes(), 1, [0, 255, 128, 64]),
        (16, np.array([0, 65535, 32768, 16384], "<u2").tobytes(), 0, [255, 0, 127, 191]),
        (8, bytes([0, 255, 128, 64]), 0, [255, 0, 127, 191]),
    ],
)
def test_tiff_says_how_many_bits_there_are_and_what_is_white(bits, content, photometric, want, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(bits, content, photometric))
    got = np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].astype(int)
    assert np.abs(got - want).max() <= 1, got


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped_without_a_word(mode, tmp_path):
    image = in_mode("RGB").convert(mode)
    image.save(tmp_path / "a.png", transparency=bytes(range(256)) if mode == "P" else (1, 1, 1) if mode == "RGB" else 1)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), np.asarray(image.convert("RGB")))


def test_one_image_in_every_form_is_the_same(tmp_path):
    Image.fromarray(photo(20, 30)).save(tmp_path / "a.png")
    content, want = (tmp_path / "a.png").read_bytes(), np.asarray(read_image(tmp_path / "a.png"))
    with (tmp_path / "a.png").open("rb") as file:
        forms = [str(tmp_path / "a.png"), content, bytearray(content), memoryview(content), io.BytesIO(content), file]
        for each in [*forms, Image.fromarray(want), want, want[::-1][::-1]]:
            np.testing.assert_array_equal(np.asarray(read_image(each)), want)


CLOSED = Image.new("RGB", (3, 3))
CLOSED.close()


@pytest.mark.parametrize(
    "wrong",
    [None, 5, 2.5, [], [1, 2], {}, object(), b"", b"no image" * 9999, "x" * 99999, "\0", io.StringIO("a"), CLOSED],
    ids=lambda value: type(value).__name__,
)
def test_nothing_else_is_an_image_and_messages_are_short(wrong):
    with pytest.raises(ImageError) as error:
        read_image(wrong)
    assert len(str(error.value)) < 800


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
