"""Build the engine of a TensorRT bundle on the machine that runs it: python finish.py, in the folder of the bundle.

The script needs Python (tested with 3.11) and the machine's tensorrt (or tensorrt_rtx). Only bundles that were exported
with --scan aot also need evm-deploy. The script writes model.engine, layers.json or layers.txt, and adds the versions
and the GPU of the build to manifest.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODULES = {"trt": ("tensorrt",), "trt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
ENGINE = "model.engine"
MIB = 1 << 20


class EngineBuildError(Exception):
    """Failed build of an engine. The message says what is wrong and what to do next."""


def load_tensorrt(target: str) -> Any:
    """Import the module of TensorRT or TensorRT-RTX. Raises EngineBuildError if it is not installed."""
    for name in MODULES[target]:
        if find_spec(name):
            return import_module(name)
    module = MODULES[target][0]
    raise EngineBuildError(f"{module} is not installed on this machine: install it, or build where it is")


def make_logger(trt: Any) -> Any:
    """Create a TensorRT logger that keeps all messages. Only the log has the reason of a failed build."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((int(severity), message))

        def errors(self) -> str:
            worst = int(trt.ILogger.Severity.ERROR)
            return "; ".join(message for severity, message in self.messages if severity <= worst) or "no reason given"

        @property
        def text(self) -> str:
            return "\n".join(message for _, message in self.messages)

    return Logger()


def parse(trt: Any, builder: Any, logger: Any, model: Path, scan: str) -> Any:
    """Parse an ONNX file to a strongly typed network. Raises EngineBuildError with all messages of the parser.

    scan: `aot` or `plugin` also check that every scan became a plugin layer.
    """
    flags = trt.NetworkDefinitionCreationFlag
    chosen = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0  # always on from 11
    network = builder.create_network(chosen)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        raise EngineBuildError(
            "the parser refuses the model: " + "; ".join(f"{e.node_name()}: {e.desc()}" for e in found)
        )
    if scan in ("aot", "plugin"):
        wanted = json.loads((model.parent / "manifest.json").read_text())["scan"]["nodes"]
        layers = [str(network.get_layer(i).type) for i in range(network.num_layers)]
        plugins = sum("PLUGIN" in layer for layer in layers)
        if plugins != len(wanted):
            raise EngineBuildError(f"{plugins} plugin layers for {len(wanted)} scans: TensorRT does not use the kernel")
    return network


def configure(trt: Any, builder: Any, network: Any, settings: dict[str, Any]) -> Any:
    """Create the builder's configuration from `settings`. Raises EngineBuildError for unsupported settings."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings["workspace_mib"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mib"] * MIB)
    if settings["version_compatible"]:
        config.set_flag(required(trt.BuilderFlag, "VERSION_COMPATIBLE", "--version-compatible"))
    if settings["hardware_compatible"]:
        levels = required(trt, "HardwareCompatibilityLevel", "--hardware-compatible")
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    if settings["sms"]:
        capabilities = required(trt, "ComputeCapability", "--sm")
        names = [f"SM{sm}" for sm in settings["sms"]]
        known = [name for name in capabilities.__members__ if name.startswith("SM")]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise EngineBuildError(f"{', '.join(unknown)} unknown: this TensorRT release builds for {', '.join(known)}")
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            config.set_compute_capability(getattr(capabilities, name), i)
    if settings["timing_cache"]:
        path = Path(settings["timing_cache"])
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    if settings["profile"]:
        profile = builder.create_optimization_profile()
        profile.set_shape(network.get_input(0).name, *settings["profile"])
        config.add_optimization_profile(profile)
    elif any(-1 in tuple(network.get_input(i).shape) for i in range(network.num_inputs)):
        raise EngineBuildError(
            "the batch is dynamic, but has no optimization profile: export with --batch MIN:OPT:MAX, such as 1:4:8"
        )
    return config


def required(holder: Any, name: str, flag: str) -> Any:
    """Return the attribute `name` of `holder`. Raises EngineBuildError naming `flag` if this release lacks it."""
    if not hasattr(holder, name):
        raise EngineBuildError(f"{flag}: this TensorRT release has no {name}; leave {flag} out")
    return getattr(holder, name)


def add_kernel(trt: Any, scan: str, library: str | None) -> None:
    """Register the kernel of the scans: embedded in the engine ("aot"), or from a library ("plugin").

    Does nothing for portable scans. Raises EngineBuildError.
    """
    if scan == "plugin":
        if not library:
            raise EngineBuildError("--library is missing: the scans need libevm_tensorrt.so, see README.md")
        trt.init_libnvinfer_plugins(None, "")
        if trt.get_plugin_registry().load_library(library) is None:
            raise EngineBuildError(f"{library} cannot be loaded")
    elif scan == "aot":
        if not find_spec("tensorrt.plugin"):
            raise EngineBuildError(
                "the installed TensorRT has no tensorrt.plugin: install 10.9 or newer, or export with --scan portable"
            )
        try:
            from evm_deploy.runtimes.tensorrt import kernel, plugin
        except ImportError as error:
            raise EngineBuildError(
                "evm-deploy is not installed; --scan aot needs it to compile the kernel: pip install evm-deploy"
            ) from error
        plugin.register(kernel.compile_kernel(f"sm_{gpu()['sm']}").decode())


def gpu() -> dict[str, str]:
    """Return name and architecture of this machine's GPU from nvidia-smi. Both are empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {"name": "", "sm": ""}
    name, _, capability = line.rpartition(",")
    return {"name": name.strip(), "sm": capability.strip().replace(".", "")}


