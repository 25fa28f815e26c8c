"""The C++ SDK for its tests: built once, in build/sdk-cpp; its C ABI through ctypes; its driver."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evm_deploy.errors import BundleError, EvmError, ImageError, ToolchainError, UsageError
from tests.toolchains import need

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent  # where pip put cmake and ninja
STRICT = "-Wall -Wextra -Wpedantic -Werror"
ADDRESS = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all"  # -O0: a fraction of the time to compile
THREAD = "-O0 -fsanitize=thread"
KINDS = {
    "release": ("-O2", ("BUILD_SHARED_LIBS", "EVM_OPENVINO"), ("all",)),
    "address": (ADDRESS, (), ("driver", "tensorrt")),  # without OpenVINO, whose threading library refuses sanitizers
    "thread": (THREAD, (), ("driver",)),
}
ERRORS = {2: UsageError, 3: ImageError, 4: BundleError, 5: ToolchainError}  # by evm_status


def package(name: str) -> Path:
    return Path(pytest.importorskip(name).__file__).parent


@functools.cache
def build(kind: str) -> Path:
    """The folder of a build, incremental. Skips where a tool or header is missing, fails where it does not compile."""
    if sys.platform != "linux":
        pytest.skip("the C++ SDK is tested on Linux")
    need("g++", "headers of the C++ SDK")
    flags, options, targets = KINDS[kind]
    folder = ROOT / "build" / "sdk-cpp" / kind
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_UNITY_BUILD": "OFF" if kind == "release" else "ON",  # a third of the time
        "CMAKE_UNITY_BUILD_BATCH_SIZE": "0",  # in one file: templates of JSON are compiled once
        "CMAKE_CXX_FLAGS": f"{flags} {STRICT}",
        "EVM_ONNXRUNTIME": "ON",
        "ONNXRUNTIME_ROOT": package("onnxruntime") / "capi",
        "OpenVINO_DIR": package("openvino") / "cmake",
        **{option: "ON" if option in options else "OFF" for option in ("BUILD_SHARED_LIBS", "EVM_OPENVINO")},
    }
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    with (folder.parent / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of a test run share it
        source = ROOT / "sdk" / "cpp" / "tests"
        run(
            ["cmake", "-S", source, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())],
            environment,
        )
        run(["cmake", "--build", folder, "--target", *targets], environment)
    return folder


def run(command: Sequence[object], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command[0]}: {(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


def classify(*flags: object, kind: str = "release", **environment: str) -> subprocess.CompletedProcess[str]:
    """evm-classify."""
    command = [str(build(kind) / "sample" / "evm-classify"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def driven(
    commands: Sequence[Sequence[object]], kind: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    text = "".join("\t".join(map(str, command)) + "\n" for command in commands)
    program, settings = str(build(kind) / "driver"), {**os.environ, **environment}
    return subprocess.run(
        [program], input=text, capture_output=True, text=True, errors="backslashreplace", env=settings
    )


def drive(*commands: Sequence[object], kind: str = "address", **environment: str) -> list[str]:
    """Answers of the driver, which must end well, so that a sanitizer had nothing to say."""
    done = driven(commands, kind, environment)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = done.stdout.splitlines()
    assert len(answers) == len(commands)
    return answers


def changed(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a bundle whose manifest has been changed."""
    copy = Path(shutil.copytree(bundle, folder / "changed"))
    content = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    change(content)
    (copy / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return copy


class View(ctypes.Structure):
    _fields_ = [
        ("rgb", ctypes.c_void_p),
        ("width", ctypes.c_int),
        ("height", ctypes.c_int),
        ("stride", ctypes.c_ssize_t),
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("threads", ctypes.c_int),
        ("streams", ctypes.c_int),
        *((name, ctypes.c_char_p) for name in ("scan", "plugin", "device", "cache", "require_signature")),
    ]


class Prediction(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int), ("score", ctypes.c_double)]


class Detection(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int), ("score", ctypes.c_double), ("box", ctypes.c_double * 4)]


class Check(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 120), ("error", ctypes.c_double), ("limit", ctypes.c_double)]


