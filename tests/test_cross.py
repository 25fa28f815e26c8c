"""`--platform`: libraries for other platforms, what they compute where they can be run, and the cache."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import struct
import subprocess
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest

from evm_deploy import cli, plugin_path
from evm_deploy._util.files import cache_folder
from evm_deploy._util.packages import install_hint
from evm_deploy.bundle.loaded import load
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.toolchain import cross_compile
from evm_deploy.toolchain.compile import Compiler, parse_recipe, read_recipe
from evm_deploy.toolchain.platforms import PLATFORMS, host_platform
from release import wheels
from tests import driver as drivers
from tests.driver import (
    IN_HALF,
    Driver,
    any_block,
    any_int8_block,
    build_driver,
    check_exact_int8_blocks,
    check_half_blocks,
    check_hard_scans,
    check_random_blocks,
    check_random_scans,
    scan_problem,
)
from tests.test_instructions import NEON_LIMITS, counted_by_qemu
from tests.test_native import isas, random_scan
from tests.toolchains import AARCH64, MUSL, need

pytestmark = [pytest.mark.xdist_group("cross"), pytest.mark.cross]  # or workers wait for each other's compilers

HOST = host_platform()
OTHER = "linux-aarch64" if HOST != "linux-aarch64" else "linux-x86_64"
EXPORTS = (b"RegisterCustomOps", b"evm_scan_isa", b"evm_scan_isa_error", b"evm_scan_force_isa", b"evm_block_run_tile")
CPP_RUNTIME = re.compile(rb"__cxa_(?!finalize)\w+|__gxx_personality\w+|\b_Zn[wa]\w+|libstdc\+\+|libc\+\+")
WASI = Path(__file__).parent / "wasi.mjs"
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """An empty cache, and a compiler that only writes a few bytes. The list of what was compiled."""
    compiled = []

    def compile_(runtime, platform, recipe, work, name):
        compiled.append(platform.name)
        (work / name).write_bytes(b"a library")
        return work / name

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cross_compile, "_compile", compile_)
    return compiled


# ---------------------------------------------------------------------------------------------- what the libraries are


@pytest.mark.parametrize("platform", PLATFORMS)
def test_each_library_is_of_its_platform_and_needs_no_cpp_runtime(platform):
    library = cross_compile.library("onnxruntime", platform)
    content = library.read_bytes()
    assert library.suffix == PLATFORMS[platform].suffix
    assert len(content) < 500_000
    if library.suffix != ".wasm":  # names have no end there, and another interface (tests/test_web_native.py)
        assert all(name + b"\0" in content for name in EXPORTS)
    assert not CPP_RUNTIME.findall(content)
    assert str(cache_folder()).encode() not in content
    if library.suffix == ".so":
        assert content[:5] == b"\x7fELF\x02"
        machine = ELF_MACHINES[PLATFORMS[platform].architecture]
        assert struct.unpack_from("<HH", content, 16) == (3, machine)  # shared object
        assert all(int(minor) <= 17 for minor in re.findall(rb"GLIBC_2\.(\d+)", content))
    elif platform.startswith("windows"):
        header = struct.unpack_from("<I", content, 0x3C)[0]
        assert content[:2] == b"MZ" and content[header : header + 4] == b"PE\0\0"
        machine, time, characteristics = struct.unpack_from("<H2xI10xH", content, header + 4)
        assert machine == 0x8664 and characteristics & 0x2000  # a DLL
        # every Windows has the Universal C Runtime
        assert re.findall(rb"[\w.-]+\.dll", content, re.I) == [b"evm_onnxruntime.dll", b"ucrtbase.dll"]
        assert abs(time - library.stat().st_mtime) > 86400  # a hash: the same sources give the same bytes
    elif library.suffix == ".wasm":
        assert content[:8] == b"\0asm\1\0\0\0"
    else:
        magic, cpu, _, kind, _ = struct.unpack_from("<5I", content)
        assert (magic, cpu, kind) == (0xFEEDFACF, 0x0100000C, 6)  # 64-bit, arm64, dylib


def load_commands(content):
    """Return the load commands of a Mach-O file by kind, each without its kind and size."""
    at, found = 32, {}
    for _ in range(struct.unpack_from("<I", content, 16)[0]):
        kind, size = struct.unpack_from("<II", content, at)
        found[kind & 0xFF] = content[at + 8 : at + size]
        at += size
    return found


ID_DYLIB, CODE_SIGNATURE, BUILD_VERSION = 0x0D, 0x1D, 0x32
CODE_DIRECTORY, LINKER_SIGNED, AD_HOC = 0xFADE0C02, 0x20000, 2


def signature(content):
    """Return flags, page size and hashes of the pages in a Mach-O file's signature, and the number of bytes signed."""
    at, _ = struct.unpack_from("<II", load_commands(content)[CODE_SIGNATURE])
    magic, _, count = struct.unpack_from(">III", content, at)
    assert magic == 0xFADE0CC0
    slots = [struct.unpack_from(">II", content, at + 12 + 8 * i) for i in range(count)]
    directory = next(at + offset for kind, offset in slots if kind == 0)
    fields = struct.unpack_from(">9I4B", content, directory)
    magic, _, _, flags, hashes, _, _, pages, limit, size, kind, _, page = fields
    assert (magic, size, kind) == (CODE_DIRECTORY, 32, 2)  # SHA-256
    start = directory + hashes
    return flags, 1 << page, [content[start + 32 * i : start + 32 * i + 32] for i in range(pages)], limit


