"""Toolchains that the tests need beside Python: one table for their skips and for the last line of a run.

In CI (CI=true) a run fails where one that CI can have is missing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from evm_deploy._util.packages import install_hint
from tests.platforms.roots import IS_ROOT, ROOTS

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
AARCH64 = Path("/usr/aarch64-linux-gnu")  # a C library of that platform
AARCH64_GXX = "aarch64-linux-gnu-g++"
MUSL = Path("/lib/ld-musl-x86_64.so.1")  # its loader
MINGW = Path("/usr/x86_64-w64-mingw32")
SDK_HEADERS = {
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "stb/stb_image.h": "libstb-dev",
    "png.h": "libpng-dev",
    "zlib.h": "zlib1g-dev",
    "jpeglib.h": "libjpeg62-turbo-dev",
    "openssl/evp.h": "libssl-dev",
}
#: As in Makefile.
MAMBAS = ("opensr-mamba==0.0.1", "mambapy==1.2.0", "bidirectional-mamba==0.2.0", "timm==1.0.31", "einops==0.8.2")
COCO = "pycocotools==2.0.11"
TRITON = "tritonclient==2.73.0"
NVIDIA_HEADERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu")


def programs(*names: str) -> bool:
    return all(shutil.which(name) for name in names)


def tensorrt_headers() -> str | None:
    """The folder of TensorRT's headers: $TENSORRT_INCLUDE, or where its packages put them."""
    folders = (os.environ.get("TENSORRT_INCLUDE", ""), *NVIDIA_HEADERS)
    return next((folder for folder in folders if folder and Path(folder, "NvInferRuntime.h").is_file()), None)


@dataclass(frozen=True)
class Toolchain:
    """here: whether this machine has it. hint: how to get it. in_ci: whether .ci/run does."""

    here: Callable[[], bool]
    hint: str
    in_ci: bool = True


TOOLCHAINS = {
    "g++": Toolchain(partial(programs, "g++"), "apt-get install g++"),
    "cmake": Toolchain(partial(programs, "cmake", "c++"), "apt-get install cmake g++"),
    "headers of the C++ SDK": Toolchain(
        lambda: all(Path("/usr/include", header).exists() for header in SDK_HEADERS),
        f"apt-get install {' '.join(SDK_HEADERS.values())}",
    ),
    "valgrind": Toolchain(partial(programs, "valgrind"), "apt-get install valgrind"),
    "qemu": Toolchain(
        lambda: programs("qemu-aarch64") and AARCH64.is_dir(), "apt-get install qemu-user libc6-arm64-cross"
    ),
    "g++ for aarch64": Toolchain(
        partial(programs, AARCH64_GXX, "cmake"), "apt-get install g++-aarch64-linux-gnu cmake"
    ),
    "musl": Toolchain(MUSL.exists, "apt-get install musl"),
    "root of linux-aarch64": Toolchain(
        lambda: ROOTS["linux-aarch64"].ready, "python -m tests.platforms setup linux-aarch64 (Debian 12, qemu-user)"
    ),
    # not in CI: wine and its prefix weigh 1.4 GB
    "root of windows-x86_64": Toolchain(
        lambda: ROOTS["windows-x86_64"].ready, "python -m tests.platforms setup windows-x86_64 (wine64)", in_ci=False
    ),
    "zlib for MinGW": Toolchain(
        lambda: (MINGW / "lib" / "libz.a").is_file(), "apt-get install libz-mingw-w64-dev", in_ci=False
    ),
    # not in CI: 2.4 GB, and a mount that not every machine allows; .ci/run sets it up where it can
    "swift": Toolchain(
        lambda: ROOTS["swift"].ready, "python -m tests.platforms setup swift (Debian 12, as root)", in_ci=False
    ),
    # not in CI: not every machine lets root mount
    "root and Debian 12": Toolchain(
        lambda: IS_ROOT and "bookworm" in Path("/etc/os-release").read_text(),
        "run the tests as root on Debian 12",
        in_ci=False,
    ),
    "openssl": Toolchain(partial(programs, "openssl"), "apt-get install openssl"),
    "sshd": Toolchain(lambda: bool(SSHD) and programs("ssh"), "apt-get install openssh-server openssh-client"),
    "java": Toolchain(partial(programs, "java"), "apt-get install openjdk-17-jre-headless"),
    "kotlin": Toolchain(partial(programs, "java"), "a wheel of PyPI, downloaded once"),
    "chromium": Toolchain(lambda: bool(CHROMIUM), "apt-get install chromium"),
    "node": Toolchain(partial(programs, "node", "npm"), "install nodejs 20 or newer and npm"),
    "coremltools": Toolchain(lambda: bool(find_spec("coremltools")), install_hint("coreml")),
    "TensorRT-RTX": Toolchain(lambda: bool(find_spec("tensorrt_rtx_bindings")), install_hint("trt-rtx")),
    "TensorRT's Python": Toolchain(lambda: bool(find_spec("tensorrt_bindings")), install_hint("dev")),
    "Mambas of PyPI": Toolchain(
        lambda: all(map(find_spec, ("opensr_mamba", "mambapy", "bidirectional_mamba", "timm", "einops"))),
        f"pip install --no-deps {' '.join(MAMBAS)}",
    ),
    "pycocotools": Toolchain(lambda: bool(find_spec("pycocotools")), f"pip install --no-deps {COCO}"),
    "Triton's schema": Toolchain(lambda: bool(find_spec("tritonclient")), f"pip install --no-deps {TRITON}"),
    "OpenCV": Toolchain(lambda: bool(find_spec("cv2")), install_hint("video")),
    "LIEF": Toolchain(lambda: bool(find_spec("lief")), install_hint("dev")),
    "OpenVINO in ONNX Runtime": Toolchain(
        lambda: bool(find_spec("onnxruntime_ep_openvino")), "pip install onnxruntime-ep-openvino", in_ci=False
    ),
    # not in CI: 245 MB, under Qualcomm's licence
    "QNN in ONNX Runtime": Toolchain(
        lambda: bool(find_spec("onnxruntime_qnn")), "pip install onnxruntime-qnn", in_ci=False
    ),
    "LiteRT": Toolchain(lambda: bool(find_spec("ai_edge_litert")), install_hint("litert")),
    "ExecuTorch": Toolchain(
        lambda: bool(find_spec("executorch")) and programs("c++"), f"{install_hint('executorch')}, and a C++ compiler"
    ),
    "MNN": Toolchain(lambda: bool(find_spec("MNN")), "pip install --no-deps MNN", in_ci=False),
    "IREE": Toolchain(
        lambda: bool(find_spec("iree")), "pip install --no-deps iree-base-compiler iree-base-runtime", in_ci=False
    ),
    "ray": Toolchain(lambda: bool(find_spec("ray")), install_hint("ray")),
    "optuna": Toolchain(lambda: bool(find_spec("optuna")), install_hint("tune")),
    # not in CI: the toolkit weighs gigabytes, the headers are behind a licence
    "nvcc": Toolchain(partial(programs, "nvcc"), "the CUDA toolkit, or pip install nvidia-cuda-nvcc", in_ci=False),
    "TensorRT's headers": Toolchain(lambda: tensorrt_headers() is not None, "set TENSORRT_INCLUDE", in_ci=False),
}
#: Target -> what its tests need that not every environment has.
OF_TARGETS = {"qnn": "QNN in ONNX Runtime", "litert": "LiteRT", "executorch": "ExecuTorch"}
MISSING = "is missing"

