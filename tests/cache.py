"""Hub graphs, programs and bundles are made once for a run of the tests and shared by its workers.

A graph or program is kept in `.pytest_cache`, where `make quick` finds those of the last run, by everything that
decides it: the module with its weights, what the plan says of it, our sources, the versions of the tracers. While
anything that takes part in tracing is patched, and in tests marked `retraces`, it is traced as ever.

A graph as torch exports it, before ours is made of it, is kept too: a network that differs from an earlier one in the
values of its weights alone is not traced, it gets the earlier graph with its own weights.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import io
import pickle
import pkgutil
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import is_dataclass, replace
from importlib import import_module, metadata
from inspect import isclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import onnx
import onnx_ir
import pytest
import torch

import evm_deploy
from evm_deploy._util.files import write_atomically
from evm_deploy._util.silence import silence_libraries
from evm_deploy.export import executorch
from evm_deploy.export.coreml import program
from evm_deploy.export.executorch import program as lowering
from evm_deploy.export.executorch import scans as executorch_scans
from evm_deploy.export.hub import graph
from evm_deploy.runtimes.coreml.tools import coremltools
from evm_deploy.scan import onnx_function
from tests.once import locked, once

ROOT = Path(__file__).parents[1]
TRACERS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxsim", "numpy", "coremltools", "executorch")
PARTS = (  # of us, what takes part in tracing
    *("evm_deploy.export.hub", "evm_deploy.export.coreml", "evm_deploy.export.executorch"),
    *("evm_deploy.scan", "evm_deploy.model"),
)
OTHERS = (  # and of others, what a test may put something else in the place of
    ("torch.nn.utils.fusion", "fuse_conv_bn_eval"),
    ("torch.onnx", "export"),
    ("onnxsim", "simplify"),
    ("onnx.checker", "check_model"),
    ("coremltools", "convert"),
)
AFTERWARDS = {  # of these, what takes no part in torch's export
    ("evm_deploy.scan.onnx_function", "selective_scan_function"),
    ("evm_deploy.model.batch_norm", "folded"),
    ("evm_deploy.export.hub.scans", "OnnxScanAccess", "in_situ"),
}
RETRACES = "retraces"


# --------------------------------------------------------------------------------------------------- what decides it


def installed_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # coremltools, executorch
        return "none"


def sources() -> str:
    """Digest of our Python, this file included, and of the versions of what traces."""
    root = Path(evm_deploy.__file__).parent
    digest = hashlib.sha256(f"{sys.version}\n".encode())
    for path in (*sorted(root.rglob("*.py")), Path(__file__)):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    for name in TRACERS:
        digest.update(f"{name} {installed_version(name)}\n".encode())
    return digest.hexdigest()


def digest_of(module: Any, plan: Any, trace_key: Callable[[Any], Any] = graph.trace_key, *, values: bool = True) -> str:
    """Digest of the module (classes, settings, weights and buffers by path) and of the plan's part.

    values: with the values of the weights and buffers.
    """
    digest = hashlib.sha256(repr(module).encode())
    for name in sorted({type(each).__module__ for each in module.modules()}):
        if not name.startswith("torch."):  # a network that is not of ours
            digest.update(Path(sys.modules[name].__file__ or "").read_bytes())
    first: dict[int, str] = {}  # what is in several places is another network than equal ones there
    for path, each in module.named_modules(remove_duplicate=False):
        plain = (bool, int, float, str, tuple, type(None))
        settings = sorted((key, value) for key, value in vars(each).items() if isinstance(value, plain))
        codes = {key: value.__code__ for key, value in vars(each).items() if isinstance(value, FunctionType)}
        settings += sorted((key, code.co_firstlineno, code.co_code) for key, code in codes.items())
        known = first.setdefault(id(each), path)
        digest.update(f"{path} {known} {type(each).__module__}.{type(each).__qualname__} {settings}\n".encode())
        for name, tensor in [*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)]:
            known = first.setdefault(id(tensor), f"{path}.{name}")
            digest.update(f"{known} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}\n".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes() if values else b"")
    digest.update(repr(trace_key(plan)).encode())
    return digest.hexdigest()


def plain(value: Any) -> bool:
    """Whether the text of a value tells all of it."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(plain, value))
    if isinstance(value, Mapping):
        return plain(list(value.items()))
    if is_dataclass(value):
        return plain(vars(value))
    return isinstance(value, (bool, int, float, str, type, type(None), torch.dtype))


