"""`--host` and `--devices`, on a real sshd: the whole cycle, refusals, and that nothing is ever left on the board."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evm_deploy._util.progress import silent
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.remote import fleet, supervisor
from evm_deploy.bench.remote.agent import build_agent
from evm_deploy.bench.remote.hosts import HostOptions
from evm_deploy.bench.remote.ssh import Connection, SshAddress, explained
from evm_deploy.bench.remote.ssh_host import SshHost
from evm_deploy.bench.sweep import Sweep
from evm_deploy.bundle.signing import sign
from evm_deploy.cli import bench_main
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.info import Requirement
from evm_deploy.sweep import fleet as sweep_fleet
from tests.sshd import Sshd, need_sshd, running_sshd, within
from tests.test_cross import HOST
from tests.test_signing import write_keys

pytestmark = pytest.mark.ssh

GONE_S = 8.0


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> Sshd:
    need_sshd()
    with running_sshd(tmp_path_factory.mktemp("sshd") / "board") as sshd:
        yield sshd


@pytest.fixture(scope="module")
def host_bundle(micro, bundle_of):
    """With the native library for this platform."""
    return bundle_of(micro, ExportPlan("onnx", imgsz=(32, 32), native_library=HOST))


@pytest.fixture
def bare_python(tmp_path) -> Path:
    """A Python without a package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return tmp_path / "bare" / "bin" / "python"


def flags(board: Sshd, out: Path, python: str | Path = sys.executable, ssh: str = "") -> list[str]:
    return ["--host", "board", "--ssh", ssh or board.ssh, "--python", str(python), "--limit", "1", "-o", str(out)]


def test_a_board_is_measured_and_left_as_it_was(board, host_bundle, tmp_path, capsys):
    command = [str(host_bundle.path), *flags(board, tmp_path), "--device", "x86-64", "--threads", "1"]
    assert bench_main([*command, "--scan", "bundled"]) == 0
    assert board.clean(), (board.processes(), list(board.tmp.iterdir()))
    shown = capsys.readouterr()
    (file,) = tmp_path.iterdir()
    record = Record.read(file)
    assert file.name.startswith(f"{host_bundle.path.name}-t1-b1-bundled-board-")
    assert (record.device["at"], record.device["profile"]) == ("board", "x86-64")
    assert record.runtime["scan"]["value"] == "plugin" and "from the bundle" in record.runtime["scan"]["reason"]
    assert record.samples_ms and record.bundle["name"] == host_bundle.path.name and record.settings["scan"] == "bundled"
    assert "at board" in shown.out and all(step in shown.err for step in ("connect", "send", "measure"))