_used: set[str] = set()


def need(*names: str, module: bool = False) -> None:
    """Skip the test, or the `module`, where one of these is missing."""
    for name in names:
        if not TOOLCHAINS[name].here():
            pytest.skip(f"{name} {MISSING}: {TOOLCHAINS[name].hint}", allow_module_level=module)
        _used.add(name)


def need_target(name: str) -> None:
    """Skip the test where a target's packages are missing that no environment of ours has by default."""
    if name in OF_TARGETS:
        need(OF_TARGETS[name])


def without(name: str, why: str) -> None:
    """Skip: what the table takes for there does not work."""
    _used.discard(name)
    pytest.skip(f"{name} {MISSING}: {why}")


# --------------------------------------------------------------------------------------------------- what a run had


def lacking(reports: list[pytest.TestReport]) -> Counter[str]:
    """How many tests each missing toolchain made skip."""
    pattern = re.compile(rf"Skipped: ({'|'.join(map(re.escape, TOOLCHAINS))}) {MISSING}")
    reasons = [report.longrepr[2] for report in reports if isinstance(report.longrepr, tuple)]
    return Counter(found[1] for reason in reasons if (found := pattern.match(reason)))


def summary(used: set[str], skipped: Counter[str]) -> str:
    """A line: how many toolchains ran, which are missing, and how many were not asked for."""
    ran = [name for name in TOOLCHAINS if name in used and name not in skipped]
    line = f"toolchains: ran {len(ran)} of {len(TOOLCHAINS)}"
    if skipped:
        line += "; missing: " + ", ".join(f"{name} ({count} skipped)" for name, count in sorted(skipped.items()))
    others = len(TOOLCHAINS) - len(ran) - len(skipped)
    return line + (f"; {others} not asked for" if others else "")


def wanted_in_ci(skipped: Counter[str]) -> list[str]:
    """Missing ones that .ci/run installs, in CI."""
    return sorted(name for name in skipped if TOOLCHAINS[name].in_ci) if os.environ.get("CI") == "true" else []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _used.update(getattr(node, "workeroutput", {}).get("toolchains", ()))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        session.config.workeroutput["toolchains"] = sorted(_used)
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and wanted_in_ci(lacking(reporter.stats.get("skipped", []))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.option.collectonly:
        return
    skipped = lacking(terminalreporter.stats.get("skipped", []))
    terminalreporter.write_line(summary(_used, skipped))
    for name in wanted_in_ci(skipped):
        hint = TOOLCHAINS[name].hint
        terminalreporter.write_line(f"FAILED: CI runs with {name}, which {MISSING} here: {hint}", red=True)
