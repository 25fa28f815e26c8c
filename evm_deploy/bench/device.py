"""Facts and state of this device, which decide whether two latencies can be compared."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evm_deploy._util.cores import usable_cores

SYS = Path("/sys")
PROC = Path("/proc")
FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)
CPU = "CPU"  # start of `runs_on` if the model ran on the processor
MAKERS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
BUSY = 0.5  # load average per core above which a warning is given


@dataclass(frozen=True)
class State:
    """State of the device before or after a measurement. Values that the system does not report are empty or None.

    clocks_mhz: clock of each core. temperatures_c: temperature by sensor. throttled: number of throttling events so
    far. load: load average of the last minute, per core.
    """

    clocks_mhz: tuple[float, ...]
    temperatures_c: dict[str, float]
    throttled: int | None
    load: float | None


def facts() -> dict[str, Any]:
    """Return model, processor, cores, clock governor, memory, GPUs and system of this device."""
    cpu: dict[str, str] = {}
    for line in text(PROC / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    board = text(PROC / "device-tree" / "model").strip("\0\n") or text(SYS / "class/dmi/id/product_name").strip()
    memory = proc_kb("meminfo", "MemTotal")
    return {
        "model": board or platform.node(),
        "cpu": cpu.get("model name") or cpu.get("Model") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "governor": text(SYS / "devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "memory_mb": int(memory) // 1024 if memory is not None else None,
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def key(device: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the facts of `Record.device` that decide whether two measurements are of the same device.

    These are host, model, processor, architecture, usable cores, memory (as sold, because the usable part differs
    between kernels), operating system without its version, and the GPU or NPU if the model ran on one.
    """
    names = ("at", "model", "cpu", "machine", "usable_cores")
    system = str(device.get("system") or "").partition(" ")[0]
    runs_on = str(device.get("runs_on") or "")
    facts = [str(device.get(name) or "") for name in names]
    return (*facts, as_sold(device.get("memory_mb")), system, "" if runs_on.startswith(CPU) else runs_on)


def as_sold(memory_mb: float | None) -> str:
    """Return the size of memory modules that holds `memory_mb`: the next of 1, 1.5, 2, 3, 4, 6, 8, 12, .. GB."""
    if not memory_mb:
        return ""
    power = math.ceil(math.log2(memory_mb / 1024))
    return f"{2.0**power if memory_mb / 1024 > 0.75 * 2.0**power else 0.75 * 2.0**power:g} GB"


def cpu_features() -> list[str]:
    """Return the CPU features that inference kernels use (AVX2, VNNI, dot products, ..); empty if not reported."""
    said = {"flags", "Features"}  # key in /proc/cpuinfo on x86-64 and on AArch64
    lines = (line.partition(":") for line in text(PROC / "cpuinfo").splitlines())
    has = next((set(value.split()) for key, _, value in lines if key.strip() in said), set())
    return [feature for feature in FEATURES if feature in has]


def gpus() -> list[str]:
    """Return the names of the GPUs: from NVIDIA's driver, else the maker and PCI device number of each card."""
    found = []
    for file in sorted(PROC.glob("driver/nvidia/gpus/*/information")):
        found += [line.partition(":")[2].strip() for line in text(file).splitlines() if line.startswith("Model:")]
    for card in sorted(SYS.glob("class/drm/card[0-9]*/device")):
        maker = MAKERS.get(text(card / "vendor").strip())
        if maker and not (found and maker == "NVIDIA"):
            found.append(f"{maker} {text(card / 'device').strip()}")
    return list(dict.fromkeys(found))


def state() -> State:
    """Return clocks, temperatures, throttling events and load at this moment."""
    clocks = [number(path) for path in sorted(SYS.glob("devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"))]
    zones = {path: number(path / "temp") for path in sorted(SYS.glob("class/thermal/thermal_zone*"))}
    throttles = [number(path) for path in SYS.glob("devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")]
    counted = [int(count) for count in throttles if count is not None]
    return State(
        tuple(clock / 1e3 for clock in clocks if clock is not None),
        {f"{text(zone / 'type').strip()} {zone.name[12:]}": t / 1e3 for zone, t in zones.items() if t is not None},
        sum(counted) if counted else None,
        load(),
    )


def load() -> float | None:
    """Return the load average of the last minute, per core; None if the system does not report it."""
    with contextlib.suppress(AttributeError, OSError):
        return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)
    return None


def warnings(device: dict[str, Any], before: State, after: State) -> list[str]:
    """Return warnings about conditions that make a measurement unreliable: load, clock governor, throttling."""
    found = []
    if before.load is not None and before.load > BUSY:
        found.append(f"other work on the machine: load {before.load:.2f} per core before the measurement")
    if device["governor"] not in (None, "performance"):
        found.append(f"the clock governor is {device['governor']}: 'performance' gives steadier latencies")
    if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
        found.append(f"throttled by heat {after.throttled - before.throttled} times")
    return found


def text(path: Path) -> str:
    """Read a text file; return an empty string if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def number(path: Path) -> float | None:
    """Read the number in a file; return None if the file cannot be read or holds no finite number."""
    return finite(text(path))


def finite(said: str) -> float | None:
    """Convert text to a number; return None if it is no finite number."""
    try:
        value = float(said)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def proc_kb(file: str, field: str) -> float | None:
    """Return the value of a line `field: value kB` of a file in /proc; None without the file, the line or a number.

    Sandboxes such as gVisor leave lines out.
    """
    for line in text(PROC / file).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field and value.split():
            return finite(value.split()[0])
    return None
