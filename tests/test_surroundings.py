"""Users without a home, and file systems without modes, links or renames: everything works, with a note."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from evm_deploy._util import files
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.bundle import open_bundle, temporary_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.calib.table import calibrate
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import BundleError, EvmError, ToolchainError, UsageError
from evm_deploy.export import ExportPlan, export
from evm_deploy.toolchain.compile import compiled_once
from evm_deploy.toolchain.openvino_extension import _run


def identity_of(count):
    return {"checkpoint_sha256": "abc", "images": {"count": count, "sha256": "def"}}


def no_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)


def below_a_file(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")


def read_only(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")


@pytest.fixture(params=[no_home, below_a_file, read_only], ids=lambda function: function.__name__)
def without_cache(request, monkeypatch):
    for each in (files._temporary, files.temporary_cache, files.log_no_cache):
        each.cache_clear()
    request.param(monkeypatch)
    yield
    for each in (files._temporary, files.temporary_cache, files.log_no_cache):
        each.cache_clear()


def test_a_library_is_compiled_once_a_process(without_cache, caplog):
    calls = []

    def compile_(work):
        calls.append(work)
        (work / "lib.so").write_bytes(b"library")
        return work / "lib.so"

    path = files.cache_folder() / "plugins" / "key" / "lib.so"
    for _ in range(2):
        found = compiled_once(path, compile_)
        assert found.read_bytes() == b"library"
    assert len(calls) == 1
    assert "XDG_CACHE_HOME" in caplog.text and len(caplog.records) == 1


def test_calibration_goes_on_and_is_kept_for_the_process(without_cache, caplog):
    measured = []

    def activations(start):
        for index in range(start, 3):
            measured.append(index)
            yield {"a:input": np.array([1.0, float(index)], np.float32)}

    identity = identity_of(3)
    for _ in range(2):
        assert calibrate(identity, activations).complete
    assert measured == [0, 1, 2]
    assert len(caplog.records) == 1


def test_a_cache_that_fills_up_does_not_end_the_calibration(monkeypatch, tmp_path, caplog):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    files.log_no_cache.cache_clear()
    monkeypatch.setattr("evm_deploy.calib.table.write_atomically", full)
    found = calibrate(identity_of(2), lambda start: iter([{"a": np.ones(1, np.float32)}] * 2), folder=tmp_path)
    assert found.complete and "No space left" in caplog.text
    files.log_no_cache.cache_clear()


def test_a_cache_that_can_only_be_read_is_read(monkeypatch, tmp_path):
    """An image with libraries of its own, which root compiled when the image was made."""
    path = tmp_path / "plugins" / "key" / "lib.so"

    def compile_(work):
        (work / "lib.so").write_bytes(b"library")
        return work / "lib.so"

    compiled_once(path, compile_)
    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", None)  # writing would fail
    assert compiled_once(path, lambda work: pytest.fail("compiled again")) == path


def test_a_compiler_that_cannot_run_is_not_called_a_cache(tmp_path):
    tool = tmp_path / "cmake"
    tool.write_text("")
    with pytest.raises(ToolchainError, match="cmake cannot be run: Permission denied"):
        _run([str(tool)], dict(os.environ))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot write the bundle to {out}: No space"),
        (PermissionError(errno.EACCES, "Permission denied", "{out}/.a.1.b/model.onnx"), "cannot write the bundle"),
        (PermissionError(errno.EACCES, "Permission denied", "/elsewhere/table.json"), "^/elsewhere/table.json: Perm"),
        (PermissionError(errno.EACCES, "Permission denied", b"/elsewhere/table.json"), "^/elsewhere/table.json: Perm"),
    ],
    ids=["full", "below", "elsewhere", "bytes"],
)
def test_only_errors_below_the_folder_are_the_bundles(tmp_path, error, says):
    if isinstance(error.filename, str):
        error.filename = error.filename.format(out=tmp_path)
    with pytest.raises(BundleError, match=says.format(out=tmp_path)), temporary_bundle(tmp_path / "a"):
        raise error


def refuse(code, function=None, below=""):
    """An operation that fails on every path, or only below a folder where the file system lacks it."""

    def refused(*args, **options):
        if function is None or str(args[0]).startswith(str(below)):
            raise OSError(code, os.strerror(code), str(args[0]))
        return function(*args, **options)

    return refused


#: Functions that some file systems lack, and the errors that they give.
LACKS = {
    "modes": (("chmod", "fchmod", "lchmod"), (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)),
    "links": (("link", "symlink"), (errno.EPERM, errno.ENOTSUP)),
    "fsync": (("fsync", "fdatasync"), (errno.EINVAL,)),
    "times": (("utime",), (errno.EPERM,)),
    "renames": (("rename", "replace"), (errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.ENOTSUP)),
}


@pytest.fixture(params=[(lack, code) for lack, (_, codes) in LACKS.items() for code in codes], ids=str)
def lacking(request, monkeypatch):
    lack, code = request.param
    for name in LACKS[lack][0]:
        if hasattr(os, name):
            monkeypatch.setattr(os, name, refuse(code))
    return lack


def test_files_and_folders_are_written_all_the_same(lacking, tmp_path):
    files.write_atomically(tmp_path / "a.json", "old")
    files.write_atomically(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "folder" / "inside" / "file").write_text("content")
    files.make_readable(tmp_path / "folder")
    files.move(tmp_path / "folder", tmp_path / "moved")
    assert (tmp_path / "moved" / "inside" / "file").read_text() == "content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "moved"]


def test_a_move_never_replaces_and_leaves_no_half(monkeypatch, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("mine")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("yours")
    monkeypatch.setattr(os, "rename", refuse(errno.EXDEV))
    with pytest.raises(OSError):
        files.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "file").read_text() == "yours"
    monkeypatch.setattr(shutil, "copyfile", refuse(errno.ENOSPC))
    with pytest.raises(OSError):
        files.move(tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "c").exists() and (tmp_path / "a" / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "coreml", "trt"])
@pytest.mark.parametrize("lack", LACKS)
def test_every_target_exports_where_the_file_system_lacks_something(monkeypatch, tmp_path, target, lack):
    names, (code, *_) = LACKS[lack]
    for name in names:
        if hasattr(os, name):
            monkeypatch.setattr(os, name, refuse(code, getattr(os, name), tmp_path))
    scan = "plugin" if target == "trt" else "auto"  # copies a folder of sources
    for force in (False, True):
        bundle = export(CHECKPOINT, ExportPlan(target, scan=scan), tmp_path, force=force)
        assert [path.name for path in tmp_path.iterdir()] == [bundle.path.name]


def test_the_negative_control_of_the_above(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "mkdir", refuse(errno.EPERM))
    with pytest.raises(EvmError, match="cannot write"):
        export(CHECKPOINT, ExportPlan("onnx"), tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
def test_a_folder_that_is_not_utf8_is_refused_before_work(monkeypatch, tmp_path):
    out = tmp_path / os.fsdecode(b"caf\xe9")
    monkeypatch.setattr("evm_deploy.export.pipeline.temporary_bundle", lambda path: pytest.fail("work has started"))
    for target in ("onnx", "openvino", "coreml", "trt"):
        with pytest.raises(UsageError, match="is not UTF-8 text"):
            export(CHECKPOINT, ExportPlan(target), out)


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
def test_a_bundle_in_a_folder_that_is_not_utf8_opens_or_says_so(micro_bundle, coreml_bundle, tmp_path):
    for bundle in (micro_bundle, coreml_bundle):
        folder = tmp_path / os.fsdecode(b"caf\xe9" + bundle.manifest.target.encode())
        shutil.copytree(bundle.path, folder)
        with pytest.raises(EvmError, match=r"is not UTF-8 text|macOS"):
            load(folder)
        with pytest.raises(UsageError, match="is not UTF-8 text"):
            files.native_path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out dir [1]", "модель ü 模型", "a'b\"c", "$HOME;x", "50%", "#1?"])
@pytest.mark.parametrize("target", ["onnx", "openvino", "coreml"])
def test_any_folder_of_utf8_is_written_and_read(tmp_path, name, target):
    bundle = export(CHECKPOINT, ExportPlan(target), tmp_path / name)
    assert open_bundle(bundle.path).manifest.files == bundle.manifest.files
    assert open_bundle(write_zip(bundle.path)).manifest.files == bundle.manifest.files
