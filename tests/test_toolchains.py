"""A run says which toolchains it had, and fails in CI where one is missing that CI installs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import toolchains
from tests.toolchains import TOOLCHAINS, need, summary

ABSENT = """
import pytest
from dataclasses import replace
from tests import toolchains

pytest_plugins = ["tests.toolchains"]
for name in ("valgrind", "nvcc"):
    toolchains.TOOLCHAINS[name] = replace(toolchains.TOOLCHAINS[name], here=lambda: False)
toolchains.TOOLCHAINS["openssl"] = replace(toolchains.TOOLCHAINS["openssl"], here=lambda: True)
"""
TESTS = """
import pytest
from tests.toolchains import need

@pytest.mark.parametrize("name", {names})
def test_it(name):
    need(name)
"""


def run(folder, names, ci, workers):
    (folder / "conftest.py").write_text(ABSENT)
    (folder / "test_it.py").write_text(TESTS.format(names=names))
    code = "import os, sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    flags = ["-n", str(workers), "-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(folder), str(folder)]
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(ci), cwd=toolchains.ROOT)
    return done.returncode, done.stdout


def environment(ci):
    import os

    return {**os.environ, "CI": ci, "PYTEST_ADDOPTS": ""}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_one_is_told(workers, tmp_path):
    code, said = run(tmp_path, ["valgrind", "valgrind", "openssl"], "", workers)
    others = len(TOOLCHAINS) - 2
    assert code == 0, said
    assert f"toolchains: ran 1 of {len(TOOLCHAINS)}; missing: valgrind (2 skipped); {others} not asked for" in said


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_ci_fails_without_one_that_it_installs(workers, tmp_path):
    code, said = run(tmp_path, ["valgrind", "openssl"], "true", workers)
    assert code == 1
    assert "FAILED: CI runs with valgrind, which is missing here: apt-get install valgrind" in said


def test_ci_does_without_those_of_nvidia(tmp_path):
    code, said = run(tmp_path, ["nvcc"], "true", 0)
    assert code == 0 and "missing: nvcc (1 skipped)" in said, said


def test_the_line_of_a_whole_run():
    assert summary(set(TOOLCHAINS), toolchains.Counter()) == f"toolchains: ran {len(TOOLCHAINS)} of {len(TOOLCHAINS)}"


def test_a_name_that_is_not_in_the_table():
    with pytest.raises(KeyError):
        need("cobol")


@pytest.mark.xdist_group("together")
def test_groups_stay_on_one_worker(request):
    """The tests of a group share what is built, as long as xdist can tell them by their node id."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("not run by a worker of xdist")
    assert request.node.nodeid.endswith("@together")
