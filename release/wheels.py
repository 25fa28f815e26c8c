"""Write the wheels of a release, each with the native library of its platform: python -m release.wheels [FOLDER]

ziglang compiles the libraries, so that one machine makes all wheels, whatever its own platform is.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from evm_deploy.toolchain import cross_compile
from evm_deploy.toolchain.platforms import PLATFORMS

PROJECT = Path(__file__).parents[1]
TAGS = {
    "linux-x86_64": "manylinux_2_17_x86_64",
    "linux-aarch64": "manylinux_2_17_aarch64",
    "macos-arm64": "macosx_14_0_arm64",
    "windows-x86_64": "win_amd64",
}
EPOCH = (1980, 1, 1, 0, 0, 0)  # equal sources give equal wheels


def bare_wheel(folder: Path) -> Path:
    """Build the wheel without a native library: CMake finds no compiler of this name and installs the sources alone."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(PROJECT)]
    subprocess.run(command, env={**os.environ, "CXX": "no-compiler"}, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def write_wheel(bare: Path, platform: str, out: Path) -> Path:
    """Write the wheel for `platform` to the folder `out`: the files of `bare`, the native library, and their hashes."""
    with zipfile.ZipFile(bare) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    if any(name.startswith("evm_deploy/lib/") for name in files):
        raise SystemExit(f"{bare.name} has a native library of this machine")
    suffix = ".dll" if PLATFORMS[platform].suffix == ".dll" else ".so"  # as in evm_deploy/toolchain/plugins.py
    library = cross_compile.library("onnxruntime", platform)
    files[f"evm_deploy/lib/evm_onnxruntime{suffix}"] = library.read_bytes()
    (about,) = (name for name in files if name.endswith(".dist-info/WHEEL"))
    lines = [line for line in files[about].decode().splitlines() if line and not line.startswith("Tag: ")]
    files[about] = "\n".join([*lines, f"Tag: py3-none-{TAGS[platform]}", ""]).encode()
    record = about.replace("/WHEEL", "/RECORD")
    del files[record]
    files[record] = "".join(f"{name},{_hash(content)},{len(content)}\n" for name, content in files.items()).encode()
    files[record] += f"{record},,\n".encode()
    path = out / f"{'-'.join(bare.name.split('-')[:2])}-py3-none-{TAGS[platform]}.whl"
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(entry, content)
    return path


def _hash(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_wheel(Path(folder))
        for platform in TAGS:
            path = write_wheel(bare, platform, out)
            print(f"{path.stat().st_size:>9} bytes  {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist/wheels"))
