"""Build the engine of a TensorRT bundle on the machine that runs it: python finish.py, in the folder of the bundle.

The script needs Python (tested with 3.11) and the machine's tensorrt (or tensorrt_rtx). Only bundles that were exported
with --scan aot also need evm-deploy. The script writes model.engine, layers.json or layers.txt, and adds the versions
and the GPU of the build to manifest.json. A signature of the bundle no longer fits then, and is removed.

Everything in the bundle is untrusted: the script checks build.json and manifest.json, and writes into the bundle and to
the timing cache of its command line only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODULES = {"trt": ("tensorrt",), "trt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
ENGINE = "model.engine"
MIB = 1 << 20
MAX_JSON = 4 * MIB  # bytes
NMS_PLUGIN = b"EfficientNMS_TRT"  # of the plugin library that comes with TensorRT
NO_CACHE = ("trt-rtx",)  # targets whose builder has no timing cache


def is_count(value: Any, most: int = 1 << 24) -> bool:
    """Test whether a JSON value is a whole number from 1 to `most`."""
    return type(value) is int and 1 <= value <= most


def is_profile(value: Any) -> bool:
    """Test whether a JSON value is three shapes of one length: smallest, best and largest."""
    shapes = isinstance(value, list) and len(value) == 3 and all(isinstance(shape, list) for shape in value)
    return shapes and len({len(shape) for shape in value}) == 1 and all(is_count(n) for shape in value for n in shape)


SETTINGS: dict[str, Callable[[Any], bool]] = {  # keys of build.json, all required
    "target": lambda value: isinstance(value, str) and value in MODULES,
    "scan": lambda value: value in ("portable", "aot", "plugin"),
    "profile": lambda value: value is None or is_profile(value),
    "workspace_mib": lambda value: value is None or is_count(value),
    "version_compatible": lambda value: isinstance(value, bool),
    "hardware_compatible": lambda value: isinstance(value, bool),
    "sms": lambda value: isinstance(value, list) and all(is_count(sm, 9999) for sm in value),
}
OLD_KEYS = ("timing_cache", "defer")  # keys of bundles of older releases; a path from a bundle is never used


class EngineBuildError(Exception):
    """Failed build of an engine. The message says what is wrong and what to do next."""


class InvalidBundleError(EngineBuildError):
    """Missing, damaged or hostile file of the bundle."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the bundle. Raises InvalidBundleError."""
    try:
        if not path.is_file() and path.exists():  # a pipe or a device would be read for ever
            raise InvalidBundleError(f"{path} is not a file")
        if path.stat().st_size > MAX_JSON:
            raise InvalidBundleError(f"{path} is larger than {MAX_JSON} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidBundleError(f"{path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise InvalidBundleError(f"{path} is not a JSON object")
    return content


def read_bundle(folder: Path) -> dict[str, Any]:
    """Read and check build.json, and what manifest.json must say for a build. Returns the builder's settings.

    Raises InvalidBundleError, also for a bundle with symbolic links: a file written through one would land elsewhere.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise InvalidBundleError(f"{path} is a link: an engine is only built in a bundle of regular files")
    settings, manifest = read_json(folder / "build.json"), read_json(folder / "manifest.json")
    for key in OLD_KEYS:
        settings.pop(key, None)
    for key in sorted({*settings, *SETTINGS}):
        if key not in SETTINGS:
            raise InvalidBundleError(f"{folder / 'build.json'}: unknown key {key!r:.60}")
        if key not in settings:
            raise InvalidBundleError(f"{folder / 'build.json'}: {key} is missing")
        if not SETTINGS[key](settings[key]):
            raise InvalidBundleError(f"{folder / 'build.json'}: {key} is invalid: {settings[key]!r:.60}")
    scan = manifest.get("scan")
    if not isinstance(scan, dict) or not isinstance(scan.get("nodes"), list):
        raise InvalidBundleError(f"{folder / 'manifest.json'} has no list of scans")
    if not all(isinstance(manifest.get(key), dict) for key in ("files", "details")):
        raise InvalidBundleError(f"{folder / 'manifest.json'} is not a manifest")
    for key, said in (("target", manifest.get("target")), ("scan", scan.get("value"))):
        if said != settings[key]:
            raise InvalidBundleError(
                f"{folder}: {key} is {settings[key]!r} in build.json, but {said!r:.60} in manifest.json"
            )
    return settings


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
    if NMS_PLUGIN in model.read_bytes():
        trt.init_libnvinfer_plugins(logger, "")
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


def configure(trt: Any, builder: Any, network: Any, settings: dict[str, Any], timing_cache: Path | None = None) -> Any:
    """Create the builder's configuration from `settings`. Raises EngineBuildError for unsupported settings.

    timing_cache: file that was written by an earlier build, or that does not exist yet.
    """
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
    if timing_cache:
        content, empty = timing_cache.read_bytes() if timing_cache.exists() else b"", config.create_timing_cache(b"")
        if content and content[:4] != bytes(empty.serialize())[:4]:  # TensorRT 11 only warns, and starts an empty one
            raise EngineBuildError(
                f"--timing-cache {timing_cache} holds no timing cache of this TensorRT: name another"
            )
        config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
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
                "evm-deploy is not installed on this machine; --scan aot needs it to compile the kernel: install it "
                "from its checkout or wheel, or export with --scan portable"
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


def build(folder: Path, library: str | None = None, timing_cache: Path | None = None) -> dict[str, Any]:
    """Build the engine of the bundle in `folder` and write it to model.engine.

    timing_cache: file that is read and updated. Returns version, GPU and layer count for the manifest. Raises
    EngineBuildError.
    """
    settings = read_bundle(folder)
    if timing_cache and settings["target"] in NO_CACHE:
        raise EngineBuildError("TensorRT-RTX has no --timing-cache: leave --timing-cache out")
    trt = load_tensorrt(settings["target"])
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    add_kernel(trt, settings["scan"], library)
    network = parse(trt, builder, logger, folder / "model.onnx", settings["scan"])
    config = configure(trt, builder, network, settings, timing_cache)
    plan = builder.build_serialized_network(network, config)  # returns None if the build fails
    if plan is None:
        raise EngineBuildError(f"the build failed: {logger.errors()}")
    layers = layer_list(trt, logger, plan)
    if timing_cache:
        write(Path(os.path.realpath(timing_cache)), bytes(config.get_timing_cache().serialize()))
    for name, content in {ENGINE: bytes(plan), **layers}.items():
        write(folder / name, content)
    version = trt.__version__
    return {"tensorrt": version, "gpu": gpu(), "sms": settings["sms"], "layers": network.num_layers}


def layer_list(trt: Any, logger: Any, plan: Any) -> dict[str, bytes]:
    """Return the list of the engine's layers as a file: layers.txt from the log if it has the list, else layers.json.

    layers.json comes from the engine inspector, which needs a GPU. Empty if the engine cannot be loaded.
    """
    if "Layers:" in logger.text:
        return {"layers.txt": logger.text[logger.text.rfind("Layers:") :].encode()}
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return {}
    information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"layers.json": information.encode()}


def write(path: Path, content: bytes) -> None:
    """Write a file atomically: to a new temporary file in the same folder, then rename."""
    number, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(number, "wb") as file:  # noqa: PTH123  an open file, not a path
            file.write(content)
        Path(beside).chmod(0o644)  # mkstemp makes files that other users cannot read
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink()
        raise


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


def record(folder: Path, facts: dict[str, Any], library: str = "") -> bool:
    """Add the engine, its hash and the facts of its build to manifest.json, and mark the bundle as built.

    Removes a signature of the old manifest. Returns whether there was one.
    """
    path, signature = folder / "manifest.json", folder / "manifest.json.sig"
    manifest = read_json(path)
    for name in (ENGINE, "layers.json", "layers.txt", library):
        file = folder / name
        if name and file.is_file():
            content = file.read_bytes()
            manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    manifest["artifact"], manifest["built"] = ENGINE, True
    if library:  # `load` uses the library in the bundle with scan="bundled"
        manifest["scan"]["plugins"] = {host(): library}
    manifest["details"]["engine"] = facts
    signed = signature.exists()
    signature.unlink(missing_ok=True)
    write(path, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    return signed


def main() -> int:
    """Parse the arguments and build the engine. Returns 0, 2 for a bundle that is invalid, 3 if the build failed."""
    arguments = argparse.ArgumentParser(description="Build the engine of this bundle on this machine.")
    arguments.add_argument("bundle", nargs="?", default=str(Path(__file__).parent), help="default: this file's folder")
    arguments.add_argument("--library", help="plugin library, for bundles exported with --scan plugin")
    arguments.add_argument(
        "--timing-cache", metavar="FILE", type=Path, help="read and updated by each build, TensorRT only"
    )
    args = arguments.parse_args()
    folder = Path(args.bundle)
    try:
        facts = build(folder, args.library, args.timing_cache)
        unsigned = record(folder, facts, take_in(folder, args.library) if args.library else "")
    except (EngineBuildError, OSError, ValueError) as error:
        print(f"finish: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidBundleError) else 3
    if unsigned:
        print("finish: the signature did not cover the engine and was removed: sign the bundle again", file=sys.stderr)
    print(f"{folder / ENGINE}  {(folder / ENGINE).stat().st_size / 1e6:.1f} MB  TensorRT {facts['tensorrt']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