def build(folder: Path, settings: dict[str, Any], library: str | None = None) -> dict[str, Any]:
    """Build the engine of the bundle in `folder` and write it to model.engine.

    Returns version, GPU and layer count for the manifest. Raises EngineBuildError.
    """
    trt = load_tensorrt(settings["target"])
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    add_kernel(trt, settings["scan"], library)
    network = parse(trt, builder, logger, folder / "model.onnx", settings["scan"])
    config = configure(trt, builder, network, settings)
    plan = builder.build_serialized_network(network, config)  # returns None if the build fails
    if plan is None:
        raise EngineBuildError(f"the build failed: {logger.errors()}")
    write(folder / ENGINE, bytes(plan))
    if settings["timing_cache"]:
        write(Path(settings["timing_cache"]), bytes(config.get_timing_cache().serialize()))
    write_layers(trt, logger, plan, folder)
    version = trt.__version__
    return {"tensorrt": version, "gpu": gpu(), "sms": settings["sms"], "layers": network.num_layers}


def write_layers(trt: Any, logger: Any, plan: Any, folder: Path) -> None:
    """Write the list of the engine's layers: to layers.txt from the log if it has the list, else to layers.json.

    layers.json comes from the engine inspector, which needs a GPU. No file is written if the engine cannot be loaded.
    """
    if "Layers:" in logger.text:
        write(folder / "layers.txt", logger.text[logger.text.rfind("Layers:") :].encode())
        return
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is not None:
        information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        write(folder / "layers.json", information.encode())


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary file in the same folder, then rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def host() -> str:
    """Return the platform of this machine, named as in manifests: linux-x86_64."""
    machine = platform.machine().lower()
    system = {"win32": "windows"}.get(sys.platform, sys.platform)
    return f"{system}-{'x86_64' if machine == 'amd64' else machine}"


def take_in(folder: Path, library: str) -> str:
    """Copy the plugin library into the bundle. Returns its path inside the bundle."""
    inside = f"plugins/{host()}/{Path(library).name}"
    (folder / inside).parent.mkdir(parents=True, exist_ok=True)
    write(folder / inside, Path(library).read_bytes())
    return inside


def record(folder: Path, facts: dict[str, Any], library: str = "") -> None:
    """Add the engine, its hash and the facts of its build to manifest.json, and mark the bundle as built."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in (ENGINE, "layers.json", "layers.txt", library):
        file = folder / name
        if name and file.is_file():
            content = file.read_bytes()
            manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    manifest["artifact"], manifest["built"] = ENGINE, True
    if library:  # `load` uses the library in the bundle with scan="bundled"
        manifest["scan"]["plugins"] = {host(): library}
    manifest["details"]["engine"] = facts
    write(path, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def main() -> int:
    """Parse the arguments and build the engine. Returns 0, or 3 if the build failed."""
    arguments = argparse.ArgumentParser(description="Build the engine of this bundle on this machine.")
    arguments.add_argument("bundle", nargs="?", default=str(Path(__file__).parent), help="default: this file's folder")
    arguments.add_argument("--library", help="plugin library, for bundles exported with --scan plugin")
    arguments.add_argument("--timing-cache", metavar="FILE", help="read and updated by each build, TensorRT only")
    args = arguments.parse_args()
    folder = Path(args.bundle)
    try:
        settings = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        settings["timing_cache"] = args.timing_cache or settings["timing_cache"]
        facts = build(folder, settings, args.library)
        record(folder, facts, take_in(folder, args.library) if args.library else "")
    except (EngineBuildError, OSError, ValueError) as error:
        print(f"finish: {error}", file=sys.stderr)
        return 3
    print(f"{folder / ENGINE}  {(folder / ENGINE).stat().st_size / 1e6:.1f} MB  TensorRT {facts['tensorrt']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
