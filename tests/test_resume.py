"""An interrupted evaluation continues: the result is to the last digit that of an evaluation that was left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evm_deploy import cli
from evm_deploy._util import kept
from evm_deploy._util.kept import KeptResults, kept_results
from evm_deploy.calib import evaluation
from evm_deploy.data import decoded as data_decoded
from evm_deploy.data import images as data_images
from evm_deploy.data.decoded import INDEX, PIXELS
from evm_deploy.data.images import labelled_images
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.demo import CHECKPOINT, digits
from evm_deploy.export import quantization
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch
from tests import cache
from tests.test_evaluation import Evaluated, image_set

PRE = Preprocessing((8, 8), crop_pct=1.0)

#: evm-export, killed in the N-th call of a function; its shards are small, and three blocks must stay in float.
CHILD = """
import os, signal, sys
from pathlib import Path
from evm_deploy import cli
from evm_deploy._util.kept import KeptResults
from evm_deploy.calib import evaluation
from evm_deploy.calib.evaluate import Accuracy
from evm_deploy.data.decoded import DecodedImages
from tests import cache

cache.Graphs.folder = Path(sys.argv[1])
evaluation.SHARD, evaluation.COMPARED = 40, 90
Accuracy.ok = property(lambda self: self.sqnr_db > 47)
name, at, which = sys.argv[2].split()
owner = {"add": DecodedImages, "put": KeptResults}[name]
real, calls = getattr(owner, name), [0]

def counted(*args):
    calls[0] += 1
    if calls[0] == int(at):
        os.kill(os.getpid(), int(which))
    return real(*args)

