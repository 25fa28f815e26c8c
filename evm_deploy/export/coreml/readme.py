"""What the README of a Core ML bundle says of running it without evm-deploy."""

from __future__ import annotations

from typing import Any

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage


def usage(manifest: Manifest) -> Usage:
    """Python on a Mac, Swift with Vision or with MLModel. None of it was run by this project."""
    read, wrote = manifest.inputs[0], manifest.outputs[0]["name"]
    height, width = manifest.preprocessing["size"]
    image = read["dtype"] == "uint8"
    given = (
        f'PIL.Image.open("cat.jpg").convert("RGB").resize(({width}, {height}))'
        if image
        else f"np.zeros({tuple(read['shape'])}, np.float32)"
    )
    swift = _swift_image(read["name"], wrote, height, width) if image else _swift_tensor(read, wrote)
    sections = f"""On a Mac this runs Core ML; on other systems evm-deploy's MIL runtime computes what the program says.

With coremltools alone, on a Mac:

```python
import coremltools as ct
{"import PIL.Image" if image else "import numpy as np"}

model = ct.models.MLModel("{manifest.artifact}", compute_units=ct.ComputeUnit.ALL)
outputs = model.predict({{"{read["name"]}": {given}}})
```
{_functions(manifest)}
## Swift

Add `{manifest.artifact}` to an Xcode target, which compiles it. In this project nobody has compiled or run these lines.

{swift}
Speed on the device: `python bench_on_mac.py` in this folder, on a Mac with coremltools, writes a record of evm-deploy
for each choice of compute units.
"""
    return Usage(
        artifact="the model, a Core ML package: nothing of ours is needed to run it", library="", sections=sections
    )


def _functions(manifest: Manifest) -> str:
    """Of a package for several sizes: how to choose one."""
    names = [f"`{function['name']}`" for function in manifest.details.get("functions", ())]
    if not names:
        return ""
    return f"""
A function for each size (iOS 18, macOS 15): {names[0]}, the default, {", ".join(names[1:])}. To choose one:
`MLModel(..., function_name=...)` in Python, `configuration.functionName = ...` in Swift.
"""


def _swift_image(name: str, output: str, height: int, width: int) -> str:
    return f"""```swift
import CoreML
import Vision

let configuration = MLModelConfiguration()
configuration.computeUnits = .all  // also try .cpuAndGPU, .cpuAndNeuralEngine: nobody measured which is fastest
let url = Bundle.main.url(forResource: "model", withExtension: "mlmodelc")!
let model = try MLModel(contentsOf: url, configuration: configuration)

// {width} x {height} pixels, cropped as described above, in a CVPixelBuffer of kCVPixelFormatType_32BGRA
let input = try MLDictionaryFeatureProvider(dictionary: ["{name}": MLFeatureValue(pixelBuffer: pixels)])
let output = try model.prediction(from: input).featureValue(for: "{output}")

// or let Vision crop and scale, for a classifier (--head probs with labels)
let config = VNCoreMLRequest(model: try VNCoreMLModel(for: model)) {{ config, _ in
    let best = (config.results as? [VNClassificationObservation])?.first
    print(best?.identifier ?? "", best?.confidence ?? 0)
}}
config.imageCropAndScaleOption = .centerCrop
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
