"""Time one export of the embedded demo to several targets against one export for each target.

    python benchmarks/export_targets.py [--targets all] [--rounds 5] [--against OTHER/bin/evm-export]

Each command runs in a process of its own, imports included, as a user runs it. One command shares one load and one
trace, and traces Core ML at the same time. --against: evm-export of another checkout, to compare two commits; then
--targets names targets that both have. The commands run in turn. The script prints medians, and ratios to the first
command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from common import interleave, ratio, where

from evm_deploy.export.targets import resolve_names

COMMAND = Path(sys.executable).parent / "evm-export"
ALL = "one command"


def exported(command: Path, *targets: str) -> None:
    """Export the demo with one command for each of `targets`."""
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            subprocess.run([command, "--target", target, "-q", "-o", folder], check=True, capture_output=True)


def main() -> int:
    """Time the commands in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", default="all", help="as --target of evm-export")
    parser.add_argument("--against", type=Path, help="evm-export of another checkout")
    args = parser.parse_args()
    subjects = {
        ALL: partial(exported, COMMAND, args.targets),
        "one by one": partial(exported, COMMAND, *resolve_names(args.targets)),
    }
    if args.against:
        subjects["other checkout"] = partial(exported, args.against, args.targets)
    times = interleave(subjects, args.rounds, warm_up=0)
    print(f"{where()}, targets {args.targets}")
    for name in subjects:
        print(
            f"{name:<15} {sorted(times[name])[args.rounds // 2] / 1000:6.1f} s   / {ALL} {ratio(times, name, ALL)[1]}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