def test_the_library_for_macos_is_signed_and_loads_in_the_oldest_macos_of_onnx_runtime():
    """arm64 Macs load no library without a signature, and none of a newer macOS. ONNX Runtime 1.32 needs macOS 14."""
    content = cross_compile.library("onnxruntime", "macos-arm64").read_bytes()
    commands = load_commands(content)
    system, oldest = struct.unpack_from("<II", commands[BUILD_VERSION])
    assert (system, oldest) == (1, 14 << 16)  # macOS 14.0.0
    assert b"@rpath/evm_onnxruntime.dylib\0" in commands[ID_DYLIB]
    flags, size, hashes, limit = signature(content)
    assert flags == LINKER_SIGNED | AD_HOC
    pages = [content[at : min(at + size, limit)] for at in range(0, limit, size)]
    assert [hashlib.sha256(page).digest() for page in pages] == hashes


@pytest.mark.parametrize("platform", [name for name in PLATFORMS if name.startswith("android")])
def test_a_library_for_android_has_nothing_that_androids_loader_refuses(platform):
    """Android loads no TLS of ELF before version 10, no text relocation, and on new devices no page of 4 KB; from apps
    it packs only files named lib*.so. glibc's library is the control."""
    library = cross_compile.library("onnxruntime", platform)
    facts = elf_facts(library)
    assert library.name == facts["soname"] == "libevm_onnxruntime.so"
    assert facts["needed"] == ["libc.so"] and not facts["versions"] and not facts["writable_code"]
    assert facts["alignments"] == {0x4000} and not facts["tls"] and not facts["text_relocations"]
    assert facts["relocations"] == {"RELATIVE", "JUMP_SLOT"} and facts["hashes"] == {"GNU_HASH", "HASH"}
    control = elf_facts(cross_compile.library("onnxruntime", "linux-aarch64"))
    assert control["needed"] == ["libc.so.6"] and control["versions"] and not control["soname"]


