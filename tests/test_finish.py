"""evm-export --finish on bundles of strangers: what a bundle says decides no path, and what is invalid is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evm_deploy import cli
from evm_deploy._util.files import sha256
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.signing import SIGNATURE, private_key, public_key, sign
from evm_deploy.errors import BundleError, ToolchainError
from evm_deploy.export.pipeline import build_engine, export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.tensorrt import build_engine as builder
from evm_deploy.runtimes.tensorrt import check_built_for
from tests.test_signing import keys  # noqa: F401  a fixture

PRECIOUS = b"precious"


@pytest.fixture(scope="module")
def unfinished(micro, tmp_path_factory) -> Path:
    """A bundle for TensorRT without its engine, made where there is no TensorRT."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evm_deploy.runtimes.tensorrt.installed", lambda target: False)
        return export(micro, ExportPlan("trt", imgsz=(32, 32)), tmp_path_factory.mktemp("unfinished")).path


@pytest.fixture
def bundle(unfinished, tmp_path) -> Path:
    return shutil.copytree(unfinished, tmp_path / "bundle")


def relisted(bundle: Path) -> None:
    """Give every file the hash that it has, as the maker of a hostile bundle would."""
    content = json.loads((bundle / "manifest.json").read_text())
    for name, facts in content["files"].items():
        facts.update(sha256=sha256(bundle / name), size_bytes=(bundle / name).stat().st_size)
    (bundle / "manifest.json").write_text(json.dumps(content))


def with_settings(bundle: Path, **changes: Any) -> Path:
    file = bundle / "build.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    relisted(bundle)
    return bundle


class FakeTensorRt:
    """Stand-in for the part of TensorRT that the builder calls; `told` holds the contents of timing caches."""

    __version__ = "10.9.0"

    def __init__(self) -> None:
        self.told: list[bytes] = []
        cache = SimpleNamespace(serialize=lambda: b"timings")

        def create(content: bytes) -> object:
            self.told.append(content)
            return cache

        config = SimpleNamespace(
            create_timing_cache=create,
            set_timing_cache=lambda cache, ignore_mismatch: True,
            get_timing_cache=lambda: cache,
            set_memory_pool_limit=lambda *_: None,
        )
        network = SimpleNamespace(num_inputs=1, num_layers=3, get_input=lambda i: SimpleNamespace(shape=(1, 32, 32, 3)))
        self.Builder = lambda logger: SimpleNamespace(
            create_network=lambda flags: network,
            create_builder_config=lambda: config,
            build_serialized_network=lambda network, config: b"an engine",
        )
        self.OnnxParser = lambda network, logger: SimpleNamespace(parse_from_file=lambda path: True)
        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: None)
        self.NetworkDefinitionCreationFlag = SimpleNamespace()
        self.ProfilingVerbosity = SimpleNamespace(DETAILED=1)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE=1)
        self.ILogger = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1)})


@pytest.fixture
def tensorrt(monkeypatch) -> FakeTensorRt:
    """TensorRT as a fake, and the builder script in this process."""
    fake = FakeTensorRt()

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", command[1:])
        said: list[str] = []
        monkeypatch.setattr(builder, "print", lambda *words, **_: said.append(" ".join(words)), raising=False)
        return SimpleNamespace(returncode=builder.main(), stdout="", stderr="\n".join(said))

    monkeypatch.setattr(builder, "load_tensorrt", lambda target: fake)
    monkeypatch.setattr("evm_deploy.export.tensorrt.target.processes", SimpleNamespace(run=run))
    monkeypatch.setattr(builder, "gpu", lambda: {"name": "", "sm": ""})
    return fake


# Paths


@pytest.mark.parametrize("where", ["absolute", "relative", "home"])
def test_a_path_in_build_json_is_neither_read_nor_written(bundle, tmp_path, tensorrt, monkeypatch, where):
    victim = tmp_path / "victim.txt"
    victim.write_bytes(PRECIOUS)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = {"absolute": str(victim), "relative": "victim.txt", "home": "~/victim.txt"}[where]
    built = build_engine(with_settings(bundle, timing_cache=path, defer=True))  # keys of bundles of before
    assert built.manifest.built and victim.read_bytes() == PRECIOUS and tensorrt.told == []


def test_a_timing_cache_of_the_command_line_is_read_and_updated(bundle, tmp_path, tensorrt):
    real, link = tmp_path / "real.cache", tmp_path / "link.cache"
    link.symlink_to(real)
    for expected in (b"", b"timings"):
        assert cli.export_main(["--finish", str(bundle), "--timing-cache", str(link), "-q"]) == 0
        assert tensorrt.told[-1] == expected and real.read_bytes() == b"timings" and link.is_symlink()


def test_a_file_that_is_no_timing_cache_stays(bundle, tmp_path, tensorrt, capsys):
    (tmp_path / "thesis.tex").write_bytes(PRECIOUS)
    assert cli.export_main(["--finish", str(bundle), "--timing-cache", str(tmp_path / "thesis.tex")]) == 3
    assert "thesis.tex holds no timing cache" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_bytes() == PRECIOUS and not (bundle / "model.engine").exists()


@pytest.mark.parametrize("flag", ["--timing-cache", "--library", "--require-signature"])
def test_flags_of_finish_alone(flag, capsys):
    assert cli.export_main(["--target", "trt", flag, "x"]) == 2
    assert f"{flag} needs --finish" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.engine", "layers.json", "plugins", "temporary", "notes"])
