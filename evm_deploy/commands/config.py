"""Reader of `--config FILE.toml`: every flag is a key of the file, and a flag on the command line overrides its key."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evm_deploy._util.text import one_of
from evm_deploy._util.toml import read_toml
from evm_deploy.errors import UsageError


def read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read the TOML file `path` and return its values as defaults for `parser`, by argument name.

    Keys are flag names without dashes in front, with `-` or `_` between words. Raises UsageError for an unknown key or
    a value of the wrong type.
    """
    content = read_toml(path, "--config")
    actions = {
        name.lstrip("-"): action
        for action in parser._actions
        for name in (action.option_strings or [action.dest])
        if action.dest not in ("help", "config", "version")
    }
    values: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key, value in content.items():
        action = actions[one_of(f"--config {path}: key", key.replace("_", "-"), actions)]
        where = f"--config {path}: {key}"
        flag = isinstance(action, argparse._StoreConstAction)  # without a value, such as fp16 = true
        if flag and not isinstance(value, bool):
            raise UsageError(f"{where} must be true or false, got {value!r}")
        if flag and not value:
            continue
        if isinstance(value, list) and "," in str(action.metavar):
            value = ",".join(map(str, value))
        elif isinstance(value, list):
            form = f"{action.metavar}" if action.metavar else "one value"
            raise UsageError(f"{where} must be one value, got {value!r}", f"write it as on the command line: {form}")
        if not flag and isinstance(value, dict | bool):
            raise UsageError(f"{where} must be a string, a number or a list, got {value!r}")
        if "\0" in str(value):
            raise UsageError(f"{where} holds a NUL character", "no path or name has one")
        if value == "":
            raise UsageError(f"{where} is empty", f"give a value, or leave {key} out")
        if action.dest in keys:
            raise UsageError(f"{where} and {keys[action.dest]} set the same: leave one of them out")
        keys[action.dest] = key
        values[action.dest] = action.const if flag else str(value)
    return values
