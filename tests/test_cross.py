"""`--platform`: libraries for other platforms, what they compute where they can be run, and the cache."""

from __future__ import annotations

import re
import shutil
import struct
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
from tests import driver as drivers
from tests.driver import (
    Driver,
    check_exact_int8_blocks,
    check_hard_scans,
    check_random_blocks,
    check_random_scans,
    scan_problem,
)
from tests.test_instructions import NEON_LIMITS, counted_by_qemu
from tests.test_native import isas, random_scan
from tests.toolchains import AARCH64, need

pytestmark = [pytest.mark.xdist_group("cross"), pytest.mark.cross]  # or workers wait for each other's compilers

HOST = host_platform()
OTHER = "linux-aarch64" if HOST != "linux-aarch64" else "linux-x86_64"
EXPORTS = (b"RegisterCustomOps", b"evm_scan_isa", b"evm_scan_isa_error", b"evm_scan_force_isa", b"evm_block_run_tile")
CPP_RUNTIME = re.compile(rb"__cxa_(?!finalize)\w+|__gxx_personality\w+|\b_Zn[wa]\w+|libstdc\+\+|libc\+\+")
ELF_MACHINES = {"linux-x86_64": 62, "linux-aarch64": 183}


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
    assert len(content) < (600_000 if platform.startswith("windows") else 500_000)  # zig's C runtime is in the former
    assert all(name + b"\0" in content for name in EXPORTS)
    assert not CPP_RUNTIME.findall(content)
    assert str(cache_folder()).encode() not in content
    if platform.startswith("linux"):
        assert content[:5] == b"\x7fELF\x02"
        assert struct.unpack_from("<HH", content, 16) == (3, ELF_MACHINES[platform])  # shared object
        assert all(int(minor) <= 17 for minor in re.findall(rb"GLIBC_2\.(\d+)", content))
    elif platform.startswith("windows"):
        header = struct.unpack_from("<I", content, 0x3C)[0]
        assert content[:2] == b"MZ" and content[header : header + 4] == b"PE\0\0"
        machine, time, characteristics = struct.unpack_from("<H2xI10xH", content, header + 4)
        assert machine == 0x8664 and characteristics & 0x2000  # a DLL
        assert abs(time - library.stat().st_mtime) > 86400  # a hash: the same sources give the same bytes
    else:
        magic, cpu, _, kind, commands = struct.unpack_from("<5I", content)
        assert (magic, cpu, kind) == (0xFEEDFACF, 0x0100000C, 6)  # 64-bit, arm64, dylib
        assert 0x1D in load_commands(content, commands)  # signed, ad hoc: arm64 Macs load nothing else


def load_commands(content, count):
    at, kinds = 32, []
    for _ in range(count):
        kind, size = struct.unpack_from("<II", content, at)
        kinds.append(kind)
        at += size
    return kinds


# --------------------------------------------------------------------------------------------------- what they compute


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """program(platform) -> the command of the driver, linked with the library that ships, here or under qemu."""
    made = {}

    def link(platform):
        folder, library = tmp_path_factory.mktemp("driver"), cross_compile.library("onnxruntime", platform)
        if platform == HOST:
            compiler, run, flags = Compiler(("g++",), PLATFORMS[platform].architecture), (), ()
        elif platform == "linux-aarch64":
            need("qemu")
            compiler = cross_compile.zig_compiler(
                PLATFORMS[platform].zig, PLATFORMS[platform].architecture, folder / "zig"
            )
            run, flags = ("qemu-aarch64", "-L", str(AARCH64)), ("-nostdlib++",)
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


AARCH64_ISAS = [kernel.name for kernel in read_recipe().of("aarch64")]


@pytest.fixture(params=[*(f"linux-aarch64 {isa}" for isa in AARCH64_ISAS), *(f"linux-x86_64 {isa}" for isa in isas())])
def driver(request, program):
    platform, isa = request.param.split()
    return Driver(program(platform)).forced(isa)


@pytest.mark.parametrize(("cpu", "lacks"), [("cortex-a53", ["dotprod"]), ("cortex-a76", [])])
def test_a_kernel_is_refused_where_the_cpu_lacks_its_instructions(cpu, lacks, program, monkeypatch):
    monkeypatch.setenv("QEMU_CPU", cpu)
    problem, arm = scan_problem(random_scan(0, 1, 4, 5, 8, 16)), Driver(program("linux-aarch64"))
    want = arm.run([problem])
    for isa in AARCH64_ISAS:
        if isa in lacks:
            with pytest.raises(
                AssertionError, match=f"EVM_ISA={isa}: this CPU lacks the instruction set; it runs: neon"
            ):
                arm.forced(isa).run([problem])
        else:
            np.testing.assert_allclose(arm.forced(isa).run([problem]), want, atol=1e-5)


def test_golden_scans(driver):
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
        f"plugins/{OTHER} was compiled but not run: check it on the device with evm-run --selftest"
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


def test_impossible_platforms_are_refused():
    with pytest.raises(UsageError, match="choose from: linux-x86_64, linux-aarch64, macos-arm64, windows-x86_64"):
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
    assert [kernel.name for kernel in read_recipe().of("x86_64")] == ["base", "avx2", "avxvnni", "avx512", "avx512vnni"]


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
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    library = cross_compile.library("onnxruntime", "linux-aarch64")
    assert {path for path in cache.rglob("*") if path.is_file()} == {
        library,
        library.with_name(f"{library.name}.sha256"),
    }


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