def elf_facts(library):
    """Return the facts of an ELF library that decide whether a system loads it, as readelf prints them."""
    text = subprocess.run(["readelf", "-dlrW", library], capture_output=True, text=True, check=True).stdout
    loads = re.findall(r"^ +LOAD .* ([R ])([W ])([E ]) (0x[0-9a-f]+)$", text, re.M)
    return {
        "needed": re.findall(r"\(NEEDED\).*\[(.+)\]", text),
        "soname": next(iter(re.findall(r"\(SONAME\).*\[(.+)\]", text)), None),
        "versions": re.findall(r"\((VER\w+)\)", text),
        "hashes": set(re.findall(r"\((GNU_HASH|HASH)\)", text)),
        "tls": " TLS " in text,
        "text_relocations": "TEXTREL" in text,
        "alignments": {int(align, 16) for *_, align in loads},
        "writable_code": [each for each in loads if each[1:3] == ("W", "E")],
        "relocations": set(re.findall(r" R_[A-Z0-9]+?(?:_64)?_(\w+)", text)),
    }


@pytest.fixture
def bare(tmp_path):
    """A wheel without a native library, with little inside."""
    path = tmp_path / "evm_deploy-1.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evm_deploy/__init__.py", "x = 1\n")
        archive.writestr("evm_deploy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-linux_x86_64\n")
        archive.writestr("evm_deploy-1.0.dist-info/RECORD", "")
    return path


@pytest.mark.parametrize("platform", wheels.TAGS)
def test_a_wheel_has_the_library_of_its_platform_where_it_is_looked_for(platform, bare, tmp_path):
    path = wheels.write_wheel(bare, platform, tmp_path / "out")
    assert path.name == f"evm_deploy-1.0-py3-none-{wheels.TAGS[platform]}.whl"
    with zipfile.ZipFile(path) as wheel:
        suffix = ".dll" if platform.startswith("windows") else ".so"  # CMake's name of a module on macOS
        library = wheel.read(f"evm_deploy/lib/evm_onnxruntime{suffix}")
        assert library == cross_compile.library("onnxruntime", platform).read_bytes()
        assert f"\nTag: py3-none-{wheels.TAGS[platform]}\n" in wheel.read("evm_deploy-1.0.dist-info/WHEEL").decode()
        rows = [line.split(",") for line in wheel.read("evm_deploy-1.0.dist-info/RECORD").decode().splitlines()]
        assert [name for name, *_ in rows] == wheel.namelist()
        for name, digest, size in rows[:-1]:
            made = base64.urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={made}", len(wheel.read(name)))


def test_a_wheel_with_a_library_of_this_machine_is_no_start(bare, tmp_path):
    with zipfile.ZipFile(bare, "a") as archive:
        archive.writestr("evm_deploy/lib/evm_onnxruntime.so", "")
    with pytest.raises(SystemExit, match="has a native library of this machine"):
        wheels.write_wheel(bare, OTHER, tmp_path)


# --------------------------------------------------------------------------------------------------- what they compute


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """program(platform) -> the command of the driver, linked with what ships, here, under qemu or in Node."""
    made = {}

    def zig(platform, folder):
        return cross_compile.zig_compiler(PLATFORMS[platform].zig, PLATFORMS[platform].architecture, folder / "zig")

    def link(platform):
        folder = tmp_path_factory.mktemp("driver")
        if platform == "browser-wasm32":  # a module is linked whole: the driver takes the library's place
            need("node")
            module = build_driver(zig(platform, folder), folder, link=cross_compile.LINK)
            return "node", "--no-warnings", str(WASI), str(module)
        library = cross_compile.library("onnxruntime", "linux-x86_64" if platform == "musl" else platform)
        if platform == HOST:
            compiler, run, flags = Compiler(("g++",), PLATFORMS[platform].architecture), (), ()
        elif platform == "linux-aarch64":
            need("qemu")
            compiler = zig(platform, folder)
            run, flags = ("qemu-aarch64", "-L", str(AARCH64)), ("-nostdlib++", "-rtlib=none")
        elif platform == "musl":  # a program of musl; the library is that for glibc
            need("musl")
            compiler = cross_compile.zig_compiler("x86_64-linux-musl", "x86_64", folder / "zig")
            run, flags = (str(MUSL),), ("-O1", "-dynamic", "-nostdlib++", "-rtlib=none")
        else:
            pytest.skip(f"{platform} is not run on {HOST}")
        include = f"-I{drivers.NATIVE / 'scan'}"
        compiler.run("-std=c++17", "-O2", *flags, include, drivers.SOURCE, library, "-o", folder / "driver")
        return *run, str(folder / "driver")

    def get(platform):
        if platform not in made:
            made[platform] = link(platform)
        return made[platform]

    return get


