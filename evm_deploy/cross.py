"""Native libraries for the platforms of `--device`, compiled with the `ziglang` package and cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from evm_deploy.compile import Compiler, Recipe, read_recipe
from evm_deploy.errors import ToolchainError
from evm_deploy.files import cache_folder, sha256
from evm_deploy.platforms import PLATFORMS, Platform

# -s: no symbols but the exported ones. -nostdlib++: the C++ runtime is not needed, and must not be.
LINK = ("-shared", "-s", "-nostdlib++")
# The same bytes everywhere: no time of compilation in a DLL, no folder of compilation as the name of a dylib.
REPRODUCIBLE = {".so": (), ".dll": ("-Wl,-Brepro",), ".dylib": ("-Wl,-install_name,@rpath/{name}",)}


def zig_version() -> str:
    """Version of the installed ziglang. Raises ToolchainError where there is none."""
    if find_spec("ziglang") is None:
        raise ToolchainError(
            "--device compiles the native library with the package ziglang, which is not installed",
            "pip install 'evm-deploy[cross]'",
        )
    return metadata.version("ziglang")


def library(runtime: str, platform: str) -> Path:
    """The library of `runtime` (`onnxruntime`) for a platform, from the cache, else compiled into it: 1-2 minutes once.

    Cached by sources, flags and ziglang version; a damaged file is compiled again. Raises ToolchainError.
    """
    path = cached_path(runtime, platform)
    if intact(path):
        return path
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=f".{platform}.") as work:
            built = _compile(runtime, PLATFORMS[platform], read_recipe(), Path(work), path.name)
            done = Path(work) / platform
            done.mkdir()
            built = built.rename(done / path.name)
            _checksum(built).write_text(sha256(built), encoding="ascii")
            shutil.rmtree(path.parent, ignore_errors=True)
            try:
                done.rename(path.parent)
            except OSError:
                if not intact(path):  # not even by another process that was faster
                    raise
    except OSError as error:
        where = error.filename or path.parent.parent
        raise ToolchainError(
            f"cannot write the compiled library: {where}: {error.strerror}",
            "set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return path


def cached_path(runtime: str, platform: str) -> Path:
    """Where the library of `runtime` for a platform is, once compiled from the sources that are here."""
    known = PLATFORMS[platform]
    return cache_folder() / "plugins" / _key(read_recipe()) / platform / f"evm_{runtime}{known.suffix}"


def intact(library: Path) -> bool:
    """Whether a cached library is there, whole."""
    try:
        return _checksum(library).read_text(encoding="ascii") == sha256(library)
    except (OSError, UnicodeDecodeError):
        return False


def zig_compiler(target: str, architecture: str) -> Compiler:
    """ziglang for one of its targets, with its own cache inside ours."""
    zig_version()
    cache = str(cache_folder() / "zig")
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    command = (sys.executable, "-m", "ziglang", "c++", "-target", target)
    return Compiler(command, architecture, environment)


def _compile(runtime: str, platform: Platform, recipe: Recipe, work: Path, name: str) -> Path:
    compiler = zig_compiler(platform.zig, platform.architecture)
    sources = [*recipe.words["scan_sources"], *recipe.words[f"{runtime}_sources"]]
    link = [*LINK, *(flag.format(name=name) for flag in REPRODUCIBLE[platform.suffix])]
    compiler.run(*link, *compiler.objects(recipe, sources, work), "-o", work / name)
    return work / name


def _key(recipe: Recipe) -> str:
    """Everything that decides the bytes of a library, but for the platform."""
    digest = hashlib.sha256(f"{zig_version()} {LINK} {REPRODUCIBLE} {sorted(PLATFORMS.items())}".encode())
    for path in recipe.files():
        digest.update(f"\0{path.relative_to(recipe.folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _checksum(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")
