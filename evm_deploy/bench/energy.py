"""Energy of an inference, from the sensors that this user can read.

Energy counters: RAPL (Intel and AMD). Power sensors, which are sampled: rails of an INA3221 (Jetson), and a battery
while it discharges. Every sensor measures a whole package, board or device, so idle power and other work are included.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from evm_deploy.bench import device

PERIOD_S = 0.1  # time between two samples of power


@dataclass(frozen=True)
class Counter:
    """Sensor file that counts microjoules. largest: value after which the counter starts again from 0."""

    name: str
    path: Path
    largest: float | None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files that must be readable."""
        return (self.path,)


@dataclass(frozen=True)
class Rail:
    """Power sensor: the product of the numbers in `paths`, times `unit`, is a power in watts."""

    name: str
    paths: tuple[Path, ...]
    unit: float

    def watts(self) -> float | None:
        """Return the power now in watts, or None if a file cannot be read."""
        watts = self.unit
        for path in self.paths:
            value = device.number(path)
            if value is None:
                return None
            watts *= value
        return watts


def sensors() -> list[Counter | Rail]:
    """Return the energy sensors of this machine, including those that this user cannot read."""
    return [*_rapl(), *_ina3221(), *_batteries()]


def readable(sensor: Counter | Rail) -> bool:
    """Test whether every file of `sensor` can be read and holds a number."""
    return all(device.number(path) is not None for path in sensor.paths)


def advice() -> list[str]:
    """Return one line with the command that makes unreadable sensors readable, or no line if there are none."""
    paths = [path for sensor in sensors() for path in sensor.paths]
    closed = [path for path in paths if path.exists() and not os.access(path, os.R_OK)]
    if not closed:
        return []
    return [
        f"energy sensors found, but not readable by this user; to allow it: sudo chmod a+r {' '.join(map(str, closed))}"
    ]


class Meter:
    """Energy meter: counts the energy used inside its `with` block. Call `millijoules` after the block."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        found = [sensor for sensor in sensors() if readable(sensor)]
        self.counters = [sensor for sensor in found if isinstance(sensor, Counter)]
        self.rails = [sensor for sensor in found if isinstance(sensor, Rail)]
        self.watts: dict[str, list[float]] = {rail.name: [] for rail in self.rails}
        self.clock, self.done = clock, threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self.before = {sensor.name: device.number(sensor.path) for sensor in self.counters}
        self.start = self.clock()
        if self.rails:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = self.clock() - self.start
        self.after = {sensor.name: device.number(sensor.path) for sensor in self.counters}
        self.done.set()
        if self.rails:
            self.thread.join()

    def millijoules(self, inferences: int) -> dict[str, float]:
        """Return the energy of one inference in mJ, by sensor. inferences: number of inferences in the block."""
        found = {}
        for sensor in self.counters:
            before, after = self.before[sensor.name], self.after[sensor.name]
            if before is not None and after is not None and after < before and sensor.largest:
                after += sensor.largest
            if before is not None and after is not None and after >= before:
                found[sensor.name] = (after - before) / 1e3
        for name, watts in self.watts.items():
            if watts:
                found[name] = statistics.fmean(watts) * self.seconds * 1e3
        return {name: round(total / inferences, 4) for name, total in found.items()}

    def _sample(self) -> None:
        """Sample every rail once per period, in a thread, until the block ends."""
        while True:
            for rail in self.rails:
                watts = rail.watts()
                if watts is not None:
                    self.watts[rail.name].append(watts)
            if self.done.wait(PERIOD_S):
                return


def _rapl() -> list[Counter]:
    """Return counters for the processor's zones (`package-0`) and the zones within these (`package-0 core`)."""
    zones = sorted(device.SYS.glob("class/powercap/intel-rapl:*"))
    names = {zone.name: device.text(zone / "name").strip() or zone.name for zone in zones}
    found = []
    for zone in zones:
        outer = names.get(zone.name.rpartition(":")[0])
        name = f"{outer} {names[zone.name]}" if outer else names[zone.name]
        found.append(Counter(f"rapl {name}", zone / "energy_uj", device.number(zone / "max_energy_range_uj")))
    return found


def _ina3221() -> list[Rail]:
    """Return the named rails of hwmon (mV, mA) or of the iio driver of older Jetsons (mW)."""
    found = []
    for chip in sorted(device.SYS.glob("class/hwmon/hwmon*")):
        if device.text(chip / "name").strip() == "ina3221":
            for label in sorted(chip.glob("in*_label")):
                volts, amperes = (chip / f"{kind}{label.name[2:-6]}_input" for kind in ("in", "curr"))
                if amperes.exists():
                    found.append(Rail(f"ina3221 {device.text(label).strip()}", (volts, amperes), 1e-6))
    for label in sorted(device.SYS.glob("bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*")):
        power = label.parent / f"in_power{label.name.removeprefix('rail_name_')}_input"
        found.append(Rail(f"ina3221 {device.text(label).strip()}", (power,), 1e-3))
    return found


def _batteries() -> list[Rail]:
    """Return the batteries that are discharging. A battery that is not discharging shows the charger's power."""
    found = []
    for supply in sorted(device.SYS.glob("class/power_supply/*")):
        kind, status = (device.text(supply / name).strip() for name in ("type", "status"))
        if (kind, status) == ("Battery", "Discharging"):
            power = (supply / "power_now",)
            if power[0].exists():
                found.append(Rail(f"battery {supply.name}", power, 1e-6))
            else:
                found.append(Rail(f"battery {supply.name}", (supply / "current_now", supply / "voltage_now"), 1e-12))
    return found
