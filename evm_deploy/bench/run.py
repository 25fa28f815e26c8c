"""bench(): a bundle's latency on this machine, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from evm_deploy import errors
from evm_deploy._util.schema import TEXT, Schema, keys
from evm_deploy.bench.record import Record, Settings
from evm_deploy.errors import ToolchainError

STARTUP_S = 600.0  # for loading, beside the measurement's own limit
DEFAULTS = Settings()
FAILED = Schema(lambda: keys(error=keys(type=TEXT, text=TEXT, hint=TEXT)))


def bench(bundle: str | Path, settings: Settings = DEFAULTS) -> Record:
    """Measure a bundle in a new process. Raises EvmErrors: BundleError, UsageError, and ToolchainError where the
    target does not run on this machine or the process died.
    """
    command = [sys.executable, "-m", "evm_deploy.bench.worker", str(bundle), json.dumps(settings.as_dict())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=settings.limit_s + STARTUP_S)
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"measuring {bundle} did not end within {error.timeout:.0f} s") from error
    return record_of(done.stdout, done.stderr, done.returncode, str(bundle))


def record_of(stdout: str, stderr: str, code: int | None, bundle: str) -> Record:
    """What the process that measured printed. Raises the EvmError that it did, ToolchainError where it died."""
    try:
        content = json.loads(stdout.splitlines()[-1])
        failed = isinstance(content, dict) and "error" in content
        if failed:
            FAILED(content)
    except (IndexError, ValueError, RecursionError) as error:
        said = (stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ToolchainError(f"the process that measured {bundle} died with code {code}: {said}") from error
    if failed:
        kinds = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}
        kind = kinds.get(content["error"]["type"], ToolchainError)
        raise kind(content["error"]["text"], content["error"]["hint"])
    return Record.parse(content, f"what came of {bundle}")
