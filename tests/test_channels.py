"""Networks with 1, 4 and other numbers of input channels: pixels, mean and std, checkpoints, int8, messages."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evm_deploy import cli, load
from evm_deploy.data.preprocessing import Preprocessing, for_channels
from evm_deploy.data.reading import read_image
from evm_deploy.errors import ImageError, UsageError
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.network_input import assumed
from evm_deploy.export.pipeline import complete
from evm_deploy.model import Network
from evm_deploy.model.families import load_checkpoint

GREY = {"mean": (0.5,), "std": (0.25,)}
RNG = np.random.default_rng(5)
PHOTO = RNG.integers(0, 256, (60, 90, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (60, 90, 1), np.uint8)
MANY = "images have 1 \\(L\\), 3 \\(RGB\\) or 4 \\(RGBA\\)"


def spec_of(channels: int, **settings: object) -> Preprocessing:
    return Preprocessing((60, 90), crop_pct=1.0, mean=(0.5,) * channels, std=(0.5,) * channels, **settings)


class Toy(nn.Module):
    """A classifier of any number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(channels)
        self.stem = nn.Conv2d(channels, 8, 3, stride=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.stem(x).relu().mean((2, 3)))


def toy(channels: int, task: str = "classification") -> Network:
    return Network.of(Toy(channels), torch.rand(1, channels, 32, 32), task=task, name=f"toy{channels}")


@pytest.fixture(scope="module")
def grey_checkpoint(of_channels):
    return of_channels(1)


# --------------------------------------------------------------------------------------------------------------- pixels


def luminance(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 in fixed point: Pillow's convert("L")."""
    return ((rgb.astype(int) @ [19595, 38470, 7471] + 0x8000) >> 16).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "CMYK", "LA", "I;16", "YCbCr"])
def test_grey_is_the_luminance_of_rgb(mode, tmp_path):
    image = Image.fromarray((PHOTO[..., 0].astype(np.uint16) * 257) if mode == "I;16" else PHOTO)
    image = image if mode == "I;16" else image.convert(mode)
    want = luminance(np.asarray(read_image(image)))
    have = spec_of(1).pixels(image)
    assert have.shape == (60, 90, 1)
    np.testing.assert_array_equal(have[..., 0], want)
    if mode == "L":
        np.testing.assert_array_equal(want, np.asarray(image))


def test_grey_is_resized_after_it_is_grey():
    want = Image.fromarray(luminance(PHOTO)).resize((32, 60), Image.Resampling.BICUBIC)
    want = want.resize((32, 32), Image.Resampling.BICUBIC)
    have = Preprocessing((32, 32), mean=(0.5,), std=(0.5,), resize="stretch").pixels(PHOTO)
    np.testing.assert_array_equal(have[..., 0], np.asarray(want))


def test_four_channels_are_rgba_and_opaque_without_alpha(tmp_path):
    rgba = np.dstack([PHOTO, ALPHA])
    np.testing.assert_array_equal(spec_of(4).pixels(rgba), rgba)
    opaque = spec_of(4).pixels(PHOTO)
    np.testing.assert_array_equal(opaque, np.dstack([PHOTO, np.full((60, 90), 255, np.uint8)]))
    Image.fromarray(rgba).save(tmp_path / "a.png")
    small = Preprocessing((30, 30), mean=(0.5,) * 4, std=(0.5,) * 4, resize="stretch").pixels(tmp_path / "a.png")
    want = Image.fromarray(rgba).convert("RGBa").resize((30, 60), 3).resize((30, 30), 3).convert("RGBA")
    np.testing.assert_array_equal(small, np.asarray(want))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("array", [PHOTO, PHOTO[..., 0], PHOTO[..., :1], np.dstack([PHOTO, ALPHA])], ids=str)
def test_arrays_of_every_kind_are_taken(array, channels):
    assert spec_of(channels).pixels(array).shape == (60, 90, channels)


def test_pad_fills_every_channel_with_its_mean():
    values = (0.1, 0.5, 0.9, 1.0)
    pixels = Preprocessing((60, 100), mean=values, std=values, resize="pad").pixels(np.dstack([PHOTO, ALPHA]))
    assert (pixels[:, 90:] == [26, 128, 230, 255]).all()  # 25.5 and 127.5 to the even neighbour, 229.5 too


@pytest.mark.parametrize("channels", [2, 5, 13])
def test_other_numbers_of_channels_are_no_images(channels):
    with pytest.raises(ImageError, match=f"tensors of {channels} channels: {MANY}"):
        spec_of(channels).pixels(PHOTO)


