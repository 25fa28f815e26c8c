"""What the README of a TensorRT bundle says of finishing and running it without evm-deploy."""

from __future__ import annotations

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage
from evm_deploy.runtimes.tensorrt import TRT, TRT_RTX

PLUGIN = """
The scans are nodes of a plugin. Compile it first, on the device, with its own headers of TensorRT (sm_87 is Orin):

    nvcc -std=c++17 -shared -Xcompiler -fPIC -arch=sm_87 plugin/*.cu -o libevm_tensorrt.so
"""


def usage(manifest: Manifest) -> Usage:
    """finish.py, trtexec, C++."""
    mode, read = manifest.scan["value"], manifest.inputs[0]
    library = " --library libevm_tensorrt.so" if mode == "plugin" else ""
    return Usage(
        artifact="the model; TensorRT builds `model.engine` from it",
        library="",
        sections=f"""## Build the engine

`model.engine` is built where it runs: it fits one release of TensorRT and one kind of GPU. On the device:

    evm-export --finish path/to/this/folder{library}

or, with nothing but {_package(manifest)} and Python, in this folder:

    python3 finish.py{library}

or without Python, which leaves `manifest.json` as it is:

    {trtexec(manifest)}
{PLUGIN if mode == "plugin" else ""}
`manifest.json` says whether it is built (`built`), and with what (`details.engine`).

## C++

`nvinfer1::createInferRuntime(logger)->deserializeCudaEngine(data, size)` on the bytes of `model.engine`; then
`setTensorAddress("{read["name"]}", pointer)` and so on, and `enqueueV3(stream)`.
""",
    )


def trtexec(manifest: Manifest) -> str:
    """The equivalent command of NVIDIA's tool. Precision is in the graph: no --fp16, no --int8."""
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
    if engine["timing_cache"]:
        words += [f"--timingCacheFile={engine['timing_cache']}"]
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