def test_a_library_of_the_bundle_runs_only_if_it_is_trusted(board, host_bundle, tmp_path, capsys):
    """A library is a program: nobody asked for it, or vouched for it."""
    path = shutil.copytree(host_bundle.path, tmp_path / "bundle")
    key = Ed25519PrivateKey.generate()
    _, public = write_keys(tmp_path, "key", key)
    command = [str(path), *flags(board, tmp_path / "out"), "--threads", "1"]
    assert bench_main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    record = Record.read(Path(row["record"]))
    assert record.runtime["scan"]["value"] == "portable"
    assert any("was not run, because a library is a program" in warning for warning in record.warnings)

    assert bench_main([*command, "--require-signature", str(public)]) == 2
    assert "is not signed" in capsys.readouterr().err and board.clean()
    sign(path, key)
    assert bench_main([*command, "--require-signature", str(public), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert Record.read(Path(row["record"])).runtime["scan"]["value"] == "plugin"


def test_a_bundle_without_a_library_for_the_board(board, micro_bundle, tmp_path, capsys, monkeypatch):
    """And EVM_SSH, and login scripts that print."""
    chatty = tmp_path / "chatty"
    chatty.write_text(f'#!/bin/sh\necho "Welcome! {"x" * 5000}"\necho\nexec "{sys.executable}" "$@"\n')
    chatty.chmod(0o755)
    monkeypatch.setenv("EVM_SSH", board.ssh)
    command = [str(micro_bundle.path), "--host", "board", "--python", str(chatty), "--limit", "1", "--json"]
    assert bench_main([*command, "-o", str(tmp_path / "out")]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    record = Record.read(Path(row["record"]))
    assert record.runtime["scan"]["value"] == "portable"
    assert any(f"no native library for {HOST} (evm-export --platform {HOST})" in warning for warning in record.warnings)
    assert board.clean()


def test_a_host_key_that_is_not_known(board, micro_bundle, tmp_path, capsys):
    known = tmp_path / "known_hosts"
    ssh = f"{board.ssh} -o UserKnownHostsFile={known}"
    assert bench_main([str(micro_bundle.path), *flags(board, tmp_path / "out", ssh=ssh)]) == 3
    assert "the board's key is unknown: connect once with  ssh board" in capsys.readouterr().err
    assert not known.exists() and not (tmp_path / "out").exists() and board.clean()


def test_a_host_key_that_changed(board, micro_bundle, tmp_path, capsys):
    stranger = " ".join((board.folder / "stranger.pub").read_text().split()[:2])
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{board.port} {stranger}\n")
    ssh = f"{board.ssh} -o UserKnownHostsFile={known}"
    assert bench_main([str(micro_bundle.path), *flags(board, tmp_path / "out", ssh=ssh)]) == 3
    assert "the board has another key than before: find out why" in capsys.readouterr().err


def test_a_user_key_that_is_not_allowed(board, micro_bundle, tmp_path, capsys):
    config = (board.folder / "config").read_text().replace("user_key", "stranger")
    (tmp_path / "config").write_text(config)
    ssh = f"ssh -F {tmp_path / 'config'}"
    assert bench_main([str(micro_bundle.path), *flags(board, tmp_path / "out", ssh=ssh)]) == 3
    assert "Permission denied (publickey).\n  evm-bench asks for no password: ssh-copy-id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--host", "127.0.0.1:1"], "Connection refused\n  check that sshd runs"),
        (["--ssh", "no-such-ssh"], "no-such-ssh cannot be run"),
        (["--python", "python9"], "board cannot run python9"),
        (["--device", "pi5"], "device 'pi5' has platform linux-aarch64, but the host has"),
        (["--device", "mac"], "device 'mac' has platform macos-arm64"),
    ],
)
def test_places_that_do_not_answer(board, micro_bundle, tmp_path, capsys, extra, says):
    assert bench_main([str(micro_bundle.path), *flags(board, tmp_path / "out"), *extra]) in (2, 3)
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown and board.clean() and not (tmp_path / "out").exists()


def test_a_board_without_the_packages(board, micro_bundle, tmp_path, capsys, bare_python):
    assert bench_main([str(micro_bundle.path), *flags(board, tmp_path / "out", bare_python)]) == 3
    shown = capsys.readouterr().err
    assert "board lacks packages for target 'onnx': numpy, safetensors, fastjsonschema, onnxruntime\n" in shown
    needs = "'numpy>=1.26' 'safetensors>=0.4' 'fastjsonschema>=2.21' 'onnxruntime>=1.17'"
    assert f"on the board:  {bare_python} -m pip install {needs}" in shown
    assert board.clean()


@pytest.mark.parametrize(
    "flags_",
    [
        ["--host", "a b"],
        ["--host=-oProxyCommand=x"],
        ["--host", "board:99999"],
        ["--host", "board", "--adb", "X"],
        ["--adb", "X"],
        ["--runner", "X"],
        ["--host", "board", "--devices", "f.toml"],
        ["--device", "pi5"],
        ["--device", "GPU"],
        ["--cache", "c", "--host", "127.0.0.1:1"],
        ["--matrix", "--host", "board"],
        ["--matrix", "--device", "x86-64"],
    ],
    ids=" ".join,
)
def test_impossible_flags(micro_bundle, tmp_path, capsys, flags_):
    assert bench_main([str(micro_bundle.path), "-o", str(tmp_path / "out"), *flags_]) in (2, 3)
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pi", ("pi", None)),
        ("me@pi.local:2222", ("me@pi.local", 2222)),
        ("ssh://me@pi:22/", ("me@pi", 22)),
        ("me@[::1]:22", ("me@::1", 22)),
        ("10.0.0.7", ("10.0.0.7", None)),
    ],
)
def test_hosts(text, expected):
    host = SshAddress.parse(text)
    assert (host.destination, host.port) == expected


