"""Evaluate many images in one process and on workers of Ray: compare the figures, and the time of the engine itself.

    python benchmarks/shards.py BUNDLE REFERENCE [--images 20000] [--seed 0]

Images are digits of the demo with noise. The overhead of an engine is the time from the first shard to the last, beyond
that which the shards take on the workers, divided by this time. Exit code 1 if a figure differs in any digit, or if the
overhead is above 10 %.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import where

from evm_deploy._util.cores import usable_cores
from evm_deploy.demo import digits
from evm_deploy.sweep.engine import Engine, Job, LocalEngine, Place
from evm_deploy.sweep.evaluate import Evaluated, evaluate
from evm_deploy.sweep.ray_engine import RayEngine

LIMIT = 0.10


def timed(call: Any, place: Place) -> tuple[float, Any]:
    """Run a job. Returns its seconds and its result."""
    start = time.perf_counter()
    result = call(place)
    return time.perf_counter() - start, result


class Timed:
    """Engine that notes the seconds of the jobs of another one, without those of the first on each worker."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.seconds = engine, 0.0

    def require(self, board: str) -> None:
        """Raise EvmError unless a host offers the board."""
        self.engine.require(board)

    def start(self, job: Job) -> None:
        """Begin a job."""
        self.engine.start(replace(job, call=partial(timed, job.call)))

    def next(self) -> tuple[Job, Any]:
        """Wait for a job, and add its seconds."""
        job, (seconds, result) = self.engine.next()
        self.seconds += seconds
        return job, result


def noisy(count: int, seed: int, path: Path) -> None:
    """Write `count` digits with noise, and their labels."""
    images, labels = digits("heldout")
    rng, places = np.random.default_rng(seed), np.arange(count) % len(images)
    faded = images[places] * rng.uniform(0.5, 1, (count, 1, 1)) + rng.normal(0, 20, images[places].shape)
    np.savez(path, images=faded.clip(0, 255).astype(np.uint8), labels=labels[places])


def main() -> int:
    """Print the figures of both engines, and the overhead of Ray."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(where())
    found: list[Evaluated] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        val = Path(folder) / "val.npz"
        noisy(args.images, args.seed, val)
        os.environ.setdefault("PYTHONPATH", str(Path(__file__).parent))
        for name, engine, workers in (("one process", LocalEngine(), 1), ("ray", RayEngine(), usable_cores())):
            run = partial(evaluate, args.bundle, str(val), args.reference)
            warm = Timed(engine)
            noisy(512 * workers, args.seed + 1, val)  # workers start and import
            run(engine=warm)
            noisy(args.images, args.seed, val)
            clock, start = Timed(engine), time.perf_counter()
            found.append(run(engine=clock))
            took = time.perf_counter() - start
            overhead = took * workers / clock.seconds - 1
            print(f"{name}: {workers} workers, {took:.1f} s, shards {clock.seconds:.1f} s, overhead {overhead:.1%}")
            print(f"  {found[-1].accuracy.as_dict()}")
            engine.close()
    same = found[0].accuracy == found[1].accuracy
    print(f"same figures: {same}")
    return 0 if same and overhead <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
