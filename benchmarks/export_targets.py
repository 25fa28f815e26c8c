"""Time `evm-export --target all` of the embedded demo against one export for each target.

    python benchmarks/export_targets.py [--rounds 5] [--against OTHER/bin/evm-export]

Each command runs in a process of its own, imports included, as a user runs it. `all` shares one load and one trace, and
traces Core ML at the same time. --against: evm-export of another checkout, to compare two commits. The commands run in
turn. The script prints medians, and ratios to `all`.
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


def exported(command: Path, *targets: str) -> None:
    """Export the demo with one command for each of `targets`."""
    with tempfile.TemporaryDirectory() as folder:
        for target in targets:
            subprocess.run([command, "--target", target, "-q", "-o", folder], check=True, capture_output=True)


def main() -> int:
    """Time the commands in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="evm-export of another checkout")
    args = parser.parse_args()
    subjects = {
        "all": partial(exported, COMMAND, "all"),
        "one by one": partial(exported, COMMAND, *resolve_names("all")),
    }
    if args.against:
        subjects["other checkout"] = partial(exported, args.against, "all")
    times = interleave(subjects, args.rounds, warm_up=0)
    print(where())
    for name in subjects:
        print(
            f"{name:<15} {sorted(times[name])[args.rounds // 2] / 1000:6.1f} s   / all {ratio(times, name, 'all')[1]}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