@pytest.mark.parametrize("text", ["", "-v", "a@-v", "a;b", "a:b", "a:0", "a:70000", "a@b@c", "$(x)", "a\nb"])
def test_no_hosts(text):
    with pytest.raises(UsageError, match="--host"):
        SshAddress.parse(text)


@pytest.mark.parametrize(
    ("version", "least", "expected"),
    [
        (None, "", False),
        ("", "1.17", True),
        ("1.17.0", "1.17", True),
        ("1.9.2", "1.17", False),
        ("2026.4.1", "2026.4", True),
        ("1.26.0rc1", "1.26", True),
        ("11", "", True),
    ],
)
def test_versions_that_serve(version, least, expected):
    assert Requirement("module", "package", least).met_by(version) is expected


def test_ends_of_ssh_that_are_no_refusals():
    assert "the connection to b failed: closed by b" in str(explained("b", "python3", 255, "closed by b"))
    assert "did not answer in time" in str(explained("b", "python3", -9, ""))
    assert "ended with code 1: no space" in str(explained("b", "python3", 1, "x\nno space"))


# ------------------------------------------------------------------------------------------- what ends, and how


@contextmanager
def measuring(board: Sshd, bundle, out: Path):
    """evm-bench in a process of its own, while the board measures."""
    code = "import sys; from evm_deploy.cli import bench_main; sys.exit(bench_main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(bundle.path), *flags(board, out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert within(20, lambda: running(board, "measure")), process.poll()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def running(board: Sshd, word: str) -> list[int]:
    return [pid for pid in board.processes() if word.encode() in command_line(pid).split(b"\0")]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill_here(board: Sshd, process: subprocess.Popen) -> None:
    process.kill()


def interrupt_here(board: Sshd, process: subprocess.Popen) -> None:
    process.terminate()
    assert process.wait(10) == 130


def cut_the_connection(board: Sshd, process: subprocess.Popen) -> None:
    for pid in board.sessions():
        os.kill(pid, signal.SIGKILL)
    assert process.wait(20) == 3
    assert "the connection to board failed" in process.stderr.read()


def kill_the_supervisor(board: Sshd, process: subprocess.Popen) -> None:
    """So that only the agent is left, tied to it."""
    (agent,) = running(board, "measure")
    parent = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert process.wait(20) == 3


@pytest.mark.parametrize("end", [kill_here, interrupt_here, cut_the_connection, kill_the_supervisor])
def test_nothing_stays_when_a_measurement_is_cut(board, micro_bundle, tmp_path, end):
    with measuring(board, micro_bundle, tmp_path / "out") as process:
        assert list(board.tmp.iterdir())
        end(board, process)
        assert board.is_clean_within(GONE_S), (board.processes(), list(board.tmp.iterdir()))
    assert not (tmp_path / "out").exists()


def test_a_run_that_takes_too_long_is_killed(board):
    with Connection(SshAddress.parse("board"), board.ssh, sys.executable) as connection:
        answer = connection.run(["-c", "import time; print('begun', flush=True); time.sleep(60)"], 0.5)
        assert answer.late and answer.stdout == "begun\n" and not running(board, "-c")[1:]
        assert connection.run(["-c", "import sys; sys.exit('no')"], 10).stderr == "no\n"
    assert board.clean()


