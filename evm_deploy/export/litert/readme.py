"""README text of a LiteRT bundle: how to run the model without evm-deploy."""

from __future__ import annotations

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage, example_pixels


def usage(manifest: Manifest) -> Usage:
    """Return the texts for plain LiteRT, in Python and Kotlin."""
    read, output = manifest.inputs[0], manifest.outputs[0]
    labels = (
        " The class names are also in the file itself, as TensorFlow's libraries read them."
        if manifest.plan["labels"]
        else ""
    )
    return Usage(
        artifact="the model, a TFLite file of standard operators",
        library="",
        sections=f"""With LiteRT alone (`pip install ai-edge-litert`), in this folder:

```python
import numpy as np
from ai_edge_litert.interpreter import Interpreter

interpreter = Interpreter("{manifest.artifact}", num_threads=1)
run = interpreter.get_signature_runner()
pixels = {example_pixels(read)}  # your image
outputs = run({read["name"]}=pixels)["{output["name"]}"]
```

On Android, with `com.google.ai.edge.litert`: copy `{manifest.artifact}` to the app's assets, and feed `{read["name"]}`
to `CompiledModel` or to the `Interpreter`.{labels}
""",
    )
