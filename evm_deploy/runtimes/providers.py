"""Execution providers of ONNX Runtime: their names, the packages that bring them, and the nodes that each one runs."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evm_deploy._util.settings import Settings, setting
from evm_deploy._util.values import listed, text
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.scan.onnx_function import DOMAIN
from evm_deploy.toolchain.platforms import host_platform

SUFFIX = "ExecutionProvider"
CPU = f"CPU{SUFFIX}"
ON_CPU = ("Dnnl", "Xnnpack")  # providers that compute on the CPU
RECORDED = "session.record_ep_graph_assignment_info"
OTHER_BUILDS = {"CUDA": "onnxruntime-gpu", "Tensorrt": "onnxruntime-gpu"}  # in place of onnxruntime


def no_options(module: Any, threads: int | None) -> dict[str, str]:
    """Return no options: the default of `Plugin.options`."""
    return {}


def exact_on_cpu(module: Any, threads: int | None) -> dict[str, str]:
    """Return the options of OpenVINO's plugin for float32: by default it computes in bfloat16 on many CPUs."""
    cpu: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        cpu["INFERENCE_NUM_THREADS"] = str(threads)
    return {"load_config": json.dumps({"CPU": cpu})}


def on_the_npu(module: Any, threads: int | None) -> dict[str, str]:
    """Return the options of QNN's plugin for the NPU."""
    return {"backend_path": str(module.get_qnn_htp_path())}


def npu_emulator() -> str:
    """Return the reason why times on QNN's plugin mean nothing on this machine, empty on Arm."""
    arm = any(name in host_platform() for name in ("aarch64", "arm64"))
    return "" if arm else "QNN's library for this processor emulates the NPU"


def nothing() -> str:
    """Return an empty text: the default of `Plugin.emulates`."""
    return ""


@dataclass(frozen=True)
class Plugin:
    """Execution provider that a package of its own adds to any build of ONNX Runtime.

    module: has get_library_path(). package: name for pip. options(module, threads): options unless the user gives them.
    emulates(): the reason why this machine computes without the device, else an empty text.
    """

    module: str
    package: str
    options: Callable[[Any, int | None], dict[str, str]] = no_options
    emulates: Callable[[], str] = nothing

    @property
    def installed(self) -> bool:
        """Whether the package is installed. The module is not imported."""
        return find_spec(self.module) is not None


PLUGINS: Mapping[str, Plugin] = {
    f"OpenVINO{SUFFIX}": Plugin("onnxruntime_ep_openvino", "onnxruntime-ep-openvino", exact_on_cpu),
    f"QNN{SUFFIX}": Plugin("onnxruntime_qnn", "onnxruntime-qnn", on_the_npu, npu_emulator),
    f"WebGpu{SUFFIX}": Plugin("onnxruntime_ep_webgpu", "onnxruntime-ep-webgpu"),
}


