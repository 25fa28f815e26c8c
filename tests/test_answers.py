"""Boards that answer anything: an EvmError, soon, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evm_deploy import cli
from evm_deploy._util.progress import silent
from evm_deploy._util.text import escape_controls
from evm_deploy.bench.remote import ssh, ssh_host
from evm_deploy.bench.remote.ssh import Connection, SshAddress
from evm_deploy.bench.remote.ssh_host import SshHost
from evm_deploy.bench.remote.supervisor import MARK
from evm_deploy.bench.run import record_of
from evm_deploy.bundle.bundle import commit
from evm_deploy.errors import EvmError, LatencyError, ToolchainError

GREETING = f"{MARK} [3, 11]\n"
GREETINGS = {
    "nothing": "",
    "noise": "welcome\n" * 3,
    "noise without end": "x" * (ssh.MAX_NOISE + 1),
    "no version": f"{MARK}\n",
    "a text": f'{MARK} "3.11"\n',
    "too few": f"{MARK} [3]\n",
    "of other types": f'{MARK} ["3", null]\n',
    "deep": f"{MARK} {'[' * 30000}\n",
    "binary": f"{MARK} \0\xff\n",
}
ANSWERS = {
    "nothing": "",
    "no JSON": "ok\n",
    "a list": "[]\n",
    "a number": "7\n",
    "other keys": '{"exit": 0}\n',
    "other types": '{"code": "0", "stdout": 1, "stderr": null, "late": 3}\n',
    "more keys": '{"code": 0, "stdout": "", "stderr": "", "late": false, "more": 1}\n',
    "deep": "[" * 30000 + "\n",
    "says nothing": '{"code": 0, "stdout": "", "stderr": "", "late": false}\n',
    "says no JSON": '{"code": 0, "stdout": "hello", "stderr": "", "late": false}\n',
    "says a number": '{"code": 0, "stdout": "5", "stderr": "", "late": false}\n',
    "says other keys": '{"code": 0, "stdout": "{}", "stderr": "", "late": false}\n',
    "no platform": json.dumps({"code": 0, "stdout": '{"platform": 1, "versions": {}}', "stderr": "", "late": False})
    + "\n",
}


FAKE = """
import json, os, sys, threading
greeting, answer = json.load(open(sys.argv[1]))
os.write(1, greeting.encode("latin-1"))
if answer is None:
    sys.exit()
heard = b""
while block := os.read(0, 1 << 16):
    heard = (heard + block)[-1000:]
    if answer and b'{"run"' in heard:
        os.write(1, answer.encode("latin-1"))
        answer = ""
"""


def fake_ssh(folder: Path, greeting: str, answer: str | None = None) -> str:
    """A command that says one thing when it starts, another when it is to run something, and takes whatever is sent."""
    (folder / "said").write_text(json.dumps([greeting, answer]))
    (folder / "ssh.py").write_text(FAKE)
    return shlex.join([sys.executable, str(folder / "ssh.py"), str(folder / "said")])


@pytest.mark.parametrize("name", GREETINGS)
def test_greetings(name, tmp_path):
    with pytest.raises(ToolchainError):
        Connection(SshAddress.parse("board"), fake_ssh(tmp_path, GREETINGS[name]), "python3")


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name, tmp_path, monkeypatch):
    said = fake_ssh(tmp_path, GREETING, ANSWERS[name])
    with Connection(SshAddress.parse("board"), said, "python3") as connection:
        assert connection.version == (3, 11)
        monkeypatch.setattr(ssh, "CONNECT_S", 0.5)
        monkeypatch.setattr(ssh_host, "CHECK_S", 1.0)
        with pytest.raises(ToolchainError) as raised:
            SshHost(connection, silent)
    assert str(raised.value).strip()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    content=JSON
    | st.fixed_dictionaries({"error": JSON | st.fixed_dictionaries({"type": JSON, "text": JSON, "hint": JSON})})
)
def test_what_the_measuring_process_prints(content):
    with pytest.raises(EvmError):
        record_of(json.dumps(content), "", 0, "bundle")


def test_errors_keep_their_class_and_no_other():
    def said(kind: str) -> str:
        return json.dumps({"error": {"type": kind, "text": "slow", "hint": "wait"}})

    with pytest.raises(LatencyError, match="slow\n  wait"):
        record_of(said("LatencyError"), "", 6, "bundle")
    for kind in ("annotations", "__builtins__", "SystemExit", ""):
        with pytest.raises(ToolchainError, match="slow\n  wait"):
            record_of(said(kind), "", 1, "bundle")


@pytest.mark.slow
@given(st.text())
def test_printable_text_has_no_control_characters(text):
    shown = escape_controls(text)
    assert len(shown) == len(text)
    assert all(each.isprintable() or each == "\n" for each in shown)


@pytest.mark.slow
def test_labels_do_not_reach_the_terminal_as_they_are(demo_bundle, tmp_path, capsys):
    import shutil

    path = tmp_path / "bundle"
    shutil.copytree(demo_bundle.path, path)
    (path / "labels.txt").write_text("\n".join(f"\x1b[31mred {i}\x07" for i in range(10)) + "\n")
    (path / "manifest.json").unlink()
    commit(path, path.with_name("new"), replace(demo_bundle.manifest, files={}))
    assert cli.run_main([str(path.with_name("new")), str(path.with_name("new") / "selftest" / "picture.png")]) == 0
    out = capsys.readouterr().out
    assert "[31mred " in out and "\x1b" not in out and "\x07" not in out
