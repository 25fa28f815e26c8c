"""A Record in words."""

from __future__ import annotations

import re
from pathlib import Path

from evm_deploy.bench.record import Record


def file_name(record: Record) -> str:
    """`<bundle>-t1-b1.json`: one file for one bundle and setting."""
    settings = record.settings
    end = "-end-to-end" if settings["timed"] == "end-to-end" else ""
    scan = "" if settings["scan"] == "auto" else f"-{settings['scan']}"
    name = re.sub(r"[^\w.+-]", "_", record.bundle["name"])  # a name from another machine is no path
    return f"{name}-t{settings['threads'] or 'auto'}-b{settings['batch']}{scan}{end}.json"


def lines(record: Record, path: Path) -> list[str]:
    """The block that a user reads."""
    settings, times, runs = record.settings, record.summary_ms, len(record.samples_ms)
    low, high = record.interval_ms
    at = f", at {record.device['at']}" if record.device["at"] else ""
    loads, memory = record.load_ms, record.memory_mb
    threads, scan = settings["threads"] or "auto", record.runtime["scan"]["value"]
    unstable = "" if record.stable else ", NOT STABLE"
    tails = "  ".join(f"{key} {times[key]:.3g}" for key in ("p90", "p99"))
    return [
        f"Measured  {record.bundle['name']}   threads {threads}, batch {settings['batch']}, "
        f"{settings['timed']}, scan {scan}{at}",
        f"Latency   p50 {times['p50']:.3g} ms (95 %: {low:.3g}-{high:.3g})  {tails}   "
        f"{record.throughput:.4g} images/s   {runs} runs{unstable}",
        *([f"Device    {parts}"] if (parts := in_words(record.device_ms)) else []),
        f"Load      {loads['fresh']:.0f} ms in a new process, "
        + (f"{loads['again']:.0f} ms again, " if "again" in loads else "")
        + f"first inference {record.first_ms:.3g} ms",
        f"Memory    peak {memory['peak']:.0f} MB"
        + (f", {memory['before']:.0f} MB before loading" if "before" in memory else "")
        + f"   artifact {record.bundle['artifact_bytes'] / 1e6:.1f} MB",
        *(f"Note      {text}" for text in record.warnings),
        f"Saved     {path}",
    ]


def in_words(parts: dict[str, float]) -> str:
    """`inputs 0.02 ms, compute 0.81 ms, outputs 0.01 ms`."""
    return ", ".join(f"{part} {value:.3g} ms" for part, value in parts.items())