def form_of(module: Any, plan: Any) -> str | None:
    """Digest of all that decides torch's export but the values of weights and buffers; None if it is not known."""
    outside = set(vars(torch.nn.Module()))  # parameters, buffers, modules and hooks
    digest = hashlib.sha256(digest_of(module, plan, values=False).encode())
    for _, each in module.named_modules():
        settings = {key: value for key, value in vars(each).items() if key not in outside}
        hooks = [value for key, value in vars(each).items() if key in outside and key.endswith("_hooks") and value]
        if hooks or not plain(settings):
            return None
        digest.update(repr(sorted(settings.items())).encode())
    return digest.hexdigest()


def parts() -> dict[tuple[str, ...], object]:
    """Everything that our part of tracing consists of, methods included, by module and name."""
    found: dict[tuple[str, ...], object] = {}
    for module in [module for name, module in sorted(sys.modules.items()) if name.startswith(PARTS)]:
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            if isclass(value) and value.__module__ == module.__name__:
                found |= {(module.__name__, name, key): each for key, each in vars(value).items()}
    return found


def load_parts() -> None:
    for name in PARTS:
        package = import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            import_module(module.name)


def foreign(module: ModuleType, name: str) -> bool:
    """Whether a function of another package is not that package's."""
    return getattr(module, name).__module__.split(".")[0] != module.__name__.split(".")[0]


# ------------------------------------------------------------------------------------------------------------- graphs


class Graphs:
    """A `graph._trace` that remembers. folder: where; without one it only traces.

    digest(*arguments): of all that decides a result. dump(result) and load(data, *arguments): to keep results.
    """

    folder: Path | None = None
    forgetful = False
    parts: Mapping[tuple[str, ...], object] = {}

    def __init__(
        self,
        real: Callable[..., Any],
        digest: Callable[..., str] = digest_of,
        dump: Callable[[Any], bytes] = pickle.dumps,
        load: Callable[..., Any] = lambda data, *arguments: pickle.loads(data),
    ) -> None:
        self.real, self.digest, self.dump, self.load = real, digest, dump, load

    def patched(self, but: Collection[tuple[str, ...]] = ()) -> bool:
        """Whether a test has put anything into tracing, `but` these places."""
        now = parts()
        ours = any(now.get(key) is not value for key, value in self.parts.items() if key not in but)
        loaded = [(sys.modules[module], name) for module, name in OTHERS if module in sys.modules]
        return ours or any(foreign(module, name) for module, name in loaded)

    def trace(self, *arguments: Any) -> Any:
        if self.folder is None or self.forgetful or self.patched():
            return self.real(*arguments)
        file = self.folder / self.digest(*arguments)
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                write_atomically(file, self.dump(self.real(*arguments)))
        onnx_function.register_schema()
        return self.load(file.read_bytes(), *arguments)


# ------------------------------------------------------------------------------------------------- graphs of a form

FORM: ContextVar[tuple[Any, str | None]] = ContextVar("form", default=(None, None))  # module in tracing, and its form
REAL_EXPORT = torch.onnx.export


def traced_by_form(module: Any, plan: Any) -> Any:
    """Make the hub graph as ever, of torch's export of any module of the same form."""
    before = FORM.set((module, form_of(module, plan)))
    try:
        return TRACED["hub"](module, plan)
    finally:
        FORM.reset(before)


@functools.wraps(REAL_EXPORT)
def export_by_form(model: Any, *arguments: Any, **settings: Any) -> Any:
    """`torch.onnx.export` that remembers its graphs by form."""
    module, form = FORM.get()
    if module is not model or form is None or Graphs.folder is None or GRAPHS.forgetful or GRAPHS.patched(AFTERWARDS):
        return REAL_EXPORT(model, *arguments, **settings)
    file = Graphs.folder / f"form-{form}"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            exported = REAL_EXPORT(model, *arguments, **settings)
            write_atomically(file, exported.model_proto.SerializeToString())
            return exported
    return torch.onnx.ONNXProgram(with_weights(onnx.ModelProto.FromString(file.read_bytes()), model), None)


