"""`bench()`: measure the latency of a bundle on this machine, in a new process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from evm_deploy import errors
from evm_deploy._util import processes
from evm_deploy._util.schema import TEXT, Schema, keys
from evm_deploy.bench.record import Record, Settings
from evm_deploy.errors import ToolchainError

STARTUP_S = 600.0  # time for loading, in addition to the limit of the measurement
DEFAULTS = Settings()
UTF8 = {"PYTHONIOENCODING": "utf-8"}  # the result is read as UTF-8, whatever the user's terminal takes
FAILED = Schema(lambda: keys(error=keys(type=TEXT, text=TEXT, hint=TEXT)))


def bench(bundle: str | Path, settings: Settings = DEFAULTS, require_signature: str | Path | None = None) -> Record:
    """Measure a bundle, or a checkpoint in torch, in a new process and return the record.

    require_signature: PEM file of the public key that must have signed the bundle.

    Raises BundleError, UsageError, and ToolchainError if the target does not run on this machine, the process died, or
    the measurement did not end within settings.limit_s + 600 seconds.
    """
    command = [sys.executable, "-m", "evm_deploy.bench.worker", "--tied", str(bundle), json.dumps(settings.as_dict())]
    command += [str(require_signature)] if require_signature else []
    try:
        done = processes.run(command, timeout=settings.limit_s + STARTUP_S, tied=True, env={**os.environ, **UTF8})
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"measuring {bundle} did not end within {error.timeout:.0f} s") from error
    return record_of(done.stdout, done.stderr, done.returncode, str(bundle))


def ended(code: int | None) -> str:
    """Return how a process ended: `died with code 1`, or `was ended by SIGKILL`, as by a system without memory."""
    if code is None or code >= 0:
        return f"died with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def record_of(stdout: str, stderr: str, code: int | None, bundle: str) -> Record:
    """Parse the output of the measuring process (bench/worker.py) into a record.

    Raises the EvmError that the process reported, or ToolchainError if the process died.
    """
    try:
        content = json.loads(stdout.splitlines()[-1])
        failed = isinstance(content, dict) and "error" in content
        if failed:
            FAILED(content)
    except (IndexError, ValueError, RecursionError) as error:
        said = (stderr.strip().splitlines() or ["no error message"])[-1]
        raise ToolchainError(f"the process measuring {bundle} {ended(code)}: {said}") from error
    if failed:
        kinds = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}
        kind = kinds.get(content["error"]["type"], ToolchainError)
        raise kind(content["error"]["text"], content["error"]["hint"])
    return Record.parse(content, f"the result for {bundle}")