SMALL = (1, 3, 5, 8, 16, 4, 1, 1)  # b, H, W, C, d, N, R, G of a block
AARCH64_ISAS = [kernel.name for kernel in read_recipe().of("aarch64")]


@pytest.fixture(
    params=[
        *(f"linux-aarch64 {isa}" for isa in AARCH64_ISAS),
        *(f"linux-x86_64 {isa}" for isa in isas()),
        "browser-wasm32 simd128",
    ]
)
def driver(request, program):
    platform, isa = request.param.split()
    return Driver(program(platform)).forced(isa)


@pytest.mark.parametrize(
    ("cpu", "lacks"), [("cortex-a53", ["dotprod", "fp16", "i8mm"]), ("cortex-a76", ["i8mm"]), ("max", [])]
)
def test_a_kernel_is_refused_where_the_cpu_lacks_its_instructions(cpu, lacks, program, monkeypatch):
    monkeypatch.setenv("QEMU_CPU", cpu)
    runs = ", ".join(isa for isa in ("i8mm", "fp16", "dotprod", "neon") if isa not in lacks)  # the default first
    problem, arm = scan_problem(random_scan(0, 1, 4, 5, 8, 16)), Driver(program("linux-aarch64"))
    want = arm.run([problem])
    blocks = [any_int8_block(1, *SMALL), *(replace(any_block(1, *SMALL), op=op) for op in (1, *IN_HALF.values()))]
    for isa in AARCH64_ISAS:
        if isa in lacks:
            lacking = f"EVM_ISA={isa}: this CPU lacks the instruction set; it runs: {runs}\n"
            with pytest.raises(AssertionError, match=lacking):
                arm.forced(isa).run([problem])
        else:
            np.testing.assert_allclose(arm.forced(isa).run([problem]), want, atol=1e-5)
            assert all(np.isfinite(out).all() for (out, *_) in arm.forced(isa).run(blocks))  # no illegal instruction


def test_a_kernel_has_int8_blocks_though_its_platform_has_float16(tmp_path):
    """Kernel neon for macOS, where compilers take Apple's M1 for the least CPU."""
    recipe, path = read_recipe(), tmp_path / "block.o"
    (kernel,) = (kernel for kernel in recipe.of("aarch64") if kernel.name == "neon")
    compiler = cross_compile.zig_compiler(PLATFORMS["macos-arm64"].zig, "aarch64", tmp_path / "zig")
    folders = [f"-I{recipe.folder / folder}" for folder in recipe.words["include"]]
    compiler.run("-std=c++17", "-O0", *folders, *kernel.arguments, "-c", recipe.folder / "scan/block.cpp", "-o", path)
    assert b"Int8Layer" in path.read_bytes() and b"HalfLayer" not in path.read_bytes()


def test_golden_scans(driver):
    check_golden_scans(driver)


def test_golden_scans_of_the_library_for_glibc_in_a_process_of_musl(program):
    check_golden_scans(Driver(program("musl")))


def check_golden_scans(driver):
    cases = [golden.scan_case(name) for name in golden.SCAN_CASES]
    results = driver.run([scan_problem(golden.channels_last(inputs)) for inputs, _ in cases])
    for (_, expected), (y,) in zip(cases, results, strict=True):
        got = golden.scan_summary(golden.channels_first(y))
        for key in ("y_head", "y_tail"):
            assert np.abs(got[key] - expected[key]).max() / expected["stats"][2] < 3e-6


