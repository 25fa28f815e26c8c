"""Kill a sweep at random points until it is complete: nothing may be lost, nothing done twice, results be the same.

    python -m reliability.sweeps [--kills 200] [--seed 1] [-o dist/reliability]

Each sweep exports the embedded demo in three sizes, evaluates and measures it, in a child process that is killed and
started again. After each kill every unit that is said to be done must have its whole result. When a sweep is complete,
each unit must be done once, reports must have each measurement once, and models and figures must be those of a sweep
that nobody killed. Then the next sweep begins, in another folder. Exit code 1 if a check fails. The suite does the same
with a few kills and units that are made up (tests/test_sweep.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from evm_deploy._util.files import sha256, write_atomically
from evm_deploy.bench.record import Record
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.demo import digits
from evm_deploy.errors import EvmError
from evm_deploy.report.collect import candidates, collect
from evm_deploy.sweep.engine import LocalEngine
from evm_deploy.sweep.folder import RunFolder
from evm_deploy.sweep.packed import read_rows
from evm_deploy.sweep.plan import read_sweep
from evm_deploy.sweep.run import SweepRun
from reliability.faults import ended, fork

PAUSE_S = 3.0  # longest time between the start of a child process and its death
SWEEP = """
checkpoints = "demo:digits"
forms = "onnx:fp32"
imgsz = [32, 48, 64]
[data]
val = "val.npz"
[[bench]]
threads = 1
limit = 0.2
"""


def sweep(out: Path, folder: Path) -> None:
    """Do what is missing of the sweep in `out`. folder: has its file."""
    run_folder = RunFolder(out)
    with run_folder.locked():
        outcomes = SweepRun(read_sweep(folder / "sweep.toml"), run_folder).run(LocalEngine())
    failed = [each.error for each in outcomes if each.error]
    if failed:
        raise failed[0]


def wrong_in(out: Path) -> Iterator[str]:
    """Yield an error for each unit that is said to be done and has no whole result."""
    for file in out.glob("units/*.json"):
        result = json.loads(file.read_bytes())["result"]
        try:
            if "bundle" in result:
                open_bundle(out / result["bundle"])
            elif "record" in result:
                Record.read(out / result["record"])
            else:
                read_rows(out / result["rows"])
        except (EvmError, OSError, ValueError) as error:
            yield f"{file.name}: {error}"


@dataclass(frozen=True)
class Complete:
    """State of a complete sweep. units: names of the done-files. measurements: number in a report.

    figures: digests of the models and of the accuracy of each bundle, by path. left: temporary files.
    """

    units: frozenset[str]
    measurements: int
    figures: dict[str, str]
    left: tuple[Path, ...] = ()

    @classmethod
    def of(cls, out: Path) -> Complete:
        """Read the state of the sweep in `out`."""
        files = (each for pattern in ("bundles/*/*/model.onnx", "judged/*.json") for each in out.glob(pattern))
        return cls(
            frozenset(each.name for each in out.glob("units/*.json")),
            sum(each.record is not None for each in candidates(collect([out]))),
            {each.relative_to(out).as_posix(): sha256(each) for each in files},
            tuple(out.rglob(".*")),
        )

    def differences(self, wanted: Complete) -> Iterator[str]:
        """Yield what differs from a sweep that nobody killed."""
        for what, mine, theirs in (
            ("units", self.units, wanted.units),
            ("measurements", self.measurements, wanted.measurements),
            ("models or figures", self.figures, wanted.figures),
        ):
            if mine != theirs:
                yield f"{what} differ from those of the first sweep: {mine}, {theirs}"
        yield from (f"left behind: {each}" for each in self.left)


def killed(folder: Path, kills: int, rng: random.Random, pause_s: float = PAUSE_S) -> tuple[int, list[str]]:
    """Do sweeps and kill them, `kills` times in all. folder: has sweep.toml. pause_s: longest time before a kill.

    Returns the number of sweeps, and what was found wrong.
    """
    assert ended(fork(partial(sweep, folder=folder), folder / "first")) == 0, "the sweep fails without kills"
    wanted = Complete.of(folder / "first")
    assert wanted.units and wanted.measurements and wanted.figures and not wanted.left
    done, sweeps, findings = 0, 0, list[str]()
    while done < kills:
        out, sweeps, code = folder / f"run{sweeps}", sweeps + 1, -signal.SIGKILL
        while code == -signal.SIGKILL:
            pid = fork(partial(sweep, folder=folder), out)
            if done < kills:
                time.sleep(rng.uniform(0, pause_s))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            done += code == -signal.SIGKILL
            findings += wrong_in(out)
        findings += [f"sweep {sweeps} ended with {code}"] if code else Complete.of(out).differences(wanted)
    return sweeps, findings


def main() -> int:
    """Kill sweeps; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, default=Path("dist/reliability"))
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # a forked child does not have the threads of its parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        images, labels = digits("heldout")
        np.savez(folder / "val.npz", images=images[:60], labels=labels[:60])
        (folder / "sweep.toml").write_text(SWEEP)
        sweeps, findings = killed(folder, args.kills, random.Random(args.seed))
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"kills": args.kills, "sweeps": sweeps, "findings": findings}
    write_atomically(args.out / "sweeps.json", json.dumps(result, indent=1) + "\n")
    print(result)
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
