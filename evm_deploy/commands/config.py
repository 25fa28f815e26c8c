"""`--config evm.toml`: every flag as a key; what is said on the command line wins."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evm_deploy._util.text import one_of
from evm_deploy._util.toml import read_toml
from evm_deploy.errors import UsageError


def read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults for `parser` from the TOML file at `path`; keys are flag names, `-` or `_`. Raises UsageError."""
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
        if isinstance(action, argparse._StoreConstAction):  # flags, and shorthands such as fp16 = true
            if not isinstance(value, bool):
                raise UsageError(f"--config {path}: {key} must be true or false, got {value!r}")
            if value:
                values[action.dest] = action.const
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict | bool):
            raise UsageError(f"--config {path}: {key} cannot be {value!r}")
        values[action.dest] = str(value)
    return values
