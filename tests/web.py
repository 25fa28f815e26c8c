"""samples/web built and served, and a browser that is driven in it: for its tests and its benchmark."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.toolchains import CHROMIUM

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "web"
NODE = 20  # Vite's oldest
HEAD = '<!doctype html><meta charset="utf-8" /><link rel="icon" href="/icon.svg" />'
LIBRARY = {
    "library.html": HEAD + '<script type="module" src="/library.ts"></script>',
    "library.ts": 'import * as evm from "./src/evm";\nObject.assign(window, { evm });\n',
}


class MissingError(Exception):
    """Parts of the web sample's toolchain that this machine lacks: node, its packages included, or chromium."""

    def __init__(self, toolchain: str, why: str) -> None:
        super().__init__(why)
        self.toolchain = toolchain


def npm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["npm", *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def modules() -> Path:
    """node_modules as package-lock.json says, installed when they are of another lock. Raises MissingError."""
    if not (shutil.which("node") and shutil.which("npm")):
        raise MissingError("node", f"install nodejs {NODE} or newer, and npm")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < NODE:
        raise MissingError("node", f"{NODE} is needed, this is {version}: install a newer one")
    if not CHROMIUM:
        raise MissingError("chromium", "install chromium")
    stamp = SAMPLE / "node_modules" / ".evm-lock"
    with (SAMPLE / "package-lock.json").open("rb") as lock:
        wanted = hashlib.sha256(lock.read()).hexdigest()
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            done = npm(SAMPLE, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
            if done.returncode:
                raise MissingError("node", f"no npm registry: {done.stderr[-300:]}")
            stamp.write_text(wanted)
    return stamp.parent


def build(folder: Path, bundle: Path, pages: Mapping[str, str]) -> Path:
    """A copy of the sample at `folder` with a built-in bundle and more `pages`, checked by tsc and built."""
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("node_modules", "dist", "bundle"))
    (folder / "node_modules").symlink_to(modules())
    for name, content in pages.items():
        (folder / name).write_text(content)
    settings = json.loads((folder / "tsconfig.json").read_text())
    settings["include"].append("*.ts")
    (folder / "tsconfig.json").write_text(json.dumps(settings))
    for command in (["bundle", "--", str(bundle)], ["check"], ["build"]):
        done = npm(folder, "run", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The address at which `vite preview` hands out a built site."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    vite = ["node", "node_modules/vite/bin/vite.js", "preview", "--strictPort", "--port", str(port)]
    server = subprocess.Popen(vite, cwd=site, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}/"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                urlopen(address).close()
                break
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


class Browser:
    """Chromium at a site, driven by samples/web/tests/drive.mjs, which has the scenarios."""

    def __init__(self, address: str) -> None:
        self.address = address
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "CHROMIUM": CHROMIUM or ""}
        self.process = subprocess.Popen(["node", "tests/drive.mjs", address], cwd=SAMPLE, env=environment, **pipes)

    def drive(self, scenario: str, console: str = "", **given: Any) -> dict[str, Any]:
        """Run a scenario in the browser and return its result.

        The console may hold lines of the pattern `console` alone. No other host may be asked.
        """
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"scenario": scenario, **given}, default=str), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "failed" not in answer, answer
        assert [line for line in answer["console"] if not (console and re.search(console, line))] == [], answer
        assert all(each.startswith((self.address, "data:")) for each in answer["addresses"]), answer["addresses"]
        return answer

    def library(self, code: str, given: Any = None, files: Path = SAMPLE, console: str = "") -> Any:
        """Run `code` and return its result.

        code: body of an async function of `evm`, the library; of `file(path)`, which gives files below `files`, as
        "files/.." does where an address is asked for; and of `given`.
        """
        return self.drive("library", console, code=code, given=given, files=files).get("value")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)
