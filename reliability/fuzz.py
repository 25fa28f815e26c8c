"""Every reader of other people's files, given broken ones: it accepts or raises an EvmError, within time and memory.

    python -m reliability.fuzz [TARGET..] [--runs 20000] [--seed 1] [-o dist/reliability]

Inputs come from `corpus/<target>/` by mutation: bytes flipped, cut, repeated; in JSON also values replaced by odd ones,
of other types. Findings are written to `<out>/findings/<target>/`, and go to `regressions/<target>/` once they are
mended: tests/test_fuzz.py replays all of both, and some hundred new mutations. A target has a process of its own, so
that a crash is a finding, too. Exit 1 with findings.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evm_deploy.errors import EvmError

CORPUS = Path(__file__).parent / "corpus"
REGRESSIONS = Path(__file__).parent / "regressions"
SECONDS = 20  # that one input may take
MEMORY = 8 << 30  # bytes of address space
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", " ", "..", "../../x", "/etc/passwd", "\0", "\ud800", "a" * 5000, "NaN", "1e400", [], [[]], {},
    {"": None}, [None] * 3, [0] * 2000,
]  # fmt: skip
BYTES = [
    b"\0",
    b"\xff",
    b"\xff" * 8,
    b"\0" * 64,
    b"{",
    b"[" * 300,
    b'"',
    b"\r\n",
    b"9" * 40,
    b"..",
    b"=",
    b"\xef\xbb\xbf",
]


@dataclass(frozen=True)
class Target:
    """`read(path)` opens what is at `path`, a file named `name`. structured: JSON whose values are worth replacing.
    prepare: puts what else must be there into the folder, and gives a good file.
    """

    name: str
    read: Callable[[Path], object]
    structured: bool = False
    prepare: Callable[[Path], bytes] | None = None


def _manifest(path: Path) -> object:
    from evm_deploy.export.manifest import Manifest

    return Manifest.read(path.parent)


def _bundle(path: Path) -> object:
    """A manifest in a bundle that is good otherwise: opened, run and self-tested."""
    from evm_deploy.inference import load

    with load(path.parent, threads=1) as model:
        found = model.predict([path.parent / "selftest" / "picture.png"])
        assert all(0 <= each.score <= 1 for row in found for each in row), found
        return model.selftest()


def _demo_bundle(folder: Path) -> bytes:
    """Export the demo into `folder` -> its manifest."""
    from evm_deploy.demo import CHECKPOINT
    from evm_deploy.export.pipeline import export
    from evm_deploy.export.plan import ExportPlan

    with tempfile.TemporaryDirectory() as out:
        bundle = export(CHECKPOINT, ExportPlan("onnx"), out).path
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
    return (folder / "manifest.json").read_bytes()


def _archive(path: Path) -> object:
    from evm_deploy.export.archive import unpack

    into = path.parent / "unpacked"
    try:
        folder = unpack(path, into)
        outside = [file for file in path.parent.rglob("*") if file != path and into not in (file, *file.parents)]
        assert not outside, f"written outside: {outside}"
        return folder
    finally:
        shutil.rmtree(into, ignore_errors=True)


def _checkpoint(path: Path) -> object:
    from evm_deploy.model.checkpoint import load_checkpoint

    return load_checkpoint(path)


def _image(path: Path) -> object:
    from evm_deploy.model.preprocess import Preprocessing

    return Preprocessing((64, 64)).pixels(path)


def _table(path: Path) -> object:
    from evm_deploy.calib.table import CalibrationTable

    return CalibrationTable.from_json(path.read_bytes().decode("utf-8", "surrogateescape"))


def _record(path: Path) -> object:
    """Through the whole of evm-report: what is read is also shown."""
    from evm_deploy.report.collect import candidates, collect
    from evm_deploy.report.page import page
    from evm_deploy.report.table import grouped
    from evm_deploy.report.write import markdown, table_csv

    groups = grouped(candidates(collect([path])))
    return page(groups), markdown(groups), table_csv(groups)


def _fleet(path: Path) -> object:
    from evm_deploy.bench.fleet import read_fleet
    from evm_deploy.bench.places import Place
    from evm_deploy.bench.record import Settings
    from evm_deploy.bench.sweep import Sweep

    return read_fleet(path, Place(), Sweep((), (None,), (None,), (1,), Settings(), path.parent))


def _profile(path: Path) -> object:
    from evm_deploy.platforms import PLATFORMS
    from evm_deploy.profiles import find_profile

    return find_profile(str(path), also=PLATFORMS)


def _config(path: Path) -> object:
    from evm_deploy.cli import export_parser
    from evm_deploy.config import read_config

    return read_config(path, export_parser())


def _perf_test(path: Path) -> object:
    from evm_deploy.bench.perf_test import read

    printed, _, result = path.read_bytes().decode("utf-8", "replace").partition("====\n")
    return read(printed, result)


def _listed(path: Path) -> object:
    """A list of pictures, or an .npz."""
    from evm_deploy.calib.images import find_pictures

    return find_pictures(path)


def _labelled(path: Path) -> object:
    from evm_deploy.calib.images import labelled_images
    from evm_deploy.model.preprocess import Preprocessing

    return labelled_images(path, Preprocessing((64, 64)), 2)


TARGETS = {
    "manifest": Target("manifest.json", _manifest, structured=True),
    "bundle": Target("manifest.json", _bundle, structured=True, prepare=_demo_bundle),
    "zip": Target("bundle.zip", _archive),
    "checkpoint": Target("net.pth", _checkpoint),
    "safetensors": Target("net.safetensors", _checkpoint),
    "image": Target("picture", _image),
    "calibration": Target("table.json", _table, structured=True),
    "record": Target("record.json", _record, structured=True),
    "fleet": Target("fleet.toml", _fleet),
    "profile": Target("profile.toml", _profile),
    "config": Target("evm.toml", _config),
    "perf_test": Target("printed.txt", _perf_test),
    "listed": Target("pictures.txt", _listed),
    "npz": Target("pictures.npz", _listed),
    "labelled": Target("val.csv", _labelled),
}


def attempt(target: Target, data: bytes, folder: Path) -> bool:
    """Whether it was accepted. Raises what a reader should not: anything but an EvmError."""
    path = folder / target.name
    path.write_bytes(data)
    signal.alarm(SECONDS)
    try:
        target.read(path)
    except EvmError as error:
        assert str(error).strip(), "an error without words"
        return False
    finally:
        signal.alarm(0)
    return True


def seeds(name: str) -> list[bytes]:
    """What is committed for a target: the corpus, then what once broke it."""
    files = [*sorted((CORPUS / name).glob("*")), *sorted((REGRESSIONS / name).glob("*"))]
    return [file.read_bytes() for file in files]


def mutations(target: Target, corpus: list[bytes], seed: int) -> Iterator[bytes]:
    """Without end, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        data = rng.choice(corpus)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
            structured = target.structured and rng.random() < 0.7
            data = _odd_value(rng, data) if structured else _odd_bytes(rng, data, corpus)
        yield data