def test_random_scans(driver):
    check_random_scans(driver, 60)


def test_hard_scans(driver):
    check_hard_scans(driver)


@pytest.mark.parametrize("states", NEON_LIMITS)
def test_instructions_of_neon(states, program, tmp_path):
    if HOST == "linux-aarch64":
        pytest.skip("counted by qemu")
    count = counted_by_qemu(program("linux-aarch64"), tmp_path / "log", states)
    assert 0.8 * NEON_LIMITS[states] < count < NEON_LIMITS[states], count


def test_random_blocks(driver):
    check_random_blocks(driver, 12)


def test_exact_int8_blocks(driver):
    check_exact_int8_blocks(driver, 24)


def test_half_blocks(driver):
    check_half_blocks(driver, 8, driver.isa)


# ------------------------------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def host_bundle(micro, bundle_of):
    if HOST not in PLATFORMS:
        pytest.skip(f"no library is built for {HOST}")
    return bundle_of(micro, ExportPlan("onnx", imgsz=(32, 32), native_library=HOST))


@pytest.fixture(scope="module")
def other_bundle(micro, bundle_of):
    return bundle_of(micro, ExportPlan("onnx", imgsz=(32, 32), native_library=OTHER))


def test_a_bundle_carries_its_library_which_runs_when_asked_for(host_bundle, monkeypatch, capsys):
    manifest, inside = host_bundle.manifest, f"plugins/{HOST}/evm_onnxruntime{PLATFORMS[HOST].suffix}"
    assert manifest.plan["native_library"] == HOST
    assert manifest.plugins == {HOST: inside}
    assert inside in manifest.files
    assert inside in (host_bundle.path / "README.md").read_text()
    assert not [note for note in manifest.notes if note.startswith("plugins/")]
    with load(host_bundle.path) as loaded:
        assert loaded.plugin == plugin_path("onnxruntime")
    monkeypatch.setattr("evm_deploy.toolchain.plugins.find_plugin", lambda runtime: None)
    with load(host_bundle.path) as loaded:
        assert (loaded.plugin, loaded.scan.value) == (None, "portable")
        assert "use scan 'bundled' to trust" in loaded.scan.reason
    with load(host_bundle.path, scan="bundled") as loaded:
        assert loaded.plugin == host_bundle.path / inside
    assert cli.run_main([str(host_bundle.path), "--selftest", "--scan", "bundled"]) == 0
    assert re.search(rf"ran as plugin: native kernel, \w+, from the bundle \({HOST}\)", capsys.readouterr().out)


def test_the_export_verifies_the_library_that_it_ships(micro, tmp_path, monkeypatch):
    monkeypatch.setattr("evm_deploy.toolchain.plugins.find_plugin", lambda runtime: None)
    bundle = export(micro, ExportPlan("onnx", imgsz=(32, 32), native_library=HOST), tmp_path)
    assert {scan["lowering"] for scan in bundle.manifest.parity["scans"]} == {"portable", "plugin"}


def test_a_damaged_library_is_not_loaded(host_bundle, tmp_path):
    copy = shutil.copytree(host_bundle.path, tmp_path / "bundle")
    library = copy / host_bundle.manifest.plugins[HOST]
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    with pytest.raises(BundleError, match=rf"plugins/{HOST}/\S+ is damaged"):
        load(copy)


