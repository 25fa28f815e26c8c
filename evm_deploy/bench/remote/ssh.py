"""Connection to a board: the system's ssh command here, and the supervisor (supervisor.py) on the board."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from evm_deploy._util.processes import Process, end
from evm_deploy._util.schema import TEXT, TRUTH, Schema, keys
from evm_deploy.bench.remote import supervisor
from evm_deploy.errors import ToolchainError, UsageError

# The user's options come first on the command line and win: ssh uses the first value of an option.
OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
    *("-o", "RemoteCommand=none", "-T"),
)
CONNECT_S = 60.0
CLOSE_S = 10.0
ALIVE_S = 5.0  # period of keep-alive lines: a sixth of the supervisor's SILENCE_S
MAX_NOISE = 1 << 16  # largest accepted output of a board's login scripts, in bytes
MAX_ANSWER = 64 << 20
VERSION = Schema(lambda: {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "minimum": 0}})
ANSWER = Schema(lambda: keys(code={"type": ["integer", "null"]}, stdout=TEXT, stderr=TEXT, late=TRUTH))
BLOCK = 1 << 18
REFUSALS = (  # message of ssh, hint
    ("IDENTIFICATION HAS CHANGED", "the board has another key than before: find out why, then  ssh-keygen -R"),
    ("Host key verification failed", "the board's key is unknown: connect once with  ssh {host}  and compare the key"),
    ("Permission denied", "evm-bench asks for no password: ssh-copy-id {host}, or load the key with ssh-add"),
    ("Could not resolve hostname", "check the name, or give an address"),
    ("Connection refused", "check that sshd runs on the board, on this port"),
    ("timed out", "check that the board is switched on and in this network"),
    ("No route to host", "check that the board is switched on and in this network"),
)


@dataclass(frozen=True)
class SshAddress:
    """Address `[user@]board[:port]`. The board is a host name, an alias in ssh's configuration, or an IP address."""

    text: str
    destination: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> SshAddress:
        """Parse `user@board:port`, or an IPv6 address in brackets such as `[::1]`. Raises UsageError."""
        found = re.fullmatch(
            r"(?:ssh://)?(?P<user>[\w.+-]+@)?(?P<board>\[[\w:.%]+\]|[\w.-]+)(?::(?P<port>\d+))?/?", text
        )
        port = int(found["port"]) if found and found["port"] else None
        if not found or text.startswith("-") or found["board"].startswith("-") or (port and port > 65535) or port == 0:
            raise UsageError(f"--host {text!r}: use user@board or user@board:port")
        return cls(text, (found["user"] or "") + found["board"].strip("[]"), port)


@dataclass(frozen=True)
class Answer:
    """Exit code and output of a run on the board. late: whether the run was killed at its time limit."""

    code: int | None
    stdout: str
    stderr: str
    late: bool


