"""Nothing that is not ours is replaced: bundles, zips, rejected ones, records, reports, folders in the making."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evm_deploy import cli
from evm_deploy._util.files import write_output
from evm_deploy.bench import device
from evm_deploy.bench.record import Record
from evm_deploy.bench.text import file_name, record_path
from evm_deploy.bundle import bundle as bundles
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.bundle import check_free, commit, open_bundle, temporary_bundle
from evm_deploy.bundle.signing import SIGNATURE, private_key
from evm_deploy.commands.matrix import _require_own
from evm_deploy.errors import BundleError, ParityError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes import registry
from tests.records import content
from tests.test_finish import PRECIOUS
from tests.test_signing import keys  # noqa: F401  a fixture

PLAN = ExportPlan("onnx", imgsz=(32, 32))
NAME = "micro_64-onnx-fp32-32x32"


@pytest.fixture
def made(micro_bundle, tmp_path):
    """made(path, ..) -> what `commit` does with a finished bundle."""

    def make(path: Path, **options: object) -> bundles.Bundle:
        with temporary_bundle(path) as folder:
            shutil.copytree(micro_bundle.path, folder, dirs_exist_ok=True)
            (folder / "manifest.json").unlink()
            manifest = replace(micro_bundle.manifest, rejected=bool(options.pop("rejected", False)))
            if before := options.pop("before", None):
                before()
            return commit(folder, path, manifest, **options)

    return make


def test_an_export_that_fails_leaves_no_folder_that_it_made(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(ParityError), temporary_bundle(there / "a" / "b" / "bundle"):
        raise ParityError("")
    assert list(there.iterdir()) == []
    with pytest.raises(ParityError), temporary_bundle(there / "a" / "b" / "bundle"):
        (there / "a" / "another").write_bytes(PRECIOUS)
        raise ParityError("")
    assert [path.name for path in there.rglob("*")] == ["a", "another"]
    with pytest.raises(ParityError), temporary_bundle(there / "bundle"):
        (there / "a" / "another").unlink()
        raise ParityError("")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "a"]


def test_an_export_makes_its_folder_again_if_another_one_deletes_it(tmp_path, monkeypatch):
    """Before there is a temporary folder in it; a folder that cannot be made at all is still an error."""
    real, deleted = bundles._sweep, []

    def sweep(path: Path, prefix: str) -> None:
        real(path, prefix)
        if len(deleted) < 2:
            path.parent.rmdir()
            deleted.append(path.parent)

    monkeypatch.setattr(bundles, "_sweep", sweep)
    with temporary_bundle(tmp_path / "a" / "bundle") as folder:
        assert folder.parent == tmp_path / "a" == deleted[1]
    monkeypatch.setattr(bundles, "_sweep", lambda path, prefix: path.parent.rmdir())
    with pytest.raises(BundleError, match=r"cannot write to .*: No such file"), temporary_bundle(tmp_path / "a" / "b"):
        pass


def precious(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").write_bytes(PRECIOUS)
    return path


def web_app(path: Path) -> Path:
    """A folder whose manifest.json is another program's."""
    (precious(path) / "manifest.json").write_text('{"name": "app", "files": ["a.js"]}')
    return path


def a_file(path: Path) -> Path:
    path.write_bytes(PRECIOUS)
    return path