def test_another_platforms_library_is_named_and_not_used(other_bundle, monkeypatch):
    assert [note for note in other_bundle.manifest.notes if note.startswith("plugins/")] == [
        f"plugins/{OTHER} was compiled but not run: check it on the device with the self-test"
    ]
    with load(other_bundle.path) as loaded:
        assert loaded.plugin == plugin_path("onnxruntime")
    with pytest.raises(UsageError, match=f"no native library for {HOST} in the bundle; available: {OTHER}"):
        load(other_bundle.path, scan="bundled")
    monkeypatch.setattr("evm_deploy.toolchain.plugins.find_plugin", lambda runtime: None)
    with load(other_bundle.path) as loaded:
        assert loaded.scan.value == "portable"
        assert f"not built for the evm_deploy in {Path(cross_compile.__file__).parent}" in loaded.scan.reason
        assert f"the libraries in the bundle are for {OTHER}" in loaded.scan.reason
    with pytest.raises(ToolchainError, match=f"the libraries in the bundle are for {OTHER}"):
        load(other_bundle.path, scan="plugin")


def test_a_manifest_cannot_name_a_library_outside_of_its_files(other_bundle, tmp_path):
    copy = shutil.copytree(other_bundle.path, tmp_path / "bundle")
    manifest = (copy / "manifest.json").read_text()
    evil = manifest.replace(f'"{OTHER}": "plugins/', f'"{HOST}": "../plugins/')
    assert evil != manifest
    (copy / "manifest.json").write_text(evil)
    with pytest.raises(BundleError, match="not among the files"):
        load(copy)


# ------------------------------------------------------------------------------------------------------- plans, errors


@pytest.mark.parametrize(
    ("system", "machine", "android", "name"),
    [
        ("linux", "aarch64", False, "linux-aarch64"),
        ("darwin", "arm64", False, "macos-arm64"),
        ("linux", "aarch64", True, "android-aarch64"),  # Termux, Python 3.12
        ("android", "x86_64", True, "android-x86_64"),
        ("win32", "win-amd64", False, "windows-x86_64"),
        ("win32", "win-arm64", False, "windows-arm64"),
    ],
)
def test_the_platform_of_a_process(system, machine, android, name, monkeypatch):
    """On Windows the name of the Python counts: one for x86-64 runs on ARM64 too."""
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: "ARM64" if system == "win32" else machine)
    monkeypatch.setattr("sysconfig.get_platform", lambda: machine)
    if android:
        monkeypatch.setattr("sys.getandroidapilevel", lambda: 34, raising=False)
    assert host_platform() == name


def test_impossible_platforms_are_refused():
    with pytest.raises(UsageError, match=f"choose from: {', '.join(PLATFORMS)}"):
        ExportPlan("onnx", native_library="linux-riscv64")
    with pytest.raises(UsageError, match="would not use the library"):
        ExportPlan("onnx", native_library=OTHER, scan="portable")


def test_the_flag_is_a_config_key_and_in_the_dry_run(micro, tmp_path, capsys):
    (tmp_path / "evm.toml").write_text(f'target = "onnx"\nplatform = "{OTHER}"\n')
    assert (
        cli.export_main([str(micro), "--config", str(tmp_path / "evm.toml"), "--dry-run", "--out", str(tmp_path)]) == 0
    )
    assert f"Platform   {OTHER}, native library compiled with ziglang" in capsys.readouterr().out


def test_without_ziglang_the_error_comes_first_and_says_what_to_install(micro, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cross_compile, "find_spec", lambda name: None)
    command = [str(micro), "--target", "onnx", "--platform", OTHER, "--out", str(tmp_path)]
    assert cli.export_main(command) == 3
    err = capsys.readouterr().err
    assert "ziglang is not installed" in err and f"\n  {install_hint('cross')}" in err
    assert "load" not in err


