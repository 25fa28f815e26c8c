"""Folder of a sweep: its bundles, records and rows, and one file for each unit that is done, written last.

plan.json            units of the sweep
units/<key>.json     done: what the unit was, its result, where and how long it ran
failed/<key>.json    failed: the error and its hint
bundles/<key>/<name> records/<board>/<name>-<key>.json rows/<key>.npz outputs/<key>.npz judged/<key>.json
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evm_deploy import errors
from evm_deploy._util.files import lock_folder, write_atomically
from evm_deploy._util.kept import continued
from evm_deploy._util.schema import TEXT, Schema, keys, strict_json
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.sweep.engine import CrashError

PLAN, UNITS, FAILED = "plan.json", "units", "failed"
BUNDLES, RECORDS, ROWS, OUTPUTS, JUDGED = "bundles", "records", "rows", "outputs", "judged"
MADE = ("bundle", "record", "rows", "outputs")  # keys of results that are paths
LIST = {"type": "array", "items": TEXT}
FAILURE = Schema(lambda: keys(unit=TEXT, type=TEXT, text=TEXT, hint=TEXT))
PLANNED = Schema(lambda: {"type": "array", "items": keys(key=TEXT, kind=TEXT, title=TEXT, after=LIST)})


def is_sweep(path: Path) -> bool:
    """Test whether a folder is that of a sweep."""
    return (path / PLAN).is_file()


@dataclass(frozen=True)
class RunFolder:
    """Folder of a sweep, plain data. Paths in it are relative to it, so that it can be moved."""

    path: Path

    @contextlib.contextmanager
    def locked(self, beside: bool = False) -> Iterator[None]:
        """Context manager: have the folder alone. Raises UsageError if it is in use, or holds something else.

        beside: other files may be in the folder. The lock ends with the process. There is none on file systems without
        locks.
        """
        if is_sweep(self.path):
            try:
                self.units()
            except UsageError as error:
                raise UsageError(error.args[0], "choose another --out") from error
        elif not beside and self.path.is_dir() and any(self.path.iterdir()):
            raise UsageError(f"{self.path} is not empty, and does not hold a sweep", "choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / PLAN).exists():
            self.write(PLAN, [])
        lock = lock_folder(self.path)
        if lock is None and os.name == "posix":
            raise UsageError(
                f"{self.path} is in use by another command, or cannot be locked",
                "wait for it, or choose another --out",
            )
        try:
            with continued(self.path):
                yield
        finally:
            if lock is not None:
                os.close(lock)

    def read(self, name: str) -> Any:
        """Return the content of a JSON file, None if it is missing or damaged, as after a power failure."""
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file, at once. Raises OSError."""
        write_atomically(self.path / name, strict_json(content, indent=1) + "\n")

    def done(self, key: str) -> dict[str, Any] | None:
        """Return the facts of a unit that is done and whose files are there, else None."""
        facts = self.read(f"{UNITS}/{key}.json")
        if not isinstance(facts, dict) or not isinstance(facts.get("result"), dict):
            return None
        made = [facts["result"].get(name) for name in MADE]
        return facts if all((self.path / str(name)).exists() for name in made if name is not None) else None

    def finish(self, key: str, facts: dict[str, Any]) -> None:
        """Write that a unit is done. Raises OSError."""
        self.write(f"{UNITS}/{key}.json", facts)
        (self.path / FAILED / f"{key}.json").unlink(missing_ok=True)

    def failure(self, key: str) -> EvmError | None:
        """Return the error that a unit failed with, else None."""
        content = self.read(f"{FAILED}/{key}.json")
        try:
            FAILURE(content)
        except ValueError:
            return None
        kinds = {each.__name__: each for each in vars(errors).values() if isinstance(each, type)}
        kind: Any = {**kinds, CrashError.__name__: CrashError}.get(content["type"], EvmError)
        error: EvmError = kind(content["text"], content["hint"])
        return error

    def fail(self, key: str, title: str, error: EvmError) -> None:
        """Write that a unit failed. Raises OSError."""
        content = {"unit": title, "type": type(error).__name__, "text": str(error.args[0]), "hint": error.hint}
        self.write(f"{FAILED}/{key}.json", content)

    def tidy(self) -> None:
        """Remove the temporary folders of killed workers, when all units have ended (`_util.files.temporary_sibling`).

        Exports remove their own. A worker of a lost driver that still writes fails, and its unit is done already.
        """
        places = [
            self.path,
            *(self.path / name for name in (UNITS, FAILED, ROWS, OUTPUTS, JUDGED)),
            *self.path.glob(f"{RECORDS}/*"),
        ]
        for left in (each for place in places for each in place.glob(".*")):
            if re.fullmatch(r"\..+\.(json|npz)\.\d+\.\w+", left.name) and left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)

    def undo(self, key: str) -> None:
        """Let a unit be done again."""
        (self.path / UNITS / f"{key}.json").unlink(missing_ok=True)

    def forget_failures(self, keys: Sequence[str]) -> None:
        """Let failed units be done again."""
        for key in keys:
            (self.path / FAILED / f"{key}.json").unlink(missing_ok=True)

    def units(self) -> list[dict[str, Any]]:
        """Return key, kind, title and dependencies of each unit, in order. Raises UsageError for another folder."""
        content = self.read(PLAN)
        try:
            PLANNED(content)
        except ValueError as error:
            what = "does not hold a sweep"
            if is_sweep(self.path):
                what = f"does not hold a sweep: its {PLAN} is something else, or damaged"
            raise UsageError(f"{self.path} {what}", "evm-sweep SWEEP.toml -o FOLDER writes a sweep") from error
        return list(content)