@dataclass(frozen=True)
class OnnxRuntimeSettings(Settings):
    """Run settings of ONNX Runtime.

    providers: execution providers in order of preference, with commas between them, or a list; None for the CPU's. A
    name may leave out `ExecutionProvider`. `NAME:DEVICE` chooses a kind of device (CPU, GPU, NPU) of a plugin. Nodes
    run on the CPU only if `cpu` is among the names.
    provider_options: options of the first provider: `K=V,K2=V2`, or a JSON object, or a mapping.
    Raises UsageError.
    """

    providers: str | None = setting(
        None,
        "--provider",
        metavar="P[,P2..]",
        help="ONNX Runtime: execution providers in order of preference, such as cuda, openvino:GPU or qnn,cpu; nodes "
        "run on the CPU only if cpu is named; default cpu",
        what="execution providers",
    )
    provider_options: str | None = setting(
        None,
        "--provider-option",
        metavar="K=V[,..]",
        help="ONNX Runtime: options of the first provider, also as a JSON object",
        what="options of execution providers",
    )

    def __post_init__(self) -> None:
        if self.providers is not None and not isinstance(self.providers, str):
            object.__setattr__(self, "providers", ",".join(listed("providers", self.providers, text)))
        if isinstance(self.provider_options, Mapping):
            pairs = {str(key): str(value) for key, value in self.provider_options.items()}
            object.__setattr__(self, "provider_options", json.dumps(pairs, sort_keys=True))
        super().__post_init__()
        if self.providers is not None and not all(self.names):
            raise UsageError(f"--provider {self.providers!r} has an empty name", "use names such as openvino,cpu")
        if self.provider_options is not None and not self.names:
            raise UsageError("--provider-option without --provider", "name the provider that the options are for")
        _ = self.options

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the providers, as given."""
        return tuple(name.strip() for name in self.providers.split(",")) if self.providers is not None else ()

    @property
    def options(self) -> dict[str, str]:
        """Options of the first provider. Raises UsageError for a text that holds none."""
        given = self.provider_options
        if given is None:
            return {}
        if given.lstrip().startswith("{"):
            try:
                found = json.loads(given)
            except ValueError as error:
                raise UsageError(f"--provider-option is not JSON: {error}", "use K=V, or a JSON object") from error
            return {key: each if isinstance(each, str) else json.dumps(each) for key, each in found.items()}
        pairs = [part.partition("=") for part in given.split(",")]
        if not all(key.strip() and equals for key, equals, _ in pairs):
            raise UsageError(f"--provider-option {given!r}: use K=V[,K2=V2], such as device_id=1, or a JSON object")
        return {key.strip(): value for key, _, value in pairs}

    @property
    def native_kernels(self) -> bool:
        """Whether the scans can run on our native kernels, which are nodes of the CPU's provider."""
        return not self.names or any(full_name(name) == CPU for name in self.names)


def full_name(name: str) -> str:
    """Return ONNX Runtime's name of a provider: `cuda` -> `CUDAExecutionProvider`. Unknown names stay as they are."""
    bare = name.partition(":")[0]
    spellings = (*(key.removesuffix(SUFFIX) for key in PLUGINS), "CPU", "CUDA", "Tensorrt", "CoreML")
    known = {spelling.lower(): spelling for spelling in spellings}
    short = bare[: -len(SUFFIX)] if bare.lower().endswith(SUFFIX.lower()) else bare
    return known.get(short.lower(), short[:1].upper() + short[1:]) + SUFFIX


def short_name(name: Any) -> str:
    """Return the name of a provider as on the command line: `CUDAExecutionProvider` -> `cuda`."""
    return str(name).removesuffix(SUFFIX).lower()


def available(ort: Any) -> list[str]:
    """Return the names of the providers that this build of ONNX Runtime has, and of those that plugins bring."""
    plugins = [name for name, plugin in PLUGINS.items() if plugin.installed]
    return sorted({name for name in ort.get_available_providers() if name.endswith(SUFFIX)} | set(plugins))


@dataclass(frozen=True)
class Opened:
    """Session on execution providers. nodes: provider -> number of its nodes. runs_on: processors, with full names.

    emulates: the reason why times mean nothing here, else an empty text.
    """

    session: Any
    nodes: Mapping[str, int]
    runs_on: str
    emulates: str


def open_session(
    ort: Any, source: str | Path | bytes, options: Any, settings: OnnxRuntimeSettings, threads: int | None
) -> Opened:
    """Open a model on the execution providers of `settings`, and on no other.

    ort: the module onnxruntime. options: SessionOptions, which get the providers. Raises UsageError if a provider is
    unknown, or runs no node, or a node runs on the CPU and `cpu` is not among the names; ToolchainError if one is
    missing. Errors of ONNX Runtime itself are left to the caller.
    """
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        raise ToolchainError(
            f"ONNX Runtime {ort.__version__} does not tell which execution provider runs a node",
            "install a newer onnxruntime, or leave --provider out",
        )
    asked = [_found(ort, name) for name in settings.names]
    if CPU in asked[:-1]:
        raise UsageError("--provider: cpu takes every node, so that nothing is left for the others", "name cpu last")
    if len(set(asked)) < len(asked):
        raise UsageError(f"--provider {settings.providers} names a provider twice")
    places = []
    for index, (name, given) in enumerate(zip(asked, settings.names, strict=True)):
        if name != CPU:
            places.append(_add(ort, options, name, given, settings.options if index == 0 else {}, threads))
    options.add_session_config_entry(RECORDED, "1")
    session = ort.InferenceSession(source, options)
    session.disable_fallback()
    placed = assigned(session)
    nodes = Counter(provider for provider, _, _ in placed)
    if CPU in nodes and CPU not in asked:
        raise _not_everything(placed, asked)
    idle = [name for name in asked if not nodes[name] and name != CPU]
    if idle and {domain for _, _, domain in placed} != {DOMAIN}:  # nothing but our kernels: a scan of the self-test
        raise UsageError(
            f"no node of the model runs on {short_name(idle[0])}: all run on {', '.join(map(short_name, nodes))}",
            "use --scan portable, or export with --scan unrolled: many providers take no other nodes",
        )
    emulates = [f"{short_name(name)}: {PLUGINS[name].emulates()}" for name in asked if name in PLUGINS]
    told = [each for each in emulates if not each.endswith(": ")]
    if CPU in nodes:
        places.append("CPU")
    return Opened(session, dict(sorted(nodes.items())), ", ".join(places), "; ".join(told))


