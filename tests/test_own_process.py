"""Settings of our own processes: garbage, and packages that a library need not find."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from evm_deploy._util import own_process
from evm_deploy._util.own_process import not_installed
from evm_deploy.runtimes.coreml.tools import OTHER_SOURCES


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages, of which the first is imported."""
    for name in ("evm_imported", "evm_other"):
        (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
        monkeypatch.setitem(sys.modules, name, None)  # restored afterwards
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    return [importlib.import_module("evm_imported").__name__, "evm_other"]


def test_packages_are_hidden_in_the_block_alone(packages, monkeypatch):
    monkeypatch.setattr(own_process, "_own", True)
    with pytest.raises(ModuleNotFoundError, match="evm_other"), not_installed(*packages):
        importlib.import_module("evm_imported")
        importlib.import_module("evm_other")
    importlib.import_module("evm_other")


def test_in_a_process_of_others_nothing_is_hidden(packages, monkeypatch):
    monkeypatch.setattr(own_process, "_own", False)
    with not_installed(*packages):
        importlib.import_module("evm_other")


@pytest.mark.slow
def test_coremltools_is_imported_without_the_others():
    pytest.importorskip("coremltools")
    installed = [name for name in OTHER_SOURCES if importlib.util.find_spec(name)]
    if not installed:
        pytest.skip(f"none of {', '.join(OTHER_SOURCES)} is installed")
    code = f"""
import importlib
import sys
from evm_deploy._util.own_process import set_up_own_process
from evm_deploy.runtimes.coreml.tools import coremltools

set_up_own_process()
coremltools()
assert not {set(OTHER_SOURCES)} & set(sys.modules), sys.modules.keys()
importlib.import_module("{installed[0]}")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
