"""Worker of a Ray cluster: a host whose boards are resources of the cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from evm_deploy._util import processes
from evm_deploy._util.packages import install_hint
from evm_deploy._util.text import command
from evm_deploy.errors import ToolchainError
from evm_deploy.sweep.boards import FLEET, Boards
from evm_deploy.sweep.ray_engine import ENVIRONMENT, RESOURCE, require_answer


@dataclass(frozen=True)
class Worker:
    """Host of a fleet. address: `host:port` of the head of the cluster. cpus: jobs beside each other on the host."""

    fleet: str
    boards: Boards
    address: str
    cpus: int

    @property
    def resources(self) -> dict[str, int]:
        """Resources of the cluster that this host adds: one for each board, by name, and their number by class."""
        names = [name for each in self.boards.members for name in (each.name, each.options.device) if name]
        return {RESOURCE + name: count for name, count in sorted(Counter(names).items())}

    @property
    def command(self) -> list[str]:
        """Command that starts Ray, which runs until it is interrupted."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.address}"]
        return [*ray, f"--num-cpus={self.cpus}", f"--resources={json.dumps(self.resources)}", "--block"]

    @property
    def line(self) -> str:
        """The command as a shell takes it, with the variable that tells its jobs which boards there are."""
        return f"{FLEET}={command(Path(self.fleet).resolve())} {command(*self.command)}"

    def run(self) -> int:
        """Start Ray and wait for its end. Returns its exit code. Raises ToolchainError if it cannot be started."""
        if not find_spec("ray"):
            raise ToolchainError("evm-sweep worker needs Ray, which is not installed", install_hint("ray"))
        require_answer(self.address)
        variables = {**ENVIRONMENT, **os.environ, FLEET: str(Path(self.fleet).resolve())}
        with processes.Process(self.command, env=variables, stdin=subprocess.DEVNULL) as ray:
            return int(ray.wait())
