"""Text form of a record, as evm-bench prints it, and the name of its file."""

from __future__ import annotations

import re
from pathlib import Path

from evm_deploy.bench.record import Record


def file_name(record: Record) -> str:
    """Return the file name for a bundle and its settings, such as `<bundle>-t1-b1.json`; `-s2` for two streams."""
    settings = record.settings
    end = "-end-to-end" if settings["timed"] == "end-to-end" else ""
    scan = "" if settings["scan"] == "auto" else f"-{settings['scan']}"
    streams = "" if settings["streams"] == 1 else f"-s{settings['streams']}"
    name = re.sub(r"[^\w.+-]", "_", record.bundle["name"])  # a name from another machine must not act as a path
    return f"{name}-t{settings['threads'] or 'auto'}-b{settings['batch']}{streams}{scan}{end}.json"


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
        f"Memory    peak {memory['peak']:.0f} MB"
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
    layers = record.layers
    kinds = ", ".join(f"{kind} {ms / layers['sum_ms']:.0%}" for kind, ms in layers["kinds"].items())
    return f"{kinds}   sum {layers['of_inference']:.0%} of an inference".replace("%", " %")


def layer_lines(record: Record) -> list[str]:
    """Return one line for each block or other part of the network: time in ms, share, and time by kind."""
    if not record.layers:
        return ["No times by layer: evm-deploy reads no profiler of this runtime."]
    blocks: dict[str, dict[str, float]] = {}
    for part in record.layers["modules"]:
        kinds = blocks.setdefault(block_name(part["module"]), {})
        kinds[part["kind"]] = kinds.get(part["kind"], 0.0) + part["ms"]
    width = max(map(len, blocks))
    rows = []
    for name, kinds in blocks.items():
        ms = sum(kinds.values())
        largest = dict(sorted(kinds.items(), key=lambda item: -item[1]))
        share = f"{ms / record.layers['sum_ms']:.1%}".replace("%", " %")
        rows.append(f"{name:<{width}}  {ms:8.3f} ms  {share:>7}   {format_parts(largest)}")
    return [*rows, f"How       {record.layers['how']}"]


def block_name(module: str) -> str:
    """Return the block that a module path belongs to.

    layers.1.blocks.0.op.in_proj -> layers.1.blocks.0; layers.2.3.se -> layers.2.3; patch_embed.2 -> patch_embed.
    """
    found = re.match(r"layers\.\d+\.(blocks\.\d+|\w+)|[^.]+", module)
    return found[0] if found else module
