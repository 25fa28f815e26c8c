"""Text form of a record, as evm-bench prints it, and the name of its file."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from evm_deploy.bench import device
from evm_deploy.bench.record import Record, Settings
from evm_deploy.errors import UsageError

MAX_STEM = 200  # bytes; a file system takes 255, temporary files beside it have longer names


def file_name(record: Record) -> str:
    """Return the file name for a bundle, its settings and the machine, such as `<bundle>-t1-b1.json`.

    All that decides a record is in its name: settings that differ from their default, such as `-s2` for two streams,
    and `at` for another machine. A digest follows if a text had to be changed to be a file name, or if the record is of
    another device than this one.
    """
    settings, at = record.settings, record.device.get("at")
    parts = [
        record.bundle["name"],
        f"t{settings['threads'] or 'auto'}",
        f"b{settings['batch']}",
        *([f"s{settings['streams']}"] if settings["streams"] != 1 else []),
        *([settings["scan"]] if settings["scan"] != "auto" else []),
        *(name if value is True else f"{name}-{value}" for name, value in Settings.of(settings).own),
        *([settings["timed"]] if settings["timed"] != "model" else []),
        *([at] if at else []),
    ]
    stem = "-".join(map(str, parts))
    safe = re.sub(r"[^\w.+-]", "_", stem)  # a name from another machine must not act as a path
    safe = safe.encode()[:MAX_STEM].decode(errors="ignore")
    here = device.key({"at": None, **device.facts()}) == device.key(record.device)
    return f"{safe}{'' if safe == stem and here else f'-{_digest(record)}'}.json"


def record_path(folder: Path, record: Record) -> Path:
    """Return the path for a record in `folder`: `file_name`, with a digest or a number if something else has that name.

    A record of the same bundle name, settings and device is replaced.
    """
    name, digest = file_name(record), _digest(record)
    stem = f"{name.removesuffix('.json').removesuffix(f'-{digest}')}-{digest}"
    names = itertools.chain([name, f"{stem}.json"], (f"{stem}-{number}.json" for number in itertools.count(2)))
    return next(folder / each for each in names if _may_write(folder / each, digest))


def _may_write(path: Path, digest: str) -> bool:
    """Test whether nothing is at `path`, or a record with this digest."""
    if not os.path.lexists(path):
        return True
    with suppress(UsageError):
        return _digest(Record.read(path)) == digest
    return False


def _digest(record: Record) -> str:
    """Return eight hex digits of all that decides a record: bundle name, settings and device."""
    settings = {key: value for key, value in record.settings.items() if key != "limit_s"}
    text = json.dumps([record.bundle["name"], settings, device.key(record.device)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def scan_form(record: Record) -> str:
    """Format how the scans ran: `portable`, or `plugin (avx2)` with the instruction set of the native kernels."""
    form, isa = record.runtime["scan"]["value"], record.runtime.get("isa")
    return f"{form} ({isa})" if isa else str(form)


def lines(record: Record, path: Path) -> list[str]:
    """Return the lines that evm-bench prints for a record. path: file of the record."""
    settings, times, runs = record.settings, record.summary_ms, len(record.samples_ms)
    low, high = record.interval_ms
    at = f", at {record.device['at']}" if record.device.get("at") else ""
    loads, memory = record.load_ms, record.memory_mb
    threads, scan = settings["threads"] or "auto", scan_form(record)
    streams = "" if settings["streams"] == 1 else f"streams {settings['streams']}, "
    unstable = "" if record.stable else ", NOT STABLE"
    tails = "  ".join(f"{key} {times[key]:.3g}" for key in ("p90", "p99"))
    return [
        f"Measured  {record.bundle['name']}   threads {threads}, batch {settings['batch']}, "
        f"{streams}{settings['timed']}, scan {scan}{at}",
        f"Latency   p50 {times['p50']:.3g} ms (95 %: {low:.3g}-{high:.3g})  {tails}   "
        f"{record.throughput:.4g} images/s   {runs} runs{unstable}",
        *([f"Nodes     {placed}"] if (placed := format_nodes(record.runtime.get("nodes") or {})) else []),
        *([f"Device    {parts}"] if (parts := format_parts(record.device_ms)) else []),
        *([f"Stages    {parts}, of an image"] if (parts := format_parts(record.stages_ms)) else []),
        *([f"Layers    {shares(record)}"] if record.layers else []),
        *([f"Energy    {energy}"] if (energy := format_parts(record.energy_mj, "mJ")) else []),
        f"Load      {loads['fresh']:.0f} ms in a new process, "
        + (f"{loads['again']:.0f} ms again, " if "again" in loads else "")
        + f"first inference {record.first_ms:.3g} ms",
        "Memory    "
        + (f"peak {memory['peak']:.0f} MB" if "peak" in memory else "not reported by this system")
        + (f", {memory['before']:.0f} MB before loading" if "before" in memory else "")
        + f"   artifact {record.bundle['artifact_bytes'] / 1e6:.1f} MB",
        *(f"Note      {text}" for text in record.warnings),
        f"Saved     {path}",
    ]


def format_nodes(nodes: dict[str, int]) -> str:
    """Format the number of nodes by the execution provider that ran them: `448 on OpenVINOExecutionProvider`."""
    return ", ".join(f"{count} on {provider}" for provider, count in nodes.items())


def format_parts(parts: dict[str, float], unit: str = "ms") -> str:
    """Format values by name with their unit: `inputs 0.02 ms, compute 0.81 ms, outputs 0.01 ms`."""
    return ", ".join(f"{part} {value:.3g} {unit}" for part, value in parts.items())


def shares(record: Record) -> str:
    """Format the share of each kind of layer: `scan 43 %, projections 21 %, norms 36 %   sum 98 % of an inference`."""
    layers, total = record.layers, record.layers["sum_ms"] or 1.0
    kinds = ", ".join(f"{kind} {ms / total:.0%}" for kind, ms in layers["kinds"].items())
    return f"{kinds}   sum {layers['of_inference']:.0%} of an inference".replace("%", " %")


def layer_lines(record: Record) -> list[str]:
    """Return one line for each block or other part of the network: time in ms, share, and time by kind."""
    if not record.layers or not record.layers["modules"]:
        return ["No times by layer: evm-deploy reads no profiler of this runtime."]
    total = record.layers["sum_ms"] or 1.0
    blocks: dict[str, dict[str, float]] = {}
    for part in record.layers["modules"]:
        kinds = blocks.setdefault(block_name(part["module"]), {})
        kinds[part["kind"]] = kinds.get(part["kind"], 0.0) + part["ms"]
    width = max(map(len, blocks))
    rows = []
    for name, kinds in blocks.items():
        ms = sum(kinds.values())
        largest = dict(sorted(kinds.items(), key=lambda item: -item[1]))
        share = f"{ms / total:.1%}".replace("%", " %")
        rows.append(f"{name:<{width}}  {ms:8.3f} ms  {share:>7}   {format_parts(largest)}")
    return [*rows, f"How       {record.layers['how']}"]


def block_name(module: str) -> str:
    """Return the block that a module path belongs to.

    layers.1.blocks.0.op.in_proj -> layers.1.blocks.0; layers.2.3.se -> layers.2.3; patch_embed.2 -> patch_embed.
    """
    found = re.match(r"layers\.\d+\.(blocks\.\d+|\w+)|[^.]+", module)
    return found[0] if found else module
