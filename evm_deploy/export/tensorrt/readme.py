"""README text of a TensorRT bundle: how to build its engine and run it without evm-deploy."""

from __future__ import annotations

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage
from evm_deploy.runtimes.tensorrt import TRT, TRT_RTX

PLUGIN = """
The scans are nodes of a plugin. Compile the plugin first, on the device, with the device's TensorRT headers (sm_87 is
Orin):

    nvcc -std=c++17 -shared -Xcompiler -fPIC -arch=sm_87 plugin/*.cu -o libevm_tensorrt.so
"""


def usage(manifest: Manifest) -> Usage:
    """Return the texts for finish.py, trtexec and C++."""
    mode, read = manifest.scan["value"], manifest.inputs[0]
    library = " --library libevm_tensorrt.so" if mode == "plugin" else ""
    return Usage(
        artifact="the model; TensorRT builds `model.engine` from it",
        library="",
        sections=f"""## Build the engine

An engine fits one release of TensorRT and one kind of GPU, so build `model.engine` on the device that runs it:

    evm-export --finish path/to/this/folder{library}

Or, with only {_package(manifest)} and Python installed, in this folder:

    python3 finish.py{library}

Or without Python (this command does not update `manifest.json`):

    {trtexec(manifest)}
{PLUGIN if mode == "plugin" else ""}
`manifest.json` records whether the engine is built (`built`), and with which versions (`details.engine`).

## C++

`nvinfer1::createInferRuntime(logger)->deserializeCudaEngine(data, size)` on the bytes of `model.engine`; then
`setTensorAddress("{read["name"]}", pointer)` and so on, and `enqueueV3(stream)`.
""",
    )


def trtexec(manifest: Manifest) -> str:
    """Return the equivalent trtexec command. Precision is in the graph, so the command has no --fp16 and no --int8."""
    engine = manifest.plan["settings"]
    words = ["tensorrt_rtx" if manifest.target == "trt-rtx" else "trtexec", "--onnx=model.onnx"]
    words += ["--saveEngine=model.engine"]
    if manifest.target == "trt":
        words += ["--stronglyTyped"]
    if engine["workspace_mib"]:
        words += [f"--memPoolSize=workspace:{engine['workspace_mib']}M"]
    if engine["version_compatible"]:
        words += ["--versionCompatible"]
    if engine["hardware_compatible"]:
        words += ["--hardwareCompatibilityLevel=ampere+"]
    if manifest.scan["value"] == "plugin":
        words += ["--staticPlugins=libevm_tensorrt.so"]
    batch, (read, *_) = manifest.batch, manifest.inputs
    if not batch.static:
        tail = "x".join(map(str, read["shape"][1:]))
        sizes = zip(("min", "opt", "max"), (batch.min, batch.opt, batch.max), strict=True)
        words += [f"--{name}Shapes={read['name']}:{size}x{tail}" for name, size in sizes]
    return " ".join(words)


def _package(manifest: Manifest) -> str:
    return {info.name: info.label for info in (TRT, TRT_RTX)}[manifest.target]
