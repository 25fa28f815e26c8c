"""Child processes that end with this process, together with the processes that they have started themselves.

Every child runs in a session of its own, which `leave` and a failed `run` end as a whole; children of the child stay in
this session. A tied child also ends itself when its stdin ends, whatever has ended its parent: SIGKILL too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from evm_deploy.errors import ToolchainError

GROUPED = "EVM_PROCESS_GROUP"  # variable of the processes in a session that this module or a board's supervisor made
PATIENCE_S = 5.0  # time for a process to end by itself after its stdin was closed

_running: set[Process] = set()
_leaving: set[int] = set()  # identifier of the thread that ends this process


class Process(subprocess.Popen[Any]):
    """Child process in a session of its own. group: False for a program that also starts servers, such as adb."""

    def __init__(
        self, command: Sequence[str], *, group: bool = True, env: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        self.pid: Any = None
        self.returncode: Any = None
        self.tie: IO[Any] | None = None  # stdin of a tied process, where communicate() must not close it
        _running.difference_update({each for each in list(_running) if each.returncode is not None})
        _running.add(self)  # before the start: an interruption may come while the start is under way
        if _leaving and threading.get_ident() not in _leaving:
            raise ToolchainError(f"interrupted before {command[0]} was started", "run the command again")
        self.leads = group and GROUPED not in os.environ
        env = {**(os.environ if env is None else env), GROUPED: "1"} if self.leads else env
        super().__init__(command, env=env, start_new_session=self.leads, **options)

    def gone(self) -> bool:
        """Test whether the process has ended, without taking its exit code from a thread that waits for it."""
        if self.pid is None or self.returncode is not None:
            return True
        if not hasattr(os, "waitid"):
            return self.poll() is not None
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def members(self) -> list[int]:
        """Return the running processes that belong to the child: its whole session, where the system lists it."""
        if self.pid is None or self.returncode is not None:  # the number may be another process's by now
            return []
        return (in_session(self.pid) if self.leads else []) or ([] if self.gone() else [self.pid])

    def signal_all(self, which: int) -> None:
        """Send a signal to all members. Does nothing if they have ended."""
        for pid in self.members():
            with contextlib.suppress(OSError):
                os.kill(pid, which)


def in_session(session: int) -> list[int]:
    """Return the running processes of a session, from /proc; empty on systems without it.

    Not the process group: ninja puts each of its jobs into another one.
    """
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, _, its = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:4]
            if its == str(session) and state not in "ZX":
                found.append(int(file.parent.name))
    return found


def run(
    command: Sequence[str], *, timeout: float | None = None, tied: bool = False, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its exit code, stdout and stderr as text.

    tied: the command ends itself when its stdin ends (`end_with_stdin`); the stdin of other commands is empty. Raises
    OSError if the command cannot be started, and subprocess.TimeoutExpired. The command and all processes that it has
    started are killed then, and by any exception in this thread, such as KeyboardInterrupt.
    """
    stdin = subprocess.PIPE if tied else subprocess.DEVNULL
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with Process(command, env=env, stdin=stdin, **pipes) as process:
        process.tie, process.stdin = process.stdin, None
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            end([process])
            raise
        finally:
            if process.tie:
                process.tie.close()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(processes: Iterable[Process]) -> None:
    """End processes with all that they have started: tied ones by the end of their stdin, others by SIGTERM.

    What is left after PATIENCE_S is killed.
    """
    found = [process for process in processes if process.pid is not None and process.returncode is None]
    for process in found:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # another thread may be writing to it
            if tie := process.tie or process.stdin:
                tie.close()
            else:
                process.signal_all(signal.SIGTERM)
    for which in (getattr(signal, "SIGKILL", signal.SIGTERM), 0):
        late = time.monotonic() + PATIENCE_S
        while time.monotonic() < late and any(process.members() for process in found):
            time.sleep(0.02)
        for process in found:
            process.signal_all(which)


def leave(code: int, message: str = "") -> NoReturn:
    """End this process at once, from any thread: children first, then unfinished files, then `message` on stderr.

    Unfinished files are registered with atexit (`temporary_sibling` in _util/files.py). No other thread can start a
    process meanwhile.
    """
    _leaving.add(threading.get_ident())
    end(list(_running))
    if GROUPED in os.environ:  # what children of children are left
        for pid in set(in_session(os.getsid(0))) - {os.getpid()}:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    atexit._run_exitfuncs()
    if message:
        os.write(2, message.encode())
    os._exit(code)


def end_with_stdin(code: int) -> None:
    """Start a thread that ends this process, its children and its unfinished files when stdin ends.

    The rest of the process has an empty stdin from now on: nobody would answer what it asks.
    """
    tie, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        while os.read(tie, 1):  # not sys.stdin: this thread would hold its lock when the interpreter ends
            pass
        leave(code)

    threading.Thread(target=wait, daemon=True).start()
