"""Fuzz every reader of untrusted files: accept a file or raise an EvmError, within limits of time and memory.

    python -m reliability.fuzz [TARGET..] [--runs 20000] [--seed 1] [-o dist/reliability]

Needs atheris: `pip install atheris`. Inputs are mutations of the files in `corpus/<target>/`. libFuzzer's mutations are
guided by coverage of Python code. The script's own mutations also replace values in JSON by unusual values and types.
Findings are written to `<out>/findings/<target>/`; after a fix they are added to `regressions/<target>/`.
tests/test_fuzz.py replays the corpus and the regressions, and some hundred new mutations. Each target runs in its own
process, so that a crash is a finding too. Exit code 1 if there are findings.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

from evm_deploy.errors import EvmError
from reliability import chosen
from reliability.readers import TARGETS, Target, bundle_into

CORPUS = Path(__file__).parent / "corpus"
REGRESSIONS = Path(__file__).parent / "regressions"
SECONDS = 20  # longest time of one input
MEMORY = 8 << 30  # limit of the address space in bytes
GUIDES = ("evm_deploy", "json", "zipfile", "csv", "tomllib", "PIL", "torch.serialization", "torch._weights_only")
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


def attempt(target: Target, data: bytes, folder: Path) -> bool:
    """Return whether the reader accepts the data. Any error but an EvmError is a finding and is raised."""
    path = folder / target.name
    path.write_bytes(data)
    signal.alarm(SECONDS)
    try:
        target.read(path)
    except EvmError as error:
        assert str(error).strip(), "an error without a message"
        return False
    finally:
        signal.alarm(0)
    return True


def seeds(name: str) -> list[bytes]:
    """Return the committed inputs of a target: the corpus, then the regressions."""
    files = [*sorted((CORPUS / name).glob("*")), *sorted((REGRESSIONS / name).glob("*"))]
    return [file.read_bytes() for file in files]


def mutations(target: Target, corpus: list[bytes], seed: int) -> Iterator[bytes]:
    """Yield mutations without end; the same seed gives the same mutations."""
    rng = random.Random(seed)
    while True:
        yield mutated(rng, target, rng.choice(corpus), corpus)


def mutated(rng: random.Random, target: Target, data: bytes, corpus: list[bytes]) -> bytes:
    """Return `data` with one or more random changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        structured = target.structured and rng.random() < 0.7
        data = _odd_value(rng, data) if structured else _odd_bytes(rng, data, corpus)
    return data


def _odd_bytes(rng: random.Random, data: bytes, corpus: list[bytes]) -> bytes:
    at, length = rng.randint(0, len(data)), rng.choice((1, 1, 2, 4, 16, 200))
    match rng.randrange(7):
        case 0 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + bytes(rng.randrange(256) for _ in range(length)) + data[at + length :]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[:at] + rng.choice(BYTES) + data[at:]
        case 4:
            return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
        case 5:
            return data[:at]
        case _:
            other = rng.choice(corpus)
            return data[:at] + other[rng.randint(0, len(other)) :][: 50 * length] + data[at:]


def _odd_value(rng: random.Random, data: bytes) -> bytes:
    """Replace or remove one value or key of a JSON document."""
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


def run(name: str, runs: int, seed: int, out: Path) -> NoReturn:
    """Fuzz one target, guided by coverage, and end the process, as libFuzzer does.

    Writes counts to `out`/<name>.json, and the first finding of each kind to `out`/findings.
    """
    import atheris

    target, found = TARGETS[name], {}
    tried = accepted = 0
    start = time.monotonic()
    folder, corpus = Path(tempfile.mkdtemp(dir=out)), Path(tempfile.mkdtemp(dir=out))
    if target.bundle:
        bundle_into(folder, target.bundle)
    known = [*seeds(name), *(target.prepare(folder) if target.prepare else [])]
    for i, data in enumerate(known):
        (corpus / str(i)).write_bytes(data)

    def one_input(data: bytes) -> None:
        nonlocal tried, accepted
        (out / f"{name}.last").write_bytes(data)  # the input to report if the process dies
        try:
            accepted += attempt(target, data, folder)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
            if kind not in found:
                found[kind] = keep(data, name, out).name
                traceback.print_exc()
        tried += 1
        if tried == runs:
            seconds = round(time.monotonic() - start, 1)
            result = {"inputs": tried, "accepted": accepted, "findings": found, "seconds": seconds}
            (out / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
            os._exit(0)

    def mutator(data: bytes, max_size: int, state: int) -> bytes:
        rng = random.Random(state)
        if rng.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return mutated(rng, target, rng.choice((data, rng.choice(known))), known)[:max_size]

    attempt(target, known[0], folder)  # imports the modules of the reader, which are instrumented below
    for function in [each for each in gc.get_objects() if isinstance(each, FunctionType)]:
        if (function.__module__ or "").startswith(GUIDES):
            atheris.instrument_func(function)
    options = ("-runs=-1", f"-seed={seed}", f"-max_len={1 << 20}", "-mutate_depth=2", "-timeout=0")
    options += (f"-artifact_prefix={out}/",)  # folder for slow inputs, which are not used
    atheris.Setup(["fuzz", *options, str(corpus)], one_input, custom_mutator=mutator)
    atheris.Fuzz()
    raise SystemExit("libFuzzer ended early")


def keep(data: bytes, name: str, out: Path) -> Path:
    """Write a finding below `out` and return its path."""
    path = out / "findings" / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def counts(out: Path, name: str, code: int) -> dict[str, Any]:
    """Read the counts that a target's process has written; a crash of the process is a finding."""
    if code == 0:
        return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    kept = keep((out / f"{name}.last").read_bytes(), name, out)
    return {"inputs": 0, "accepted": 0, "findings": {f"the process ended with {code}": kept.name}}


class Late(BaseException):
    """Raised if an input takes too long. It is not an Exception, so that no reader catches it."""


def limit() -> None:
    """Limit the time of each input and the memory of the process."""

    def late(*_: object) -> None:
        raise Late(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> int:
    """Fuzz the chosen targets; return the exit code."""
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
        (name,) = args.targets
        run(name, args.runs, args.seed, args.out)
    if not importlib.util.find_spec("atheris"):
        parser.error("atheris is not installed: pip install atheris")
    results = {}
    for name in chosen(parser, args.targets, TARGETS):
        command = [sys.executable, "-W", "ignore", "-m", "reliability.fuzz", name, "--inside", "--runs", str(args.runs)]
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run([*command, "--seed", str(args.seed), "-o", out], capture_output=True, text=True)
            results[name] = counts(Path(out), name, done.returncode)
            if results[name]["findings"]:
                said = [line for line in done.stderr.splitlines() if not line.startswith(("#", "INFO", "WARNING"))]
                print(*said[-40:], sep="\n", file=sys.stderr)
            for path in Path(out).glob("findings/*/*"):
                keep(path.read_bytes(), name, args.out)
        print(f"{name:<12} {results[name]}", flush=True)
    (args.out / "fuzz.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["findings"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
