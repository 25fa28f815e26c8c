"""Processes that a command starts end with it, and all that they have started; nothing else starts any."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evm_deploy._util import processes
from tests.imports import PACKAGE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

#: Files that start processes by themselves -> the reason.
OTHERS = {
    "_util/processes.py": "the mechanism",
    "bench/remote/supervisor.py": "runs on boards, as text, without evm-deploy",
    "bench/bench_on_mac.py": "asks sysctl; runs without evm-deploy",
    "runtimes/tensorrt/build_engine.py": "asks nvidia-smi; runs without evm-deploy",
}

#: A tool that, like ninja, puts its job into another process group; the job notes its number.
TOOL = """#!/bin/sh
exec "{python}" -c "
import os, subprocess, sys, time
job = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=lambda: os.setpgid(0, 0))
with open('{jobs}', 'a') as file:
    file.write(str(os.getpid()) + ' ' + str(job.pid) + chr(10))
time.sleep(60)
"
"""

#: What a command's body may be waiting in -> Python that waits there. `tool` is the path of the tool.
WAITS = {
    "a command": "processes.run([tool])",
    "a tied process": "processes.run([sys.executable, '-c', CHILD, tool], tied=True)",
    "a compiler": "Compiler((tool,), 'x86_64').run('a.cpp')",
    "a compiler in a thread": "list(Pool(2).map(lambda i: Compiler((tool,), 'x86_64').run('a.cpp'), range(9)))",
    "nvcc": "compile_kernel('sm_75')",
    "the builder of engines": "build_engine('trt', Path('.'))",
    "cmake": "openvino_extension._run([tool], dict(os.environ))",
    "ssh": "Connection(SshAddress.parse('board'), tool, 'python3')",
    "adb": "AdbHost('serial', Path(tool), silent)",
}

BODY = """
import os, shutil, sys
from concurrent.futures import ThreadPoolExecutor as Pool
from argparse import Namespace
from pathlib import Path
from evm_deploy._util import processes
from evm_deploy._util.progress import silent
from evm_deploy.bench.remote.adb_host import AdbHost
from evm_deploy.bench.remote.ssh import Connection, SshAddress
from evm_deploy.commands.console import run_command
from evm_deploy.export.tensorrt import target
from evm_deploy.export.tensorrt.target import build_engine
from evm_deploy.runtimes.tensorrt.kernel import compile_kernel
from evm_deploy.toolchain import openvino_extension
from evm_deploy.toolchain.compile import Compiler

CHILD = "import sys; from evm_deploy._util import processes; processes.end_with_stdin(9); processes.run(sys.argv[1:])"
tool = sys.argv[1]
processes.PATIENCE_S = 1  # the tool does not end when its stdin does
target.engine_builder.__file__ = tool + ".py"
sys.exit(run_command("evm-test", lambda: [WAIT, 0][1], Namespace(verbose=False)))
"""


def jobs_of(file: Path) -> list[int]:
    return [int(number) for number in file.read_text().split()] if file.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def within(seconds: float, test) -> bool:
    late = time.monotonic() + seconds
    while time.monotonic() < late:
        if test():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def tools(tmp_path):
    """A folder with the tool under every name, and the file of its jobs."""
    jobs = tmp_path / "jobs"
    for name in ("tool", "nvcc", "adb"):
        (tmp_path / name).write_text(TOOL.format(python=sys.executable, jobs=jobs))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "tool.py").write_text("import subprocess; subprocess.run([__file__[:-3]])")
    yield tmp_path, jobs
    for pid in filter(alive, jobs_of(jobs)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda which: which.name)
@pytest.mark.parametrize("waits", WAITS)
def test_an_interrupted_command_ends_what_it_started(waits, which, tools):
    folder, jobs = tools
    command = [sys.executable, "-c", BODY.replace("WAIT", WAITS[waits]), str(folder / "tool")]
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)
    if not within(30, lambda: jobs_of(jobs)):
        process.kill()
        pytest.fail(f"the tool was not started: {process.communicate()[1]}")
    process.send_signal(which)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "nothing was left behind" in err
    if waits == "adb":  # adb itself starts a server, which stays
        assert not alive(jobs_of(jobs)[0])
    else:
        assert within(2, lambda: not any(map(alive, jobs_of(jobs))))


def test_a_killed_command_ends_its_tied_process(tools):
    """SIGKILL cannot be handled: the tied process notices, and ends what it has started."""
    folder, jobs = tools
    command = [sys.executable, "-c", BODY.replace("WAIT", WAITS["a tied process"]), str(folder / "tool")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)}, cwd=folder)
    assert within(30, lambda: jobs_of(jobs))
    process.kill()
    process.wait()
    assert within(10, lambda: not any(map(alive, jobs_of(jobs))))


@pytest.mark.slow
def test_a_timeout_ends_the_whole_tree(tools):
    folder, jobs = tools
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([str(folder / "tool")], timeout=2)
    assert jobs_of(jobs) and within(2, lambda: not any(map(alive, jobs_of(jobs))))


def test_the_tool_outlives_a_command_that_does_not_end_it(tools):
    """The control: without the mechanism the tool's job stays."""
    folder, jobs = tools
    process = subprocess.Popen([str(folder / "tool")], start_new_session=True)
    assert within(30, lambda: jobs_of(jobs))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    assert alive(jobs_of(jobs)[1])


def test_an_ignored_signal_stays_ignored(tools):
    """Ignore a signal that nohup has ignored."""
    folder, _ = tools
    body = BODY.replace("WAIT", "os.kill(os.getpid(), 1)")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    script = f'trap "" HUP; exec "{sys.executable}" -c "$0" tool'
    done = subprocess.run(["sh", "-c", script, body], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def starts(source: str) -> bool:
    """Whether a module starts processes by other means than _util/processes.py."""
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    names = {"run", "Popen", "call", "check_call", "check_output", "getoutput"}
    return any(name in called for name in ({f"subprocess.{each}" for each in names} | {"os.system", "os.popen"}))


def test_no_other_module_starts_processes():
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if starts(path.read_text())}
    assert found <= set(OTHERS)
    assert starts("import subprocess\nsubprocess.run([])")
