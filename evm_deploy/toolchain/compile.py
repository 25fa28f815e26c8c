"""The native sources and how they are compiled: native/kernels.txt, which CMake reads too."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evm_deploy._util.files import checksum_matches, package_folders, write_checksum
from evm_deploy.errors import ToolchainError

RECIPE = "kernels.txt"
SETTINGS = (RECIPE, "CMakeLists.txt")
SHOWN_LINES = 6  # of a failed compiler's output


@dataclass(frozen=True)
class KernelVariant:
    """One build of the kernel sources. `flags` allow its instructions."""

    architecture: str
    name: str
    lanes: int
    states: int
    accumulators: int
    flags: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        sizes = {"LANES": self.lanes, "STATES": self.states, "ACCUMULATORS": self.accumulators}
        return [f"-DEVM_ISA={self.name}", *(f"-DEVM_{key}={value}" for key, value in sizes.items()), *self.flags]


@dataclass(frozen=True)
class Recipe:
    """What kernels.txt says: words by key, and the kernels. Paths are relative to `folder`."""

    folder: Path
    words: Mapping[str, tuple[str, ...]]
    kernels: tuple[KernelVariant, ...]

    def of(self, architecture: str) -> list[KernelVariant]:
        """The kernels of an architecture, those of `other` where it has none."""
        return [kernel for kernel in self.kernels if kernel.architecture == architecture] or self.of("other")

    def files(self) -> list[Path]:
        """Everything that the compiled code depends on."""
        return sorted(path for path in self.folder.rglob("*") if path.name in SETTINGS or path.suffix in (".cpp", ".h"))

    def digest(self, settings: str) -> str:
        """Sixteen hex digits of these files and of `settings`, whatever else decides the bytes of a library."""
        digest = hashlib.sha256(settings.encode())
        for path in self.files():
            digest.update(f"\0{path.relative_to(self.folder).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def read_recipe() -> Recipe:
    """The recipe that was installed with this package. Raises ToolchainError where there is none."""
    for parent in package_folders():
        folder = parent / "native"
        if (folder / RECIPE).is_file():
            return parse_recipe(folder)
    raise ToolchainError(
        f"the native sources are not in the evm_deploy in {Path(__file__).parent}", "install it with pip install ."
    )


def parse_recipe(folder: Path) -> Recipe:
    """`folder`/kernels.txt."""
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
    """A C++ compiler: the command up to where flags begin, what it compiles for, and its environment (None: ours)."""

    command: tuple[str, ...]
    architecture: str
    environment: Mapping[str, str] | None = None

    def run(self, *arguments: str | Path) -> None:
        """Raises ToolchainError with the first lines of what the compiler says."""
        command = [*self.command, *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=self.environment)
        except OSError as error:
            raise ToolchainError(f"{command[0]} cannot be run: {error.strerror}") from error
        if done.returncode:
            said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[:SHOWN_LINES])
            raise ToolchainError(f"compiling failed with exit code {done.returncode}: {' '.join(command)}", said)

    def objects(self, recipe: Recipe, sources: Sequence[str | Path], folder: Path) -> list[Path]:
        """Compile `sources`, and the kernel sources once per kernel, into `folder`. Returns the object files."""
        common = [*recipe.words["flags"], *(f"-I{recipe.folder / path}" for path in recipe.words["include"])]
        made = []
        for kernel in (None, *recipe.of(self.architecture)):
            for source in recipe.words["kernel_sources"] if kernel else sources:
                path = folder / f"{kernel.name if kernel else 'once'}-{Path(source).stem}.o"
                self.run(*common, *(kernel.arguments if kernel else ()), "-c", recipe.folder / source, "-o", path)
                made.append(path)
        return made


def compiled_once(path: Path, compile_: Callable[[Path], Path]) -> Path:
    """The library `path` of a cache, if it is there whole, else what `compile_` makes in a folder and returns.

    The cache holds nothing half-made; a damaged file is compiled again. Raises ToolchainError.
    """
    if checksum_matches(path):
        return path
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=f".{path.parent.name}.") as work:
            built = compile_(Path(work))
            done = Path(work) / "done"
            done.mkdir()
            built = built.rename(done / path.name)
            write_checksum(built)
            shutil.rmtree(path.parent, ignore_errors=True)
            try:
                done.rename(path.parent)
            except OSError:
                if not checksum_matches(path):  # not even by another process that was faster
                    raise
    except OSError as error:
        where = error.filename or path.parent.parent
        raise ToolchainError(
            f"cannot write the compiled library: {where}: {error.strerror}",
            "set XDG_CACHE_HOME to a folder that can be written",
        ) from error
    return path