def test_links_in_a_bundle_are_not_written_through(name, bundle, tmp_path, tensorrt, capsys):
    name = f".model.engine.{os.getpid()}" if name == "temporary" else name
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(PRECIOUS)
    (bundle / name).symlink_to(outside if name == "plugins" else outside / "file")
    (tmp_path / "lib.so").write_bytes(b"a library")
    assert cli.export_main(["--finish", str(bundle), "--library", str(tmp_path / "lib.so")]) == 2
    assert f"{name} is a link: an engine is only built in a bundle of regular files" in capsys.readouterr().err
    assert [file.read_bytes() for file in outside.rglob("*")] == [PRECIOUS]


# build.json

GOOD = {"target", "scan", "profile", "workspace_mib", "version_compatible", "hardware_compatible", "sms"}
ANY = (None, 0, -1, 1.5, 10**30, True, "", "x", "../x", [], [0], [[1], [2]], {}, {"a": 1}, [[[]]], ...)
VALID = {  # of ANY: what each key may be
    "profile": (None,),
    "workspace_mib": (None,),
    "version_compatible": (True,),
    "hardware_compatible": (True,),
    "sms": ([],),
}


@pytest.mark.parametrize("key", sorted(GOOD))
def test_every_other_value_of_every_key_is_refused(key, bundle):
    """... stands for a key that is missing."""
    for value in ANY:
        if not any(value is good or (value == good and value == []) for good in VALID.get(key, ())):
            before = (bundle / "build.json").read_bytes()
            with pytest.raises(BundleError, match=f"build.json: {key} is (invalid|missing)|{key} is .* but"):
                build_engine(with_settings(bundle, **{key: value}))
            (bundle / "build.json").write_bytes(before)


WHOLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda file: file.write_bytes(b"{"), "cannot be read"),
    "bytes": (lambda file: file.write_bytes(b"\xff\xfe"), "cannot be read"),
    "a list": (lambda file: file.write_text("[]"), "is not a JSON object"),
    "deep": (lambda file: file.write_text("[" * 100_000), "cannot be read"),
    "empty": (lambda file: file.write_text("{}"), "is missing"),
    "long": (lambda file: file.write_text(" " * (5 << 20)), "is larger than"),
    "a key too many": (
        lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "plugins": "/x"})),
        "unknown key 'plugins'",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_build_json_that_is_none(name, bundle, capsys):
    change, said = WHOLE[name]
    change(bundle / "build.json")
    relisted(bundle)
    assert cli.export_main(["--finish", str(bundle)]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown and "internal error" not in shown


def test_without_build_json(bundle):
    content = json.loads((bundle / "manifest.json").read_text())
    del content["files"]["build.json"]
    (bundle / "manifest.json").write_text(json.dumps(content))
    (bundle / "build.json").unlink()
    with pytest.raises(BundleError, match=r"build\.json cannot be read: No such file"):
        build_engine(bundle)


def test_the_target_is_the_manifests(bundle):
    with pytest.raises(BundleError, match=r"target is 'trt-rtx' in build\.json, but 'trt' in manifest"):
        build_engine(with_settings(bundle, target="trt-rtx"))


def test_the_script_alone_checks_the_manifest_too(bundle):
    for content in ("{", "[]", "{}", '{"scan": {"nodes": []}}', '{"scan": {"nodes": []}, "files": {}, "details": []}'):
        (bundle / "manifest.json").write_text(content)
        done = subprocess.run([sys.executable, bundle / "finish.py"], capture_output=True, text=True)
        assert done.returncode == 2 and "finish: " in done.stderr and "Traceback" not in done.stderr


# Signatures


@pytest.fixture
def signed(bundle, keys) -> Path:  # noqa: F811
    sign(bundle, private_key(keys[0]))
    return bundle


def test_finish_says_that_the_signature_is_gone(signed, tensorrt, capsys):
    assert cli.export_main(["--finish", str(signed), "--json"]) == 0
    shown = capsys.readouterr()
    assert "no longer signed" in shown.err and json.loads(shown.out)["signed"] is False
    assert not (signed / SIGNATURE).exists()
    open_bundle(signed)


def test_finish_signs_again(signed, keys, tensorrt, capsys):  # noqa: F811
    flags = ["--finish", str(signed), "--sign", str(keys[0]), "--require-signature", str(keys[1])]
    assert cli.export_main([*flags, "--json"]) == 0
    shown = capsys.readouterr()
    assert "no longer signed" not in shown.err and json.loads(shown.out)["signed"] is True
    assert cli.export_main([*flags, "-q"]) == 0  # a second build starts from the new signature


def test_finish_builds_only_what_the_key_signed(signed, keys, tensorrt, capsys):  # noqa: F811
    with_settings(signed, workspace_mib=7)
    assert cli.export_main(["--finish", str(signed), "--require-signature", str(keys[1])]) == 2
    assert "was changed after signing" in capsys.readouterr().err and not (signed / "model.engine").exists()


def test_a_failed_build_leaves_bundle_and_signature(signed, keys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("evm_deploy.export.tensorrt.target.sys.executable", "false")
    with pytest.raises(ToolchainError):
        build_engine(signed, require_signature=keys[1])
    open_bundle(signed, public_key(keys[1]))


# Engines


@pytest.mark.parametrize("engine", [None, [], "x", 3, {"tensorrt": 7}, {}])
@pytest.mark.parametrize("plan", [None, [], "x", {"settings": []}, {"engine": "x"}])
def test_any_json_beside_an_engine(engine, plan, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"details": {"engine": engine}, "plan": plan}))
    if engine == {"tensorrt": 7}:
        with pytest.raises(ToolchainError, match="built with TensorRT 7"):
            check_built_for(tmp_path / "model.engine", "10.3.0")
    else:
        check_built_for(tmp_path / "model.engine", "10.3.0")
