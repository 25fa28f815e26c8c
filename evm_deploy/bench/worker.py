"""Measuring process: it measures one bundle and nothing else, so load time and peak memory are the bundle's.

    python -m evm_deploy.bench.worker [--tied] SUBJECT SETTINGS [KEY]

SUBJECT: path of a bundle, or of a checkpoint to measure in torch. SETTINGS: bench.record.Settings as JSON. KEY: PEM
file of the public key that must have signed the bundle. --tied: end when stdin ends.

The process prints one JSON object: the Record, or `error` with the type, text and hint of an EvmError.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evm_deploy._util.processes import end_with_stdin
from evm_deploy._util.schema import strict_json
from evm_deploy.bench import device
from evm_deploy.bench.energy import Meter
from evm_deploy.bench.latency import measure, throughput
from evm_deploy.bench.measurable import Measurable, MeasuredBundle, batch_size
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bundle import archive
from evm_deploy.bundle.bundle import refuse_part_of_a_bundle
from evm_deploy.errors import EvmError

PARTS_RUNS = 50
INTERRUPTED = 130  # exit code


def work(path: Path, settings: Settings, require_signature: str | None = None) -> Record:
    """Measure the bundle or checkpoint `path` in this process and return the record. Raises EvmError."""
    memory = {"before": peak_mb()}

    def opened() -> Measurable:
        return open_subject(path, settings, require_signature)

    fresh_ms, subject = timed(opened)
    with subject:
        batch = batch_size(subject.batch, settings.batch)
        run = subject.inference(batch, settings.timed)
        first_ms, _ = timed(run)
        facts, before = device.facts(), device.state()
        with Meter() as meter:
            latency = measure(run, streams=settings.streams, limit_s=settings.limit_s)
        after = device.state()
        memory["peak"] = peak_mb()
        parts, bundle, runtime = on_device(subject, run), subject.facts(), subject.runtime()
        runs_on = subject.runs_on
    again_ms, subject = timed(opened)
    with subject:
        warnings = device.warnings(facts, before, after)
        by_layer, stages = subject.layers(batch), subject.stages()
    if not latency.stable:
        warnings.append(f"not stable after {settings.limit_s:g} s: the medians of the windows differ by more than 5 %")
    return Record(
        bundle=bundle,
        device={"at": None, "profile": None, **facts, "runs_on": runs_on or None},
        runtime=runtime,
        settings={**settings.as_dict(), "batch": batch},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        load_ms={"fresh": round(fresh_ms, 2), "again": round(again_ms, 2)},
        first_ms=round(first_ms, 4),
        warm_up=latency.warm_up,
        stable=latency.stable,
        samples_ms=[round(value, 5) for value in latency.samples],
        summary_ms=latency.summary(),
        interval_ms=latency.interval(),
        device_ms=parts,
        stages_ms=stages,
        layers=by_layer,
        energy_mj=meter.millijoules(latency.warm_up + len(latency.samples)),
        throughput=round(throughput(latency, batch), 2),
        memory_mb={name: round(value, 1) for name, value in memory.items() if value is not None},
        before=asdict(before),
        after=asdict(after),
        warnings=warnings,
    )


def open_subject(path: Path, settings: Settings, require_signature: str | None = None) -> Measurable:
    """Load the bundle (folder or .zip) or the checkpoint file at `path`. Raises EvmError."""
    if path.is_file() and path.suffix != archive.SUFFIX and not require_signature:
        refuse_part_of_a_bundle(path)
        from evm_deploy.bench.float_model import FloatModel

        return FloatModel(path, settings)
    return MeasuredBundle(path, settings, require_signature)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Call `call` once and return its duration in ms and its result."""
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def on_device(subject: Measurable, run: Callable[[], object]) -> dict[str, float]:
    """Run PARTS_RUNS times and return the median device time of each part of a run, in ms.

    Empty if the runtime does not measure parts.
    """
    seen = []
    for _ in range(PARTS_RUNS if subject.milliseconds else 0):
        run()
        seen.append(dict(subject.milliseconds))
    return {part: round(statistics.median(each[part] for each in seen), 5) for part in (seen[0] if seen else ())}


def peak_mb() -> float | None:
    """Return the peak resident memory of this process so far, in MB (2**20 bytes); None if it is not reported.

    On Linux a process inherits ru_maxrss from its parent, so only VmHWM in /proc/self/status tells.
    """
    if sys.platform == "linux":
        peak = device.proc_kb("self/status", "VmHWM")
        return None if peak is None else peak / 1024
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)
    return None


def main() -> int:
    """Measure as the command line says and print the result as JSON. Return 0, also after an EvmError."""
    arguments = sys.argv[1:]
    if arguments[0] == "--tied":
        end_with_stdin(INTERRUPTED)
        arguments = arguments[1:]
    path, settings, *key = arguments
    try:
        print(strict_json(asdict(work(Path(path), Settings.of(json.loads(settings)), *key))))
    except EvmError as error:
        print(strict_json({"error": {"type": type(error).__name__, "text": error.args[0], "hint": error.hint}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
