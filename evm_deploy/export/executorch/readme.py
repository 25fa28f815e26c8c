"""README text of an ExecuTorch bundle: how to run the program without evm-deploy, and how to build it into an app."""

from __future__ import annotations

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage, shape_of

TYPES = {"uint8": "Byte", "float32": "Float"}


def usage(manifest: Manifest) -> Usage:
    """Return the texts for ExecuTorch's own runtime, in Python and C++, and for apps on Android and iOS."""
    read, output, release = manifest.inputs[0], manifest.outputs[0]["name"], manifest.details["executorch"]
    library = next(iter(manifest.plugins.values()), "")
    needs = "; it needs our operators, in `plugins/` for this platform" if library else ": standard operators only"
    sizes = ", ".join(str(size) for size in read["shape"])
    load = f'\nctypes.CDLL("{library}")  # registers our operators, once in a process' if library else ""
    app = OPERATORS.format(release=release) if library else ""
    return Usage(
        artifact=f"the program, for ExecuTorch with XNNPACK{needs}",
        library=f"our operators for ExecuTorch {release} on {{platform}}",
        sections=f"""With ExecuTorch {release} and torch, in this folder:

```python
import ctypes

import torch
from executorch.runtime import Runtime

runtime = Runtime.get(){load}
program = runtime.load_program("{manifest.artifact}")
method = program.load_method("forward")
pixels = torch.zeros(({sizes}), dtype=torch.{read["dtype"]})  # your image
outputs = method.execute([pixels])  # in the order of "outputs" in manifest.json
```

## C++

```cpp
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

executorch::extension::Module model("{manifest.artifact}");
auto pixels = executorch::extension::from_blob(data, {{{sizes}}}, executorch::aten::ScalarType::{TYPES[read["dtype"]]});
auto result = model.forward(pixels);  // Result<std::vector<EValue>>: "{output}" is result->at(0).toTensor()
```

Input: {read["dtype"]}, {shape_of(read)}. Link the runtime, the optimised CPU kernels and the delegate XNNPACK. Use
ExecuTorch {release} or newer.
{app}""",
    )


OPERATORS = """
## Android and iOS

The operators come with evm-deploy as C++ sources, in the folder that this command prints:

    python -c "import evm_deploy.toolchain.compile as c; print(c.read_recipe().folder)"

Build `executorch/ops.cpp`, and the sources and instruction sets of `kernels.txt`, into the app, beside ExecuTorch
{release}. A static initialiser registers the operators: link the object files themselves, or the archive as a whole
(`-Wl,--whole-archive` on Android, `-force_load` on iOS). A second copy in the process ends it.
"""
