"""README text of an ONNX bundle: how to run the model without evm-deploy."""

from __future__ import annotations

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage, cpp_call, example_pixels, shape_of


def usage(manifest: Manifest) -> Usage:
    """Return the texts for plain ONNX Runtime, in Python and C++."""
    read = manifest.inputs[0]
    return Usage(
        artifact="the model, a plain ONNX file that runs without evm-deploy",
        library="native kernel for {platform}, to load with `RegisterCustomOpsLibrary`, in web pages with evm-deploy's "
        "SDK; optional, for speed",
        sections=f"""With ONNX Runtime alone:

```python
import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("{manifest.artifact}", providers=["CPUExecutionProvider"])
pixels = {example_pixels(read)}  # your image
outputs = session.run(None, {{"{read["name"]}": pixels}})
```

## C++

With evm-deploy's SDK: `evm::Model model("path/to/this/folder"); {cpp_call(manifest)}`.

With ONNX Runtime alone: `Ort::Session session(env, "{manifest.artifact}", Ort::SessionOptions{{}});`, then `Run` with
one input `{read["name"]}` ({read["dtype"]}, {shape_of(read)}) and the output names above.
""",
    )