def content_of(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


# Bundles

THINGS = {"a folder": precious, "a web app": web_app, "a file": a_file, "an empty folder": lambda path: path.mkdir()}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_name_that_is_taken(thing, force, when, made, tmp_path):
    path, make = tmp_path / "bundle", THINGS[thing]
    if when == "before":
        make(path)
    with pytest.raises(BundleError, match=r"exists|was made during"):
        check_free(path, force) if when == "before" else made(path, force=force, before=lambda: make(path))
    assert path.exists() and all(each == PRECIOUS or b'"app"' in each for each in content_of(path).values())
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_of_two_exports_to_one_name_the_second_does_not_win_silently(made, tmp_path):
    first: list[bundles.Bundle] = []
    with pytest.raises(BundleError, match="was made during the export\n  add --force"):
        made(tmp_path / "b", before=lambda: first.append(made(tmp_path / "b")))
    assert open_bundle(tmp_path / "b").manifest == first[0].manifest
    made(tmp_path / "b", force=True)  # a bundle may be replaced


@pytest.mark.parametrize("name", ["notes.txt", "plugins/mine.so", "records/t1.json"])
def test_a_bundle_with_a_file_of_the_user_is_not_replaced(name, made, tmp_path):
    path = made(tmp_path / "b").path
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(PRECIOUS)
    for call in (lambda: check_free(path, force=True), lambda: made(path, force=True)):
        with pytest.raises(BundleError, match=f"b holds {name}, which is not part of the bundle"):
            call()
    assert (path / name).read_bytes() == PRECIOUS
    (path / name).unlink()
    (path / ".DS_Store").write_bytes(b"litter")
    made(path, force=True)


def test_a_damaged_bundle_may_be_replaced(made, tmp_path):
    path = made(tmp_path / "b").path
    (path / "model.onnx").write_bytes(b"damaged")
    (path / "README.md").unlink()
    check_free(path, force=True)
    made(path, force=True)
    open_bundle(path)


@pytest.mark.parametrize("linked", ["bundle", "parent"])
def test_a_link_given_as_output_stays(linked, made, tmp_path):
    real = tmp_path / "disk" / "b"
    path = tmp_path / "dist" / "b"
    if linked == "bundle":
        path.parent.mkdir()
        path.symlink_to(real)
    else:
        real.parent.mkdir()
        path.parent.symlink_to(real.parent)
    for _ in range(2):
        made(path, force=True)
        assert not real.is_symlink() and (path if linked == "bundle" else path.parent).is_symlink()
        open_bundle(path)
    assert [each.name for each in real.parent.iterdir()] == ["b"]


# Rejected bundles


@pytest.mark.parametrize("thing", [*THINGS, "a good bundle"])
def test_what_has_the_name_of_a_rejected_bundle_stays(thing, made, micro, tmp_path):
    path = tmp_path / f"{NAME}.rejected"
    made(path) if thing == "a good bundle" else THINGS[thing](path)
    before = content_of(path)
    with pytest.raises(ParityError, match=r"the artifact is not kept: .*rejected exists and is not a rejected bundle"):
        export(micro, replace(PLAN, tol=1e-12), tmp_path)
    assert path.exists() and content_of(path) == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_rejected_bundle_replaces_a_rejected_one(micro, tmp_path):
    for _ in range(2):
        with pytest.raises(ParityError, match="the artifact is kept for inspection"):
            export(micro, replace(PLAN, tol=1e-12), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [f"{NAME}.rejected"]


# Zips


def test_a_zip_that_is_not_ours_stays(micro, tmp_path, capsys, monkeypatch):
    zipped = a_file(tmp_path / f"{NAME}.zip")
    monkeypatch.setattr("evm_deploy.export.pipeline.temporary_bundle", lambda path: pytest.fail("work has started"))
    flags = [str(micro), "--target", "onnx", "--imgsz", "32", "-o", str(tmp_path), "--zip"]
    for extra, said in (([], "zip exists"), (["--force"], "is not the zip of a bundle: --force does not replace it")):
        for dry in ([], ["--dry-run"]):
            assert cli.export_main([*flags, *extra, *dry]) == 2
            assert said in capsys.readouterr().err
    assert zipped.read_bytes() == PRECIOUS


def test_a_zip_of_a_bundle_is_replaced_by_force(made, tmp_path):
    path = made(tmp_path / "b").path
    first = write_zip(path).read_bytes()
    assert write_zip(path).read_bytes() == first  # the same again is no loss
    (path / "README.md").write_text("another bundle")
    with pytest.raises(BundleError, match="zip exists\n  add --force"):
        write_zip(path)
    assert write_zip(path, force=True).read_bytes() != first


def test_a_zip_holds_nothing_from_behind_a_link(made, tmp_path):
    path = made(tmp_path / "b").path
    (path / "stolen").symlink_to(a_file(tmp_path / "secret"))
    assert PRECIOUS not in write_zip(path).read_bytes()
    assert (
        "stolen"
        not in subprocess.run(
            [sys.executable, "-m", "zipfile", "-l", tmp_path / "b.zip"], capture_output=True, text=True
        ).stdout
    )


# Signed before it has its name


def test_a_signed_export_has_its_signature_with_its_name(made, keys, tmp_path, monkeypatch):  # noqa: F811
    seen: list[bool] = []
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda self, to: (seen.append((self / SIGNATURE).exists()), rename(self, to))[1]
    )
    made(tmp_path / "b", key=private_key(keys[0]))
    assert seen == [True]


# Folders that another export is writing

HOLD = """
import sys, time
from pathlib import Path
from evm_deploy.bundle.bundle import temporary_bundle
with temporary_bundle(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def another(tmp_path):
    """An export to tmp_path/b in another process. Returns the process and its folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "b"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()


def left_over(path: Path) -> list[Path]:
    with temporary_bundle(path) as own:
        return [each for each in path.parent.iterdir() if each != own]


def test_a_live_folder_stays_and_a_dead_one_goes(another, tmp_path, monkeypatch):
    """Also where the live process cannot be seen, as in another container."""
    process, folder = another
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, what: (_ for _ in ()).throw(ProcessLookupError))
        assert left_over(tmp_path / "b") == [folder]
    process.kill()
    process.wait()
    assert left_over(tmp_path / "b") == []


