"""Inject faults at random points: no incomplete bundle may remain, no wrong cache entry be used, the next run succeed.

    python -m reliability.faults [FAULT..] [--runs N] [--seed 1] [-o dist/reliability]

Each run does its work in a child process: an export of the embedded demo (in float, with a calibration, or with a
library for another platform), a measurement, or inferences from a cache of compiled models. A cached result must equal
the first result. After each run every file or folder whose name does not begin with a dot must be a complete bundle or
a complete record. After all runs the same work without faults must succeed and remove the temporary files that the
faults left. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evm_deploy._util.files import sha256, write_atomically
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.run import bench
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import EvmError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from reliability import chosen

NOBODY = 65534
CRASH = 70  # exit code of a child process with an unexpected error


def export_float(folder: Path) -> None:
    """Export the demo in float32."""
    export(CHECKPOINT, ExportPlan("onnx"), folder, force=True)


def export_int8(folder: Path) -> None:
    """Export the demo in int8."""
    export(CHECKPOINT, ExportPlan("onnx", precision="int8", calib="demo", calib_images=100), folder, force=True)


def export_cross(folder: Path) -> None:
    """Export the demo with a native library for another platform, and compare the library with the first one."""
    plan = ExportPlan("onnx", precision="fp16", native_library="linux-aarch64")
    bundle = export(CHECKPOINT, plan, folder, force=True)
    unchanged(folder, bundle.path / bundle.manifest.plugins["linux-aarch64"])


def export_int8_again(folder: Path) -> None:
    """Export the demo in int8 and compare the model with the first one."""
    export_int8(folder)
    unchanged(folder, folder / "evm_digits-onnx-int8-64x64" / "model.onnx")


def infer_openvino(folder: Path) -> None:
    """Run an inference with the OpenVINO extension and the cache of compiled models; compare it with the first one."""
    bundle = next(folder.glob("evm_digits-openvino-*"), None) or export(CHECKPOINT, ExportPlan("openvino"), folder).path
    with load(bundle, cache=cache() / "models", threads=2) as model, tempfile.TemporaryDirectory() as work:
        logits = model.run({"image": np.full((1, 64, 64, 3), 90, np.uint8)})["logits"]
        logits.tofile(Path(work) / "logits")
        unchanged(folder, Path(work) / "logits")


def unchanged(folder: Path, result: Path) -> None:
    """Raise AssertionError if a file differs from the file of the first call."""
    first = folder.parent / f"{result.name}.sha256"
    if first.exists():
        assert first.read_text() == sha256(result), f"{result.name} differs from the first one"
    write_atomically(first, sha256(result))


def measure(folder: Path) -> None:
    """Measure the latency of the demo and write a record."""
    bundle = next(folder.glob("evm_digits-onnx-*"), None) or export(CHECKPOINT, ExportPlan("onnx"), folder).path
    bench(bundle, Settings(threads=1, limit_s=2.0)).write(folder / "record.json")


@dataclass(frozen=True)
class Fault:
    """A fault to inject, and the works that are run with it, in turn.

    disturb(rng, folder, pid): called in the parent while the child works. hobble(rng, folder): called in the child
    before the work. prepare(rng, folder): called before each run. twice: run two children at the same time.
    """

    works: tuple[Callable[[Path], None], ...]
    runs: int
    disturb: Callable[[random.Random, Path, int], None] | None = None
    hobble: Callable[[random.Random, Path], None] | None = None
    prepare: Callable[[random.Random, Path], None] | None = None
    twice: bool = False


@dataclass
class Tally:
    """Counts and findings of the runs of one fault."""

    runs: int = 0
    succeeded: int = 0
    refused: int = 0
    killed: int = 0
    findings: list[str] = field(default_factory=list)


def kill(rng: random.Random, folder: Path, pid: int) -> None:
    """Kill the child at a random time."""
    time.sleep(rng.uniform(0, DURATION[0]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def remove_files(rng: random.Random, folder: Path, pid: int) -> None:
    """Delete files in the hidden folders while the child writes into them."""
    end = time.monotonic() + rng.uniform(0, DURATION[0])
    while time.monotonic() < end and alive(pid):
        time.sleep(0.02)
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0][0] == "."]
    for path in rng.sample(files, min(len(files), 3)):
        path.unlink(missing_ok=True)


def no_space(rng: random.Random, folder: Path) -> None:
    """Simulate a full disk: limit the size of files to a random number of bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = int(10 ** rng.uniform(1, 6.3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def not_allowed(rng: random.Random, folder: Path) -> None:
    """Work as a user who may not write into the folder."""
    folder.chmod(0o755)
    folder.parent.chmod(0o755)
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def jumping_clock(rng: random.Random, folder: Path) -> None:
    """Let time.time() jump back and forth."""
    real = time.time
    time.time = lambda: real() + rng.choice((-1e9, -3600, 0, 3600, 1e9))  # type: ignore[assignment]


def spoil_caches(rng: random.Random, folder: Path) -> None:
    """Truncate, change or delete up to three files in the cache."""
    files = [path for path in cache().rglob("*") if path.is_file()]
    for path in rng.sample(files, min(len(files), rng.randint(1, 3))):
        content = path.read_bytes()
        match rng.randrange(4):
            case 0:
                path.write_bytes(content[: rng.randint(0, len(content))])
            case 1 if content:
                at = rng.randrange(len(content))
                path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
            case 2:
                path.write_bytes(rng.randbytes(100))
            case _:
                path.unlink()


FAULTS = {
    "kill export": Fault((export_float,), 90, disturb=kill),
    "kill calibration": Fault((export_int8,), 60, disturb=kill),
    "kill bench": Fault((measure,), 60, disturb=kill),
    "kill openvino": Fault((infer_openvino,), 30, disturb=kill),
    "file removed": Fault((export_float, export_int8), 16, disturb=remove_files),
    "disk full": Fault((export_float, export_int8, measure), 21, hobble=no_space),
    "read-only folder": Fault((export_float,), 4, hobble=not_allowed),
    "clock jumps": Fault((export_int8, measure), 6, hobble=jumping_clock),
    "two at once": Fault((export_float,), 6, twice=True),
    "caches corrupted": Fault((export_int8_again, export_cross, infer_openvino), 24, prepare=spoil_caches),
}
DURATION = [0.0]  # seconds that the work takes without faults


def cache() -> Path:
    """Return the cache folder of the test."""
    return Path(os.environ["XDG_CACHE_HOME"])


def alive(pid: int) -> bool:
    """Test whether a child process still runs."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def fork(work: Callable[[Path], None], folder: Path, hobble: Callable[[], None] | None = None) -> int:
    """Start the work in a child process and return its pid.

    The exit code of the child is 0, the exit code of an EvmError, or CRASH.
    """
    if pid := os.fork():
        return pid
    code = CRASH
    try:
        if hobble:
            hobble()
        work(folder)
        code = 0
    except EvmError as error:
        code = error.exit_code
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child process and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wrong_in(folder: Path) -> Iterator[str]:
    """Yield an error for every visible file or folder that is not a complete bundle or record."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name.endswith(".rejected"):
            continue
        try:
            Record.read(path) if path.suffix == ".json" else open_bundle(path)
        except EvmError as error:
            yield f"{path.name}: {error}"


def run(fault: Fault, rng: random.Random, folder: Path, tally: Tally) -> None:
    """Run the works of a fault and add the results to `tally`."""
    for i in range(fault.runs):
        work = fault.works[i % len(fault.works)]
        if fault.prepare:
            fault.prepare(rng, folder)
        hobble = (lambda: fault.hobble(rng, folder)) if fault.hobble else None
        pids = [fork(work, folder, hobble) for _ in range(1 + fault.twice)]
        if fault.disturb:
            fault.disturb(rng, folder, pids[0])
        for code in map(ended, pids):
            tally.runs += 1
            tally.succeeded += code == 0
            tally.killed += code == -signal.SIGKILL
            tally.refused += 2 <= code <= 6
            if code not in (0, -signal.SIGKILL, *range(2, 7)):
                tally.findings.append(f"run {i}: the process ended with {code}")
        tally.findings += [f"run {i}: {said}" for said in wrong_in(folder)]


def afterwards(fault: Fault, folder: Path) -> Iterator[str]:
    """Run the same works without faults and yield every error."""
    for work in fault.works:
        if ended(fork(work, folder)) != 0:
            yield f"afterwards {work.__name__} fails"
    yield from (f"afterwards {said}" for said in wrong_in(folder))
    yield from (f"left behind: {path.name}" for path in folder.iterdir() if path.name.startswith("."))
    for path in folder.glob("evm_digits-*"):
        if path.name.endswith(".rejected"):
            continue
        try:
            with load(path) as model:
                yield from (f"self-test of {path.name}: {check}" for check in model.selftest() if not check.ok)
        except EvmError as error:
            yield f"afterwards {path.name} does not open: {error}"


def main() -> int:
    """Inject the chosen faults; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--runs", type=int, help="number of runs of each fault; default: the number in FAULTS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, default=Path("dist/reliability"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch

    torch.set_num_threads(1)  # a forked child does not have the threads of its parent
    results: dict[str, Any] = {}
    for name in chosen(parser, args.faults, FAULTS):
        fault = FAULTS[name]
        if args.runs:
            fault = Fault(**{**vars(fault), "runs": args.runs})
        tally = Tally()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
            out = Path(folder) / "out"
            out.mkdir()
            cache().mkdir()
            first = [ended(fork(work, out)) for work in fault.works]
            assert first == [0] * len(fault.works), f"the work fails without faults: {first}"
            start = time.monotonic()  # a second time, with the caches that the first run filled
            for work in fault.works:
                ended(fork(work, out))
            DURATION[0] = (time.monotonic() - start) / len(fault.works)
            run(fault, random.Random(f"{args.seed} {name}"), out, tally)
            tally.findings += afterwards(fault, out)
        results[name] = vars(tally)
        print(f"{name:<18} {results[name]}", flush=True)
    (args.out / "faults.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["findings"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
