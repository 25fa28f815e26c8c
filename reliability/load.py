"""Load test with the embedded demo: many inferences, threads and openings; memory must not grow, results not change.

    python -m reliability.load [JOB..] [--scale 1.0] [-o dist/reliability]

Each job runs in its own process until its count is reached, or for one hour. Resident memory and file descriptors are
read after the first tenth and at the end. Exit code 1 if memory grew by more than 4 MB, a descriptor or a temporary
folder was not closed, or a result differed in any bit. Use `--scale 0.01` for a short run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy import load
from evm_deploy.bundle.archive import write_zip
from evm_deploy.demo import CHECKPOINT
from evm_deploy.export import ExportPlan, export
from reliability import chosen

if TYPE_CHECKING:
    from evm_deploy.bundle.loaded import LoadedBundle

MAX_GROWTH_MB = 4.0
IMAGES = 16  # number of different inputs, used in turn
THREADS = 8
LONGEST_S = 3600.0


@dataclass(frozen=True)
class Job:
    """A load test.

    work: yields after each step whether the result differs. count: number of steps. plan: plan of the bundle. options:
    options of `load`.
    """

    work: Callable[[Path, int, dict[str, Any]], Iterator[int]]
    count: int
    plan: ExportPlan
    options: dict[str, Any]


def infer(bundle: Path, count: int, options: dict[str, Any]) -> Iterator[int]:
    """Run inferences in one thread; yield after each whether the result differs from the first of the same image."""
    with load(bundle, **{"threads": 1, **options}) as model:
        inputs = images(model)
        first = [result(model, each) for each in inputs]
        for i in range(count):
            yield result(model, inputs[i % IMAGES]) != first[i % IMAGES]


def infer_together(bundle: Path, count: int, options: dict[str, Any]) -> Iterator[int]:
    """Run inferences in threads that share the bundle, a tenth of the count at a time; yield as `infer`."""
    with load(bundle, threads=1, streams=THREADS, **options) as model, ThreadPoolExecutor(THREADS) as pool:
        inputs = images(model)
        first = [result(model, each) for each in inputs]

        def some(offset: int) -> list[int]:
            each = range(offset, offset + count // (10 * THREADS))
            return [result(model, inputs[i % IMAGES]) != first[i % IMAGES] for i in each]

        for _ in range(10):
            for differ in pool.map(some, range(THREADS)):
                yield from differ


def open_and_close(bundle: Path, count: int, options: dict[str, Any]) -> Iterator[int]:
    """Open the bundle again and again, with one inference each; yield whether the result differs from the first."""
    with load(bundle, threads=1, **options) as model:
        image, *_ = images(model)
        first = result(model, image)
    for _ in range(count):
        with load(bundle, threads=1, **options) as model:
            yield result(model, image) != first


def open_and_close_zip(bundle: Path, count: int, options: dict[str, Any]) -> Iterator[int]:
    """Run `open_and_close` with the zip of the bundle."""
    yield from open_and_close(write_zip(bundle), count, options)


ONNX, OPENVINO, PORTABLE = ExportPlan("onnx"), ExportPlan("openvino"), ExportPlan("openvino", scan="portable")
INT8 = ExportPlan("onnx", precision="int8", calib="demo", calib_images=100)
JOBS = {
    "onnx native": Job(infer, 1_000_000, ONNX, {"scan": "plugin"}),
    "onnx portable": Job(infer, 200_000, ONNX, {"scan": "portable"}),
    "onnx int8": Job(infer, 200_000, INT8, {}),
    "openvino extension": Job(infer, 1_000_000, OPENVINO, {}),
    "openvino portable": Job(infer, 200_000, PORTABLE, {}),
    "coreml emulated": Job(infer, 1_000_000, ExportPlan("coreml"), {"threads": None}),
    "onnx 8 threads": Job(infer_together, 80_000, ONNX, {"scan": "plugin"}),
    "openvino 8 threads": Job(infer_together, 80_000, OPENVINO, {}),
    "onnx opened": Job(open_and_close, 10_000, ONNX, {}),
    "onnx zip opened": Job(open_and_close_zip, 1_000, ONNX, {}),
    "openvino opened": Job(open_and_close, 1_000, OPENVINO, {}),
}


def images(model: LoadedBundle) -> list[dict[str, Any]]:
    """Return random inputs for the model."""
    (spec,) = model.inputs.values()
    shape = [side or 1 for side in spec.shape]
    rng = np.random.default_rng(0)
    return [{spec.name: rng.integers(0, 256, shape, np.uint8)} for _ in range(IMAGES)]


def result(model: LoadedBundle, feeds: dict[str, Any]) -> bytes:
    """Run one inference and return the bytes of all outputs."""
    return b"".join(value.tobytes() for value in model.run(feeds).values())


def resident_mb() -> float:
    """Return the resident memory of this process in MB. Linux only."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def held() -> int:
    """Return the number of open file descriptors, plus the number of folders with unpacked zips."""
    return len(list(Path("/proc/self/fd").iterdir())) + len(list(Path(tempfile.gettempdir()).glob("evm-bundle-*")))


def run(job: Job, count: int, bundle: Path) -> dict[str, Any]:
    """Run a job and return its counts and its verdict."""
    work = job.work(bundle, count, job.options)
    done = differ = 0
    early: tuple[float, int] | None = None
    start = time.monotonic()
    for different in work:
        done, differ = done + 1, differ + different
        progress = max(done / count, (time.monotonic() - start) / LONGEST_S)
        if not early and progress >= 0.1:
            early = resident_mb(), held()
        if progress >= 1:
            break
    (early_mb, early_held), (late_mb, late_held) = early, (resident_mb(), held())  # both before the bundle is closed
    return {
        "done": done,
        "differ": differ,
        "seconds": round(time.monotonic() - start),
        "resident_mb": [round(early_mb, 1), round(late_mb, 1)],
        "held": [early_held, late_held],
        "ok": progress >= 1 and not differ and late_mb - early_mb <= MAX_GROWTH_MB and late_held <= early_held,
    }


def main() -> int:
    """Run the chosen jobs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the counts of all jobs")
    parser.add_argument("-o", "--out", type=Path, default=Path("dist/reliability"))
    parser.add_argument("--bundle", type=Path, help=argparse.SUPPRESS)  # in the process of one job
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.bundle:
        (name,) = args.jobs
        print(json.dumps(run(JOBS[name], count_of(JOBS[name], args.scale), args.bundle)))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen(parser, args.jobs, JOBS):
            bundle = export(CHECKPOINT, JOBS[name].plan, f"{folder}/{name}").path
            command = [sys.executable, "-m", "reliability.load", name, "--scale", str(args.scale), "--bundle", bundle]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            results[name] = json.loads(done.stdout) if done.returncode == 0 else {"ok": False, "code": done.returncode}
            print(f"{name:<20} {results[name]}", flush=True)
    (args.out / "load.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(not all(each["ok"] for each in results.values()))


def count_of(job: Job, scale: float) -> int:
    """Return the scaled count of a job, a multiple of 10 * THREADS."""
    return max(100, int(job.count * scale)) // (10 * THREADS) * (10 * THREADS)


if __name__ == "__main__":
    sys.exit(main())
