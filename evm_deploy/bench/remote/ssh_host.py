"""Host for `--host USER@BOARD`: measure bundles on another machine over ssh."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy._util.progress import Step
from evm_deploy._util.schema import TEXT, Schema, keys
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.remote.agent import NAME, build_agent
from evm_deploy.bench.remote.ssh import Connection
from evm_deploy.bench.run import STARTUP_S, record_of
from evm_deploy.bundle.bundle import Bundle, open_bundle
from evm_deploy.bundle.manifest import FILE, Manifest
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.runtimes.info import Requirement
from evm_deploy.runtimes.registry import runtime_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PYTHON = (3, 10)
CHECK_S = 60.0
UNTRUSTED = (
    "the bundle's native library was not run, because a library is a program; if you trust the bundle: --scan bundled, "
    "or --require-signature PUB"
)
CHECKED = Schema(
    lambda: keys(platform=TEXT, versions={"type": "object", "additionalProperties": {"type": ["string", "null"]}})
)


COMMON = (
    Requirement("numpy", "numpy", "1.26"),
    Requirement("safetensors", "safetensors", "0.4"),
    Requirement("fastjsonschema", "fastjsonschema", "2.21"),
)
IMAGES = Requirement("PIL", "pillow", "10")


class SshHost:
    """Host that measures on a board with the agent; a call has the parameters and errors of `bench.run.bench`.

    A bundle's own native library is a program: it runs with --scan bundled, or if `key`, the public key that must have
    signed every bundle, is given. platform: name of the board's platform, see toolchain/platforms.py. Raises
    ToolchainError if the board lacks something or the agent fails.
    """

    def __init__(self, connection: Connection, step: Step, key: Ed25519PublicKey | None = None) -> None:
        self._connection, self._step, self._key = connection, step, key
        self.at = connection.host
        if connection.version < PYTHON:
            raise ToolchainError(
                f"{self.at} has Python {'.'.join(map(str, connection.version))}, but 3.10 or newer is needed",
                "install a newer Python on the board, and give it with --python PATH",
            )
        for _ in connection.send(NAME, build_agent()):
            pass
        self.platform: str = self._check(())["platform"]
        self._sent: dict[str, str] = {}

    def prepare(self, path: str | Path, settings: Settings) -> None:
        """Check that the board has the packages that the bundle needs, and send the bundle. Raises EvmError."""
        bundle = open_bundle(path, self._key)
        for flag in settings.flags().values():
            if flag.here:
                raise UsageError(
                    f"{flag.name} with --host: files on the board are removed at the end", f"leave {flag.name} out"
                )
        self._require(bundle, settings)
        self._place(path, bundle)

    def __call__(self, path: str | Path, settings: Settings) -> Record:
        bundle = open_bundle(path, self._key)
        there = settings
        if settings.scan == "auto" and self._key and self.platform in bundle.manifest.plugins:
            there = replace(settings, scan="bundled")  # a library that the user's signer vouches for
        arguments = ["--tied", "measure", self._place(path, bundle), json.dumps(there.as_dict())]
        answer = self._connection.run([NAME, *arguments], settings.limit_s + STARTUP_S)
        if answer.late:
            raise ToolchainError(
                f"measuring {path} on {self.at} did not end within {settings.limit_s + STARTUP_S:.0f} s"
            )
        record = record_of(answer.stdout, answer.stderr, answer.code, f"{path} on {self.at}")
        warnings = [*record.warnings, *no_library(bundle.manifest, record, self.platform)]
        return replace(
            record,
            device={**record.device, "at": self.at},
            settings={**record.settings, "scan": settings.scan},  # as asked; runtime.scan says how it ran
            warnings=warnings,
        )

    def _require(self, bundle: Bundle, settings: Settings) -> None:
        """Raise ToolchainError with an install command if the board lacks packages that the bundle needs."""
        target = runtime_of(bundle.manifest.target, bundle.path)
        needs = (*COMMON, *target.needs, *((IMAGES,) if settings.timed == "end-to-end" else ()))
        versions = self._check([module for need in needs for module in need.modules])["versions"]
        found = {need: next((v for v in map(versions.get, need.modules) if v is not None), None) for need in needs}
        wrong = {need: version for need, version in found.items() if not need.met_by(version)}
        if wrong:
            lacks = ", ".join(f"{need.package} (has {has})" if has else need.package for need, has in wrong.items())
            install = " ".join(f"'{need}'" if need.least else need.package for need in wrong)
            raise ToolchainError(
                f"{self.at} lacks packages for target '{target.name}': {lacks}",
                f"on the board:  {self._connection.python} -m pip install {install}\n"
                "  or install them into a virtual environment, and give --python PATH/bin/python",
            )

    def _check(self, modules: list[str] | tuple[()]) -> dict[str, Any]:
        """Return the board's platform and the package versions of `modules`. Raises ToolchainError."""
        answer = self._connection.run([NAME, "--tied", "check", *modules], CHECK_S)
        try:
            content: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
            CHECKED(content)
        except (IndexError, ValueError, RecursionError) as error:
            said = (answer.stderr.strip().splitlines() or ["no error message"])[-1]
            raise ToolchainError(f"the agent does not run on {self.at}: {said}") from error
        return content

    def _place(self, path: str | Path, bundle: Bundle) -> str:
        """Return the bundle's folder on the board; the first call sends the files that the manifest names."""
        if str(path) in self._sent:
            return self._sent[str(path)]
        folder = f"{len(self._sent)}/{bundle.path.resolve().name}"
        files = [FILE, *bundle.manifest.files]
        total = sum((bundle.path / name).stat().st_size for name in files)
        with self._step("send", f"{bundle.path.name}, {total / 1e6:.1f} MB, to {self.at}") as advance:
            before = 0
            for name in files:
                sent = 0
                for sent in self._connection.send(f"{folder}/{name}", bundle.path / name):
                    advance(before + sent, total)
                before += sent
        self._sent[str(path)] = folder
        return folder


def no_library(manifest: Manifest, record: Record, platform: str) -> list[str]:
    """Return a warning if scans ran portably unasked: no native library for `platform`, or one that is not trusted."""
    could = "plugin" in manifest.scan["value"].split("+") and record.settings["scan"] != "portable"
    if not could or record.runtime["scan"]["value"] != "portable":
        return []
    if platform in manifest.plugins:
        return [f"portable scans: {UNTRUSTED}"]
    return [f"portable scans: the bundle has no native library for {platform} (evm-export --platform {platform})"]