def with_weights(proto: onnx.ModelProto, module: Any) -> onnx_ir.Model:
    """Torch's export of a module of this form, as one of `module`."""
    named = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    model = onnx_ir.from_proto(proto)
    for name, value in model.graph.initializers.items():
        if name in named:
            value.const_value = onnx_ir.tensor(named[name].detach().numpy(), name=name)
    return model


def program_digest(module: Any, folded: Any, plan: Any) -> str:
    return digest_of(folded, plan, program.trace_key)


def dump_program(made: Any) -> bytes:
    return pickle.dumps((dump_model(made.model), replace(made, model=None, float_module=None)))


def load_program(data: bytes, module: Any, *rest: Any) -> Any:
    model, made = pickle.loads(data)
    return replace(made, model=load_model(model), float_module=module)


def dump_model(model: Any) -> bytes:
    """A Core ML package as a tar file."""
    data = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, silence_libraries(), tarfile.open(fileobj=data, mode="w") as tar:
        model.save(f"{folder}/model.mlpackage")
        tar.add(folder, arcname=".")
    return data.getvalue()


def load_model(data: bytes) -> Any:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, True)
    with silence_libraries(), tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")
        return coremltools().models.MLModel(f"{folder}/model.mlpackage", skip_model_load=True)


def lower_digest(model: onnx.ModelProto, portable: bool) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True) + bytes([portable])).hexdigest()


TRACED = {"hub": graph._trace, "program": program._trace, "scan": program.scan_program, "lower": lowering.lower}
GRAPHS = Graphs(traced_by_form)
PROGRAMS = Graphs(TRACED["program"], program_digest, dump_program, load_program)
SCANS = Graphs(
    TRACED["scan"],
    lambda *arguments: hashlib.sha256(repr(arguments).encode()).hexdigest(),
    dump_model,
    lambda data, *arguments: load_model(data),
)
LOWERED = Graphs(lambda model, portable: TRACED["lower"](model, portable=portable), lower_digest)


def install() -> None:
    """Put the caches in the place of the tracers."""

    def remembering(graphs: Graphs, name: str) -> Any:
        return functools.wraps(TRACED[name])(lambda *arguments: graphs.trace(*arguments))

    load_parts()
    graph._trace = remembering(GRAPHS, "hub")
    torch.onnx.export = export_by_form
    program._trace = remembering(PROGRAMS, "program")
    program.scan_program = remembering(SCANS, "scan")
    for module in (executorch, executorch_scans, lowering):  # where it is called, and where tests import it from
        module.lower = functools.wraps(TRACED["lower"])(lambda model, *, portable: LOWERED.trace(model, portable))
    Graphs.parts = parts()


install()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{RETRACES}: traces its own hub graphs, takes none from the cache")
    if not hasattr(config, "cache"):
        return
    everything = Path(config.cache.mkdir("hub-graphs"))
    Graphs.folder = everything / sources()[:16]
    if not hasattr(config, "workerinput"):
        for old in everything.iterdir():
            if old != Graphs.folder:
                shutil.rmtree(old, ignore_errors=True)


@pytest.fixture(autouse=True)
def _graphs(request: pytest.FixtureRequest) -> Iterator[None]:
    Graphs.forgetful = request.node.get_closest_marker(RETRACES) is not None
    yield
    Graphs.forgetful = False


# ------------------------------------------------------------------------------------------------------------ bundles


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of this run that its workers share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def bundle_of(shared_folder: Path) -> Callable[..., Any]:
    """bundle_of(checkpoint, plan) -> a bundle to read and to copy, exported once for the run."""
    from evm_deploy.bundle.bundle import open_bundle
    from evm_deploy.export.pipeline import export

    def make(checkpoint: Path, plan: Any) -> Any:
        content = hashlib.sha256(f"{plan}".encode() + checkpoint.read_bytes()).hexdigest()[:16]
        folder = once(shared_folder / "bundles" / content, lambda folder: export(checkpoint, plan, folder))
        return open_bundle(next(path for path in folder.iterdir() if path.is_dir()))

    return make
