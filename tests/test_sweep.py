"""evm-sweep: every unit is done once, an interruption loses nothing, bad input is named before work begins."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evm_deploy import cli
from evm_deploy._util.files import lock_folder
from evm_deploy.bench.record import Record
from evm_deploy.bench.remote.hosts import HostOptions
from evm_deploy.demo import CHECKPOINT, digits
from evm_deploy.errors import BundleError, EvmError, ToolchainError, UsageError
from evm_deploy.sweep import units as units_module
from evm_deploy.sweep.boards import Boards, boards_here
from evm_deploy.sweep.engine import TRIES, CrashError, Job, LocalEngine, Place, retried
from evm_deploy.sweep.folder import RunFolder
from evm_deploy.sweep.locks import alone, beside_others, held
from evm_deploy.sweep.plan import read_sweep
from evm_deploy.sweep.run import SweepRun, counts
from reliability.sweeps import killed
from tests.records import record as make_record

SWEEP = """
checkpoints = "demo:digits"
forms = ["onnx:fp32", "onnx:fp16"]
[data]
val = "val.npz"
[[bench]]
threads = [1, 2]
"""
HERE = Place(Boards(), 1)
BOTH = ["evm_digits-onnx-fp16-64x64", "evm_digits-onnx-fp32-64x64"]


@pytest.fixture(autouse=True)
def images(own_cache, tmp_path, monkeypatch):
    """The sweep, and val.npz, in shards of 25 and 15 images."""
    monkeypatch.setattr("evm_deploy.sweep.shards.SHARD", 25)
    images, labels = digits("heldout")
    np.savez(tmp_path / "val.npz", images=images[:40], labels=labels[:40])
    (tmp_path / "sweep.toml").write_text(SWEEP)


def sweep(folder: Path, *flags: str) -> int:
    return cli.sweep_main([str(folder / "sweep.toml"), "-o", str(folder / "run"), *flags])


def files(folder: Path) -> dict[str, bytes]:
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_every_unit_is_done_once(work, tmp_path, capsys):
    assert sweep(tmp_path, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert Counter(row["kind"] for row in rows) == {"export": 2, "evaluate": 6, "measure": 4}
    assert (work["float 25"], work["evaluate 25"]) == (1, 2)  # both bundles are compared with the same outputs
    assert sum(work.values()) == 12
    before = files(tmp_path / "run")
    assert sweep(tmp_path) == 0 and sum(work.values()) == 12
    assert files(tmp_path / "run") == before
    shown = capsys.readouterr()
    assert "12 units: 12 kept" in shown.out and "[" not in shown.err

    records = [Record.read(each) for each in (tmp_path / "run" / "records" / "here").iterdir()]
    assert sorted({each.bundle["name"] for each in records}) == BOTH
    for each in records:
        found = each.bundle["accuracy"]
        assert (found["images"], found["top1"], found["top1_float"]) == (40, 1.0, 1.0) and found["sqnr_db"] > 80
    assert cli.sweep_main(["status", str(tmp_path / "run"), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["units"]["evaluate"] == {"done": 6, "failed": 0, "to do": 0} and status["failed"] == []


def test_an_interrupted_sweep_does_the_rest(work, tmp_path, monkeypatch):
    """Interrupted before each of its ends: nothing is lost, nothing done twice but the unit that was interrupted."""
    finish, left = RunFolder.finish, [1]

    def dying(self, key, facts):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        finish(self, key, facts)

    monkeypatch.setattr(RunFolder, "finish", dying)
    folder, kills = RunFolder(tmp_path / "run"), 0
    while True:
        left[0] = 1
        try:
            with folder.locked():
                outcomes = SweepRun(read_sweep(tmp_path / "sweep.toml"), folder).run(LocalEngine())
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 11 and sum(work.values()) == 12 + kills
    assert counts(outcomes) == "12 units: 1 done, 11 kept"
    assert len(list((tmp_path / "run" / "units").iterdir())) == 12
    assert len(list((tmp_path / "run" / "records" / "here").iterdir())) == 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_sweeps_lose_nothing_and_repeat_nothing(work, tmp_path):
    """`python -m reliability.sweeps` does it 200 times, with real exports and measurements."""
    sweeps, findings = killed(tmp_path, 12, random.Random(1), pause_s=0.4)
    assert sweeps >= 1 and findings == []


def test_a_unit_that_fails_stops_no_other(work, tmp_path, monkeypatch, capsys):
    fake = units_module.export

    def export(source, plan, out, force):
        if plan.precision == "fp16":
            work["refused"] += 1
            raise BundleError("no room for fp16", "make room")
        return fake(source, plan, out, force)

    monkeypatch.setattr(units_module, "export", export)
    assert sweep(tmp_path) == 2 and work["refused"] == 1  # the same error again is no news
    shown = capsys.readouterr()
    assert "10 units: 7 done, 1 failed, 2 not run" in shown.out and "--retry-failed" in shown.out
    assert "export evm_digits onnx fp16: no room for fp16\n  make room" in shown.err
    assert sweep(tmp_path) == 2 and work["refused"] == 1  # and is not tried again
    assert cli.sweep_main(["status", str(tmp_path / "run")]) == 0
    assert "no room for fp16\n  make room" in capsys.readouterr().out
    monkeypatch.setattr(units_module, "export", fake)
    assert sweep(tmp_path, "--retry-failed") == 0
    assert "12 units: 5 done, 7 kept" in capsys.readouterr().out
    assert list((tmp_path / "run" / "failed").iterdir()) == []


def test_what_is_no_evm_error_is_tried_again():
    tried = []

    def flaky(place):
        tried.append(1)
        if len(tried) < TRIES:
            raise ConnectionError("the line dropped")
        return "result"

    assert retried(Job("a", flaky), HERE) == "result" and len(tried) == TRIES
    tried.clear()

    def broken(place):
        tried.append(1)
        raise ConnectionError("the line dropped")

    error = retried(Job("a", broken), HERE)
    assert isinstance(error, CrashError) and "the line dropped" in str(error) and len(tried) == TRIES
    tried.clear()

    def wrong(place):
        tried.append(1)
        raise UsageError("wrong")

    assert isinstance(retried(Job("a", wrong), HERE), UsageError) and len(tried) == 1

    def full(place):
        tried.append(1)
        raise OSError(28, "No space left on device", "/x/y")

    error = retried(Job("a", full), HERE)
    assert "/x/y cannot be written: No space left on device\n  free space" in str(error) and len(tried) == 2


def test_a_full_disk_is_an_error_of_the_unit(work, tmp_path, monkeypatch, capsys):
    """Said once, with what to do; the others go on, and the same command does it again when there is space."""
    real = units_module.write_rows

    def full(path, rows):
        if path.parent.name == "outputs":
            raise OSError(28, "No space left on device", str(path))
        real(path, rows)

    monkeypatch.setattr(units_module, "write_rows", full)
    assert sweep(tmp_path, "-q") == 2 and work["float 25"] == 1
    shown = capsys.readouterr()
    assert ".npz cannot be written: No space left on device\n  free space on that disk" in shown.err
    assert "12 units: 6 done, 2 failed, 4 not run" in shown.out
    monkeypatch.setattr(units_module, "write_rows", real)
    assert sweep(tmp_path, "-q", "--retry-failed") == 0
    assert "12 units: 6 done, 6 kept" in capsys.readouterr().out


def test_images_that_change_during_the_work_are_an_error(work, tmp_path, monkeypatch):
    """The bundle and the float network must see the same images."""
    real = units_module.FloatUnit.outputs
    monkeypatch.setattr(
        units_module.FloatUnit, "outputs", lambda self, folder: replace(real(self, folder), digest="other")
    )
    assert sweep(tmp_path, "-q") == 2
    (failed, *_) = (tmp_path / "run" / "failed").iterdir()
    assert "have changed during the work" in failed.read_text()


def test_a_plan_of_something_else_is_not_replaced(work, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text('{"holidays": []}')
    assert sweep(tmp_path) == 2 and not work
    assert "does not hold a sweep: its plan.json is something else, or damaged" in capsys.readouterr().err
    assert (tmp_path / "run" / "plan.json").read_text() == '{"holidays": []}'


def test_only_one_unit_and_what_it_needs(work, tmp_path, capsys):
    assert sweep(tmp_path, "--dry-run", "--json") == 0 and not work
    rows = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "run").exists() and {row["state"] for row in rows} == {"to do"}
    key = next(row["key"] for row in rows if row["unit"].startswith("measure") and "fp16" in row["unit"])
    assert sweep(tmp_path, "--only", key) == 0
    assert list(work) == ["export fp16 mse auto", "measure evm_digits-onnx-fp16-64x64 1"]
    assert sweep(tmp_path, "--only", "zz") == 2
    assert "no unit has a key that begins so" in capsys.readouterr().err


def test_two_sweeps_do_not_fill_one_folder(work, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert sweep(tmp_path) == 2
    assert "is not empty, and does not hold a sweep" in capsys.readouterr().err
    (tmp_path / "run" / "thesis.txt").unlink()
    assert sweep(tmp_path, "--only", "zz") == 2
    lock = lock_folder(tmp_path / "run")
    assert sweep(tmp_path) == 2 and not work
    assert "in use by another command" in capsys.readouterr().err
    os.close(lock)
    assert sweep(tmp_path) == 0


def test_a_checkpoint_that_has_changed_is_not_exported(work, tmp_path):
    copy = shutil.copy(CHECKPOINT, tmp_path / "net.safetensors")
    (tmp_path / "sweep.toml").write_text('checkpoints = "*.safetensors"\nforms = "onnx:fp32"')
    folder, plan = RunFolder(tmp_path / "run"), read_sweep(tmp_path / "sweep.toml")
    Path(copy).write_bytes(b"other")
    with folder.locked():
        (outcome,) = SweepRun(plan, folder).run(LocalEngine())
    assert "has changed since the work was planned" in str(outcome.error) and not work
    assert read_sweep(tmp_path / "sweep.toml").exports[0].key != plan.exports[0].key


def test_checkpoints_are_files_and_patterns(tmp_path):
    """In a folder whose name looks like a pattern, too; each once."""
    folder = tmp_path / "run [1]"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.pth", "b.pth", "deep/c.pth", "[d].pth"):
        (folder / name).write_bytes(b"")
    for named, found in {
        '"a.pth"': ["a"],
        '["*.pth", "a.pth"]': ["[d]", "a", "b"],
        '"**/c.pth"': ["c"],
        '"../*/deep/*"': ["c"],
        '"[d].pth"': ["[d]"],
        f'"{tmp_path}/*/b.pth"': ["b"],
    }.items():
        (folder / "s.toml").write_text(f"checkpoints = {named}\nforms = 'onnx'")
        assert [Path(each.checkpoint).stem for each in read_sweep(folder / "s.toml").exports] == found, named


def test_what_decides_a_result_decides_its_key(tmp_path):
    def keys(text: str) -> list[str]:
        (tmp_path / "s.toml").write_text(text)
        plan = read_sweep(tmp_path / "s.toml")
        return [each.key for each in (*plan.exports, *plan.measurements)]

    base = 'checkpoints = "demo:digits"\nforms = "onnx:int8"\n[data]\ncalib = "demo"\n'
    bench = base + "[[bench]]\nthreads = 1\n"
    assert keys(bench) == keys(bench + "limit = 5\n") and keys(bench)[0] == keys(base)[0]
    others = [
        base.replace("int8", "fp32"),
        base.replace("[data]", "imgsz = 48\n[data]"),
        base + "[export]\ncalib-method = 'minmax'\n",
    ]
    assert len({keys(text)[0] for text in (base, *others)}) == 4
    assert keys(bench)[1] != keys(bench + "board = 'pi5'\n")[1]
    (tmp_path / "calib").mkdir()
    shutil.copy(CHECKPOINT, tmp_path / "calib" / "a.png")
    own = base.replace('"demo"\n', '"calib"\n')
    before = keys(own)
    shutil.copy(CHECKPOINT, tmp_path / "calib" / "b.png")
    assert keys(own) != before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "is not TOML"),
        ("checkpoint = 'a'", r"key 'checkpoint' is unknown(?s:.*)did you mean checkpoints"),
        ("forms = 'onnx'", "has no checkpoints"),
        ("checkpoints = 'x/*.pth'\nforms = 'onnx'", r"no file x/\*\.pth"),
        ("checkpoints = 'demo:digits'", "has no forms"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx:int4'", "no such precision"),
        ("checkpoints = 'demo:digits'\nforms = 'torch'", "torch is no target"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx:int8'", "int8 needs images"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\nimgsz = [1.5]", "imgsz: 1.5 is not possible"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[data]\nvals = 'x'", "key 'vals' is unknown"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[data]\nval = 'x'", "x does not exist"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[data]\nval = 3", "val must be"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[export]\nprecision = 'w8'", "key 'precision' is unknown"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[export]\nopset = 3", "--opset 3"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\nbench = 1", "bench: 1 is not possible"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[[bench]]\nthreads = 0", "use whole numbers from 1"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[[bench]]\nlimit = -1", "limit -1"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[[bench]]\nboard = '../x'", "must be the name or class"),
        ("checkpoints = 'demo:digits'\nforms = 'onnx'\n[[exclude]]\nform = 'onnx'", "nothing is left"),
        ("checkpoints = ['demo:digits', '*.safetensors']\nforms = 'onnx'", "have the same name"),
    ],
)
def test_sweeps_that_are_refused(text, says, tmp_path):
    (tmp_path / "s.toml").write_text(text)
    (tmp_path / "evm_digits.safetensors").write_bytes(b"")
    with pytest.raises(EvmError, match=says):
        read_sweep(tmp_path / "s.toml")


def test_flags_that_are_refused(work, tmp_path, capsys):
    for flags, says in (
        (["--address", "a:1"], "--address needs --engine ray"),
        (["--devices", str(tmp_path / "none.toml")], "No such file"),
    ):
        assert sweep(tmp_path, *flags) == 2 and not work
        assert says in capsys.readouterr().err
    (tmp_path / "sweep.toml").write_text(SWEEP + 'board = "pi5"\n')
    assert sweep(tmp_path) == 2 and not work
    assert "no board of this host has the name or class 'pi5'; it has: here" in capsys.readouterr().err


FLEET = """
[[board]]
name = "left"
host = "me@left"
device = "pi5"
[[board]]
name = "right"
host = "me@right"
device = "pi5"
threads = 3
"""


class FakeHost:
    def __init__(self, options: HostOptions) -> None:
        self.options = options

    def __enter__(self):
        if self.options.host == "me@right":
            raise ToolchainError("me@right does not answer", "is it on?")
        return self

    def __exit__(self, *error):
        pass

    def prepare(self, bundle, settings):
        pass

    def __call__(self, bundle, settings):
        made = make_record(settings={**settings.as_dict(), "batch": 1})
        return replace(made, bundle={**made.bundle, "name": Path(bundle).name})


def test_boards_are_taken_by_name_or_class_one_at_a_time(work, tmp_path, monkeypatch, capsys):
    """A board that has vanished is an error of its measurements, and stops no other."""
    monkeypatch.setattr("evm_deploy.sweep.boards.opened", lambda options, step: FakeHost(options))
    (tmp_path / "fleet.toml").write_text(FLEET)
    text = SWEEP.replace("threads = [1, 2]", 'board = "left"') + '[[bench]]\nboard = "right"\n'
    (tmp_path / "sweep.toml").write_text(text)
    assert sweep(tmp_path, "--devices", str(tmp_path / "fleet.toml"), "-q") == 3
    shown = capsys.readouterr()
    assert shown.err.count("me@right does not answer\n  is it on?") == 2 and "12 units: 10 done, 2 failed" in shown.out
    assert len(list((tmp_path / "run" / "records" / "left").iterdir())) == 2

    boards = Boards.of(tmp_path / "fleet.toml")
    assert [each.name for each in boards.known("pi5")] == ["left", "right"]
    with boards.taken(boards.known("pi5")) as first, boards.taken(boards.known("pi5")) as second:
        assert [first.name, second.name] == ["left", "right"]
        with held("board-me@left", wait=False) as free:
            assert not free
    with held("board-me@left", wait=False) as free:
        assert free


def test_a_board_may_not_have_the_name_of_a_class(tmp_path):
    for name in ("here", "pi5"):
        (tmp_path / "fleet.toml").write_text(FLEET.replace('"right"', f'"{name}"'))
        with pytest.raises(UsageError, match="is also a class of boards, or this machine"):
            Boards.of(tmp_path / "fleet.toml")


def test_a_worker_offers_its_boards(tmp_path, capsys, monkeypatch):
    """By name, and by class with their number."""
    (tmp_path / "fleet.toml").write_text(FLEET)
    flags = ["worker", "--devices", str(tmp_path / "fleet.toml"), "--address", "10.0.0.1:6379"]
    assert cli.sweep_main([*flags, "--dry-run"]) == 0
    line = capsys.readouterr().out
    assert """'--resources={"board:left": 1, "board:pi5": 2, "board:right": 1}'""" in line and "--num-cpus=2" in line
    assert line.startswith(f"EVM_FLEET={tmp_path / 'fleet.toml'} ")
    assert cli.sweep_main([*flags, "--cpus", "0"]) == 2
    assert "--cpus 0: use a whole number" in capsys.readouterr().err
    monkeypatch.setenv("EVM_FLEET", str(tmp_path / "fleet.toml"))
    assert [each.name for each in boards_here().members] == ["left", "right"]


def test_ray_is_an_extra(work, tmp_path, monkeypatch, capsys):
    for module in ("ray", "ray.scripts"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("evm_deploy.sweep.worker.find_spec", lambda name: None)
    (tmp_path / "fleet.toml").write_text(FLEET)
    for flags in (
        [str(tmp_path / "sweep.toml"), "-o", str(tmp_path / "run"), "--engine", "ray"],
        ["worker", "--devices", str(tmp_path / "fleet.toml"), "--address", "10.0.0.1:6379"],
    ):
        assert cli.sweep_main(flags) == 3 and not work
        assert "needs Ray, which is not installed\n  pip install" in capsys.readouterr().err
    assert sweep(tmp_path, "--engine", "ray", "--devices", str(tmp_path / "fleet.toml")) == 2
    assert "--devices is for --engine local" in capsys.readouterr().err


def test_nothing_runs_beside_a_measurement():
    with beside_others(), beside_others(), held("cores", wait=False) as free:
        assert not free  # a measurement waits
    with alone(), held("cores", shared=True, wait=False) as free:
        assert not free
    with held("cores", wait=False) as free:
        assert free


def test_a_damaged_done_file_counts_as_none(work, tmp_path):
    assert sweep(tmp_path, "-q") == 0
    done = sorted((tmp_path / "run" / "units").iterdir())
    done[0].write_bytes(b"")
    done[1].write_text('{"result": 1}')
    assert sweep(tmp_path, "-q") == 0
    assert sum(work.values()) == 14


def test_what_killed_workers_left_is_removed(work, tmp_path):
    """And nothing else."""
    run = tmp_path / "run"
    assert sweep(tmp_path, "--only", "zz") == 2
    left = [run / ".plan.json.123.ab_c12xy", run / "units" / ".0a.json.7.q", run / "records" / "here" / ".r.json.7.q"]
    own = [run / ".notes", run / ".plan.json.old", run / "units" / ".cache"]
    for each in (*left, *own):
        each.mkdir(parents=True)
        (each / "file").touch()
    assert sweep(tmp_path, "-q") == 0
    assert not any(each.exists() for each in left) and all((each / "file").exists() for each in own)


def test_what_was_deleted_is_made_again(work, tmp_path):
    assert sweep(tmp_path, "-q") == 0
    before = files(tmp_path / "run" / "judged")
    for name in ("bundles", "rows", "outputs"):
        shutil.rmtree(tmp_path / "run" / name)
    next((tmp_path / "run" / "records" / "here").iterdir()).unlink()
    assert sweep(tmp_path, "-q") == 0
    assert sum(work.values()) == 12 + 2 + 6 + 1 and files(tmp_path / "run" / "judged") == before


def test_images_that_do_not_fit_are_an_error_of_the_bundle(work, tmp_path, capsys):
    np.savez(tmp_path / "val.npz", images=np.zeros((3, 8, 8), np.uint8), labels=[0, 1, 99])
    assert sweep(tmp_path, "-q") == 2
    shown = capsys.readouterr()
    assert "label 99, but the head has 10 classes" in shown.err and "6 units: 6 done" in shown.out
