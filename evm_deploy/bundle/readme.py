"""README.md of a bundle: content of the bundle, and how to embed it in an app."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.data.preprocessing import CROP, PAD, Preprocessing
from evm_deploy.data.reading import MODES
from evm_deploy.data.resizing import PLAIN
from evm_deploy.tasks.classification import CLASSIFICATION
from evm_deploy.tasks.detection import DETECTION, MASKS
from evm_deploy.tasks.segmentation import SEGMENTATION


@dataclass(frozen=True)
class Usage:
    """Target-specific texts of a bundle's README.

    artifact: description of the artifact. library: description of a native library, with {platform}. sections: Markdown
    sections on how to embed the bundle.
    """

    artifact: str
    library: str
    sections: str


def bundle_readme(manifest: Manifest, usage: Usage, files: Mapping[str, str]) -> str:
    """Return the README of a bundle as Markdown. The reader may have only the bundle, without evm-deploy.

    files: further files of the bundle -> their content.
    """
    spec, pre, plan = manifest.model, manifest.preprocess(), manifest.plan
    height, width = pre.size
    read, outputs = manifest.inputs[0], ", ".join(o["name"] for o in manifest.outputs)
    channels = {"L": "grey", **{mode: mode for mode in ("RGB", "RGBA")}}.get(MODES.get(pre.channels, ""), "values")
    contract = (
        f"{channels} pixels 0..255; mean and std are inside the model"
        if plan["input"] == "image"
        else f"{channels} scaled to 0..1, then (x - mean) / std with mean {list(pre.mean)} and std {list(pre.std)}"
    )
    kind = " ".join(filter(None, (spec["variant"], spec["family"])))
    labels = "| `labels.txt` | class names, one per line |\n" if plan["labels"] else ""
    others = "".join(f"| `{file}` | {content} |\n" for file, content in files.items())
    libraries = "".join(
        f"| `{file}` | {usage.library.format(platform=platform)} |\n" for platform, file in manifest.plugins.items()
    )
    return f"""# {manifest.name}

{kind}, {spec["parameters"]:,} parameters, {manifest.precision}, {height}x{width} (HxW).
Compared with the float model, the largest difference of the outputs is {manifest.parity["max_abs"]:.1e}, the cosine
similarity {manifest.parity["cosine"]:.6f}.

| file | content |
|---|---|
| `{manifest.artifact}` | {usage.artifact} |
| `manifest.json` | input, output, preprocessing, versions, hashes |
| `selftest/` | test inputs and expected outputs |
{labels}{libraries}{others}
Input `{read["name"]}`: {read["dtype"]} {shape_of(read)}, {contract}.
Preprocessing by the app: {preprocessing_text(pre)}.
Output: {outputs}.{outputs_text(manifest)}

## Python

With evm-deploy:

```python
from evm_deploy import load

with load("path/to/this/folder") as model:
    print(model.predict(["cat.jpg"]))
```

{usage.sections}
## Check the bundle on the device

    evm-run path/to/this/folder --selftest
"""


def outputs_text(manifest: Manifest) -> str:
    """Describe the outputs of a detector or segmenter for an app that reads them itself; else an empty text."""
    found, (height, width) = manifest.selection, manifest.preprocess().size
    if manifest.task == SEGMENTATION.name:
        return label_map_text(manifest)
    if manifest.task != DETECTION.name:
        return ""
    text = (
        f" `boxes` are x1, y1, x2, y2 in pixels of the {height}x{width} input: divide them by the factors of the "
        "resize. `labels` count from 0."
    )
    if any(each["name"] == MASKS for each in manifest.outputs):
        text += (
            " `masks` are probabilities in the cells of each box: resize them to the box (bilinear, half pixel); "
            "pixels from 0.5 on belong to the object."
        )
    if found.nms == "graph":
        return (
            f"{text} The first `count` rows are detections, by falling score, each over {found.score_thr:g}; the "
            "others hold nothing and have label -1."
        )
    return (
        f"{text} Rows are candidates with a score over {found.score_thr:g}, the others have label -1 and score 0: for "
        f"each class drop every box that overlaps a better one by over {found.iou:g} (intersection over union), and "
        f"keep the best {found.max_det}."
    )


def label_map_text(manifest: Manifest) -> str:
    """Describe the output of a segmenter, and the way from it to a map of the original image."""
    height, width = manifest.preprocess().size
    padded = manifest.preprocess().resize == PAD
    cut = "cut off the padding, which is right and below, and " if padded else ""
    palette = " `manifest.json` has a colour for each class (`model.details.palette`)." if manifest.palette else ""
    output = manifest.outputs[0]
    return (
        f" It holds the class index of each pixel of the {height}x{width} input, from 0: {output['dtype']} "
        f"{shape_of(output)}. For a map of the original image {cut}resize the map to the image's size, "
        f"each pixel from the nearest one (never interpolate class indices).{palette}"
    )


def preprocessing_text(pre: Preprocessing) -> str:
    """Describe the resize that an app must do, as text without a full stop at its end."""
    height, width = pre.size
    if pre.channels not in MODES:
        return f"give tensors of {pre.channels} channels; evm-deploy reads no such images"
    grey = "take the luminance of RGB, " if pre.channels == 1 else ""
    plain = pre.interpolation == PLAIN
    how = "bilinear without antialiasing, as OpenCV does" if plain else f"{pre.interpolation}, antialiased"
    if pre.resize == CROP:
        covered = f"{round(height / pre.crop_pct)}x{round(width / pre.crop_pct)}"
        return f"{grey}resize ({how}) so that the image covers {covered}, then crop the centre"
    if pre.resize == PAD:
        return (
            f"{grey}resize ({how}) to fit into {height}x{width} with the aspect ratio kept, then fill the right and "
            f"the bottom with the pixel {list(pre.fill)}, the mean"
        )
    return f"{grey}resize ({how}) to {height}x{width}, without a crop; the aspect ratio is not kept"


def shape_of(value: dict[str, object]) -> str:
    """Format the shape of an input or output: 1x224x224x3, or batchx224x224x3 for a dynamic batch."""
    shape = value["shape"]
    assert isinstance(shape, (list, tuple))
    return "x".join("batch" if d is None else str(d) for d in shape)


def cpp_call(manifest: Manifest) -> str:
    """Return the C++ statement with which an app asks our SDK's model for the answer of one image."""
    calls = {
        CLASSIFICATION.name: "auto top = model.classify(rgb, width, height, 5);",
        DETECTION.name: "auto found = model.detect(rgb, width, height);",
        SEGMENTATION.name: "auto map = model.segment(rgb, width, height);",
    }
    return calls.get(manifest.task, "auto outputs = model.run(feeds);")


def example_pixels(value: dict[str, object]) -> str:
    """Return a Python expression that creates an input of zeros."""
    return f"np.zeros(({shape_of(value).replace('batch', '1').replace('x', ', ')}), np.{value['dtype']})"
