"""Compile the native sources by the recipe native/kernels.txt, which CMake reads too."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from evm_deploy._util import processes
from evm_deploy._util.cores import usable_cores
from evm_deploy._util.files import (
    checksum_matches,
    lock_folder,
    move,
    package_folders,
    sha256,
    writable_cache,
    write_checksum,
)
from evm_deploy._util.packages import install_hint
from evm_deploy.errors import ToolchainError

RECIPE = "kernels.txt"
SETTINGS = (RECIPE, "CMakeLists.txt")
SHOWN_LINES = 6  # lines of a failed compiler's output in an error message


@dataclass(frozen=True)
class KernelVariant:
    """Build variant of the kernel sources for one instruction set. flags: compiler flags that enable the instructions.

    lanes, states, accumulators: sizes that the kernel is compiled for.
    """

    architecture: str
    name: str
    lanes: int
    states: int
    accumulators: int
    flags: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """Compiler arguments of this variant: definitions of its name and sizes, then its flags."""
        sizes = {"LANES": self.lanes, "STATES": self.states, "ACCUMULATORS": self.accumulators}
        return [f"-DEVM_ISA={self.name}", *(f"-DEVM_{key}={value}" for key, value in sizes.items()), *self.flags]


@dataclass(frozen=True)
class Recipe:
    """Content of kernels.txt: lists of words by key, and the kernel variants. Paths are relative to `folder`."""

    folder: Path
    words: Mapping[str, tuple[str, ...]]
    kernels: tuple[KernelVariant, ...]

    def of(self, architecture: str) -> list[KernelVariant]:
        """Return the kernel variants of an architecture, or those of `other` if the architecture has none."""
        return [kernel for kernel in self.kernels if kernel.architecture == architecture] or self.of("other")

    def files(self) -> list[Path]:
        """Return all files that the compiled code depends on, sorted."""
        return sorted(path for path in self.folder.rglob("*") if path.name in SETTINGS or path.suffix in (".cpp", ".h"))

    def digest(self, settings: str) -> str:
        """Return 16 hex digits of the SHA-256 of `files()` and `settings`.

        settings: text of everything else that changes the bytes of a library, such as compiler version and flags.
        """
        digest = hashlib.sha256(settings.encode())
        for path in self.files():
            digest.update(f"\0{path.relative_to(self.folder).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def archive(self, architecture: str, flags: str = "") -> Path | None:
        """Return the archive of the compiled kernels that was installed with these sources; None if there is none.

        flags: compiler flags beside those of the recipe. The name of an archive has a digest of its sources, platform
        and flags (CMakeLists.txt), so that an archive of others is not found.
        """
        sources = [path for path in self.files() if path.parent in (self.folder, self.folder / "scan")]
        text = f"{''.join(map(sha256, sources))} {platform.system()} {architecture} Release {flags}"
        name = f"libevm_kernels-{hashlib.sha256(text.encode()).hexdigest()[:16]}.a"
        path = self.folder.parent / "lib" / name
        return path if path.is_file() else None


def read_recipe() -> Recipe:
    """Read the recipe that was installed with this package. Raises ToolchainError if it is missing."""
    for parent in package_folders():
        folder = parent / "native"
        if (folder / RECIPE).is_file():
            return parse_recipe(folder)
    raise ToolchainError(
        f"the native sources are missing from the evm_deploy in {Path(__file__).parent}",
        f"install it again:  {install_hint()}",
    )


def parse_recipe(folder: Path) -> Recipe:
    """Parse kernels.txt of `folder`."""
    words, kernels = {}, []
    for line in (folder / RECIPE).read_text(encoding="utf-8").splitlines():
        key, *rest = line.split() or ["#"]
        if key == "kernel":
            architecture, name, lanes, states, accumulators, *flags = rest
            kernels.append(KernelVariant(architecture, name, int(lanes), int(states), int(accumulators), tuple(flags)))
        elif not key.startswith("#"):
            words[key] = tuple(rest)
    return Recipe(folder, words, tuple(kernels))


@dataclass(frozen=True)
class Compiler:
    """C++ compiler. command: its call without flags. environment: None for the environment of this process.

    features: CPU features, as flags of kernels name them -> other names that this compiler has for them.
    """

    command: tuple[str, ...]
    architecture: str
    environment: Mapping[str, str] | None = None
    features: Mapping[str, str] = field(default_factory=dict)

    def run(self, *arguments: str | Path) -> None:
        """Run the compiler. Raises ToolchainError with the first lines of its output if it fails."""
        command = [*self.command, *map(str, arguments)]
        try:
            done = processes.run(command, env=self.environment)
        except OSError as error:
            raise ToolchainError(f"{command[0]} cannot be run: {error.strerror}") from error
        if done.returncode:
            said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[:SHOWN_LINES])
            raise ToolchainError(f"compiling failed with exit code {done.returncode}: {' '.join(command)}", said)

    def objects(
        self, recipe: Recipe, sources: Sequence[str | Path], folder: Path, archive: Path | None = None
    ) -> list[Path]:
        """Compile `sources` and the kernels into `folder`, on every usable core. Return the files to link.

        The kernels are the scan sources, and the kernel sources once per kernel variant. archive: of the compiled
        kernels, to link in their place; None to compile them. Raises ToolchainError.
        """
        common = [*recipe.words["flags"], *(f"-I{recipe.folder / path}" for path in recipe.words["include"])]
        once = sources if archive else (*recipe.words["scan_sources"], *sources)
        work = [
            (kernel, source)
            for kernel in (None, *(() if archive else recipe.of(self.architecture)))
            for source in (recipe.words["kernel_sources"] if kernel else once)
        ]

        def compiled(kernel: KernelVariant | None, source: str | Path) -> Path:
            path = folder / f"{kernel.name if kernel else 'once'}-{Path(source).stem}.o"
            flags = map(self._spelled, kernel.arguments if kernel else ())
            self.run(*common, *flags, "-c", recipe.folder / source, "-o", path)
            return path

        with ThreadPoolExecutor(usable_cores()) as pool:
            objects = list(pool.map(compiled, *zip(*work, strict=True)))
        return [*objects, archive] if archive else objects

    def _spelled(self, flag: str) -> str:
        return "+".join(self.features.get(part, part) for part in flag.split("+"))


def compiled_once(path: Path, compile_: Callable[[Path], Path]) -> Path:
    """Return the cached library `path`. Compile it first if it is missing or its checksum does not match.

    compile_(folder): compiles the library in a temporary folder and returns its path there. The library is then moved
    into the cache atomically. Another process that needs the library meanwhile waits for it. Where the cache cannot be
    written, the library is kept until this process ends. Raises ToolchainError.
    """
    if checksum_matches(path):
        return path
    path = writable_cache(path.parent.parent) / path.parent.name / path.name
    lock = lock_folder(path.parent.parent, wait=True)
    try:
        if not checksum_matches(path):
            _compile_to(path, compile_)
    finally:
        if lock is not None:
            os.close(lock)
    return path


def _compile_to(path: Path, compile_: Callable[[Path], Path]) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=f".{path.parent.name}.") as work:
            built = compile_(Path(work))
            done = Path(work) / "done"
            done.mkdir()
            built = built.rename(done / path.name)
            write_checksum(built)
            shutil.rmtree(path.parent, ignore_errors=True)
            try:
                move(done, path.parent)
            except OSError:
                if not checksum_matches(path):  # no other process has moved its library there meanwhile
                    raise
    except OSError as error:
        where = error.filename or path.parent.parent
        raise ToolchainError(
            f"cannot write the compiled library: {where}: {error.strerror}",
            "set XDG_CACHE_HOME to a writable folder",
        ) from error
