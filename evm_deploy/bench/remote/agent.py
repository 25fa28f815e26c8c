"""Agent that measures on a board: a zipapp of this package's Python files, built when a board is connected.

    python3 agent.pyz check MODULE..              print platform and package versions as JSON
    python3 agent.pyz measure BUNDLE SETTINGS     run bench.worker

With `--tied` in front of these arguments the agent ends itself and removes its folder when its stdin ends, that is,
when the process that started the agent is gone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipapp
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAME = "agent.pyz"
PACKAGE = Path(__file__).parents[2]
REMOVALS = 20  # attempts to remove the folder
# The finder of sys.path, which begins with the zipapp, goes in front of the import hook of an editable installation of
# evm_deploy on the board.
START = """import sys
from importlib.machinery import PathFinder

sys.meta_path.insert(0, PathFinder)
from evm_deploy.bench.remote.agent import main

sys.exit(main())
"""
USED = (".py", ".schema.json")
UNUSED = ("demo", "lib", "__pycache__")


def build_agent(package: Path = PACKAGE) -> bytes:
    """Build the zipapp and return its bytes: the Python files and JSON Schemas of `package`, no other data."""
    archive = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder) / "evm_deploy", ignore=_unused)
        (Path(folder) / "__main__.py").write_text(START, encoding="utf-8")
        zipapp.create_archive(folder, archive, compressed=True)
    return archive.getvalue()


def _unused(folder: str, names: list[str]) -> list[str]:
    """Return the names in `folder` that the zipapp leaves out."""
    return [name for name in names if name in UNUSED or not (name.endswith(USED) or (Path(folder) / name).is_dir())]


def check(modules: list[str]) -> dict[str, Any]:
    """Return the platform of this machine and the package version of each module.

    A version is None if the module is not installed, and empty if the module has no package metadata.
    """
    from evm_deploy.toolchain.platforms import host_platform

    packages = metadata.packages_distributions()

    def version(module: str) -> str | None:
        if find_spec(module) is None:
            return None
        return metadata.version(packages[module][0]) if module in packages else ""

    return {"platform": host_platform(), "versions": {module: version(module) for module in modules}}


def main() -> int:
    """Run the agent with the arguments of the process and return the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--tied"]:
        arguments = arguments[1:]
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if arguments[:1] == ["check"]:
        print(json.dumps(check(arguments[1:])))
        return 0
    from evm_deploy.bench import worker

    sys.argv[1:] = arguments[1:]
    return worker.main()


def _end_with_stdin() -> None:
    """Wait for the end of stdin, then kill this process group and remove the agent's folder."""
    while os.read(0, 1):  # not sys.stdin: this thread would hold the lock of sys.stdin when the interpreter ends
        pass
    folder, group = Path(sys.argv[0]).resolve().parent, os.getpgrp()
    if os.fork():
        return
    os.setsid()  # a child removes the files: the agent may end early because of missing files, and leave the others
    with contextlib.suppress(ProcessLookupError):  # the group has ended already
        os.killpg(group, signal.SIGKILL)
    for _ in range(REMOVALS):  # a process that is being killed may still write files
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.05)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
