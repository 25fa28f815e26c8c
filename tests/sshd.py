"""A real sshd on the loopback interface: own port, own keys, own configuration, in a folder of its own."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.toolchains import SSHD, need


def need_sshd() -> None:
    need("sshd")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it drops privileges; its service makes it at start


@dataclass(frozen=True)
class Sshd:
    """A running sshd. config: for `ssh -F`, with the host `board`; tmp: TMPDIR of what runs there."""

    process: subprocess.Popen[bytes]
    folder: Path
    port: int

    @property
    def ssh(self) -> str:
        return f"ssh -F {self.folder / 'config'}"

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    def processes(self) -> list[int]:
        """Return the ids of the processes that run with the board's TMPDIR."""
        mine = f"TMPDIR={self.tmp}".encode()  # or a folder inside
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if any(entry.startswith(mine) for entry in environ.read_bytes().split(b"\0")):
                    found.append(int(environ.parent.name))
            except OSError:
                continue
        return found

    def sessions(self) -> list[int]:
        """Return the ids of sshd's processes, one for each connection."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def clean(self) -> bool:
        return not self.processes() and not list(self.tmp.iterdir())

    def is_clean_within(self, seconds: float) -> bool:
        return within(seconds, self.clean)


def within(seconds: float, condition) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


@contextmanager
def running_sshd(folder: Path) -> Iterator[Sshd]:
    folder.mkdir()
    (folder / "tmp").mkdir()
    for name in ("host_key", "user_key", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copyfile(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    server = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "UsePAM": "no",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "SetEnv": f"TMPDIR={folder / 'tmp'}",
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
    client = {
        "HostName": "127.0.0.1",
        "Port": port,
        "User": getpass.getuser(),
        "IdentityFile": folder / "user_key",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "UserKnownHostsFile": folder / "known_hosts",
        "GlobalKnownHostsFile": "none",
    }
    lines = "".join(f"  {key} {value}\n" for key, value in client.items())
    (folder / "config").write_text(f"Host board\n{lines}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        try:
            assert within(5, lambda: listening(port)), (folder / "log").read_text()
            yield Sshd(process, folder, port)
        finally:
            process.terminate()
            process.wait()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
