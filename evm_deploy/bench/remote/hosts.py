"""Where to measure: this machine, a board over ssh, a phone over adb; and as what kind of device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from evm_deploy._util.progress import Step
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.run import bench
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.devices.profiles import Profile, find_profile
from evm_deploy.errors import UsageError
from evm_deploy.toolchain.platforms import host_platform


class Host(Protocol):
    """Measures bundles somewhere, as `bench.run.bench` does here. platform: of that place, as in platforms.py."""

    platform: str

    def prepare(self, path: str | Path, settings: Settings) -> None:
        """Everything before the measurement that says how far it is by itself. Raises EvmErrors."""
        ...

    def __call__(self, path: str | Path, settings: Settings) -> Record: ...


@dataclass(frozen=True)
class HostOptions:
    """host: `user@board[:port]`, and adb: serial of a phone; without either, this machine.

    device: name or TOML file of a device profile. ssh, python: the command here, the interpreter there.
    runner: onnxruntime_perf_test for the phone.
    """

    host: str | None = None
    adb: str | None = None
    device: str | None = None
    ssh: str = "ssh"
    python: str = "python3"
    runner: str | None = None

    def __post_init__(self) -> None:
        if self.host and self.adb:
            raise UsageError("--host and --adb are two places", "leave one out, or list both in --devices FILE.toml")
        if bool(self.adb) != bool(self.runner):
            raise UsageError(
                "--adb and --runner belong together",
                "--runner FILE: an onnxruntime_perf_test compiled for Android, from ONNX Runtime's own build",
            )


class LocalHost:
    """This machine."""

    def __init__(self) -> None:
        self.platform = host_platform()

    def prepare(self, path: str | Path, settings: Settings) -> None:
        """Nothing."""

    def __call__(self, path: str | Path, settings: Settings) -> Record:
        return bench(path, settings)


class ProfiledHost:
    """A place that is a kind of device: its threads and settings of the runtime, where they are not given.

    Raises UsageError for a place or bundle that is not of this kind.
    """

    def __init__(self, there: Host, profile: Profile) -> None:
        self._there, self._profile, self.platform = there, profile, there.platform
        if profile.platform != self.platform:
            raise UsageError(
                f"device {profile.name!r} is {profile.platform}, this would be measured on {self.platform}",
                "measure on the device: --host user@board, or --adb SERIAL" if isinstance(there, LocalHost) else "",
            )

    def prepare(self, path: str | Path, settings: Settings) -> None:
        self._there.prepare(path, self._settings(path, settings))

    def __call__(self, path: str | Path, settings: Settings) -> Record:
        record = self._there(path, self._settings(path, settings))
        return replace(record, device={**record.device, "profile": self._profile.name})

    def _settings(self, path: str | Path, settings: Settings) -> Settings:
        profile, target = self._profile, open_bundle(path).manifest.target
        if target not in profile.targets:
            raise UsageError(f"device {profile.name!r} has no target {target!r}; it has: {profile.preferences}")
        own = {**profile.settings.get(target, {}), **dict(settings.own)}
        return replace(settings, threads=settings.threads or profile.threads).with_own(**own)


@contextlib.contextmanager
def opened(options: HostOptions, step: Step) -> Iterator[Host]:
    """Connect to the host of `options`. Raises UsageError, ToolchainError."""
    profile = find_profile(options.device) if options.device else None
    with contextlib.ExitStack() as stack:
        there: Host = LocalHost()
        if options.host:
            from evm_deploy.bench.remote.ssh import Connection, SshAddress
            from evm_deploy.bench.remote.ssh_host import SshHost

            host = SshAddress.parse(options.host)
            with step("connect", host.text):
                connection = stack.enter_context(Connection(host, options.ssh, options.python))
                there = SshHost(connection, step)
        elif options.adb and options.runner:
            from evm_deploy.bench.remote.adb_host import AdbHost

            with step("connect", f"{options.adb}, adb"):
                there = stack.enter_context(AdbHost(options.adb, Path(options.runner), step))
        yield ProfiledHost(there, profile) if profile else there
