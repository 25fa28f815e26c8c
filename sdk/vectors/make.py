"""Write the test vectors of all SDKs: unusual images with the expected pixels, and manifests that must be refused.

    python sdk/vectors/make.py

Entries of `cases` in `cases.json`: `name`; `image`: the file; `width` and `height` of the upright image;
`preprocessing`: as in a bundle's manifest; `expected`: the file with the pixels that preprocessing must give, within
`tolerance` of 255, or instead `code`: the code of the error that must be raised; `normalised`: samples [channel, y, x,
value] of the tensor for a model with `--input tensor`. The images are lossless, or JPEG without subsampling, for which
all decoders give the same pixels.

Entries of `manifests`, each a change that makes the manifest of a good ONNX bundle invalid: `name`; `at`: a key path;
`value`: the new value, or absent to remove the key; `code` and `where` of the error. `codes`: the meaning of each code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evm_deploy.bundle.manifest import FILE, Manifest
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.reading import read_image
from evm_deploy.errors import BundleError, ImageError
from evm_deploy.export.selftest import synthetic_image

HERE = Path(__file__).parent
TOLERANCE = 1  # largest difference of a pixel, of 255
ORIENTATION = 0x0112  # Exif tag
SMALL = Preprocessing((64, 64))
GOOD = HERE.parents[1] / "reliability" / "corpus" / "manifest" / "onnx"
CODES = {
    "bundle.missing": "no folder or zip exists at the path",
    "bundle.rejected": "the export failed its own checks",
    "bundle.unfinished": "the engine has not been built yet",
    "manifest.missing": "manifest.json is missing or cannot be read",
    "manifest.damaged": "manifest.json is not a JSON object, or is too large",
    "manifest.version": "manifest.json has a newer schema version than this reader supports",
    "manifest.invalid": "`where`, a key path, is missing, has another type, or has an invalid value",
    "file.missing": "`where`, a file, is missing or cannot be read",
    "file.damaged": "`where`, a file, has another hash, or invalid contents",
    "model.interface": "`where`, the model, has inputs or outputs that do not match the manifest or the labels",
    "selftest.damaged": "`where`, a file of the self-test, cannot be read or does not belong to the model",
    "zip.damaged": "the zip cannot be unpacked",
    "zip.refused": "`where`, a name in the zip, leaves the bundle, is a link, encrypted, a duplicate or a zip bomb",
    "image.narrow": "the image is too narrow to be cropped",
}
NOTHING = object()  # marks a key that is removed
REFUSED: list[tuple[str, tuple[object, ...]]] = [
    ("schema_version", (NOTHING, None, "1", 0, 2)),
    *((key, (NOTHING, None, 3)) for key in ("name", "target", "plan.head", "plan.input", "plan.batch", "scan.value")),
    ("artifact", (NOTHING, None, 3, "else.onnx")),
    *((key, (NOTHING, None, [], "x")) for key in ("plan", "preprocessing", "scan", "parity")),
    ("files", (None, [], "x")),
    *((key, (NOTHING, None, [], {}, "x")) for key in ("inputs", "outputs")),
    ("plan.head", ("all",)),
    ("plan.input", ("tensors",)),
    ("plan.batch", ("", "0", "-1", "4:2:1", "1:2", "x", "1:4:8:9", "123456")),
    ("plan.iou", ("x", 0, -1, 1.5)),
    ("plan.max_det", ("x", 0, 1.5, 1001)),
    ("preprocessing.size", (NOTHING, None, 64, [64], [0, 64], [64, 8193], ["64", 64], [64, 64, 3])),
    ("preprocessing.crop_pct", (NOTHING, None, "x", 0, -1, 1.5, True)),
    ("preprocessing.interpolation", (NOTHING, None, 3, "lanczos")),
    ("preprocessing.resize", (None, 3, "letterbox", "")),
    ("preprocessing.mean", (NOTHING, None, [], [0.5, 0.5], [0.5, 0.5, None], 0.5)),
    ("preprocessing.std", (NOTHING, None, [], [0.1, 0.1], [0.1, 0, 0.1], [0.1, -1, 0.1])),
    *((f"outputs.0.{key}", (NOTHING, None, 3)) for key in ("name", "dtype", "shape")),
    ("inputs.0.shape", ([1, 0, 64, 3], [1, "64", 64, 3], [1.5])),
    ("files.model~onnx", (None, [], "x", {})),
    ("files.model~onnx.sha256", (None, 3, "none", "A" * 64)),
    *(
        (f"files.{name}", ({"sha256": "0" * 64, "size_bytes": 1},))
        for name in ("../x", "/x", "a/../../x", "a\\x", "C:x", "")
    ),
    ("scan.plugins", ([], {"linux-x86_64": 3}, {"linux-x86_64": "gone~so"})),
    ("parity.limit", (NOTHING, None, "x", -1)),
    ("selftest", (None, [], "x", {"preprocessing": 1, "outputs": {}}, {"outputs": {}, "scans": {}})),
    ("selftest.preprocessing", (None, "x", -1)),
    ("selftest.outputs", (None, [], {"logits": None}, {"logits": -1})),
    ("selftest.scans", (None, [], {"large_delta": "x"})),
    ("built", (None, 1, "x")),
    ("rejected", (None, 0)),
]


@dataclass(frozen=True)
class Case:
    """An image and the preprocessing to test with it."""

    name: str
    image: str
    preprocessing: Preprocessing = SMALL


def save(folder: Path, name: str, image: NDArray[np.uint8] | Image.Image, orientation: int = 1) -> str:
    """Save an image as `folder`/`name`, with an Exif orientation other than 1, and return `name`."""
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    exif = Image.Exif()
    if orientation > 1:
        exif[ORIENTATION] = orientation
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if name.endswith(".jpg") else {"optimize": True}
    opened.save(folder / name, exif=exif, **options)
    return name


def cases(folder: Path) -> Iterator[Case]:
    """Write the images into `folder` and yield their cases."""
    photo = synthetic_image(117, 183, seed=1)
    odd = save(folder, "odd.png", photo)
    yield Case("square", odd)
    yield Case("wide", odd, Preprocessing((48, 80)))
    yield Case("tall", odd, Preprocessing((80, 40)))
    yield Case("bilinear", odd, Preprocessing((64, 64), interpolation="bilinear"))
    yield Case("uncropped", odd, Preprocessing((64, 64), crop_pct=1.0))
    yield Case("larger", odd, Preprocessing((130, 130), crop_pct=0.7))
    yield Case("other-mean", odd, Preprocessing((56, 56), 0.9, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 1.0)))
    yield Case("imagenet", save(folder, "smooth.png", smooth(217, 333)), Preprocessing((224, 224)))
    fits = Preprocessing((64, 64), crop_pct=1.0)
    yield Case("fits", save(folder, "fits.png", synthetic_image(64, 64, seed=2)), fits)
    checks = np.uint8(np.indices((90, 90)).sum(0) // 7 % 2 * 255)
    yield Case("overshoot", save(folder, "checks.png", np.dstack([checks] * 3)), Preprocessing((112, 112)))
    yield Case("one-pixel", save(folder, "one-pixel.png", np.array([[[200, 30, 90]]], np.uint8)))
    yield Case("tiny", save(folder, "tiny.png", synthetic_image(3, 5, seed=3)))
    yield Case("huge", save(folder, "huge.png", smooth(251, 373).repeat(16, 0).repeat(16, 1)))
    yield Case("panorama", save(folder, "panorama.png", synthetic_image(20, 640, seed=4)))
    noise = np.random.default_rng(7).integers(0, 256, (87, 33, 3), np.uint8)
    yield Case("width-first", save(folder, "tall-noise.png", noise), Preprocessing((58, 22), crop_pct=1.0))
    yield Case("tower", save(folder, "tower.png", synthetic_image(640, 20, seed=5)))
    yield Case("too-narrow", save(folder, "too-narrow.png", synthetic_image(2000, 3, seed=6)))
    grey, other = photo[..., 0], photo[::-1, :, 1]
    yield Case("grey", save(folder, "grey.png", grey))
    yield Case("grey-alpha", save(folder, "grey-alpha.png", np.dstack([grey, other])))
    yield Case("grey-16-bit", save(folder, "grey-16-bit.png", grey.astype(np.uint16) * 257))
    yield Case("alpha", save(folder, "alpha.png", np.dstack([photo, other])))
    yield Case("transparent", save(folder, "transparent.png", np.dstack([photo, 0 * grey])))
    rgb = Image.fromarray(photo)
    yield Case("palette", save(folder, "palette.png", rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)))
    yield Case("one-bit", save(folder, "one-bit.png", rgb.convert("1")))
    for orientation in range(2, 9):
        yield Case(f"exif-{orientation}", save(folder, f"exif-{orientation}.jpg", smooth(60, 90), orientation))
    yield from resized_cases(folder, photo)
    yield Case("exif-in-png", save(folder, "exif-6.png", smooth(60, 90), orientation=6))


def resized_cases(folder: Path, photo: NDArray[np.uint8]) -> Iterator[Case]:
    """Yield cases of the other ways to resize, of the other interpolation, and of grey networks."""
    grey: dict[str, Any] = {"mean": (0.42,), "std": (0.25,)}
    for resize in ("stretch", "pad"):
        yield Case(f"{resize}-wide", "odd.png", Preprocessing((48, 80), resize=resize))
        yield Case(f"{resize}-tall", "odd.png", Preprocessing((80, 40), interpolation="bilinear", resize=resize))
        yield Case(f"{resize}-opencv", "odd.png", Preprocessing((52, 60), 1, "bilinear-opencv", resize=resize))
        yield Case(f"{resize}-larger", "tiny.png", Preprocessing((40, 31), resize=resize))
        yield Case(f"{resize}-one-pixel", "one-pixel.png", Preprocessing((9, 12), resize=resize))
        yield Case(f"{resize}-narrow", "too-narrow.png", Preprocessing((64, 64), resize=resize))
        yield Case(f"{resize}-fits", "fits.png", Preprocessing((64, 64), resize=resize))
        yield Case(f"{resize}-grey", "odd.png", Preprocessing((48, 40), resize=resize, **grey))
    halves = Preprocessing((20, 64), mean=(0.1, 0.3, 0.5), std=(0.5, 0.5, 0.5), resize="pad")
    yield Case("pad-halves", "fits.png", halves)  # 25.5, 76.5 and 127.5: rounded half to even, in double
    yield Case("crop-opencv", "odd.png", Preprocessing((64, 64), interpolation="bilinear-opencv"))
    yield Case("grey-network", "odd.png", Preprocessing((64, 64), **grey))
    yield Case("grey-of-alpha", "alpha.png", Preprocessing((30, 60), **grey))
    yield Case("exif-pad", "exif-6.jpg", Preprocessing((64, 64), resize="pad"))


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """Return an image without noise and with another colour in every corner, which JPEG and PNG compress well."""
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    planes = [255 * x * (1 - y / 2), 255 * y * (1 - x / 3), 127 + 100 * np.cos(7 * x + 4 * y)]
    return np.stack(planes, -1).astype(np.uint8)


def entry(case: Case, folder: Path) -> dict[str, Any]:
    """Write the expected pixels of a case and return its entry of cases.json."""
    path = folder / case.image
    width, height = read_image(path).size
    preprocessing = case.preprocessing.as_dict()
    facts = {"name": case.name, "image": case.image, "preprocessing": preprocessing, "width": width, "height": height}
    try:
        pixels = case.preprocessing.pixels(path)
    except ImageError as error:
        return {**facts, "code": error.code}
    expected = f"{case.name}.expected.png"
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(folder / expected, optimize=True)
    return {**facts, "expected": expected, "normalised": samples(case.preprocessing, pixels)}


def samples(preprocessing: Preprocessing, pixels: NDArray[np.uint8]) -> list[list[float]]:
    """Return three samples [channel, y, x, value] of the normalised pixels."""
    tensor = preprocessing.normalise(pixels[None])[0]
    height, width = tensor.shape[1:]
    last = len(tensor) - 1
    at = [(0, 0, 0), (min(1, last), height // 2, width // 3), (last, height - 1, width - 1)]
    return [[*index, float(tensor[index])] for index in at]


def changed(content: dict[str, Any], at: Sequence[str | int], value: object) -> dict[str, Any]:
    """Return a copy of a manifest with `value` at a key path, or without the key if `value` is NOTHING."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    if value is NOTHING:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return copy  # type: ignore[no-any-return]