def test_normalise_takes_any_number():
    pixels = RNG.integers(0, 256, (2, 4, 5, 7), np.uint8)
    mean, std = tuple(np.linspace(0.1, 0.7, 7)), tuple(np.linspace(0.2, 0.8, 7))
    have = Preprocessing((4, 5), mean=mean, std=std).normalise(pixels)
    np.testing.assert_allclose(have, ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_wrong_number_of_values_says_how_many(channels, key):
    plan = ExportPlan("onnx", "fp32", input="tensor", **{key: (0.5,) * 3})
    with pytest.raises(UsageError, match=f"--{key} has 3 values, the network has {channels} input channel") as raised:
        complete(plan, toy(channels).spec)
    assert raised.value.hint.startswith(f"give {channels} number")


def test_mean_and_std_of_unequal_numbers_are_refused_before_the_network_is_loaded():
    with pytest.raises(UsageError, match="--mean has 1 value, --std has 3 values"):
        ExportPlan("onnx", mean=(0.5,), std=(0.5,) * 3)


@pytest.mark.parametrize("channels", [1, 4])
def test_repeated_defaults_are_said(channels):
    spec = toy(channels).spec
    plan = ExportPlan("onnx", "fp32")
    _, preprocessing = complete(plan, spec)
    assert preprocessing.mean == (0.485, 0.456, 0.406, 0.485)[:channels]  # as timm repeats them
    (note,) = assumed(plan, spec, preprocessing)
    assert f"mean {','.join(map(str, preprocessing.mean))} (ImageNet's for RGB, repeated for {channels} ch" in note
    assert for_channels((1.0, 2.0), 5) == (1.0, 2.0, 1.0, 2.0, 1.0)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.slow
def test_a_grey_checkpoint_is_inferred_exported_and_asked(grey_checkpoint, tmp_path, capsys):
    assert load_checkpoint(grey_checkpoint).spec.channels == 1
    flags = ["--target", "onnx", "--imgsz", "64", "-o", str(tmp_path)]
    assert cli.export_main([str(grey_checkpoint), *flags, "--dry-run"]) == 0
    assert "image, 1 channel, resize crop" in capsys.readouterr().out
    assert cli.export_main([str(grey_checkpoint), *flags, "--mean", "0.5,0.5,0.5"]) == 2
    assert "--mean has 3 values, the network has 1 input channel" in capsys.readouterr().err
    assert cli.export_main([str(grey_checkpoint), *flags, "--mean", "0.5", "--std", "0.25"]) == 0
    bundle = next(tmp_path.glob("micro1-onnx*"))
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    assert cli.run_main([str(bundle), str(tmp_path / "photo.png"), "--json"]) == 0
    assert cli.run_main([str(bundle), "--selftest"]) == 0
    assert "grey pixels 0..255" in (bundle / "README.md").read_text(encoding="utf-8")
    with load(bundle) as model:
        (found,) = model.predict(PHOTO)
        assert found == model.predict(luminance(PHOTO))[0]
        grey = np.stack([model.preprocessing.pixels(PHOTO)])
        assert model.classify(grey)[0] == found
        with pytest.raises(UsageError, match=r"pixels must be uint8 \[n, 64, 64, 1\]"):
            model.classify(np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.slow
def test_the_head_features_of_a_grey_checkpoint(grey_checkpoint, tmp_path):
    made = export(grey_checkpoint, ExportPlan("onnx", "fp32", imgsz=(64, 64), head="features", **GREY), tmp_path)
    assert [*made.manifest.inputs[0]["shape"]] == [1, 64, 64, 1]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "coreml", "trt"])
def test_int8_is_calibrated_with_images_of_the_networks_channels(target, grey_checkpoint, images, tmp_path):
    plan = ExportPlan(
        target, "int8", imgsz=(64, 64), calib=str(images), calib_images=4, force_calib=True, smooth="off", **GREY
    )
    made = export(grey_checkpoint, plan, tmp_path)
    assert made.manifest.accuracy["images"] > 0 and made.manifest.preprocess().channels == 1


# ------------------------------------------------------------------------------------------------------ other networks


def test_tensors_of_five_channels(tmp_path, images):
    network = toy(5)
    with pytest.raises(UsageError, match=f"--input image: the network has 5 input channels, {MANY}") as raised:
        export(network, ExportPlan("onnx", "fp32"), tmp_path)
    assert raised.value.hint.startswith("add --input tensor")
    with pytest.raises(UsageError, match=f"--calib: the network has 5 input channels, {MANY}"):
        export(network, ExportPlan("onnx", "int8", input="tensor", calib=str(images)), tmp_path)
    made = export(network, ExportPlan("onnx", "fp32", input="tensor"), tmp_path)
    assert not (made.path / "selftest" / "picture.png").exists()
    tensor = RNG.standard_normal((1, 5, 32, 32)).astype(np.float32)
    with load(made.path) as model:
        assert [check.name for check in model.selftest()] == ["logits"] and all(c.ok for c in model.selftest())
        with torch.no_grad():
            want = network.module(torch.from_numpy(tensor)).numpy()
        np.testing.assert_allclose(model.run({"tensor": tensor})["logits"], want, atol=1e-5)
        with pytest.raises(ImageError, match=MANY):
            model.predict(PHOTO)
    assert "give tensors of 5 channels" in (made.path / "README.md").read_text(encoding="utf-8")


FACTORY = """
import torch

class Grey(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 8, 3, stride=2)

    def forward(self, x):
        return self.stem(x).relu().mean((2, 3))
"""


@pytest.mark.slow
def test_the_flag_channels(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grey_net.py").write_text(FACTORY)
    flags = ["--model", "grey_net.py:Grey", "--target", "onnx", "--imgsz", "32", "-o", "out"]
    assert cli.export_main(flags) == 2
    assert "--channels" in capsys.readouterr().err
    assert cli.export_main([*flags, "--channels", "1", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["manifest"]["model"]["channels"] == 1
    assert content["manifest"]["inputs"][0]["shape"] == [1, 32, 32, 1]
    assert "repeated for 1 channel" in content["manifest"]["notes"][0]
    for wrong in ("0", "-1", "x", "1.5", "99999", "٣"):
        assert cli.export_main([*flags, f"--channels={wrong}"]) == 2
        assert "--channels" in capsys.readouterr().err
    assert cli.export_main(["--target", "onnx", "--channels", "1"]) == 2
    assert "--channels needs --model" in capsys.readouterr().err


def test_an_example_of_other_channels_than_said():
    with pytest.raises(UsageError, match="has 1 channel, not 3"):
        Network.of(Toy(1), torch.rand(1, 1, 32, 32), channels=3)
    assert Network.of(Toy(2), channels=2).spec.channels == 2
    with pytest.raises(UsageError, match="float \\(b, channels, H, W\\)"):
        Network.of(Toy(1), torch.rand(1, 0, 32, 32))