def test_a_folder_of_another_host_stays(another, tmp_path, monkeypatch):
    """The lock of another machine may be invisible here, so even a dead folder stays."""
    process, folder = another
    process.kill()
    process.wait()
    (tmp_path / "boot_id").write_text("another machine")
    monkeypatch.setattr(bundles, "BOOT_ID", tmp_path / "boot_id")
    assert folder in left_over(tmp_path / "b")
    monkeypatch.setattr(bundles, "BOOT_ID", tmp_path / "nothing")  # a system that has no such name
    assert folder in left_over(tmp_path / "b")


@pytest.mark.parametrize("name", [".b.1", ".b.4194305.x", ".b.notes", ".b.old", ".bb.4194305.old", ".b.{machine}.x"])
def test_hidden_folders_of_the_user_stay(name, tmp_path):
    folder = precious(tmp_path / name.format(machine="0" * 12))
    left_over(tmp_path / "b")
    assert (folder / "notes.txt").read_bytes() == PRECIOUS


def test_an_old_bundle_is_restored_once_its_export_is_dead(another, made, tmp_path):
    process, folder = another
    old = folder.with_name(folder.name + ".old")
    made(tmp_path / "b").path.rename(old)
    assert left_over(tmp_path / "b") and old.exists() and not (tmp_path / "b").exists()  # alive: between two renames
    process.kill()
    process.wait()
    assert left_over(tmp_path / "b") == [tmp_path / "b"]
    open_bundle(tmp_path / "b")


def test_where_locks_do_not_work_nothing_is_deleted(another, tmp_path, monkeypatch):
    import fcntl

    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    process, folder = another
    process.kill()
    process.wait()
    assert left_over(tmp_path / "b") == [folder]


# Bundles with links, pipes and devices


@pytest.mark.parametrize("thing", ["pipe", "link to a device", "link to a folder", "dangling link"])
def test_a_bundle_of_things_that_are_no_files(thing, made, tmp_path):
    path = made(tmp_path / "b").path
    (path / "README.md").unlink()
    if thing == "pipe":
        os.mkfifo(path / "README.md")  # reading it would wait for ever
    else:
        to = {"link to a device": "/dev/zero", "link to a folder": tmp_path, "dangling link": tmp_path / "no"}
        (path / "README.md").symlink_to(to[thing])
    with pytest.raises(BundleError, match=r"README.md (is missing|cannot be read)"):
        open_bundle(path)


# Reports

OUTPUTS = {
    "--html": ("page.html", b"<html"),
    "--markdown": ("report.md", b"# Latency"),
    "--csv": ("report.csv", b"name"),
    "--db": ("history.db", b"SQLite format 3"),
}


@pytest.mark.parametrize("flag", OUTPUTS)
@pytest.mark.parametrize("behind", ["a file", "nothing yet"])
def test_a_report_is_written_behind_a_link(flag, behind, tmp_path, capsys):
    name, begins = OUTPUTS[flag]
    real, link = tmp_path / "disk" / name, tmp_path / name
    real.parent.mkdir()
    if behind == "a file":
        real.write_bytes(b"")
        real.chmod(0o640)
    link.symlink_to(real)
    record = tmp_path / "records" / "r.json"
    record.parent.mkdir()
    record.write_text(json.dumps(content()))
    assert cli.report_main([str(record), flag, str(link)]) == 0
    assert link.is_symlink() and begins in real.read_bytes()[:5000]
    assert behind != "a file" or real.stat().st_mode & 0o777 == 0o640
    assert sorted(each.name for each in real.parent.iterdir()) == [name]


