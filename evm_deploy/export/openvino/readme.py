"""README text of an OpenVINO bundle: how to run the model without evm-deploy."""

from __future__ import annotations

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage, cpp_call, example_pixels
from evm_deploy.runtimes.openvino import PRECISION_HINT


def usage(manifest: Manifest) -> Usage:
    """Return the texts for plain OpenVINO: Python, benchmark_app and C++."""
    read, output, artifact = manifest.inputs[0], manifest.outputs[0], manifest.artifact
    hint, release = manifest.details[PRECISION_HINT], manifest.versions["openvino"]
    library = next(iter(manifest.plugins.values()), "")
    needs = f"; it needs the extension `{library}`" if library else ": standard operators only"
    add = f'core.add_extension("{library}")\n' if library else ""
    trust = 'evm::Options options; options.scan = "bundled"; ' if library else ""
    model = f'{trust}evm::Model model("path/to/this/folder"{", options" if library else ""})'
    answer = f'["{output["name"]}"]' if len(manifest.outputs) == 1 else "  # arrays by the names of the outputs"
    cpp_add = f'core.add_extension("{library}");\n' if library else ""
    extensions = f" -extensions {library}" if library else ""
    batch = "" if read["shape"][0] else f" -data_shape [{','.join(map(str, [1, *read['shape'][1:]]))}]"
    one_thread = "-hint none -nstreams 1 -nthreads 1 -api sync"
    fits = f"\nThe extension fits OpenVINO {release} and no other release.\n" if library else ""
    return Usage(
        artifact=f"the model, an OpenVINO IR; its weights are in `model.bin` beside it{needs}",
        library=f"extension for OpenVINO {release} on {{platform}}: the model's blocks on our native kernels",
        sections=f"""With OpenVINO alone, in this folder:

```python
import numpy as np
import openvino as ov

core = ov.Core()
{add}settings = {{"INFERENCE_PRECISION_HINT": "{hint}", "PERFORMANCE_HINT": "LATENCY"}}
model = core.compile_model("{artifact}", "CPU", settings)
pixels = {example_pixels(read)}  # your image
outputs = model({{"{read["name"]}": pixels}}){answer}
```

Set the precision hint: without it OpenVINO computes in bfloat16 on CPUs that have it.
{fits}
Latency on one thread:

    benchmark_app -m {artifact}{extensions}{batch} -d CPU -infer_precision {hint} {one_thread}

## C++

With evm-deploy's SDK: `{model}; {cpp_call(manifest)}`.

With OpenVINO alone:

```cpp
ov::Core core;
{cpp_add}auto model = core.compile_model("{artifact}", "CPU", ov::hint::inference_precision(ov::element::{hint}));
auto request = model.create_infer_request();
request.set_tensor("{read["name"]}", pixels);  // an ov::Tensor
request.infer();
auto outputs = request.get_tensor("{output["name"]}");
```
""",
    )
