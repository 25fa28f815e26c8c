"""Measure `pip install evm-deploy[run-onnx]` in a new virtual environment: size, import time, imported modules.

    python benchmarks/run_only.py BUNDLE [--runs 9]

Sizes are those of the installed files, without the byte code that pip writes. The times of the import and of the first
prediction are measured in new processes, minus the start of Python. Exit code 1 if the packages beside the runtime's
wheel are larger than 150 MB, if the import takes over half a second, or if torch is imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from common import where

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MB, LIMIT_S = 150.0, 0.5
SIZES = """
import json
from importlib import metadata
from pathlib import Path

def size(distribution):
    paths = [Path(str(file.locate())) for file in distribution.files or []]
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".pyc") / 1e6

ours = [each for each in metadata.distributions() if each.name not in ("pip", "setuptools")]
print(json.dumps({each.name: size(each) for each in ours}))
"""
IMPORT = "from evm_deploy import load"
PREDICT = f"import sys; {IMPORT}; load(sys.argv[1]).predict([sys.argv[2]]); print('torch' in sys.modules)"


def seconds(python: Path, code: str, *arguments: object, runs: int) -> list[float]:
    """Measure a command in new processes, in seconds; a first process fills the caches and is not counted."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([python, "-c", code, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    image = args.bundle / "selftest" / "picture.png"
    print(where())
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"{ROOT}[run-onnx]"], check=True)
        sizes = json.loads(subprocess.run([python, "-c", SIZES], check=True, capture_output=True, text=True).stdout)
        for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
            print(f"{name:<20} {size:7.1f} MB")
        beside = sum(sizes.values()) - sizes["onnxruntime"]
        print(f"beside onnxruntime   {beside:7.1f} MB, limit {LIMIT_MB:.0f}")
        bare = statistics.median(seconds(python, "pass", runs=args.runs))
        took = {}
        for what, code in {"import": IMPORT, "to the first prediction": PREDICT}.items():
            times = [value - bare for value in seconds(python, code, args.bundle, image, runs=args.runs)]
            took[what] = statistics.median(times)
            print(f"{what:<24} {took[what]:.2f} s ({min(times):.2f} to {max(times):.2f}) over Python's own {bare:.2f}")
        predict = [python, "-c", PREDICT, str(args.bundle), str(image)]
        torch = subprocess.run(predict, check=True, capture_output=True, text=True).stdout.strip() == "True"
        print(f"torch imported: {torch}")
    return int(beside > LIMIT_MB or took["import"] > LIMIT_S or torch)


if __name__ == "__main__":
    sys.exit(main())
