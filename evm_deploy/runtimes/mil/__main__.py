"""`python -m evm_deploy.runtimes.mil model.mlpackage`: print inputs, operations and outputs of a Core ML program."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.own_process import set_up_own_process
from evm_deploy._util.text import escape_controls
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.runtimes.base import TensorSpec, check_feeds
from evm_deploy.runtimes.mil.runtime import MilRuntime


def main() -> int:
    """Parse the arguments and run the program. Returns 0, or the exit code of the error."""
    parser = argparse.ArgumentParser("evm_deploy.runtimes.mil", description="Run an mlprogram package without Core ML.")
    parser.add_argument("package", type=Path, metavar="model.mlpackage")
    parser.add_argument("--function", metavar="F", help="function to run; default: the package's default")
    parser.add_argument("--exact", action="store_true", help="skip float16 roundings between operations")
    parser.add_argument("--inputs", type=Path, metavar="X.npz", help="arrays by input name; default: seeded noise")
    parser.add_argument("--outputs", type=Path, metavar="Y.npz", help="write the outputs to this file")
    args = parser.parse_args()
    set_up_own_process()
    try:
        _run(args)
    except EvmError as error:
        print(f"{parser.prog}: {escape_controls(error)}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(args: argparse.Namespace) -> None:
    with MilRuntime(args.package, args.function, exact=args.exact) as runtime:
        counts = Counter(op.type for op in runtime.program.operations)
        print("inputs    ", ", ".join(map(str, runtime.inputs.values())))
        print("operations", counts.total(), " ".join(f"{name} {count}" for name, count in counts.most_common()))
        feeds = _read(args.inputs) if args.inputs else {s.name: _noise(s) for s in runtime.inputs.values()}
        check_feeds(runtime.inputs, feeds)
        outputs = runtime.run(feeds)
        for name, value in outputs.items():
            print(f"{runtime.outputs[name]}   {value.min():.6g} to {value.max():.6g}, mean {value.mean():.6g}")
    if args.outputs:
        np.savez(args.outputs, **outputs)  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--inputs {path} is not an .npz file of arrays") from error


def _noise(spec: TensorSpec) -> NDArray[Any]:
    rng, shape = np.random.default_rng(0), tuple(size or 1 for size in spec.shape)
    if spec.dtype == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape).astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(main())
