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
    for key, value in content.items():
        action = actions[one_of(f"--config {path}: key", key.replace("_", "-"), actions)]
        if isinstance(action, argparse._StoreConstAction):  # flags without a value, such as fp16 = true
            if not isinstance(value, bool):
                raise UsageError(f"--config {path}: {key} must be true or false, got {value!r}")
            if value:
                values[action.dest] = action.const
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict | bool):
            raise UsageError(f"--config {path}: {key} must be a string, a number or a list, got {value!r}")
        values[action.dest] = str(value)
    return values
