"""Faults at random points: afterwards no half bundle and no wrong reuse, and the next run succeeds.

    python -m reliability.faults [FAULT..] [--runs N] [--seed 1] [-o dist/reliability]

Each run does its work in a child process: exports of the embedded demo, in float, with a calibration, with a library
for another platform, measurements, inferences from a cache of compiled models. What is cached must give what it gave
first.
What it leaves is then looked at: every name that does not begin with a dot must be a whole bundle, or a whole record.
After the runs the same work, undisturbed, must succeed with what was left, and clear it away. Exit 1 when anything
else is seen.
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
CRASH = 70  # exit code of a child that met what it should not


def export_float(folder: Path) -> None:
    export(CHECKPOINT, ExportPlan("onnx"), folder, force=True)


def export_int8(folder: Path) -> None:
    export(CHECKPOINT, ExportPlan("onnx", precision="int8", calib="demo", calib_images=100), folder, force=True)


def export_cross(folder: Path) -> None:
    plan = ExportPlan("onnx", precision="fp16", native_library="linux-aarch64")
    bundle = export(CHECKPOINT, plan, folder, force=True)
    unchanged(folder, bundle.path / bundle.manifest.plugins["linux-aarch64"])


def export_int8_again(folder: Path) -> None:
    export_int8(folder)
    unchanged(folder, folder / "evm_digits-onnx-int8-64x64" / "model.onnx")


def infer_openvino(folder: Path) -> None:
    """Through the extension and the cache of compiled models."""
    bundle = next(folder.glob("evm_digits-openvino-*"), None) or export(CHECKPOINT, ExportPlan("openvino"), folder).path
    with load(bundle, cache=cache() / "models", threads=2) as model, tempfile.TemporaryDirectory() as work:
        logits = model.run({"image": np.full((1, 64, 64, 3), 90, np.uint8)})["logits"]
        logits.tofile(Path(work) / "logits")
        unchanged(folder, Path(work) / "logits")


def unchanged(folder: Path, result: Path) -> None:
    """Raise AssertionError unless a file is what it was the first time."""
    first = folder.parent / f"{result.name}.sha256"
    if first.exists():
        assert first.read_text() == sha256(result), f"{result.name} is another than at first"
    write_atomically(first, sha256(result))


def measure(folder: Path) -> None:
    bundle = next(folder.glob("evm_digits-onnx-*"), None) or export(CHECKPOINT, ExportPlan("onnx"), folder).path
    bench(bundle, Settings(threads=1, limit_s=2.0)).write(folder / "record.json")


@dataclass(frozen=True)
class Fault:
    """disturb(rng, folder, pid): from the parent, while the child works. hobble(rng, folder): in the child, before it
    works. prepare(rng, folder): before each run. A `work` each, in turn.
    """

    works: tuple[Callable[[Path], None], ...]
    runs: int
    disturb: Callable[[random.Random, Path, int], None] | None = None
    hobble: Callable[[random.Random, Path], None] | None = None
    prepare: Callable[[random.Random, Path], None] | None = None
    twice: bool = False


@dataclass
class Tally:
    """What came of the runs of one fault."""

    runs: int = 0
    succeeded: int = 0
    refused: int = 0
    killed: int = 0
    findings: list[str] = field(default_factory=list)


def kill(rng: random.Random, folder: Path, pid: int) -> None:
    time.sleep(rng.uniform(0, DURATION[0]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def remove_files(rng: random.Random, folder: Path, pid: int) -> None:
    """Somebody cleans up the hidden folders, while the child writes into them."""
    end = time.monotonic() + rng.uniform(0, DURATION[0])
    while time.monotonic() < end and alive(pid):
        time.sleep(0.02)
    files = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0][0] == "."]
    for path in rng.sample(files, min(len(files), 3)):
        path.unlink(missing_ok=True)


def no_space(rng: random.Random, folder: Path) -> None:
    """A disk that is full after so many bytes of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = int(10 ** rng.uniform(1, 6.3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def not_allowed(rng: random.Random, folder: Path) -> None:
    folder.chmod(0o755)
    folder.parent.chmod(0o755)
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def jumping_clock(rng: random.Random, folder: Path) -> None:
    real = time.time
    time.time = lambda: real() + rng.choice((-1e9, -3600, 0, 3600, 1e9))  # type: ignore[assignment]


def spoil_caches(rng: random.Random, folder: Path) -> None:
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
DURATION = [0.0]  # seconds that the work takes undisturbed


def cache() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"])


def alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def fork(work: Callable[[Path], None], folder: Path, hobble: Callable[[], None] | None = None) -> int:
    """The work in a child -> its pid. It ends with 0, the code of an EvmError, or CRASH."""
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
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wrong_in(folder: Path) -> Iterator[str]:
    """What of the names that a user would take for results is none."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name.endswith(".rejected"):
            continue
        try:
            Record.read(path) if path.suffix == ".json" else open_bundle(path)
        except EvmError as error:
            yield f"{path.name}: {error}"


def run(fault: Fault, rng: random.Random, folder: Path, tally: Tally) -> None:
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
    """The same work again, undisturbed."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--runs", type=int, help="of each fault; default: as in the table")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, default=Path("dist/reliability"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import torch

    torch.set_num_threads(1)  # children of a fork have no threads of their parent
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
            assert first == [0] * len(fault.works), f"the work itself fails: {first}"
            start = time.monotonic()  # once more, with what the first left in the caches
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
