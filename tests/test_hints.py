"""Lines that messages give to paste: what they install can be installed, and no file's name becomes a command."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from evm_deploy import cli
from evm_deploy._util import packages
from evm_deploy._util.packages import UNKNOWN, install_hint, source, upgrade_hint
from evm_deploy._util.text import command
from evm_deploy._util.toml import read_toml
from evm_deploy.export.targets import load_targets
from evm_deploy.runtimes.registry import load_runtimes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "evm_deploy"
EXTRAS = set(read_toml(ROOT / "pyproject.toml", "pyproject")["project"]["optional-dependencies"])


def texts() -> list[tuple[str, str]]:
    """Every string of the package's code but docstrings, with its place; parts of f-strings are joined with {}."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [each.value if isinstance(each, ast.Constant) else "{}" for each in node.values]
                found.append((f"{file.relative_to(ROOT)}:{node.lineno}", "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found.append((f"{file.relative_to(ROOT)}:{node.lineno}", node.value))
    return found


@pytest.mark.slow
def test_no_message_installs_evm_deploy_from_an_index():
    """Whoever registers the name there would have his code run by our messages."""
    assert any("pip" in text for _, text in texts())  # the walk sees messages
    assert [each for each in texts() if re.search(r"pip3? install.*evm[-_]deploy", each[1])] == []
    assert [each for each in texts() if re.search(r"evm[-_]deploy\[", each[1])] == []


def extras_of_hints() -> list[tuple[str, str]]:
    """The extra of every call of install_hint in the package, and those of the targets' runtimes."""
    found = [(info.name, info.extra) for info in load_runtimes().values()]
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "install_hint" and node.args
            if called and isinstance(node.args[0], ast.Constant):
                found.append((file.name, node.args[0].value))
    return found


@pytest.mark.parametrize(("place", "extra"), extras_of_hints())
def test_every_hint_names_an_extra_of_this_checkout(place, extra):
    words = shlex.split(install_hint(extra))
    assert words == ["pip", "install", f"{ROOT}[{extra}]"] and extra in EXTRAS


def test_the_targets_hints():
    found = {hint for target in load_targets().values() for hint in (target.install_hint, target.runtime.install_hint)}
    for hint in found:
        pip, install, what = shlex.split(hint)
        path, extra = what.removesuffix("]").split("[")
        assert (pip, install) == ("pip", "install") and (Path(path) / "pyproject.toml").is_file() and extra in EXTRAS
    assert shlex.split(upgrade_hint())[-1] == str(ROOT)


class Installed:
    """Stand-in for importlib.metadata's facts of an installed evm-deploy."""

    def __init__(self, origin: str | None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        return self.origin if name == "direct_url.json" else None


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(direct_url.json) -> source() of a package without a checkout."""

    def say(origin: str | None) -> str:
        monkeypatch.setattr(packages, "package_folders", lambda: [tmp_path / "site-packages" / "evm_deploy"])
        monkeypatch.setattr(metadata, "distribution", lambda name: Installed(origin))
        source.cache_clear()
        return source()

    yield say
    source.cache_clear()


def test_an_installed_wheel_names_the_wheel(installed, tmp_path):
    wheel = tmp_path / "my wheels" / "evm_deploy-0.1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert installed(json.dumps({"url": wheel.as_uri(), "archive_info": {}})) == str(wheel)
    assert shlex.split(install_hint("onnx")) == ["pip", "install", f"{wheel}[onnx]"]
    wheel.unlink()
    assert installed(json.dumps({"url": wheel.as_uri()})) == UNKNOWN  # deleted since


@pytest.mark.parametrize("origin", [None, "", "{", "[]", "7", "{}", '{"url": 3}', '{"url": "https://x/evm.whl"}'])
def test_from_nowhere_it_says_what_to_fill_in(origin, installed):
    assert installed(origin) == UNKNOWN
    assert install_hint("onnx") == "pip install 'CHECKOUT[onnx]'  with CHECKOUT: folder or wheel of evm-deploy"


def test_a_folder_of_another_project_is_no_checkout(installed, tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert installed(None) == UNKNOWN


def test_an_agent_in_a_zip_has_hints(tmp_path):
    from evm_deploy.bench.remote.agent import build_agent

    (tmp_path / "agent.pyz").write_bytes(build_agent())
    code = "from evm_deploy._util.packages import install_hint; print(install_hint('onnx'))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = ['agent.pyz']; {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("pip install 'CHECKOUT[onnx]'"), done.stderr


# Names of files

HOSTILE = ["a b", "x; touch y", "$(touch y)", "`touch y`", "it's", 'a"b', "-rf", "~", "*", "a|b", "#a", "a\\b", "é"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_one_word(name):
    line = command("printf", "%s", Path(name))
    shown = subprocess.run(["sh", "-c", line], capture_output=True, text=True).stdout
    assert shown == (f"./{name}" if name.startswith("-") else name)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "-rf"])
def test_commands_quote_the_names_in_their_hints(name, micro_bundle, tmp_path, capsys, monkeypatch):
    """Each hint that a bundle's path is part of: the path is one word of the line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(micro_bundle.path, name)
    lines = []
    for call in (lambda: cli.run_main([name]), lambda: cli.export_main(["--finish", name])):
        assert call() == 2
        lines.append(capsys.readouterr().err.splitlines()[-1])
    content = json.loads(Path(name, "manifest.json").read_text())
    Path(name, "manifest.json").write_text(json.dumps({**content, "built": False}))
    assert cli.run_main([name, "--selftest"]) == 2
    lines.append(capsys.readouterr().err.splitlines()[-1])
    for line in lines:
        assert name in shlex.split(line[line.index("evm-") :]), line


def test_the_last_lines_of_an_export_can_be_pasted(micro, tmp_path, capsys):
    out = tmp_path / "out dir [1]; $(x)"
    assert cli.export_main([str(micro), "--target", "onnx", "--imgsz", "32", "-o", str(out), "-q"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "evm-run" in line]
    assert lines and all(str(out / "micro_64-onnx-fp32-32x32") in shlex.split(line) for line in lines)
