"""What runs on a board: a zipapp of this package's Python, built when it is needed.

    python3 agent.pyz check MODULE..              platform, and the versions of packages, as JSON
    python3 agent.pyz measure BUNDLE SETTINGS     bench.worker

With `--tied` before these, the process and its folder go when stdin ends: when whoever started it is gone.
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
REMOVALS = 20
# sys.path, with the zipapp at its start, before the hook of an evm_deploy that is installed there for editing
START = """import sys
from importlib.machinery import PathFinder

sys.meta_path.insert(0, PathFinder)
from evm_deploy.bench.remote.agent import main

sys.exit(main())
"""
USED = (".py", ".schema.json")
UNUSED = ("demo", "lib", "__pycache__")


def build_agent(package: Path = PACKAGE) -> bytes:
    """The zipapp: a package's Python files and JSON Schemas; no other data, no native library."""
    archive = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder) / "evm_deploy", ignore=_unused)
        (Path(folder) / "__main__.py").write_text(START, encoding="utf-8")
        zipapp.create_archive(folder, archive, compressed=True)
    return archive.getvalue()


def _unused(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in UNUSED or not (name.endswith(USED) or (Path(folder) / name).is_dir())]


def check(modules: list[str]) -> dict[str, Any]:
    """This machine's platform, and the version of each module's package: None where it is not installed."""
    from evm_deploy.toolchain.platforms import host_platform

    packages = metadata.packages_distributions()

    def version(module: str) -> str | None:
        if find_spec(module) is None:
            return None
        return metadata.version(packages[module][0]) if module in packages else ""

    return {"platform": host_platform(), "versions": {module: version(module) for module in modules}}


def main() -> int:
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
    while os.read(0, 1):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    folder, group = Path(sys.argv[0]).resolve().parent, os.getpgrp()
    if os.fork():
        return
    os.setsid()  # another process: this one may end by itself meanwhile, for want of its files, and leave half of them
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.killpg(group, signal.SIGKILL)
    for _ in range(REMOVALS):  # what is being killed may write while it is being removed
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.05)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
