"""Energy from made-up trees of /sys: what is read, what it comes to, and what is said where it may not be read."""

from __future__ import annotations

import os
import time

import pytest

from evm_deploy.bench import device, energy
from evm_deploy.bench.energy import Counter, Meter, Rail, advice, readable, sensors


@pytest.fixture
def sys(tmp_path, monkeypatch):
    """sys(path, value): a file of a new /sys, which has nothing else."""
    monkeypatch.setattr(device, "SYS", tmp_path)

    def write(path: str, value: object) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")

    return write


def rapl(sys, zone="intel-rapl:0", name="package-0", start=1000, largest=262143328850):
    for file, value in (("name", name), ("energy_uj", start), ("max_energy_range_uj", largest)):
        sys(f"class/powercap/{zone}/{file}", value)


def test_a_machine_without_sensors(sys):
    assert sensors() == [] and advice() == []
    with Meter() as meter:
        pass
    assert meter.millijoules(10) == {}


def test_a_counter(sys):
    rapl(sys)
    rapl(sys, "intel-rapl:0:0", "core", 500)
    with Meter() as meter:
        sys("class/powercap/intel-rapl:0/energy_uj", 1000 + 5_000_000)
        sys("class/powercap/intel-rapl:0:0/energy_uj", 500 + 2_000_000)
    assert meter.millijoules(100) == {"rapl package-0": 50.0, "rapl package-0 core": 20.0}


@pytest.mark.parametrize(("largest", "found"), [(1_000_000, {"rapl package-0": 30.0}), ("", {})])
def test_a_counter_that_starts_again(sys, largest, found):
    """Without its range nothing can be said."""
    rapl(sys, start=900_000, largest=largest)
    with Meter() as meter:
        sys("class/powercap/intel-rapl:0/energy_uj", 200_000)
    assert meter.millijoules(10) == found


def test_a_counter_that_goes_away(sys, tmp_path):
    rapl(sys)
    with Meter() as meter:
        (tmp_path / "class/powercap/intel-rapl:0/energy_uj").unlink()
    assert meter.millijoules(10) == {}


def jetson(sys):
    chip = "class/hwmon/hwmon1"
    sys(f"{chip}/name", "ina3221")
    for i, (rail, millivolts, milliamperes) in enumerate((("VDD_IN", 5000, 1200), ("VDD_CPU", 5000, 300)), 1):
        sys(f"{chip}/in{i}_label", rail)
        sys(f"{chip}/in{i}_input", millivolts)
        sys(f"{chip}/curr{i}_input", milliamperes)
    sys(f"{chip}/in7_label", "sum of shunt voltages")  # has no current
    sys("class/hwmon/hwmon2/name", "coretemp")


def test_rails_of_a_jetson(sys):
    jetson(sys)
    assert [(rail.name, pytest.approx(rail.watts())) for rail in sensors()] == [
        ("ina3221 VDD_IN", 6.0),
        ("ina3221 VDD_CPU", 1.5),
    ]


def test_rails_of_an_older_jetson(sys):
    folder = "bus/i2c/drivers/ina3221x/1-0040/iio:device0"
    sys(f"{folder}/rail_name_0", "POM_5V_IN")
    sys(f"{folder}/in_power0_input", 2500)
    (rail,) = sensors()
    assert rail.name == "ina3221 POM_5V_IN" and rail.watts() == pytest.approx(2.5)


@pytest.mark.parametrize("files", [{"power_now": 7_400_000}, {"current_now": 1_000_000, "voltage_now": 7_400_000}])
def test_a_battery_counts_while_it_discharges(sys, files):
    for name, value in {"type": "Battery", "status": "Charging", **files}.items():
        sys(f"class/power_supply/BAT0/{name}", value)
    assert sensors() == []
    sys("class/power_supply/BAT0/status", "Discharging")
    (rail,) = sensors()
    assert rail.name == "battery BAT0" and rail.watts() == pytest.approx(7.4)


def test_power_is_sampled_all_the_time(sys, monkeypatch):
    """Half of it at 6 W, half at 18 W, on a clock that says it took two seconds: 24 J."""
    jetson(sys)
    monkeypatch.setattr(energy, "PERIOD_S", 0.002)
    seconds = iter((10.0, 12.0))
    with Meter(clock=lambda: next(seconds)) as meter:
        time.sleep(0.15)
        sys("class/hwmon/hwmon1/curr1_input", 3600)
        time.sleep(0.15)
    found = meter.millijoules(1000)
    assert found["ina3221 VDD_CPU"] == pytest.approx(3.0)
    assert 13.0 < found["ina3221 VDD_IN"] < 35.0 and not meter.thread.is_alive()


def test_what_may_not_be_read_is_named_once(sys, tmp_path, monkeypatch):
    rapl(sys)
    rapl(sys, "intel-rapl:0:0", "core")
    assert advice() == [] and all(map(readable, sensors()))
    shut = {tmp_path / f"class/powercap/{zone}/energy_uj" for zone in ("intel-rapl:0", "intel-rapl:0:0")}
    allowed, read = os.access, device.number  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: path not in shut and allowed(path, mode))
    monkeypatch.setattr(device, "number", lambda path: None if path in shut else read(path))
    (line,) = advice()
    assert (
        line.startswith("energy sensors found, but not readable by this user; to allow it: sudo chmod a+r ")
        and line.count("energy_uj") == 2
    )
    assert not any(map(readable, sensors()))
    with Meter() as meter:
        pass
    assert meter.millijoules(1) == {}


def test_sensors_are_what_they_say(sys):
    rapl(sys)
    jetson(sys)
    assert [type(sensor) for sensor in sensors()] == [Counter, Rail, Rail]