setattr(owner, name, counted)
sys.exit(cli.export_main(sys.argv[3:]))
"""


def class_folders(folder, count=200):
    images, labels = digits("heldout")
    for i, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def run(tmp_path, out, dies, home):
    flags = ["--target", "onnx", "--precision", "w8", "--val", str(tmp_path / "val"), "-o", str(tmp_path / out), "-v"]
    environment = {**os.environ, "PYTHONPATH": str(cache.ROOT), "XDG_CACHE_HOME": str(tmp_path / home)}
    command = [sys.executable, "-c", CHILD, str(cache.Graphs.folder), dies, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)


def result(folder):
    """All that an export says, but for what the clock says."""
    (bundle,) = folder.iterdir()
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["details"]["quantization"]["speed_over_fp32_here"]
    return manifest, {path.name: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def leftovers(home):
    folder = home / "evm-deploy" / kept.FOLDER
    return list(folder.iterdir()) if folder.exists() else []


@pytest.mark.slow
def test_an_export_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    class_folders(tmp_path / "val")
    whole = run(tmp_path, "whole", "add 0 0", "home")
    assert whole.returncode == 0, whole.stderr
    assert "interrupted run" not in whole.stderr and not leftovers(tmp_path / "home")
    assert "sensitivity" in whole.stderr and "in float" in whole.stderr
    kills = [
        f"add 70 {signal.SIGKILL}",
        f"put 2 {signal.SIGTERM}",
        f"put 7 {signal.SIGKILL}",
        f"put 24 {signal.SIGINT}",
    ]
    for dies in kills:
        killed = run(tmp_path, "again", dies, "other")
        assert killed.returncode == (130 if dies.split()[2] in ("2", "15") else -signal.SIGKILL), killed.stderr
        assert len(leftovers(tmp_path / "other")) == 1
        if killed.returncode == 130:
            assert "the same command continues" in killed.stderr and "nothing was left" not in killed.stderr
    again = run(tmp_path, "again", "add 0 0", "other")
    assert again.returncode == 0, again.stderr
    assert int(re.search(r"(\d+) of 200 images taken from the interrupted run", again.stderr)[1]) >= 90
    assert "evaluations of an image taken from the interrupted run" in again.stderr
    assert not leftovers(tmp_path / "other")
    (manifest, files), (other, others) = result(tmp_path / "whole"), result(tmp_path / "again")
    timed = {"README.md", "manifest.json"}
    assert files.keys() == others.keys() and {name for name in files if files[name] != others[name]} <= timed
    for each in (manifest, other):
        del each["files"]["README.md"]
    assert manifest == other


class Interrupted(BaseException):
    pass


def test_an_interruption_in_any_place_changes_no_digit(tmp_path, monkeypatch):
    """Every call of `put`, in turn, is the last of a run; the next run continues, until one reaches the end."""
    monkeypatch.setattr(evaluation, "SHARD", 40)
    monkeypatch.setattr(evaluation, "COMPARED", 90)
    bad = partial(lambda blocks, i: "b" in blocks and i % 10 == 0)
    whole, _ = Evaluated(bad).choose(image_set(250))
    runs, taken = 0, []
    real = KeptResults.put
    for _ in range(100):
        runs += 1
        left = [1]

        def put(self, name, arrays, left=left):
            if not left[0]:
                raise Interrupted
            left[0] -= 1
            real(self, name, arrays)

        monkeypatch.setattr(KeptResults, "put", put)
        interrupted = Evaluated(bad)
        interrupted.config.kept = KeptResults(tmp_path)
        try:
            found, steps = interrupted.choose(image_set(250))
        except Interrupted:
            continue
        taken = [detail for name, detail in steps if name == "resume"]
        break
    assert runs > 10 and taken
    assert found.accuracy == whole.accuracy and found.in_float == whole.in_float == ("b",)
    assert found.tried == whole.tried and found.sensitivity == whole.sensitivity


def test_shards_and_their_order_change_no_digit(monkeypatch):
    bad = lambda blocks, i: i % 7 == 0  # noqa: E731
    accuracies = set()
    for size in (1, 13, 512):
        monkeypatch.setattr(evaluation, "SHARD", size)
        found, _ = Evaluated(bad, max_drop=None).choose(image_set(100))
        accuracies.add(repr(found.accuracy))
    assert len(accuracies) == 1


def test_results_of_other_images_labels_or_layers_are_not_taken(tmp_path):
    """A control of the names: each part of the question makes another name."""

    def rows(images, bad, **config):
        done = Evaluated(bad)
        done.config.kept = KeptResults(tmp_path)
        vars(done.config).update(config)
        found, _ = done.choose(images)
        return found.accuracy, sum(count for _, count in done.seen)

    good = lambda blocks, i: False  # noqa: E731
    first, ran = rows(image_set(60), good)
    assert ran == 60 and rows(image_set(60), good) == (first, 0)
    relabelled = image_set(60)
    items = tuple(SimpleNamespace(**{**vars(item), "label": 0}) for item in relabelled.items)
    other, ran = rows(type(relabelled)(items, relabelled.preprocessing), good)
    assert ran == 60 and other.scores["top1"] < first.scores["top1"]
    assert rows(image_set(61), good)[1] == 61
    assert rows(image_set(60), good, val=None)[1] == 60


@pytest.mark.slow
def test_all_that_decides_a_result_is_in_its_identity(monkeypatch):
    """Another torch, network, setting, kernel or processor starts anew; other choices among candidates continue."""
    target, spec = get_target("onnx"), load_checkpoint(CHECKPOINT).spec
    plan, pre = complete(check_plan(target, ExportPlan("onnx", "w8", val="demo")), spec)
    seen = []
    monkeypatch.setattr(quantization, "kept_results", lambda identity: seen.append(json.dumps(identity, default=str)))

    def identity(plan=plan, spec=spec, pre=pre, network="a", **patched):
        with monkeypatch.context() as patch:
            for name, value in patched.items():
                patch.setattr(quantization, name, value)
            quantization.keeping(SimpleNamespace(sha256=network), plan, spec, pre, target)
        return seen[-1]

    first = identity()
    assert first == identity()
    for same_question in (
        {"max_drop": 2.0},
        {"calib_images": 7},
        {"smooth": "off"},
        {"calib_method": "minmax"},
        {"tol": 0.1},
    ):
        assert identity(replace(plan, **same_question)) == first
    others = [
        identity(replace(plan, opset=18)),
        identity(replace(plan, scan="portable")),
        identity(replace(plan, batch=Batch(2, 2, 2))),
        identity(spec=replace(spec, checkpoint={**spec.checkpoint, "sha256": "0"})),
        identity(spec=replace(spec, checkpoint={**spec.checkpoint, "container": "state_dict"})),
        identity(pre=replace(pre, crop_pct=0.5)),
        identity(network="b"),
        identity(package_versions=lambda names: {"torch": "9.0"}),
        identity(cpu_model=lambda: "another processor"),
        identity(usable_cores=lambda: 99),
        identity(library_here=lambda target: None, find_plugin=lambda name: None),
    ]
    assert len({first, *others}) == 1 + len(others)


# ------------------------------------------------------------------------------------------------ decoded images


def decoded(source, folder):
    """All images of `source`, with the number of those that were not decoded, and their pixels."""
    reads, real = [], data_images.read_image
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_images, "read_image", lambda *given: reads.append(given) or real(*given))
        images = labelled_images(source, PRE, 10, folder=folder).all()
    taken = len(images) - len(reads)
    return SimpleNamespace(items=images.items, digest=images.digest, taken=taken), [
        pixels.copy() for pixels in images.pixels()
    ]


@pytest.fixture
def val(tmp_path):
    return class_folders(tmp_path / "val", 60)


def kept_folder(tmp_path):
    (tmp_path / "kept").mkdir(exist_ok=True)
    return tmp_path / "kept"


def same(some, others):
    return len(some) == len(others) and all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def test_decoded_images_are_taken_by_content(val, tmp_path, monkeypatch):
    folder = kept_folder(tmp_path)
    first, pixels = decoded(val, folder)
    assert first.taken == 0 and all(item.decoded is not None for item in first.items)
    digest = first.digest()
    names = [item.source for item in first.items]
    changed, gone = names[3], names[10]
    monkeypatch.setattr("evm_deploy.data.images.read_image", lambda path, channels: pytest.fail("decoded again"))
    again, same_pixels = decoded(val, folder)
    assert again.taken == 60 and same(pixels, same_pixels) and again.digest() == digest
    monkeypatch.undo()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(changed)
    gone.unlink()
    names[20].rename(names[20].with_name("renamed.png"))
    mended, new_pixels = decoded(val, folder)
    assert mended.taken == 58 and mended.digest() != digest
    alone, want = decoded(val, None)
    assert same(new_pixels, want) and alone.digest() == mended.digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, index: (data[:1000], index),
        lambda data, index: (b"", index),
        lambda data, index: (data, index[:100]),
        lambda data, index: (bytes(len(data)), index),
        lambda data, index: (data[:5000] + b"x" + data[5001:], index),
        lambda data, index: (data, bytes(len(index))),
        lambda data, index: (data + b"half", index + b"half"),
    ],
    ids=["pixels cut", "pixels lost", "index cut", "pixels are zeros", "one byte", "index is zeros", "half an image"],
)
def test_what_a_power_failure_leaves_is_decoded_again(damage, val, tmp_path):
    folder = kept_folder(tmp_path)
    _, pixels = decoded(val, folder)
    data, index = damage((folder / PIXELS).read_bytes(), (folder / INDEX).read_bytes())
    (folder / PIXELS).write_bytes(data)
    (folder / INDEX).write_bytes(index)
    for taken in (False, True):
        images, again = decoded(val, folder)
        assert same(pixels, again) and (images.taken == 60 or not taken)


def test_a_disk_that_is_too_small_is_said_before_the_work(val, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("evm_deploy.data.decoded.shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    order = []
    monkeypatch.setattr(
        "evm_deploy.data.images.read_image",
        lambda path, channels: order.append(len(caplog.records)) or Image.open(path).convert("RGB"),
    )
    images, pixels = decoded(val, kept_folder(tmp_path))
    assert set(order) == {1} and "no room for" in caplog.text and "11.5 kB" in caplog.text
    assert all(item.decoded is None for item in images.items) and same(pixels, decoded(val, None)[1])


@pytest.mark.parametrize("before", [0, 20])
def test_a_cache_that_is_too_small_gives_way_to_the_temporary_folder(before, val, tmp_path, monkeypatch, caplog):
    folder = kept_folder(tmp_path)
    if before:  # what is there already must not be taken for what is elsewhere
        decoded(class_folders(tmp_path / "part", before), folder)
    monkeypatch.setattr(
        "evm_deploy.data.decoded.shutil.disk_usage",
        lambda path: SimpleNamespace(free=1000 if path == folder else 10**9),
    )
    images, pixels = decoded(val, folder)
    assert "not kept if this run is interrupted" in caplog.text and images.taken == 0
    assert all(item.decoded is not None for item in images.items)
    monkeypatch.undo()
    assert same(pixels, decoded(val, None)[1])


@pytest.mark.parametrize("before", [0, 20])
def test_a_disk_that_fills_up_stops_nothing(before, val, tmp_path, monkeypatch):
    folder = kept_folder(tmp_path)
    if before:
        decoded(class_folders(tmp_path / "part", before), folder)
    real, left = data_decoded._append, [9]

    def full(file, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(file, data)

    monkeypatch.setattr(data_decoded, "_append", full)
    images, pixels = decoded(val, folder)
    assert all(item.decoded is None for item in images.items)
    assert (folder / PIXELS).stat().st_size == before * 8 * 8 * 3
    monkeypatch.undo()
    assert same(pixels, decoded(val, None)[1])
    images, pixels_again = decoded(val, folder)
    assert images.taken == before and same(pixels, pixels_again)


# ---------------------------------------------------------------------------------------------------- kept results


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


ROWS = {"sqnr_db": np.array([1.5, -np.inf]), "top1": np.array([0.0, 1.0])}


def leave_behind(identity):
    with pytest.raises(Interrupted), kept_results(identity) as results:
        results.put("rows", ROWS)
        raise Interrupted


def test_results_stay_until_the_work_is_done(home):
    leave_behind({"torch": "2.13.0"})
    (folder,) = leftovers(home)
    with kept_results({"torch": "2.14.0"}) as results:
        assert results.get("rows") is None and len(leftovers(home)) == 2
    with kept_results({"torch": "2.13.0"}) as results:
        assert results.inherited("rows") and results.get("else") is None
        assert all(np.array_equal(value, ROWS[name]) for name, value in results.get("rows").items())
        results.put("rows", ROWS)
        assert not results.inherited("rows")
    assert not folder.exists() and not leftovers(home)


def test_a_damaged_result_is_missing(home):
    leave_behind({})
    (file,) = leftovers(home)[0].iterdir()
    good = file.read_bytes()
    for bad in (b"", good[:-1], good[:20], b"x" + good[1:], bytes(len(good)), good + b"\0"):
        file.write_bytes(bad)
        with pytest.raises(Interrupted), kept_results({}) as results:
            assert results.get("rows") is None
            raise Interrupted


def test_results_do_not_fill_the_disk(home, monkeypatch, caplog):
    kept.log_no_cache.cache_clear()
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: SimpleNamespace(free=kept.RESERVED_BYTES))
    with kept_results({}) as results:
        results.put("rows", ROWS)
        assert not list(results.folder.iterdir()) and results.get("rows") is ROWS and "No space" in caplog.text


def test_nothing_is_left_of_work_that_kept_nothing(home):
    with pytest.raises(Interrupted), kept_results({}):
        assert kept.what_is_left() == "nothing was left behind"
        raise Interrupted
    assert not leftovers(home)


def test_two_processes_do_not_share_results(home, caplog):
    with kept_results({}) as first, kept_results({}) as second:  # a lock of this process is a lock too
        first.put("rows", ROWS)
        assert second.folder is None and second.get("rows") is None
        second.put("rows", ROWS)
        assert second.get("rows") is ROWS
        assert "used by another process" in caplog.text
        assert len(list(first.folder.iterdir())) == 1
    assert not leftovers(home)


def test_old_and_many_leftovers_are_deleted_unless_in_use(home):
    for i in range(6):
        leave_behind({"n": i})
        (newest,) = set(leftovers(home)) - {each for each in leftovers(home) if each.stat().st_mtime < 10**6 * (1 + i)}
        os.utime(newest, (10**6 * (i + 1),) * 2)
    with kept_results({"n": 5}) as results:
        assert leftovers(home) == [results.folder]  # the others are of 1970
    for i in range(6):
        leave_behind({"n": i})
    with kept_results({"n": "in use"}) as used:
        used.put("rows", ROWS)
        os.utime(used.folder, (1, 1))
        with kept_results({"n": "new"}):
            assert len(leftovers(home)) <= kept.KEPT_WORKS + 2 and used.folder.exists()


def test_results_need_no_cache(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kept.log_no_cache.cache_clear()
    with kept_results({}) as results:
        results.put("rows", ROWS)
        assert results.get("rows") is ROWS
    assert "nothing is cached" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "w8"])
def test_a_rejected_artifact_keeps_its_evaluation(precision, home, tmp_path, capsys, monkeypatch):
    """The same command with another --max-drop asks the candidates nothing that they have answered."""
    from evm_deploy.calib.evaluate import Accuracy

    monkeypatch.setattr(Accuracy, "drop", property(lambda self: 1.5))
    flags = [
        "--target",
        "onnx",
        "--precision",
        precision,
        "--val",
        "demo",
        "--calib-images",
        "110",
        "-o",
        str(tmp_path / "o"),
    ]
    assert cli.export_main([*flags, "--max-drop", "1"]) == 5
    capsys.readouterr()
    monkeypatch.setattr("evm_deploy.calib.evaluation.run_each", lambda *a: pytest.fail("evaluated again"))
    assert cli.export_main([*flags, "--max-drop", "2"]) == 0
    assert "599 of 599 images taken from the interrupted run" in capsys.readouterr().err and not leftovers(home)
