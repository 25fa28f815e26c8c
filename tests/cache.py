"""Hub graphs and bundles are made once for a run of the tests and shared by its workers, each under a lock.

A graph is kept in `.pytest_cache`, where `make quick` finds those of the last run, by everything that decides it: the
module with its weights, what the plan says of the graph, our sources, the versions of the tracers. While
anything that takes part in tracing is patched, and in tests marked `retraces`, it is traced as ever.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import pickle
import pkgutil
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from inspect import isclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import evm_deploy
from evm_deploy._util.files import write_atomically
from evm_deploy.export.hub import graph
from evm_deploy.scan import onnx_function

ROOT = Path(__file__).parents[1]
TRACERS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxsim", "numpy")
PARTS = ("evm_deploy.export.hub", "evm_deploy.scan", "evm_deploy.model")  # of us, what takes part in tracing
OTHERS = (  # and of others, what a test may put something else in the place of
    ("torch.nn.utils.fusion", "fuse_conv_bn_eval"),
    ("torch.onnx", "export"),
    ("onnxsim", "simplify"),
    ("onnx.checker", "check_model"),
)
RETRACES = "retraces"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, after one process has filled it with `make(folder)`."""
    done = folder.with_name(f"{folder.name}.done")
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            done.touch()
    return folder


# --------------------------------------------------------------------------------------------------- what decides it


def sources() -> str:
    """Digest of our Python and of the versions of what traces."""
    root = Path(evm_deploy.__file__).parent
    digest = hashlib.sha256(f"{sys.version}\n".encode())
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    for name in TRACERS:
        digest.update(f"{name} {metadata.version(name)}\n".encode())
    return digest.hexdigest()


def digest_of(module: Any, plan: Any) -> str:
    """Digest of the module (classes, settings, weights and buffers by path) and of the plan's part."""
    digest = hashlib.sha256(repr(module).encode())
    for name in sorted({type(each).__module__ for each in module.modules()}):
        if not name.startswith("torch."):  # a network that is not of ours
            digest.update(Path(sys.modules[name].__file__ or "").read_bytes())
    first: dict[int, str] = {}  # what is in several places is another network than equal ones there
    for path, each in module.named_modules(remove_duplicate=False):
        plain = (bool, int, float, str, tuple, type(None))
        settings = sorted((key, value) for key, value in vars(each).items() if isinstance(value, plain))
        known = first.setdefault(id(each), path)
        digest.update(f"{path} {known} {type(each).__module__}.{type(each).__qualname__} {settings}\n".encode())
        for name, tensor in [*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)]:
            known = first.setdefault(id(tensor), f"{path}.{name}")
            digest.update(f"{known} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}\n".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    digest.update(repr(graph.trace_key(plan)).encode())
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


@functools.cache
def parse_torchlib_once() -> None:
    """Keep onnxscript's table of functions: for each trace torch parses the sources of all 557, 0.5 CPU seconds."""
    apis = import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
    apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


class Graphs:
    """A `graph._trace` that remembers. folder: where; without one it only traces."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real = real
        self.folder: Path | None = None
        self.forgetful = False
        self.parts: dict[tuple[str, ...], object] = {}

    def patched(self) -> bool:
        """Whether a test has put anything into tracing."""
        now = parts()
        ours = any(now.get(key) is not value for key, value in self.parts.items())
        loaded = [(sys.modules[module], name) for module, name in OTHERS if module in sys.modules]
        return ours or any(foreign(module, name) for module, name in loaded)

    def trace(self, module: Any, plan: Any) -> Any:
        if self.folder is None or self.forgetful or self.patched():
            return self.real(module, plan)
        file = self.folder / digest_of(module, plan)
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                write_atomically(file, pickle.dumps(self.real(module, plan)))
        onnx_function.register_schema()
        return pickle.loads(file.read_bytes())


def installed() -> Graphs:
    """Put the cache in the place of `graph._trace`."""
    load_parts()
    traced_anew = graph._trace

    def real(module: Any, plan: Any) -> Any:
        parse_torchlib_once()
        return traced_anew(module, plan)

    graphs = Graphs(real)

    @functools.wraps(traced_anew)
    def trace(module: Any, plan: Any) -> Any:
        return graphs.trace(module, plan)

    graph._trace = trace
    graphs.parts = parts()
    return graphs


GRAPHS = installed()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{RETRACES}: traces its own hub graphs, takes none from the cache")
    if not hasattr(config, "cache"):
        return
    everything = Path(config.cache.mkdir("hub-graphs"))
    GRAPHS.folder = everything / sources()[:16]
    if not hasattr(config, "workerinput"):
        for old in everything.iterdir():
            if old != GRAPHS.folder:
                shutil.rmtree(old, ignore_errors=True)


@pytest.fixture(autouse=True)
def _graphs(request: pytest.FixtureRequest) -> Iterator[None]:
    GRAPHS.forgetful = request.node.get_closest_marker(RETRACES) is not None
    yield
    GRAPHS.forgetful = False


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
