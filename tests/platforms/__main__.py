"""Set up Python of other platforms and Swift, or print what was executed for them as a table.

python -m tests.platforms setup NAME..     linux-aarch64, windows-x86_64, swift
python -m tests.platforms table            runs the tests of each row; the rows of docs/platforms.md
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from tests.platforms.roots import PROJECT, ROOTS, WINE

HEAD = "| platform | executed | how | result |\n|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """Row of the table. tests: the file and the expression of `pytest -k` that choose the tests behind it."""

    platform: str
    executed: str
    how: str
    tests: tuple[str, str]


ROWS = (
    Row(
        "linux-x86_64",
        "native kernels of each instruction set that this CPU has, on golden and random scans and blocks",
        "real",
        ("tests/test_cross.py", "linux-x86_64 and (golden or random or exact)"),
    ),
    Row(
        "linux-x86_64 with musl (Alpine)",
        "the library for glibc, on golden scans",
        "real, musl's own loader",
        ("tests/test_cross.py", "musl"),
    ),
    Row(
        "linux-aarch64",
        "NEON kernels, on golden and random scans and blocks",
        "emulated, {qemu}",
        ("tests/test_cross.py", "linux-aarch64 and (golden or random or exact)"),
    ),
    Row(
        "linux-aarch64",
        "self-test in {onnxruntime-aarch64}: native (Cortex-A53), portable (A72)",
        "emulated, {qemu}",
        ("tests/test_platforms.py", "onnx_runtime_for_aarch64"),
    ),
    Row(
        "linux-aarch64",
        "self-test in {openvino-aarch64}: portable (Cortex-A76), and the extension, compiled by g++ (A72)",
        "emulated, {qemu}",
        ("tests/test_platforms.py", "openvino and aarch64"),
    ),
    Row(
        "containers (x86-64)",
        "steps of the Dockerfiles for ONNX Runtime and OpenVINO, without Docker: self-test and a prediction",
        "real, on a copy of this system",
        ("tests/test_docker.py", "steps"),
    ),
    Row(
        "windows-x86_64",
        "self-test in {onnxruntime-windows} with Python: native and portable, from a folder and a zip",
        "{wine}",
        ("tests/test_platforms.py", "onnx_runtime_for_windows"),
    ),
    Row(
        "windows-x86_64",
        "classes with the C++ SDK, likewise, under a path outside the ANSI code page",
        "{wine}",
        ("tests/test_platforms.py", "cpp_sdk_for_windows"),
    ),
    Row(
        "the Swift package",
        "library, command and tests, with outputs of the MIL runtime; Core ML and ImageIO compiled against stand-ins",
        "real, {swift} on Linux",
        ("tests/test_ios.py", "swift_"),
    ),
    Row(
        "macos-arm64",
        "the library's code in {onnxruntime-aarch64} for Linux: self-test",
        "emulated, {qemu}, loader of the tests ({lief})",
        ("tests/test_platforms.py", "code_for_macos"),
    ),
    Row(
        "macos-arm64",
        "format, exports, oldest macOS and every page of the signature",
        "file",
        ("tests/test_cross.py", "macos"),
    ),
    Row(
        "browser-wasm32",
        "kernels as WebAssembly SIMD, on golden and random scans and blocks",
        "real, Node",
        ("tests/test_cross.py", "browser-wasm32 and (golden or random or exact)"),
    ),
    Row(
        "browser-wasm32",
        "self-tests and predictions of the web SDK on the library",
        "real, headless Chromium",
        ("tests/test_web_native.py", "native"),
    ),
    Row(
        "android-aarch64, android-x86_64",
        "nothing; everything that Android's loader refuses is checked with readelf",
        "file",
        ("tests/test_cross.py", "android and (loader or each_library)"),
    ),
)


def versions() -> dict[str, str]:
    """Return the versions of emulators and runtimes; `none` for those that are not here."""

    def first(pattern: str, *command: str) -> str:
        try:
            text = subprocess.run(command, capture_output=True, text=True).stdout
        except OSError:
            return "none"
        found = re.search(pattern, text)
        return found[1] if found else "none"

    def wheel(root: str, name: str) -> str:
        found = next((ROOTS[root].folder / "site").glob(f"{name}-*.dist-info"), None)
        return found.name.removesuffix(".dist-info").partition("-")[2] if found else "none"

    swift = ROOTS["swift"]
    compiler = swift.run("swiftc", "--version").stdout if swift.ready else ""
    return {
        "swift": " ".join(re.findall(r"Swift version [0-9.]+", compiler)).replace("version ", "") or "no Swift",
        "qemu": f"qemu {first(r'version ([0-9.]+)', 'qemu-aarch64', '--version')}",
        "wine": f"wine {first(r'wine-([0-9.]+)', f'{WINE}/wine64', '--version')}",
        "onnxruntime-aarch64": f"ONNX Runtime {wheel('linux-aarch64', 'onnxruntime')}",
        "lief": f"LIEF {metadata.version('lief') if find_spec('lief') else 'none'}",
        "openvino-aarch64": f"OpenVINO {wheel('linux-aarch64', 'openvino')}",
        "onnxruntime-windows": f"ONNX Runtime {wheel('windows-x86_64', 'onnxruntime')}",
    }


def result(row: Row) -> str:
    """Run the tests of a row. Returns `passed`, or what is missing or failed."""
    file, expression = row.tests
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:randomly", file, "-k", expression]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    missing = re.search(r"SKIPPED .*: (.* is missing)", done.stdout)
    if missing:
        return f"not run: {missing[1]}"
    return "passed" if done.returncode == 0 else f"FAILED: pytest {file} -k '{expression}'"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["setup"]:
        for name in arguments[1:] or ROOTS:
            ROOTS[name].setup()
        return 0
    if arguments != ["table"]:
        print(__doc__, file=sys.stderr)
        return 2
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(HEAD)
    rows = [(row, result(row)) for row in ROWS]
    known = versions()
    for row, found in rows:
        print(f"| {row.platform} | {row.executed.format(**known)} | {row.how.format(**known)} | {found} |")
    print(f"\n{datetime.date.today()}, {cpu[1] if cpu else 'unknown CPU'}, ziglang {metadata.version('ziglang')}")
    return int(any(found.startswith("FAILED") for _, found in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
