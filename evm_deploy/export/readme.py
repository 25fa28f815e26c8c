"""The README inside a bundle: how to embed it."""

from __future__ import annotations

from evm_deploy.export.manifest import Manifest


def bundle_readme(manifest: Manifest) -> str:
    """Markdown for a person who has the bundle and nothing else."""
    spec, pre, plan = manifest.model, manifest.preprocessing, manifest.plan
    height, width = pre["size"]
    read, outputs = manifest.inputs[0], ", ".join(o["name"] for o in manifest.outputs)
    shape = "x".join("batch" if d is None else str(d) for d in read["shape"])
    contract = (
        "RGB pixels 0..255; mean and std are inside the model"
        if plan["input"] == "image"
        else f"RGB scaled to 0..1, minus mean {list(pre['mean'])}, divided by std {list(pre['std'])}"
    )
    scale = f"covers {round(height / pre['crop_pct'])}x{round(width / pre['crop_pct'])}"
    example = (
        f"pixels = np.zeros(({shape.replace('batch', '1').replace('x', ', ')}), np.{read['dtype']})  # your image\n"
        f'outputs = session.run(None, {{"{read["name"]}": pixels}})'
    )
    labels = "| `labels.txt` | class names, one per line |\n" if plan["labels"] else ""
    libraries = "".join(
        f"| `{file}` | native kernel for {platform}, for `RegisterCustomOpsLibrary`; optional, faster |\n"
        for platform, file in manifest.plugins.items()
    )
    return f"""# {manifest.name}

{spec["variant"]} EfficientVMamba, {spec["parameters"]:,} parameters, {manifest.precision}, {height}x{width} (HxW).
Against the float model: largest difference {manifest.parity["max_abs"]:.1e}, cosine {manifest.parity["cosine"]:.6f}.

| file | what |
|---|---|
| `{manifest.artifact}` | the model, a plain ONNX file: nothing of ours is needed to run it |
| `manifest.json` | input, output, preprocessing, versions, hashes |
| `selftest/` | inputs with expected outputs |
{labels}{libraries}
Input `{read["name"]}`: {read["dtype"]} {shape}, {contract}.
Before that: resize with {pre["interpolation"]} and antialiasing so that the picture {scale}, crop the centre.
Output: {outputs}.

## Python

With evm-deploy:

```python
from evm_deploy import load

with load("path/to/this/folder") as model:
    print(model.predict(["cat.jpg"], top=5))
```

With ONNX Runtime alone:

```python
import numpy as np
import onnxruntime as ort

session = ort.InferenceSession("{manifest.artifact}", providers=["CPUExecutionProvider"])
{example}
```

## C++

`Ort::Session session(env, "{manifest.artifact}", Ort::SessionOptions{{}});`, then `Run` with one input
`{read["name"]}` ({read["dtype"]}, {shape}) and the output names above.

## Check it on the device

    evm-run path/to/this/folder --selftest
"""
