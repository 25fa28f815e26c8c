"""evm-bench on other machines: --host, --adb, --devices; and with which device profile: --device."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.text import escape_controls
from evm_deploy.commands.console import Steps
from evm_deploy.errors import UsageError

if TYPE_CHECKING:
    from evm_deploy.bench.remote.hosts import HostOptions
    from evm_deploy.bench.sweep import Sweep


def host_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of evm-bench that say where."""
    add = parser.add_argument_group("where to measure").add_argument
    add(
        "--device",
        metavar="D",
        dest="profile",
        help="a device profile (evm-doctor lists them) or FILE.toml: its threads and settings, where not given",
    )
    add("--host", metavar="USER@BOARD[:PORT]", help="measure there, over ssh; needs Python and the runtime there")
    add("--python", default="python3", metavar="PATH", help="the board's Python, default python3")
    add("--ssh", metavar="COMMAND", help="such as 'ssh -F my_config'; default: $EVM_SSH, else ssh")
    add("--adb", metavar="SERIAL", help="measure on this Android device, with --runner")
    add("--runner", metavar="FILE", help="onnxruntime_perf_test for Android")
    add("--devices", metavar="FILE", help="TOML with several boards: measure on all at the same time")


def host_options(args: argparse.Namespace) -> HostOptions:
    """Raises UsageError for what is no place."""
    from evm_deploy.bench.remote.hosts import HostOptions

    ssh = args.ssh or os.environ.get("EVM_SSH") or "ssh"
    options = HostOptions(args.host, args.adb, args.profile, ssh, args.python, args.runner)
    if args.devices and (args.host or args.adb):
        raise UsageError("--devices names the boards", "leave --host and --adb out")
    return options


def fleet(args: argparse.Namespace, options: HostOptions, sweep: Sweep) -> int:
    """Measure on the boards of a file. Returns the exit code: the largest of the boards that failed."""
    from evm_deploy.bench.remote.fleet import read_fleet, run_fleet, table
    from evm_deploy.report.history import append

    outcomes = run_fleet(read_fleet(Path(args.devices), options, sweep), Steps(args.quiet, live=False))
    if args.db:
        append(Path(args.db), [record for outcome in outcomes for record, _ in outcome.found])
    if args.json:
        rows = [
            {"board": outcome.name, "record": str(path), **record.bundle, **record.summary_ms}
            for outcome in outcomes
            for record, path in outcome.found
        ]
        failed = [{"board": outcome.name, "error": str(outcome.error)} for outcome in outcomes if outcome.error]
        print(json.dumps([*rows, *failed], indent=1))
    else:
        print(escape_controls("\n".join([*table(outcomes), f"Saved  {sweep.out}"])))
    return max((outcome.error.exit_code for outcome in outcomes if outcome.error), default=0)