def test_a_device_is_written_directly(tmp_path):
    write_output(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()
    with (tmp_path / "out").open("wb") as file:
        code = "from evm_deploy._util.files import *; write_output(Path('/dev/stdout'), 'x')"
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "x" and Path("/dev/stdout").is_symlink()


# Records


def record(**changes: dict[str, object]) -> Record:
    made = content(changes={"device": {"at": None, **device.facts()}})
    for section, values in changes.items():
        made[section] = {**made[section], **values}
    return Record.parse(made, "made")


def settings_of_runtimes() -> dict[str, object]:
    """Another value for every setting of every runtime."""
    fields = [each for kind in registry.setting_kinds() if kind for each in kind.__dataclass_fields__.values()]
    return {each.name: True if each.default is False else "other" for each in fields}


DIFFERING = [
    *({"settings": {name: value}} for name, value in settings_of_runtimes().items()),
    {"settings": {"device": "HETERO:GPU,CPU"}},
    {"settings": {"device": "HETERO:GPU.CPU"}},
    {"settings": {"device": "HETERO_GPU_CPU"}},
    {"settings": {"threads": 2}},
    {"settings": {"batch": 4}},
    {"settings": {"streams": 2}},
    {"settings": {"scan": "portable"}},
    {"settings": {"timed": "end-to-end"}},
    {"device": {"at": "pi@board"}},
    {"device": {"at": "pi_board"}},
    {"device": {"at": "pi@board:23"}},
    {"device": {"at": "adb 1234"}},
    {"device": {"model": "another board"}},
    {"device": {"cpu": "another"}},
    {"device": {"usable_cores": 1234}},
    {"device": {"system": "Plan9 4"}},
    {"device": {"runs_on": "a GPU"}},
    {"bundle": {"name": "a/b"}},
    {"bundle": {"name": "a_b"}},
    {"bundle": {"name": "x" * 300}},
    {"bundle": {"name": "x" * 299}},
]


def test_all_that_decides_a_record_is_in_its_file_name(tmp_path):
    names = [file_name(record(**changes)) for changes in ({}, *DIFFERING)]
    assert len(set(names)) == len(names)
    for name in names:
        assert "/" not in name and len(name) < 250
        (tmp_path / name).touch()
    assert names[0] == "evm_tiny-onnx-fp32-64x64-t1-b1.json" and "-cuda_graph" in " ".join(names)


@pytest.mark.parametrize("changes", [{"settings": {"limit_s": 5.0}}, {"device": {"governor": "x", "python": "3.99"}}])
def test_what_does_not_decide_a_record(changes):
    assert file_name(record(**changes)) == file_name(record())


def test_a_record_of_another_machine_with_this_name_stays(tmp_path, monkeypatch):
    """Two machines that measure into one folder: each takes the short name for its own."""
    theirs = record(device={"model": "another board"})
    path = tmp_path / file_name(record())
    theirs.write(path)
    mine = record_path(tmp_path, record())
    assert mine != path and mine.name.startswith(path.stem)
    record().write(mine)
    assert record_path(tmp_path, record()) == mine and record_path(tmp_path, theirs) != mine
    assert record_path(tmp_path, replace(record(), date="2030-01-01T00:00:00+00:00")) == mine
    a_file(path)
    assert record_path(tmp_path, record()) == mine  # a file that is no record stays, too


def test_the_page_of_a_comparison_replaces_only_such_a_page(tmp_path, capsys):
    a_file(tmp_path / "report.html")
    assert cli.bench_main(["--matrix", "-o", str(tmp_path)]) == 2
    assert "report.html exists and is no latency report" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_bytes() == PRECIOUS
    (tmp_path / "r.json").write_text(json.dumps(content()))
    assert cli.report_main([str(tmp_path / "r.json"), "--html", str(tmp_path / "report.html")]) == 0
    _require_own(tmp_path / "report.html")
    _require_own(tmp_path / "none.html")


@pytest.mark.parametrize("name", ["b", "b.rejected", "b.zip"])
def test_loops_of_links_are_no_internal_errors(name, made, tmp_path):
    (tmp_path / name).symlink_to(tmp_path / name)
    try:
        path = made(tmp_path / "b", force=True, rejected=False).path
        write_zip(path, force=True)
    except BundleError as error:
        assert name == "b" and "cannot write the bundle" in str(error)
