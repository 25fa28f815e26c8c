"""Compile native libraries for the platforms of `--platform` with the `ziglang` package, and cache them."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from evm_deploy._util.files import cache_folder
from evm_deploy._util.packages import install_hint
from evm_deploy.errors import ToolchainError
from evm_deploy.toolchain.compile import Compiler, Recipe, compiled_once, read_recipe
from evm_deploy.toolchain.platforms import PLATFORMS, CLibrary, Platform

# -s: strip all symbols except exported ones. -nostdlib++: the library must not depend on the C++ runtime.
# -fno-sanitize: or ziglang first compiles the runtime of a sanitizer, which nothing calls.
LINK = ("-s", "-nostdlib++", "-fno-sanitize=undefined")
# A stand-in for a C library has no code: only its name and the names of its functions are read.
STAND_IN = ("-x", "c", "-shared", "-nostdlib", "-fno-builtin", "-w", "-Wl,--no-entry", "-Wl,-soname,{name}")


def zig_version() -> str:
    """Return the version of the installed ziglang. Raises ToolchainError if ziglang is not installed."""
    if find_spec("ziglang") is None:
        raise ToolchainError(
            "ziglang is not installed; --platform compiles the native library with it",
            install_hint("cross"),
        )
    return metadata.version("ziglang")


def library(runtime: str, platform: str) -> Path:
    """Return the native library of `runtime` (`onnxruntime`) for a platform.

    The first call compiles the library, which takes 1 to 2 minutes; later calls find it in the cache. The cache key
    covers sources, flags and ziglang version. Raises ToolchainError.
    """

    def compile_(work: Path) -> Path:
        return _compile(runtime, PLATFORMS[platform], read_recipe(), work, path.name)

    path = cached_path(runtime, platform)
    return compiled_once(path, compile_)


def cached_path(runtime: str, platform: str) -> Path:
    """Return the cache path of the library of `runtime` for a platform. The file may not exist yet."""
    known = PLATFORMS[platform]
    return cache_folder() / "plugins" / _key() / platform / f"{known.prefix}evm_{runtime}{known.suffix}"


def zig_compiler(target: str, architecture: str, cache: Path) -> Compiler:
    """Return the compiler for one zig target, which caches in the folder `cache`.

    Use a new `cache` folder per build: ziglang 0.17.1 links cached objects that were changed in the folder.
    """
    zig_version()
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    command = (sys.executable, "-m", "ziglang", "c++", "-target", target)
    return Compiler(command, architecture, environment, {"fp16": "fullfp16"})


def _compile(runtime: str, platform: Platform, recipe: Recipe, work: Path, name: str) -> Path:
    compiler = zig_compiler(platform.zig, platform.architecture, work / "zig")
    compiler = replace(compiler, command=(*compiler.command, *platform.flags))
    sources = [*recipe.words[platform.adapter or f"{runtime}_sources"]]
    sources += recipe.words[platform.sources] if platform.sources else ()
    link = [*LINK, *(flag.format(name=name) for flag in platform.link)]
    objects: list[str | Path] = [*compiler.objects(recipe, sources, work)]
    if platform.c_library:
        objects += ["-nostdlib", _stand_in(compiler, platform.c_library, work)]
    compiler.run(*link, *objects, "-o", work / name)
    return work / name


def _stand_in(compiler: Compiler, library: CLibrary, work: Path) -> Path:
    """Link a shared library with the name and the functions of a platform's C library, to link against."""
    source, path = work / "c_library.c", work / "stand_in" / library.file
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in library.functions))
    path.parent.mkdir()
    compiler.run(*(flag.format(name=library.file) for flag in STAND_IN), source, "-o", path)
    return path


def _key() -> str:
    """Return the cache key of a library: everything that changes its bytes, except the platform."""
    return read_recipe().digest(f"{zig_version()} {LINK} {STAND_IN} {sorted(PLATFORMS.items())}")
