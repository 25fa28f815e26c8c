"""Host for `--adb SERIAL --runner FILE`: measure ONNX bundles on an Android device with onnxruntime_perf_test.

The program onnxruntime_perf_test is part of ONNX Runtime. Tested with a fake adb; never run on a device.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import math
import re
import secrets
import shlex
import subprocess
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evm_deploy._util.processes import Process
from evm_deploy._util.progress import Step
from evm_deploy.bench.device import State
from evm_deploy.bench.latency import throughput
from evm_deploy.bench.measurable import batch_size, bundle_facts
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.remote import perf_test
from evm_deploy.bench.remote.ssh_host import UNTRUSTED
from evm_deploy.bundle.bundle import Bundle, open_bundle
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.runtimes.info import RuntimeInfo
from evm_deploy.runtimes.registry import configured, runtime_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

RUN_S = 10  # fixed duration: onnxruntime_perf_test cannot stop when the median is stable
MODEL, LIBRARY = "model.onnx", "libbundle_ops.so"  # names of the bundle's files on the device
ANSWER_S = 60.0
PUSH_S = 600.0
WHERE = "/data/local/tmp"  # folder in which adb's shell user may write and run programs
NOTHING = State((), {}, None, None)
STATES = {
    "unauthorized": "allow this computer on the device's screen",
    "offline": "unplug it and plug it in again, or  adb reconnect",
    "not found": "adb devices  lists the connected devices",
    "no devices": "connect a device with USB debugging switched on; adb devices  lists the connected devices",
    "no permissions": "see udev rules:  https://developer.android.com/tools/device.html",
}
# Shell script on the device. The end of adb closes the script's stdin; the script then kills the runner and removes
# the folder.
SCRIPT = """cd {folder} || exit 1
exec 3<&0
LD_LIBRARY_PATH=. ./{runner} {arguments} </dev/null >printed 2>&1 & run=$!
(cat <&3; trap '' TERM; kill -9 $run; rm -rf {folder}) >/dev/null 2>&1 & watch=$!
wait $run; code=$?
kill $watch 2>/dev/null
tail -c 4000 printed
exit $code
"""
FACTS = """getprop ro.product.manufacturer; getprop ro.product.model; getprop ro.soc.model; getprop ro.product.cpu.abi
getprop ro.build.version.release; nproc; grep MemTotal /proc/meminfo
cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null || echo"""


class AdbError(ToolchainError):
    """Failure of a command that adb started on the device."""


class AdbHost:
    """Host that measures on an Android device; a call has the parameters of `bench.run.bench`.

    The runner lies in a temporary folder on the device, which is removed at the end of the `with` block. A bundle's own
    native library is a program: it runs with --scan bundled, or if `key`, the public key that must have signed every
    bundle, is given. Raises ToolchainError if adb cannot reach the device, the runner fails, or its results cannot be
    read.
    """

    platform = "android-aarch64"

    def __init__(self, serial: str, runner: Path, step: Step, key: Ed25519PublicKey | None = None) -> None:
        if not runner.is_file():
            raise UsageError(f"--runner {runner} is not a file", "give onnxruntime_perf_test, compiled for Android")
        self._serial, self._runner, self._step, self._key = serial, runner, step, key
        self._folder = f"{WHERE}/evm-bench-{secrets.token_hex(6)}"
        self._adb("get-state")
        atexit.register(self._clear)  # an interrupted command does not leave its `with` blocks
        self._device = self._facts()

    def __enter__(self) -> AdbHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()
        atexit.unregister(self._clear)

    def prepare(self, path: str | Path, settings: Settings) -> None:
        """Send runner and model to the device. Raises UsageError for a bundle or setting that it cannot measure.

        Also raises BundleError and ToolchainError.
        """
        bundle = open_bundle(path, self._key)
        for what in self._refused(runtime_of(bundle.manifest.target, bundle.path), settings):
            raise UsageError(f"{what} with --adb: {perf_test.NAME} only measures ONNX models on the CPU")
        library = self._library(bundle.manifest, settings)
        if not library and "portable" not in bundle.manifest.scan["value"].split("+"):
            raise UsageError("the bundle's scans need its native library", "if you trust the bundle: --scan bundled")
        sent = {file: file.name for file in (self._runner, *self._runner.parent.glob("libonnxruntime*.so"))}
        sent[bundle.path / bundle.manifest.artifact] = MODEL  # a name from the bundle could be that of a system library
        sent |= {bundle.path / library: LIBRARY} if library else {}
        self._clear()
        with self._step("send", f"{bundle.path.name} and {self._runner.name}, to {self._serial}"):
            self._shell(f"mkdir {self._folder}")
            for file, name in sent.items():
                self._adb("push", str(file.resolve()), f"{self._folder}/{name}", seconds=PUSH_S)
            self._shell(f"chmod 755 {self._folder}/{shlex.quote(self._runner.name)}")

    def __call__(self, path: str | Path, settings: Settings) -> Record:
        bundle = open_bundle(path, self._key)
        manifest = bundle.manifest
        batch = batch_size(manifest.batch, settings.batch)
        library = self._library(manifest, settings)
        seconds = math.ceil(min(settings.limit_s, RUN_S))
        arguments = perf_test.arguments(
            MODEL,
            seconds,
            settings.threads,
            None if manifest.batch.static else batch,
            f"./{LIBRARY}" if library else None,
        )
        script = SCRIPT.format(
            folder=self._folder, runner=shlex.quote(self._runner.name), arguments=shlex.join(arguments)
        )
        try:
            printed = self._shell(script, seconds=seconds + ANSWER_S)
        except AdbError as error:
            raise ToolchainError(
                f"{self._runner.name} failed: {error}", "check that it was compiled for this device's processor"
            ) from error
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / perf_test.RESULT
            self._adb("pull", f"{self._folder}/{perf_test.RESULT}", str(result))
            written = result.read_text(encoding="utf-8", errors="replace") if result.is_file() else ""
        self._shell(f"rm -f {self._folder}/{perf_test.RESULT}")
        return self._record(bundle, replace(settings, batch=batch), library, perf_test.read(printed, written))

    def _refused(self, target: RuntimeInfo, settings: Settings) -> list[str]:
        """Return the names of settings that onnxruntime_perf_test cannot measure."""
        refused = [f"a bundle for {target.name}"] if target.phone != perf_test.NAME else []
        refused += ["--end-to-end"] if settings.timed == "end-to-end" else []
        refused += ["several streams"] if settings.streams > 1 else []
        own = dict(settings.own)
        for name, flag in settings.flags().items():
            try:
                configured(target, {name: own[name]})
            except UsageError:
                refused.append(f"{flag.name} {own[name]}" if flag.metavar and not flag.here else flag.name)
        return refused

    def _library(self, manifest: Manifest, settings: Settings) -> str | None:
        """Return the bundle's native library for Android if it may run, else None.

        Raises UsageError if --scan asks for a native library that is not there.
        """
        library = manifest.plugins.get(self.platform)
        if library is None and settings.scan in ("plugin", "bundled"):
            has = ", ".join(manifest.plugins) or "none"
            raise UsageError(
                f"--scan {settings.scan}: the bundle has no native library for Android; it has libraries for: {has}"
            )
        if settings.scan == "plugin":
            raise UsageError("--scan plugin with --adb: no native library is installed there", "use --scan bundled")
        trusted = settings.scan == "bundled" or (settings.scan == "auto" and self._key)
        return library if trusted else None

    def _record(self, bundle: Bundle, settings: Settings, library: str | None, found: perf_test.Measured) -> Record:
        """Make the record of a run."""
        latency = found.latency
        skipped = settings.scan == "auto" and library is None and self.platform in bundle.manifest.plugins
        untrusted = [f"portable scans: {UNTRUSTED}"] if skipped else []
        unstable = [] if latency.stable else ["not stable: the last windows differ by more than 5 %, or are too few"]
        return Record(
            bundle=bundle_facts(bundle),
            device={"at": f"adb {self._serial}", "profile": None, **self._device},
            runtime={
                "versions": {},
                "scan": {
                    "value": "plugin" if library else "portable",
                    "reason": "the bundle's native library" if library else "no native library for Android in use",
                },
                "plan": {},
            },
            settings=settings.as_dict(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            load_ms={"fresh": round(found.load_ms, 2)},
            first_ms=found.first_ms,
            warm_up=latency.warm_up,
            stable=latency.stable,
            samples_ms=[round(value, 5) for value in latency.samples],
            summary_ms=latency.summary(),
            interval_ms=latency.interval(),
            device_ms={},
            layers={},
            energy_mj={},
            throughput=round(throughput(latency, settings.batch or 1), 2),
            memory_mb={"peak": round(found.peak_mb, 1)},
            before=asdict(NOTHING),
            after=asdict(NOTHING),
            warnings=["measured by onnxruntime_perf_test, on generated inputs", *unstable, *untrusted],
        )

    def _facts(self) -> dict[str, Any]:
        """Return the device's facts for `Record.device`."""
        lines = [line.strip() for line in self._shell(FACTS).splitlines()] + [""] * 8
        maker, model, soc, abi, release, cores, memory, governor = lines[:8]
        megabytes = re.search(r"\d+", memory)
        return {
            "model": f"{maker} {model}".strip(),
            "cpu": soc or abi,
            "machine": abi,
            "cores": int(cores) if cores.isdigit() else None,
            "usable_cores": int(cores) if cores.isdigit() else None,
            "governor": governor or None,
            "memory_mb": int(megabytes[0]) // 1024 if megabytes else None,
            "system": f"Android {release}",
            "python": None,
        }

    def _clear(self) -> None:
        """Remove the folder on the device, if it can be reached."""
        with contextlib.suppress(ToolchainError):
            self._shell(f"rm -rf {self._folder}")

    def _shell(self, script: str, seconds: float = ANSWER_S) -> str:
        """Run a shell script on the device and return its output."""
        return self._adb("shell", script, seconds=seconds)

    def _adb(self, *arguments: str, seconds: float = ANSWER_S) -> str:
        """Run an adb command and return its output. Raises ToolchainError.

        The command's stdin is a pipe from this process, so the command notices when this process ends.
        """
        command = ["adb", "-s", self._serial, *arguments]
        try:
            with Process(
                command,
                group=False,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process:
                return self._printed(process, arguments, seconds)
        except FileNotFoundError as error:
            raise ToolchainError("adb is not installed", "install Android's platform-tools") from error

    def _printed(self, process: Process, arguments: tuple[str, ...], seconds: float) -> str:
        """Return the output of a running adb command; kill the command after `seconds`. Raises ToolchainError."""
        assert process.stdout
        late = threading.Timer(seconds, process.kill)
        late.start()
        try:
            printed: str = process.stdout.read()
            code = process.wait()
        finally:
            late.cancel()
            process.kill()
        if code == 0:
            return printed
        if code < 0:
            raise ToolchainError(f"adb {arguments[0]} on {self._serial} did not end within {seconds:.0f} s")
        lines = printed.strip().splitlines() or ["no error message"]
        for line in lines:
            for state, hint in STATES.items():
                if line.startswith(("error: ", "adb: ")) and state in line:
                    raise ToolchainError(f"{self._serial} cannot be reached: {line}", hint)
        raise AdbError(f"adb {arguments[0]} on {self._serial} failed with code {code}: {lines[-1]}")