def test_what_the_compiler_says_is_shown(tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text("int main() { return nothing; }\n")
    compiler = cross_compile.zig_compiler(PLATFORMS[OTHER].zig, PLATFORMS[OTHER].architecture, tmp_path / "zig")
    with pytest.raises(ToolchainError, match=r"exit code 1(?s:.*)undeclared identifier 'nothing'"):
        compiler.run("-c", source, "-o", tmp_path / "wrong.o")
    with pytest.raises(ToolchainError, match="no-such-compiler cannot be run"):
        Compiler(("no-such-compiler",), "x86_64").run("--version")


def test_architectures_without_a_kernel_of_their_own_get_the_base():
    assert [kernel.name for kernel in read_recipe().of("riscv64")] == ["base"]
    names = ["base", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16"]
    assert [kernel.name for kernel in read_recipe().of("x86_64")] == names


# ----------------------------------------------------------------------------------------------------------- the cache


def test_a_library_is_compiled_once_and_again_when_damaged(no_cache):
    first = cross_compile.library("onnxruntime", OTHER)
    assert cross_compile.library("onnxruntime", OTHER) == first
    assert no_cache == [OTHER]
    first.write_bytes(b"another")
    assert cross_compile.library("onnxruntime", OTHER).read_bytes() == b"a library"
    assert no_cache == [OTHER, OTHER]
    assert sorted(path.name for path in first.parents[1].iterdir()) == [OTHER]  # nothing half-made is left


@pytest.fixture
def small_recipe(monkeypatch, tmp_path):
    """A library of three functions in place of the kernels, which take zig 20 CPU seconds."""
    folder = tmp_path / "native"
    folder.mkdir()
    for name in ("kernel", "scan", "library"):
        (folder / f"{name}.cpp").write_text(f'extern "C" int {name}(int x) {{ return x + 1; }}\n')
    recipe = ["flags -O1 -fPIC", "include .", "kernel aarch64 neon 4 16 24", "kernel_sources kernel.cpp"]
    recipe += ["scan_sources scan.cpp", "onnxruntime_sources library.cpp"]
    (folder / "kernels.txt").write_text("\n".join(recipe))
    monkeypatch.setattr(cross_compile, "read_recipe", lambda: parse_recipe(folder))


def test_nothing_of_zigs_own_cache_is_kept(small_recipe, monkeypatch, tmp_path):
    """zig links changed objects of its cache."""
    monkeypatch.setattr(cross_compile, "zig_compiler", cross_compile.zig_compiler.__wrapped__)
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    library = cross_compile.library("onnxruntime", "linux-aarch64")
    assert {path for path in cache.rglob("*") if path.is_file()} == {
        library,
        library.with_name(f"{library.name}.sha256"),
    }


def test_a_function_that_no_c_library_has_is_an_error(small_recipe, monkeypatch, tmp_path):
    """In the export, not in the loader of a board."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scan = tmp_path / "native" / "scan.cpp"
    scan.write_text('extern "C" int absent(int);\nextern "C" int scan(int x) { return absent(x); }\n')
    with pytest.raises(ToolchainError, match="compiling failed") as error:
        cross_compile.library("onnxruntime", "linux-aarch64")
    assert "undefined symbol: absent" in str(error.value)


def test_a_library_that_another_process_compiles_is_waited_for(no_cache, monkeypatch):
    """Here a thread: locks are of an open file, not of a process."""
    compile_, began = cross_compile._compile, threading.Event()

    def slow(*arguments):
        began.set()
        time.sleep(0.2)
        return compile_(*arguments)

    monkeypatch.setattr(cross_compile, "_compile", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(cross_compile.library, "onnxruntime", OTHER)
        assert began.wait(60)
        assert cross_compile.library("onnxruntime", OTHER) == first.result()
    assert no_cache == [OTHER]


def test_another_ziglang_compiles_again(no_cache, monkeypatch):
    before = cross_compile.cached_path("onnxruntime", OTHER)
    monkeypatch.setattr(cross_compile.metadata, "version", lambda name: "9.9.9")
    assert cross_compile.cached_path("onnxruntime", OTHER) != before


def test_without_a_cache_the_library_is_still_compiled(no_cache, monkeypatch, tmp_path):
    """A cache is a convenience: a folder that cannot be made is a note."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cross_compile.library("onnxruntime", OTHER).read_bytes() == b"a library"
    assert no_cache == [OTHER]
