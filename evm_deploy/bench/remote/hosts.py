"""Hosts that measure bundles: this machine, a board over ssh, an Android device over adb, and device profiles."""

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
from evm_deploy.bundle.signing import public_key
from evm_deploy.devices.profiles import Profile, find_profile
from evm_deploy.errors import UsageError
from evm_deploy.toolchain.platforms import host_platform


class Host(Protocol):
    """Machine that measures bundles; a call has the parameters of `bench.run.bench`.

    platform: name of the host's platform, see toolchain/platforms.py.
    """

    platform: str

    def prepare(self, path: str | Path, settings: Settings) -> None:
        """Check and send the bundle, with progress shown as separate steps. Raises EvmError."""
        ...

    def __call__(self, path: str | Path, settings: Settings) -> Record: ...


@dataclass(frozen=True)
class HostOptions:
    """Choice of a host and a device profile; without `host` and `adb` it is this machine.

    host: `user@board[:port]` to reach over ssh. adb: serial number of an Android device. device: name or TOML file of a
    device profile. ssh: ssh command on this machine. python: Python interpreter on the board. runner: file of
    onnxruntime_perf_test for the Android device. require_signature: PEM file of the public key that must have signed
    every bundle. Raises UsageError for options that cannot be combined.
    """

    host: str | None = None
    adb: str | None = None
    device: str | None = None
    ssh: str = "ssh"
    python: str = "python3"
    runner: str | None = None
    require_signature: str | None = None

    def __post_init__(self) -> None:
        if self.host and self.adb:
            raise UsageError(
                "--host and --adb cannot be combined", "leave one out, or list both boards in --devices FILE.toml"
            )
        if bool(self.adb) != bool(self.runner):
            raise UsageError(
                "--adb and --runner must be given together",
                "--runner FILE: onnxruntime_perf_test compiled for Android, made by ONNX Runtime's build",
            )


class LocalHost:
    """Host that measures on this machine, each bundle in a new process.

    require_signature: PEM file of the public key that must have signed the bundles.
    """

    def __init__(self, require_signature: str | None = None) -> None:
        self.platform = host_platform()
        self._require_signature = require_signature

    def prepare(self, path: str | Path, settings: Settings) -> None:
        """Do nothing: the bundle is on this machine already."""

    def __call__(self, path: str | Path, settings: Settings) -> Record:
        return bench(path, settings, self._require_signature)


class ProfiledHost:
    """Host with a device profile, which gives threads and runtime settings that the caller leaves open.

    Raises UsageError if the host has another platform than the profile, or the profile lacks the bundle's target.
    """

    def __init__(self, there: Host, profile: Profile) -> None:
        self._there, self._profile, self.platform = there, profile, there.platform
        if profile.platform != self.platform:
            raise UsageError(
                f"device {profile.name!r} has platform {profile.platform}, but the host has {self.platform}",
                "measure on the device: --host user@board, or --adb SERIAL" if isinstance(there, LocalHost) else "",
            )

    def prepare(self, path: str | Path, settings: Settings) -> None:
        """Prepare the measurement on the host, with the profile's settings. Raises EvmError."""
        self._there.prepare(path, self._settings(path, settings))

    def __call__(self, path: str | Path, settings: Settings) -> Record:
        record = self._there(path, self._settings(path, settings))
        return replace(record, device={**record.device, "profile": self._profile.name})

    def _settings(self, path: str | Path, settings: Settings) -> Settings:
        """Return `settings` completed from the profile. Raises UsageError if the profile lacks the bundle's target."""
        profile, target = self._profile, open_bundle(path).manifest.target
        if target not in profile.targets:
            raise UsageError(f"device {profile.name!r} has no target {target!r}; it has: {profile.preferences}")
        own = {**profile.settings.get(target, {}), **dict(settings.own)}
        return replace(settings, threads=settings.threads or profile.threads).with_own(**own)


@contextlib.contextmanager
def opened(options: HostOptions, step: Step) -> Iterator[Host]:
    """Context manager: connect to the host of `options`, disconnect at the end. Raises UsageError, ToolchainError."""
    profile = find_profile(options.device) if options.device else None
    key = public_key(options.require_signature) if options.require_signature else None
    with contextlib.ExitStack() as stack:
        there: Host = LocalHost(options.require_signature)
        if options.host:
            from evm_deploy.bench.remote.ssh import Connection, SshAddress
            from evm_deploy.bench.remote.ssh_host import SshHost

            host = SshAddress.parse(options.host)
            with step("connect", host.text):
                connection = stack.enter_context(Connection(host, options.ssh, options.python))
                there = SshHost(connection, step, key)
        elif options.adb and options.runner:
            from evm_deploy.bench.remote.adb_host import AdbHost

            with step("connect", f"{options.adb}, adb"):
                there = stack.enter_context(AdbHost(options.adb, Path(options.runner), step, key))
        yield ProfiledHost(there, profile) if profile else there