def _odd_bytes(rng: random.Random, data: bytes, corpus: list[bytes]) -> bytes:
    at, length = rng.randint(0, len(data)), rng.choice((1, 1, 2, 4, 16, 200))
    match rng.randrange(6):
        case 0:
            return data[:at] + bytes(rng.randrange(256) for _ in range(length)) + data[at + length :]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + rng.choice(BYTES) + data[at:]
        case 3:
            return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
        case 4:
            return data[:at]
        case _:
            other = rng.choice(corpus)
            return data[:at] + other[rng.randint(0, len(other)) :][: 50 * length] + data[at:]


def _odd_value(rng: random.Random, data: bytes) -> bytes:
    """One value of a JSON document, or one key, replaced or removed."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(_places(content))
    if not places:
        return data
    holder, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del holder[key]
        case 1:
            other, its = rng.choice(places)
            holder[key] = copy.deepcopy(other.get(its) if isinstance(other, dict) else other[its])
        case _:
            holder[key] = rng.choice(ODD)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def run(name: str, runs: int, seed: int, out: Path) -> dict[str, Any]:
    """Mutations of one target in this process -> counts; findings, the first of each kind, are written to `out`."""
    target, corpus = TARGETS[name], seeds(name)
    accepted, found = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        if target.prepare:
            corpus.append(target.prepare(Path(folder)))
        stream = mutations(target, corpus, seed)
        start = time.monotonic()
        for i in range(runs):
            data = corpus[i] if i < len(corpus) else next(stream)
            (out / f"{name}.last").write_bytes(data)  # what to blame when the process dies
            try:
                accepted += attempt(target, data, Path(folder))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                frame = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
                if kind not in found:
                    found[kind] = str(keep(data, name, out))
                    traceback.print_exc()
    (out / f"{name}.last").unlink()
    return {"inputs": runs, "accepted": accepted, "findings": found, "seconds": round(time.monotonic() - start, 1)}


def keep(data: bytes, name: str, out: Path) -> Path:
    path = out / "findings" / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


class Late(BaseException):
    """An input took too long; not an Exception, so that no reader swallows it."""


def limit() -> None:
    def late(*_: object) -> None:
        raise Late(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, default=Path("dist/reliability"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process of one target
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.inside:
        limit()
        print(json.dumps(run(*args.targets, args.runs, args.seed, args.out)))
        return 0
    results = {}
    for name in args.targets or TARGETS:
        command = [sys.executable, "-m", "reliability.fuzz", name, "--inside", "--runs", str(args.runs)]
        command += ["--seed", str(args.seed), "-o", str(args.out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            last = args.out / f"{name}.last"
            crash = f"the process ended with {done.returncode}"
            results[name] = {
                "inputs": 0,
                "accepted": 0,
                "findings": {crash: str(keep(last.read_bytes(), name, args.out))},
            }
        else:
            results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<12} {results[name]}", flush=True)
    (args.out / "fuzz.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["findings"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
