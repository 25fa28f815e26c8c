"""README text of a Core ML bundle: how to run the model without evm-deploy."""

from __future__ import annotations

from typing import Any

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage
from evm_deploy.data.reading import MODES

#: Resize -> the nearest of Vision's own. Its scaleFit centres the image.
VISION = {"crop": "centerCrop", "stretch": "scaleFill", "pad": "scaleFit"}


def usage(manifest: Manifest) -> Usage:
    """Return the texts for Python on a Mac, and for Swift with Vision or MLModel. This code has not been run."""
    read, wrote = manifest.inputs[0], manifest.outputs[0]["name"]
    height, width = manifest.preprocessing["size"]
    image = read["dtype"] == "uint8"
    mode = MODES.get(manifest.preprocess().channels)
    given = (
        f'PIL.Image.open("cat.jpg").convert("{mode}").resize(({width}, {height}))'
        if image
        else f"np.zeros({tuple(read['shape'])}, np.float32)"
    )
    swift = _swift_image(manifest, read["name"], wrote) if image else _swift_tensor(read, wrote)
    sections = f"""On a Mac, evm-deploy runs the model in Core ML; on other systems, in its own MIL runtime.

With coremltools alone, on a Mac:

```python
import coremltools as ct
{"import PIL.Image" if image else "import numpy as np"}

model = ct.models.MLModel("{manifest.artifact}", compute_units=ct.ComputeUnit.ALL)
outputs = model.predict({{"{read["name"]}": {given}}})
```
{_functions(manifest)}
## Swift

Add `{manifest.artifact}` to an Xcode target, which compiles it. These lines have not been compiled or run.

{swift}
{_vision(manifest)}To measure latency, run `python bench_on_mac.py` in this folder, on a Mac with coremltools.
The script writes a record of evm-deploy for each choice of compute units.
"""
    return Usage(artifact="the model, a Core ML package that runs without evm-deploy", library="", sections=sections)


def _functions(manifest: Manifest) -> str:
    """Return the text on how to choose a function in a package for several image sizes; "" for one size."""
    names = [f"`{function['name']}`" for function in manifest.details.get("functions", ())]
    if not names:
        return ""
    return f"""
The package has a function for each image size (iOS 18, macOS 15): {names[0]}, the default, {", ".join(names[1:])}.
To choose a function:
`MLModel(..., function_name=...)` in Python, `configuration.functionName = ...` in Swift.
"""


def _vision(manifest: Manifest) -> str:
    """Return the text on the pipeline for Vision; "" for a bundle without it."""
    facts = manifest.details.get("vision")
    if not facts:
        return ""
    resize = manifest.preprocess().resize
    return f"""## Vision and Xcode

`{facts["file"]}` is the detector as a pipeline with a NonMaximumSuppression model, for Vision and for the preview of
Xcode. It gives each anchor its best class alone, so that its detections differ from those of `{manifest.artifact}`.
The inputs `iouThreshold` ({facts["iou"]:g}) and `confidenceThreshold` ({facts["score_thr"]:g}) are optional. The boxes
are in 0..1 of the image, from its lower left corner. These lines have not been compiled or run.

```swift
let url = Bundle.main.url(forResource: "vision", withExtension: "mlmodelc")!
let detector = try VNCoreMLModel(for: MLModel(contentsOf: url))
let request = VNCoreMLRequest(model: detector) {{ request, _ in
    for found in request.results as? [VNRecognizedObjectObservation] ?? [] {{
        print(found.labels.first?.identifier ?? "", found.confidence, found.boundingBox)
    }}
}}
request.imageCropAndScaleOption = .{VISION[resize]}
try VNImageRequestHandler(cgImage: image).perform([request])
```

"""


def _swift_image(manifest: Manifest, name: str, output: str) -> str:
    preprocessing = manifest.preprocess()
    height, width = preprocessing.size
    pixels = "32BGRA" if preprocessing.channels == 3 else "OneComponent8"
    return f"""```swift
import CoreML
import Vision

let configuration = MLModelConfiguration()
configuration.computeUnits = .all  // also try .cpuAndGPU, .cpuAndNeuralEngine: not measured yet
let url = Bundle.main.url(forResource: "model", withExtension: "mlmodelc")!
let model = try MLModel(contentsOf: url, configuration: configuration)

// {width} x {height} pixels, preprocessed as described above, in a CVPixelBuffer of kCVPixelFormatType_{pixels}
let input = try MLDictionaryFeatureProvider(dictionary: ["{name}": MLFeatureValue(pixelBuffer: pixels)])
let output = try model.prediction(from: input).featureValue(for: "{output}")

// or let Vision scale in its own way, for a classifier (--head probs with labels)
let request = VNCoreMLRequest(model: try VNCoreMLModel(for: model)) {{ request, _ in
    let best = (request.results as? [VNClassificationObservation])?.first
    print(best?.identifier ?? "", best?.confidence ?? 0)
}}
request.imageCropAndScaleOption = .{VISION[preprocessing.resize]}
try VNImageRequestHandler(cgImage: image).perform([request])
```
"""


def _swift_tensor(read: dict[str, Any], output: str) -> str:
    return f"""```swift
import CoreML

let url = Bundle.main.url(forResource: "model", withExtension: "mlmodelc")!
let model = try MLModel(contentsOf: url)
let array = try MLMultiArray(shape: {list(read["shape"])}, dataType: .float32)  // normalised, channels first
let input = try MLDictionaryFeatureProvider(dictionary: ["{read["name"]}": MLFeatureValue(multiArray: array)])
let output = try model.prediction(from: input).featureValue(for: "{output}")
```
"""