def assigned(session: Any) -> list[tuple[str, str, str]]:
    """Return the provider, the operator and its domain of every node of a session."""
    parts = session.get_provider_graph_assignment_info()
    return [(part.ep_name, node.op_type, node.domain) for part in parts for node in part.get_nodes()]


def _found(ort: Any, given: str) -> str:
    """Return ONNX Runtime's name of a provider that this machine has. Raises UsageError, ToolchainError."""
    has = available(ort)
    named: dict[str, str] = {each.lower(): each for each in (*has, *ort.get_all_providers(), *PLUGINS)}
    name = named.get(full_name(given).lower())
    here = f"available with ONNX Runtime {ort.__version__}: {', '.join(map(short_name, has))}"
    if name is None:
        raise UsageError(f"execution provider {given!r} is unknown; {here}")
    if name not in has:
        bare = name.removesuffix(SUFFIX)
        hint = "use a build of ONNX Runtime that has it"
        if name in PLUGINS:
            hint = f"pip install {PLUGINS[name].package}"
        elif bare in OTHER_BUILDS:
            hint = f"install {OTHER_BUILDS[bare]} in place of onnxruntime"
        raise ToolchainError(f"execution provider {short_name(name)} is not installed; {here}", hint)
    if ":" in given and not (name in PLUGINS and PLUGINS[name].installed):
        raise UsageError(f"--provider {given}: only plugins have devices", f"use --provider {short_name(name)}")
    return name


def _add(ort: Any, options: Any, name: str, given: str, own: Mapping[str, str], threads: int | None) -> str:
    """Add a provider to the session's options. Returns the processor that it runs on, or the provider's name.

    Raises UsageError for a device that there is not, ToolchainError for a plugin that does not fit.
    """
    plugin = PLUGINS.get(name)
    if not (plugin and plugin.installed):
        options.add_provider(name, dict(own))
        return "CPU" if name.removesuffix(SUFFIX) in ON_CPU else name
    module = importlib.import_module(plugin.module)
    if not any(device.ep_name == name for device in ort.get_ep_devices()):
        try:
            ort.register_execution_provider_library(name, module.get_library_path())
        except Exception as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ToolchainError(f"ONNX Runtime {ort.__version__} refuses {plugin.package}: {message}") from error
    kind = given.partition(":")[2].upper()
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    fitting = [device for device in devices if not kind or device.device.type.name == kind]
    if not fitting:
        there = ", ".join(dict.fromkeys(device.device.type.name for device in devices)) or "none"
        raise UsageError(f"--provider {given}: {plugin.package} finds no such device here; it finds: {there}")
    options.add_provider_for_devices(fitting[:1], {**plugin.options(module, threads), **own})
    device = fitting[0].device
    return f"{device.type.name}: {fitting[0].ep_metadata.get('FULL_DEVICE_NAME') or device.vendor}"


def _not_everything(placed: list[tuple[str, str, str]], asked: list[str]) -> UsageError:
    """Return the error for a model of which some nodes can run on the CPU alone. placed: result of `assigned`."""
    left = Counter(op for provider, op, _ in placed if provider == CPU)
    names, kinds = ",".join(map(short_name, asked)), ", ".join(list(left)[:6]) + ", .." * (len(left) > 6)
    return UsageError(
        f"{left.total()} of {len(placed)} nodes cannot run on {names}: {kinds}",
        f"let them run on the CPU:  --provider {names},cpu  or export with --scan unrolled",
    )
