"""Flags of evm-bench that choose the host (--host, --adb, --devices) and the device profile (--device)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.files import require_writable
from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import Steps
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.bench.remote.hosts import HostOptions
    from evm_deploy.bench.sweep import Sweep


def host_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `where to measure` to the parser of evm-bench."""
    add = parser.add_argument_group("where to measure").add_argument
    add(
        "--device",
        metavar="D",
        dest="profile",
        help="device profile (evm-doctor lists them) or FILE.toml: gives threads and settings that no flag sets",
    )
    add("--host", metavar="USER@BOARD[:PORT]", help="measure on this board over ssh; it needs Python and the runtime")
    add("--python", metavar="PATH", help="Python interpreter on the board, default python3")
    add("--ssh", metavar="COMMAND", help="ssh command, such as 'ssh -F my_config'; default: $EVM_SSH, else ssh")
    add("--adb", metavar="SERIAL", help="measure on this Android device; needs --runner")
    add("--runner", metavar="FILE", help="ONNX Runtime's onnxruntime_perf_test, compiled for Android")
    add("--devices", metavar="FILE", help="TOML file that lists several boards: measure on all of them at once")


def host_options(args: argparse.Namespace) -> HostOptions:
    """Return the host options in `args`. Raises UsageError for flags that cannot be combined."""
    from evm_deploy.bench.remote.hosts import HostOptions

    ssh = args.ssh or os.environ.get("EVM_SSH") or "ssh"
    for flag, value in (("--python", args.python), ("--ssh", args.ssh)):
        if value is not None and not (args.host or args.devices):
            raise UsageError(f"{flag} needs --host or --devices", f"leave {flag} out")
    options = HostOptions(
        args.host, args.adb, args.profile, ssh, args.python or "python3", args.runner, args.require_signature
    )
    if args.devices and (args.host or args.adb):
        raise UsageError("--devices cannot be combined with --host or --adb", "leave --host and --adb out")
    return options


def fleet(args: argparse.Namespace, options: HostOptions, sweep: Sweep) -> int:
    """Measure on every board of the file --devices, and print a table or JSON.

    Return the largest exit code of the boards that failed, or 0.
    """
    from evm_deploy.bench.remote.fleet import read_fleet
    from evm_deploy.report.history import append
    from evm_deploy.sweep.fleet import run_fleet, table

    members = read_fleet(Path(args.devices), options, sweep)
    for member in members:
        require_writable(member.sweep.out, "--out", folder=True)
    outcomes = run_fleet(members, Steps(args.quiet, live=False))
    if args.db:
        append(Path(args.db), [record for outcome in outcomes for record, _ in outcome.found])
    if args.json:
        rows = [
            {"board": outcome.name, "record": str(path), **record.bundle, **record.summary_ms}
            for outcome in outcomes
            for record, path in outcome.found
        ]
        failed = [
            {"board": outcome.name, "error": str(outcome.error), "exit_code": outcome.error.exit_code}
            for outcome in outcomes
            if outcome.error
        ]
        print(strict_json([*rows, *failed], indent=1))
    else:
        print(escape_controls("\n".join([*table(outcomes), f"Saved  {sweep.out}"])))
    return max((outcome.error.exit_code for outcome in outcomes if outcome.error), default=0)
