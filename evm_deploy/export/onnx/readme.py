"""What the README of an ONNX bundle says of running it without evm-deploy."""

from __future__ import annotations

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage, example_pixels, shape_of


def usage(manifest: Manifest) -> Usage:
    """Plain ONNX Runtime, Python and C++."""
    read = manifest.inputs[0]
    return Usage(
        artifact="the model, a plain ONNX file: nothing of ours is needed to run it",
        library="native kernel for {platform}, for `RegisterCustomOpsLibrary`; optional, faster",
        sections=f"""With ONNX Runtime alone:

```python
import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("{manifest.artifact}", providers=["CPUExecutionProvider"])
pixels = {example_pixels(read)}  # your image
outputs = session.run(None, {{"{read["name"]}": pixels}})
```

## C++

With evm-deploy's SDK: `evm::Model model("path/to/this/folder"); auto top = model.classify(rgb, width, height, 5);`.

Without: `Ort::Session session(env, "{manifest.artifact}", Ort::SessionOptions{{}});`, then `Run` with one input
`{read["name"]}` ({read["dtype"]}, {shape_of(read)}) and the output names above.
""",
    )
