"""The library for macOS as one for Linux on arm64: the same code, placed, relocated and bound by a loader (macos.c)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evm_deploy.toolchain.cross_compile import zig_compiler

LOADER = Path(__file__).with_name("macos.c")
PAGE = 0x4000
NOT_EXPORTED = ("_mh_dylib_header", "__dso_handle")  # by mistake of zig's linker: they are no functions


def for_linux(dylib: Path, work: Path) -> Path:
    """Return a shared library for linux-aarch64 with the code of a dylib, written to the folder `work`.

    Raises AssertionError if the dylib has anything that the loader does not know.
    """
    import lief

    lief.logging.disable()
    binary = lief.MachO.parse(str(dylib)).at(0)
    exported = {each.name.removeprefix("_"): each.value for each in binary.exported_symbols}
    exported = {name: value for name, value in exported.items() if name not in NOT_EXPORTED}
    (work / "image").write_bytes(_image(binary))
    (work / "macho.h").write_text(_header(binary, exported, work / "image"))
    compiler = zig_compiler("aarch64-linux-gnu.2.17", "aarch64", work / "zig")
    flags = ("-x", "c", "-shared", "-fPIC", "-O2", "-nostdlib++")  # or zig compiles its C++ library first
    compiler.run(*flags, f"-I{work}", LOADER, "-o", work / "evm_onnxruntime.so")
    return work / "evm_onnxruntime.so"


def _segments(binary: Any) -> list[Any]:
    return [each for each in binary.segments if each.name != "__LINKEDIT"]


def _image(binary: Any) -> bytearray:
    """Return the memory of a dylib that is placed at address 0, before it is relocated and bound."""
    end = max(each.virtual_address + each.virtual_size for each in _segments(binary))
    image = bytearray(-(-end // PAGE) * PAGE)
    for each in _segments(binary):
        assert each.virtual_address % PAGE == 0, each.name
        image[each.virtual_address : each.virtual_address + each.file_size] = bytes(each.content)[: each.file_size]
    return image


def _header(binary: Any, exported: dict[str, int], image: Path) -> str:
    """Return macho.h. C names the functions of the system, so that an unknown one is an error of the compiler."""
    text = next(each for each in _segments(binary) if each.name == "__TEXT")
    (starts,) = (each for each in binary.sections if each.name == "__mod_init_func")
    assert binary.has_dyld_info and not binary.has_dyld_chained_fixups and text.virtual_address == 0
    bound = [(each.address, each.symbol.name) for each in binary.bindings]
    binds = [(at, f"(void *){name[1:]}") for at, name in bound if name != "dyld_stub_binder"]  # nothing is bound lazily
    words = {
        "SIZE": image.stat().st_size,
        "TEXT": -(-text.virtual_size // PAGE) * PAGE,
        "IMAGE": f'"{image}"',
        "REBASES": ", ".join(f"{each.address:#x}" for each in binary.relocations),
        "BINDS": ", ".join(f"{{{at:#x}, {to}}}" for at, to in binds),
        "STARTS": ", ".join(f"{starts.virtual_address + at:#x}" for at in range(0, starts.size, 8)),
        "EXPORTS(DO)": " ".join(f"DO({name}, {address:#x})" for name, address in exported.items()),
    }
    return "".join(f"#define {name} {value}\n" for name, value in words.items())