def test_a_board_that_stops_to_answer(board, monkeypatch):
    with Connection(SshAddress.parse("board"), board.ssh, sys.executable) as connection:
        monkeypatch.setattr("evm_deploy.bench.remote.ssh.CONNECT_S", 1.0)
        (session,) = board.processes()
        os.kill(session, signal.SIGSTOP)
        with pytest.raises(ToolchainError, match="did not answer in time"):
            connection.run(["-c", ""], 0)
        os.kill(session, signal.SIGCONT)
    assert board.is_clean_within(GONE_S)


@contextmanager
def supervised(tmp_path, silence: float = 30.0):
    """The supervisor alone, on pipes."""
    source = Path(supervisor.__file__).read_text().replace("SILENCE_S = 30.0", f"SILENCE_S = {silence}")
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline().startswith(supervisor.MARK.encode()) and len(list(tmp_path.iterdir())) == 1
    with process:
        yield process


def order(process, **what) -> None:
    process.stdin.write(json.dumps(what).encode() + b"\n")
    process.stdin.flush()


@pytest.mark.parametrize("how", ["silence", "hang-up", "end of stdin", "half a file"])
def test_the_supervisor_ends(tmp_path, how):
    with supervised(tmp_path, silence=1.0 if how == "silence" else 30.0) as process:
        order(process, run=["-c", "import time; time.sleep(60)"], seconds=60)
        if how == "hang-up":
            process.send_signal(signal.SIGHUP)
        elif how == "end of stdin":
            process.stdin.close()
        elif how == "half a file":
            order(process, file="x", size=100)
            process.stdin.close()
        process.wait(20)
    assert not list(tmp_path.iterdir())


def test_the_supervisor_waits_while_it_hears_something(tmp_path):
    """The negative control of silence."""
    with supervised(tmp_path, silence=1.0) as process:
        for _ in range(12):
            time.sleep(0.2)
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert process.poll() is None
        process.stdin.close()
        process.wait(20)


def test_the_supervisor_says_why_it_cannot(tmp_path):
    with supervised(tmp_path) as process:
        order(process, file="a/b", size=1)
        process.stdin.write(b"x")
        order(process, file="a", size=1)
        answer = json.loads(process.stdout.readline())
        assert answer["code"] is None and "IsADirectoryError" in answer["stderr"]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- agent, board