class Connection:
    """SSH connection to a board: sends files to a temporary folder and runs the board's Python there.

    Closing the connection kills the runs and removes the folder. The end of the ssh process has the same effect,
    whatever its cause. ssh: the command, such as `ssh -F my_config`. python: the interpreter on the board, expanded by
    the board's shell. Raises ToolchainError with a hint.
    """

    def __init__(self, host: SshAddress, ssh: str, python: str) -> None:
        self.host = host.text
        self.python = python
        source = Path(supervisor.__file__).read_bytes()
        remote = f"exec {python} -c 'import sys;exec(sys.stdin.buffer.read({len(source)}))'"
        port = ("-p", str(host.port)) if host.port else ()
        command = [*shlex.split(ssh), *OPTIONS, *port, "--", host.destination, f"exec sh -c {shlex.quote(remote)}"]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the connection
        self._lock = threading.Lock()
        self._closed = threading.Event()
        try:
            self._ssh = Process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0)
        except OSError as error:
            raise ToolchainError(f"{command[0]} cannot be run: {error.strerror}", "install OpenSSH's client") from error
        threading.Thread(target=self._stay_alive, daemon=True).start()
        try:
            self._write(source)
            self.version = self._greeting()
        except BaseException:
            self.close()
            raise

    def send(self, name: str, content: Path | bytes) -> Iterator[int]:
        """Write a file into the folder on the board; yield the number of bytes sent so far. Raises ToolchainError."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        with self._lock:
            self._write_now(json.dumps({"file": name, "size": size}).encode() + b"\n")
            with contextlib.ExitStack() as stack:
                file = None if isinstance(content, bytes) else stack.enter_context(content.open("rb"))
                for start in range(0, size, BLOCK):
                    block = file.read(BLOCK) if file else content[start : start + BLOCK]  # type: ignore[index]
                    self._write_now(block)
                    yield min(start + BLOCK, size)

    def run(self, arguments: list[str], seconds: float) -> Answer:
        """Run the board's Python with `arguments` in the folder, for at most `seconds`. Raises ToolchainError."""
        self._write(json.dumps({"run": arguments, "seconds": seconds}).encode() + b"\n")
        line = self._line(seconds + CONNECT_S, MAX_ANSWER)
        try:
            content = json.loads(line)
            ANSWER(content)
            answer = Answer(**content)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._lost() from error
        if answer.code is None:
            raise ToolchainError(f"{self.host}: {answer.stderr}")
        return answer

    def close(self) -> None:
        """Close the connection: the board kills its runs and removes the folder. Wait at most CLOSE_S for it."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._ssh.stdin.close()  # type: ignore[union-attr]
        try:
            self._ssh.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            end([self._ssh])
            self._ssh.wait()
        self._ssh.stdout.close()  # type: ignore[union-attr]
        self._stderr.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _greeting(self) -> tuple[int, int]:
        """Skip output of the board's login scripts and return the version of its Python. Raises ToolchainError."""
        mark, seen = supervisor.MARK.encode(), 0
        while seen < MAX_NOISE:
            line = self._line(CONNECT_S, MAX_NOISE)
            if mark in line:
                with contextlib.suppress(ValueError, RecursionError):
                    VERSION(version := json.loads(line.partition(mark)[2]))
                    return version[0], version[1]
            seen += len(line)
        raise ToolchainError(
            f"{self.host}: got output of a shell, but the supervisor did not start",
            "make .bashrc and .profile return at once in shells that are not interactive",
        )

    def _line(self, seconds: float, limit: int) -> bytes:
        """Read the next line from the board. Raises ToolchainError if no line comes within `seconds`."""
        late = threading.Timer(seconds, self._ssh.kill)
        late.start()
        line = b""
        try:
            while not line.endswith(b"\n"):
                part = self._ssh.stdout.read(BLOCK) if len(line) < limit else b""  # type: ignore[union-attr]
                if not part:
                    raise self._lost()
                line += part
        finally:
            late.cancel()
        return line

    def _write(self, content: bytes) -> None:
        """Write to the board, after any file that is being sent. Raises ToolchainError."""
        with self._lock:
            self._write_now(content)

    def _write_now(self, content: bytes) -> None:
        """Write to the board; the caller holds the lock. Raises ToolchainError."""
        view = memoryview(content)
        try:
            while view:
                view = view[self._ssh.stdin.write(view) :]  # type: ignore[union-attr]
        except OSError as error:
            raise self._lost() from error

    def _stay_alive(self) -> None:
        """Write an empty line every ALIVE_S seconds, so that the supervisor knows that this machine is there."""
        while not self._closed.wait(ALIVE_S):
            try:
                self._write(b"\n")
            except (ToolchainError, ValueError):
                return

    def _lost(self) -> ToolchainError:
        """Return the error that explains why the connection was lost."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._ssh.wait(1)
        code = self._ssh.poll()
        self._stderr.seek(0)
        said = self._stderr.read().decode("utf-8", "replace").strip()
        with contextlib.suppress(ValueError, KeyError, IndexError):  # the supervisor may have sent its own error
            last = self._ssh.stdout.read() if code is not None else b""  # type: ignore[union-attr]
            return ToolchainError(f"{self.host}: {json.loads(last.splitlines()[-1])['stderr']}")
        return explained(self.host, self.python, code, said)


def explained(host: str, python: str, code: int | None, said: str) -> ToolchainError:
    """Return the error for an ssh process that ended with `code`. said: its stderr."""
    last = (said.splitlines() or [""])[-1].strip()
    if code == 255:
        for text, hint in REFUSALS:
            if text in said:
                return ToolchainError(f"cannot connect to {host}: {last}", hint.format(host=host))
        return ToolchainError(
            f"the connection to {host} failed: {last or 'no message from ssh'}", f"try  ssh {host}  by hand"
        )
    if code in (126, 127):
        return ToolchainError(
            f"{host} cannot run {python}: {last}", "install Python 3.10 or newer on the board, or give --python PATH"
        )
    if code is not None and code < 0:
        return ToolchainError(f"{host} did not answer in time, or ssh was killed", f"try  ssh {host}  by hand")
    return ToolchainError(
        f"ssh to {host} ended with code {code}: {last or 'no error message'}", f"try  ssh {host}  by hand"
    )