Output = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.c_size_t,
    ctypes.c_void_p,
)


class Model:
    """A bundle through the C ABI. Errors are raised as Python's."""

    def __init__(self, bundle: Path | str, **options: object) -> None:
        self.library = ctypes.CDLL(str(build("release") / "sample" / "sdk" / "libevm.so"))
        self.library.evm_manifest.restype = self.library.evm_label.restype = ctypes.c_char_p
        self.handle = ctypes.c_void_p()
        encoded = {key: str(v).encode() if isinstance(v, (str, Path)) else v for key, v in options.items()}
        settings = Options(ctypes.sizeof(Options), **encoded)
        self._call("evm_open", str(bundle).encode(), ctypes.byref(settings), ctypes.byref(self.handle))

    def _call(self, function: str, *arguments: object) -> None:
        text = ctypes.c_void_p()
        status = getattr(self.library, function)(*arguments, ctypes.byref(text))
        if status:
            said = ctypes.string_at(text.value).decode()
            self.library.evm_free(text)
            kind: type[EvmError] = ERRORS[status]
            raise kind(*said.split("\n  ", 1))

    def classify(self, images: Sequence[np.ndarray], top: int = 5) -> list[list[tuple[int, float]]]:
        views = (View * len(images))(*(View(a.ctypes.data, a.shape[1], a.shape[0], a.strides[0]) for a in images))
        best = (Prediction * (len(images) * top))()
        self._call("evm_classify", self.handle, views, ctypes.c_size_t(len(images)), top, best)
        rows = [best[i * top : (i + 1) * top] for i in range(len(images))]
        return [[(p.index, p.score) for p in row if p.index >= 0] for row in rows]

    def detect(self, image: np.ndarray) -> list[Detection]:
        found, count = (Detection * 1000)(), ctypes.c_size_t()
        view = View(image.ctypes.data, image.shape[1], image.shape[0], image.strides[0])
        self._call("evm_detect", self.handle, ctypes.byref(view), found, ctypes.c_size_t(1000), ctypes.byref(count))
        return found[: count.value]

    def segment(self, image: np.ndarray) -> np.ndarray:
        classes = np.empty(image.shape[:2], np.int32)
        view = View(image.ctypes.data, image.shape[1], image.shape[0], image.strides[0])
        self._call("evm_segment", self.handle, ctypes.byref(view), ctypes.c_void_p(classes.ctypes.data))
        return classes

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        height, width = ctypes.c_int(), ctypes.c_int()
        self.library.evm_input_size(self.handle, ctypes.byref(height), ctypes.byref(width))
        pixels = np.empty((height.value, width.value, self.library.evm_input_channels(self.handle)), np.uint8)
        view = View(image.ctypes.data, image.shape[1], image.shape[0], image.strides[0])
        self._call("evm_preprocess", self.handle, ctypes.byref(view), ctypes.c_void_p(pixels.ctypes.data))
        return pixels

    def run(self, value: np.ndarray) -> dict[str, np.ndarray]:
        found = {}

        def take(_, name, dtype, shape, rank, data):
            sizes = tuple(shape[i] for i in range(rank))
            count = int(np.prod(sizes)) * np.dtype(dtype.decode()).itemsize
            found[name.decode()] = np.frombuffer(ctypes.string_at(data, count), dtype.decode()).reshape(sizes)

        batch = ctypes.c_int64(len(value))
        self._call("evm_run", self.handle, ctypes.c_void_p(value.ctypes.data), batch, Output(take), None)
        return found

    def selftest(self) -> dict[str, tuple[float, float]]:
        checks, count = (Check * 200)(), ctypes.c_size_t()
        self._call("evm_selftest", self.handle, checks, ctypes.c_size_t(200), ctypes.byref(count))
        return {check.name.decode(): (check.error, check.limit) for check in checks[: count.value]}

    def label(self, index: int) -> str | None:
        found = self.library.evm_label(self.handle, index)
        return found.decode() if found else None

    def close(self) -> None:
        self.library.evm_close(self.handle)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