def manifests() -> Iterator[dict[str, Any]]:
    """Yield the entry of cases.json for every change in REFUSED."""
    good = json.loads(GOOD.read_text(encoding="utf-8"))
    good["selftest"] = {"preprocessing": 1, "outputs": {"logits": 1e-4}, "scans": {"large_delta": 1e-4}}
    with TemporaryDirectory() as name:
        for path, values in REFUSED:
            at = [int(key) if key.isdigit() else key.replace("~", ".") for key in path.split(".")]
            at = ["files", path.removeprefix("files.")] if path.startswith("files.") and "~" not in path else at
            for value in values:
                (Path(name) / FILE).write_text(json.dumps(changed(good, at, value)), encoding="utf-8")
                shown = "nothing" if value is NOTHING else json.dumps(value)
                put = {} if value is NOTHING else {"value": value}
                yield {"name": f"{path.replace('~', '.')} is {shown:.60}", "at": at, **put, **_refusal(Path(name))}


def _refusal(bundle: Path) -> dict[str, str]:
    try:
        Manifest.read(bundle)
    except BundleError as error:
        return {"code": error.code, "where": error.where}
    raise AssertionError(f"not refused: {(bundle / FILE).read_text(encoding='utf-8')}")


def main() -> None:
    """Write all images and cases.json."""
    for old in (*HERE.glob("*.png"), *HERE.glob("*.jpg")):
        old.unlink()
    entries = [entry(case, HERE) for case in cases(HERE)]
    content = {
        "schema_version": 1,
        "tolerance": TOLERANCE,
        "cases": entries,
        "codes": CODES,
        "manifests": [*manifests()],
    }
    (HERE / "cases.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    kilobytes = sum(file.stat().st_size for file in HERE.iterdir()) / 1e3
    print(f"{len(entries)} images, {len(content['manifests'])} manifests, {kilobytes:.0f} kB")


if __name__ == "__main__":
    main()
