"""evm-doctor: list the targets that this machine can build and run, its sensors, and what to install."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evm_deploy import __version__
from evm_deploy._util.schema import strict_json
from evm_deploy.commands.console import EXIT_CODES, Parser, run_command, stdout_console
from evm_deploy.errors import ToolchainError

if TYPE_CHECKING:
    from evm_deploy.export.target import Target


def doctor_parser() -> Parser:
    """Return the argument parser of evm-doctor."""
    parser = Parser(
        "evm-doctor",
        description="List what this machine can build, run and measure, and what to install for the rest.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"evm-deploy {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `evm-doctor` with `argv` and return the exit code: 0, even if something is missing."""
    args = doctor_parser().parse_args(argv)
    return run_command("evm-doctor", lambda: _doctor(args), args)


def examine() -> dict[str, Any]:
    """Examine this machine and return plain data, as --json prints it.

    targets: by name `build`, `run`, `versions` and `hint`. kernel: path and instruction set of the native library,
    and `forced`, the value of EVM_ISA.
    device, cpu_features, gpus, state: the hardware, see `bench.device`. energy: names of the readable sensors.
    advice: changes that make measurements more reliable. profiles: the device profiles by name.
    """
    from evm_deploy.bench import device, energy
    from evm_deploy.devices.profiles import find_profile, profile_names
    from evm_deploy.export.targets import load_targets

    facts, state = device.facts(), device.state()
    return {
        "targets": {name: _abilities(target) for name, target in load_targets().items()},
        "kernel": _kernel(),
        "device": facts,
        "cpu_features": device.cpu_features(),
        "gpus": device.gpus(),
        "state": asdict(state),
        "energy": [sensor.name for sensor in energy.sensors() if energy.readable(sensor)],
        "advice": device.warnings(facts, state, state) + energy.advice(),
        "profiles": {name: asdict(find_profile(name)) for name in profile_names()},
    }


def _abilities(target: Target) -> dict[str, Any]:
    """Return whether this machine can build and run `target`, with package versions and a hint."""
    build, run = target.environment(), target.runtime.availability()
    versions = {**build.versions, **run.versions}
    return {"build": build.can_build, "run": run.can_run, "versions": versions, "hint": build.hint or run.hint}


def _kernel() -> dict[str, str]:
    """Return path and instruction set of the native library for ONNX Runtime, and the value of EVM_ISA.

    If no library is installed, or it cannot use the instruction set that EVM_ISA names, `hint` says so.
    """
    from evm_deploy.toolchain.plugins import ISA, installed_plugin, kernel_isa

    forced = os.environ.get(ISA, "")
    try:
        path = installed_plugin()
        return {"library": str(path), "isa": kernel_isa(path), "forced": forced, "hint": ""}
    except ToolchainError as error:
        return {"library": "", "isa": "", "forced": forced, "hint": str(error)}


def _doctor(args: argparse.Namespace) -> int:
    """Print the result of `examine` as a table or as JSON."""
    found = examine()
    if args.json:
        print(strict_json(found, indent=1))
        return 0
    from rich.table import Table

    table = Table("target", "build", "run", "versions", "what to do", box=None, pad_edge=False)
    for name, each in found["targets"].items():
        versions = ", ".join(f"{package} {version}" for package, version in each["versions"].items())
        table.add_row(name, *("yes" if each[key] else "no" for key in ("build", "run")), versions, each["hint"])
    console = stdout_console()
    console.print(table)
    device, kernel, state = found["device"], found["kernel"], found["state"]
    governor = device["governor"] or "not readable"
    sensors = ", ".join(f"{name} {value:.0f} C" for name, value in state["temperatures_c"].items()) or "none readable"
    by = " (forced by EVM_ISA)" if kernel["forced"] else ""
    for key, text in (
        ("kernel", f"{kernel['isa']}{by}, {kernel['library']}" if kernel["isa"] else kernel["hint"]),
        ("device", f"{device['cpu']}, {device['usable_cores']} of {device['cores']} cores, {device['memory_mb']} MB"),
        ("cpu", ", ".join(found["cpu_features"]) or "features not readable"),
        ("gpus", ", ".join(found["gpus"]) or "none found"),
        ("system", f"{device['system']}, Python {device['python']}"),
        ("clocks", f"governor {governor}"),
        ("sensors", sensors),
        ("energy", ", ".join(found["energy"]) or "none readable"),
        *(("advice", text) for text in found["advice"]),
        ("profiles", ", ".join(found["profiles"]) + "   (--device)"),
    ):
        console.print(f"{key:<8} {text}", soft_wrap=True)
    return 0
