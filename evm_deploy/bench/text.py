"""Text form of a record, as evm-bench prints it, and the name of its file."""

from __future__ import annotations

import itertools
import os
import re
from contextlib import suppress
from pathlib import Path

from evm_deploy.bench.device import key
from evm_deploy.bench.record import Record, Settings
from evm_deploy.errors import UsageError


def file_name(record: Record) -> str:
    """Return the file name for a bundle and its settings, such as `<bundle>-t1-b1.json`.

    Settings that differ from their default follow: `-s2` for two streams, `-portable`, `-GPU`, `-cuda_graph`.
    """
    settings = record.settings
    parts = [record.bundle["name"], f"t{settings['threads'] or 'auto'}", f"b{settings['batch']}"]
    parts += [f"s{settings['streams']}"] if settings["streams"] != 1 else []
    parts += [settings["scan"]] if settings["scan"] != "auto" else []
    own = Settings.of(settings)
    for name, flag in own.flags().items():
        value = dict(own.own)[name]
        parts += [name if flag.here or isinstance(value, bool) else str(value)]
    parts += ["end-to-end"] if settings["timed"] == "end-to-end" else []
    return re.sub(r"[^\w.+-]", "_", "-".join(parts)) + ".json"  # a name from another machine must not act as a path


def record_path(folder: Path, record: Record) -> Path:
    """Return the path of a record in `folder`: the first of `<name>.json`, `<name>-2.json`, .. that may be written.

    A record of the same device is replaced. A record of another device, and a file that is no record, is not.
    """
    name = file_name(record).removesuffix(".json")
    for number in itertools.count(1):
        path = folder / (f"{name}-{number}.json" if number > 1 else f"{name}.json")
        if not os.path.lexists(path):
            return path
        with suppress(UsageError):
            if key(Record.read(path).device) == key(record.device):
                return path
    raise AssertionError


def lines(record: Record, path: Path) -> list[str]:
    """Return the lines that evm-bench prints for a record. path: file of the record."""
    settings, times, runs = record.settings, record.summary_ms, len(record.samples_ms)
    low, high = record.interval_ms
    at = f", at {record.device['at']}" if record.device["at"] else ""
    loads, memory = record.load_ms, record.memory_mb
    threads, scan = settings["threads"] or "auto", record.runtime["scan"]["value"]
    streams = "" if settings["streams"] == 1 else f"streams {settings['streams']}, "
    unstable = "" if record.stable else ", NOT STABLE"
    tails = "  ".join(f"{key} {times[key]:.3g}" for key in ("p90", "p99"))
    return [
        f"Measured  {record.bundle['name']}   threads {threads}, batch {settings['batch']}, "
        f"{streams}{settings['timed']}, scan {scan}{at}",
        f"Latency   p50 {times['p50']:.3g} ms (95 %: {low:.3g}-{high:.3g})  {tails}   "
        f"{record.throughput:.4g} images/s   {runs} runs{unstable}",
        *([f"Device    {parts}"] if (parts := format_parts(record.device_ms)) else []),
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