def test_the_agent_runs_by_itself(micro_bundle, tmp_path):
    """A zipapp in an isolated Python, from a folder with nothing of ours."""
    pyz = tmp_path / "agent.pyz"
    pyz.write_bytes(build_agent())
    assert len(pyz.read_bytes()) < 1 << 20

    def run(*arguments: str) -> dict:
        command = [sys.executable, "-I", str(pyz), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = run("check", "numpy", "no_such_module")
    assert found["platform"] == HOST and found["versions"]["numpy"] and found["versions"]["no_such_module"] is None
    settings = json.dumps({"threads": 1, "limit_s": 1.0})
    record = run("measure", str(micro_bundle.path), settings)
    assert record["samples_ms"] and str(pyz) in record["runtime"]["scan"]["reason"]
    assert run("measure", str(tmp_path / "nothing"), settings)["error"]["type"] == "BundleError"


class FakeConnection:
    host, python = "board", "python3"

    def __init__(self, version=(3, 12)) -> None:
        self.version, self.files = version, []

    def send(self, name, content):
        self.files.append(name)
        yield 1

    def run(self, arguments, seconds):
        content = {"platform": HOST, "versions": dict.fromkeys(arguments[3:], "9999")}
        return type("Answer", (), {"stdout": json.dumps(content), "stderr": ""})


def test_what_the_manifest_names_is_sent_once_and_nothing_else(micro_bundle, tmp_path):
    copy = shutil.copytree(micro_bundle.path, tmp_path / "bundle")
    (copy / "private.txt").write_text("not of the bundle")
    connection = FakeConnection()
    there = SshHost(connection, silent)
    for _ in range(2):
        there.prepare(copy, Settings())
    names = ["manifest.json", *micro_bundle.manifest.files]
    assert sorted(connection.files) == sorted(["agent.pyz", *(f"0/bundle/{name}" for name in names)])
    (copy / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(Exception, match="damaged"):
        SshHost(connection, silent).prepare(copy, Settings())


def test_a_python_that_is_too_old():
    with pytest.raises(ToolchainError, match=r"board has Python 3\.9, but 3\.10 or newer is needed(?s:.*)--python"):
        SshHost(FakeConnection((3, 9)), silent)


# --------------------------------------------------------------------------------------------------------- fleet


def test_a_fleet_of_which_one_fails(board, host_bundle, tmp_path, capsys):
    (tmp_path / "fleet.toml").write_text(
        f'[[board]]\nname = "good"\nhost = "board"\ndevice = "x86-64"\npython = "{sys.executable}"\n'
        '[[board]]\nname = "bad"\nhost = "board"\npython = "python9"\n'
        f'[[board]]\nname = "other"\nhost = "board"\npython = "{sys.executable}"\nscan = "portable"\nthreads = 1\n'
    )
    command = [str(host_bundle.path), "--devices", str(tmp_path / "fleet.toml"), "--ssh", board.ssh, "--limit", "1"]
    assert bench_main([*command, "-o", str(tmp_path / "out")]) == 3
    shown = capsys.readouterr()
    files = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.json")}
    name = host_bundle.path.name
    assert {re.sub(r"-\w{8}\.json", "", each) for each in files} == {
        f"good/{name}-tauto-b1-board",
        f"other/{name}-t1-b1-portable-board",
    }
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["board", "good", "other"]
    assert any(line.startswith("bad: FAILED: board cannot run python9") for line in lines)
    assert "bad: board" in shown.err and board.clean()


def test_boards_are_measured_at_the_same_time(monkeypatch, tmp_path):
    both = threading.Barrier(2, timeout=5)

    @contextmanager
    def opened(place, step):
        both.wait()
        raise ToolchainError(f"no {place.host}")
        yield

    monkeypatch.setattr(sweep_fleet, "opened", opened)
    (tmp_path / "f.toml").write_text('[[board]]\nname = "a"\nhost = "x"\n[[board]]\nname = "b"\nhost = "y"\n')
    members = fleet.read_fleet(tmp_path / "f.toml", HostOptions(), Sweep([], [None], [None], [1], Settings(), tmp_path))
    outcomes = sweep_fleet.run_fleet(members, silent)
    assert [(each.name, str(each.error)) for each in outcomes] == [("a", "no x"), ("b", "no y")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", r"must hold \[\[board\]\] tables"),
        ("board = 1", r"must hold \[\[board\]\] tables"),
        ("board = [1]", r"board 1 is not a \[\[board\]\] table"),
        ('[[board]]\nhost = "x"', r"board 1 has no 'name'"),
        ('[[board]]\nname = "a"\nhots = "x"', r"board 1: key 'hots' is unknown(?s:.*)did you mean host"),
        ('[[board]]\nname = "a"\nthreads = "2"', r"board 1: threads must be a whole number"),
        ('[[board]]\nname = "a"\nbatch = 0', r"board 1: batch 0: use a number"),
        ('[[board]]\nname = "../a"', r"board 1: name '\.\./a' cannot be the name of a folder"),
        ('[[board]]\nname = ".."', r"cannot be the name of a folder"),
        ('[[board]]\nname = "a"\n[[board]]\nname = "a"', r"two boards are named 'a'"),
        ('[[board]]\nname = "a"\nhost = "x"\nadb = "y"', r"--host and --adb cannot be combined"),
        ("[[board]", "is not TOML"),
    ],
)
def test_fleets_that_are_refused(tmp_path, content, says):
    (tmp_path / "f.toml").write_text(content)
    with pytest.raises(UsageError, match=says):
        fleet.read_fleet(tmp_path / "f.toml", HostOptions(), Sweep([], [None], [None], [1], Settings(), tmp_path))
