"""CPU seconds of every test: its own and of the processes that it waited for. `--costs 40` lists the dearest forty."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

SPENT = "cpu_seconds"
BEFORE = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--costs", type=int, default=0, metavar="N", help="list the N tests that cost most CPU seconds")


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    now = cpu_seconds()
    report.user_properties.append((SPENT, now - item.stash[BEFORE]))
    item.stash[BEFORE] = now
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    item.stash[BEFORE] = cpu_seconds()


def pytest_terminal_summary(terminalreporter, config):
    if not config.option.costs:
        return
    costs = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                costs[report.nodeid] += dict(report.user_properties).get(SPENT, 0.0)
    terminalreporter.section(f"{sum(costs.values()):.0f} CPU seconds")
    for name, seconds in sorted(costs.items(), key=lambda cost: -cost[1])[: config.option.costs]:
        terminalreporter.write_line(f"{seconds:8.1f} {name}")
