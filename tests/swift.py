"""Build and test the package samples/ios with Debian 13's Swift; the MIL runtime stands in for Core ML."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from evm_deploy.data.reading import read_image
from evm_deploy.errors import EvmError
from evm_deploy.runtimes.mil import MilRuntime
from tests.platforms.roots import PROJECT, ROOTS

PACKAGE = PROJECT / "samples" / "ios"


def run(*arguments: str | Path, **environment: str) -> str:
    """Return what a Swift program printed. Raises AssertionError with that if it failed."""
    done = ROOTS["swift"].run(*map(str, arguments), **environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def package(program: str, *arguments: str, **environment: str) -> str:
    """Return what swift-build or swift-test printed for the package. Built files stay in the cache for the next run."""
    built = ROOTS["swift"].folder / "built"
    flags = ("-c", "release", "-Xswiftc", "-enable-testing", "-Xswiftc", "-warnings-as-errors")
    return run(program, "--package-path", PACKAGE, "--scratch-path", built, *flags, *arguments, **environment)


def write_pixels(images: Sequence[Path], folder: Path) -> None:
    """Write the upright RGB pixels of image files as PPM files, named by the SHA-256 of the image file."""
    for path in images:
        read_image(path).save(folder / f"{sha256(path.read_bytes()).hexdigest()}.ppm")


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """Answer the requests of StandIns.swift in `folder` with the MIL runtime."""
    for name in ("ask", "answer"):
        if not (folder / name).exists():
            os.mkfifo(folder / name)
    with (folder / "ask").open("r+b", buffering=0) as ask, (folder / "answer").open("r+b", buffering=0) as answer:

        def serve() -> None:
            while line := ask.readline().decode().rstrip("\n"):
                artifact, function = line.split("\t")
                try:
                    with MilRuntime(Path(artifact), function=function or None) as runtime:
                        outputs = runtime.run(load_file(folder / "feeds.safetensors"))
                    outputs = {name: np.ascontiguousarray(value) for name, value in outputs.items()}
                    save_file(outputs, folder / "outputs.safetensors")
                    answer.write(b"ok\n")
                except EvmError as error:
                    answer.write(f"{error}".splitlines()[0].encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ask.write(b"\n")
            thread.join()
