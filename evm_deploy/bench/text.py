"""A Record in words."""

from __future__ import annotations

from pathlib import Path

from evm_deploy.bench.record import Record, Settings


def file_name(record: Record) -> str:
    """`<bundle>-t1-b1.json`: one file for one bundle and setting."""
    settings = record.settings
    end = "-end-to-end" if settings["timed"] == "end-to-end" else ""
    scan = "" if settings["scan"] == "auto" else f"-{settings['scan']}"
    return f"{record.bundle['name']}-t{settings['threads'] or 'auto'}-b{settings['batch']}{scan}{end}.json"


def in_short(settings: Settings) -> str:
    """`threads 1, batch auto`."""
    return f"threads {settings.threads or 'auto'}, batch {settings.batch or 'auto'}"


def lines(record: Record, path: Path) -> list[str]:
    """The block that a user reads."""
    settings, times, runs = record.settings, record.summary_ms, len(record.samples_ms)
    low, high = record.interval_ms
    threads, scan = settings["threads"] or "auto", record.runtime["scan"]["value"]
    unstable = "" if record.stable else ", NOT STABLE"
    tails = "  ".join(f"{key} {times[key]:.3g}" for key in ("p90", "p99"))
    return [
        f"Measured  {record.bundle['name']}   threads {threads}, batch {settings['batch']}, "
        f"{settings['timed']}, scan {scan}",
        f"Latency   p50 {times['p50']:.3g} ms (95 %: {low:.3g}-{high:.3g})  {tails}   "
        f"{record.throughput:.4g} images/s   {runs} runs{unstable}",
        *([f"Device    {parts}"] if (parts := in_words(record.device_ms)) else []),
        f"Load      {record.load_ms['fresh']:.0f} ms in a new process, {record.load_ms['again']:.0f} ms again, "
        f"first inference {record.first_ms:.3g} ms",
        f"Memory    peak {record.memory_mb['peak']:.0f} MB, {record.memory_mb['before']:.0f} MB before loading   "
        f"artifact {record.bundle['artifact_bytes'] / 1e6:.1f} MB",
        *(f"Note      {text}" for text in record.warnings),
        f"Saved     {path}",
    ]


def in_words(parts: dict[str, float]) -> str:
    """`inputs 0.02 ms, compute 0.81 ms, outputs 0.01 ms`."""
    return ", ".join(f"{part} {value:.3g} ms" for part, value in parts.items())
