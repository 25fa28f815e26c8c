"""evm-tune: the most accurate artifact within a budget, every trial done once, an ended search continues."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evm_deploy import cli
from evm_deploy.bench.measurable import calibration_text
from evm_deploy.bench.record import Record
from evm_deploy.calib.evaluate import own_rows
from evm_deploy.demo import digits
from evm_deploy.errors import BundleError, EvmError, ToolchainError, UsageError
from evm_deploy.report.collect import newest
from evm_deploy.sweep import units as units_module
from evm_deploy.sweep.additive import Additive, Outcome
from evm_deploy.sweep.budget import Budget, parse_budget
from evm_deploy.sweep.folder import RunFolder
from evm_deploy.sweep.search import SAMPLERS, Search
from evm_deploy.sweep.shards import ShardRows
from evm_deploy.sweep.space import Choice, Space
from evm_deploy.sweep.tune import FIRST, is_behind, parts_of
from evm_deploy.sweep.tuned import BEHIND, FAILED, FITS, OVER, Trial, Tuned, read_tuned, require_folder_of
from evm_deploy.tasks import get_task
from tests.records import record as make_record
from tests.sweeps import count
from tests.toolchains import need

need("optuna", module=True)

IMAGES = 400
SMALL = Space(("onnx:fp32", "onnx:int8"), ("64x64", "32x32"), ("2", "1"), ("mse", "minmax"), ("on",))
FLAGS = ("--calib", "demo", "--imgsz", "64,32", "--threads", "2,1")
EVERY = ("--sampler", "random", "--trials", "100")  # in all 44
WRONG = {"fp32": 4, "fp16": 4, "w8": 8, "int8": 8}  # wrong answers of IMAGES at 64x64, 100 more at 32x32


@pytest.fixture
def done(work, tmp_path, monkeypatch):
    """`work`, with evaluations that are made up, too. tmp_path has val.npz."""
    images, labels = digits("heldout")
    np.savez(tmp_path / "val.npz", images=images[:IMAGES], labels=labels[:IMAGES])

    def evaluated(shard, cores, expected):
        work["images"] += len(shard.items)
        *_, precision, size = shard.bundle.rpartition("/")[2].split("-")
        wrong = WRONG[precision] + (100 if size == "32x32" else 0)
        answers = [(item.label + (int(item.name[:-1].partition("[")[2]) < wrong)) % 10 for item in shard.items]
        logits = {"logits": np.eye(10, dtype=np.float32)[answers]}
        rows = own_rows(logits, get_task("classification"), [item.label for item in shard.items])
        return ShardRows(rows, (), "digest")

    def in_float(self, items):
        work["in float"] += len(items)
        return (ShardRows({}, (), "digest"),) * 2

    monkeypatch.setattr(units_module, "evaluated", evaluated)
    monkeypatch.setattr(units_module.FloatCheckpoint, "evaluated", in_float)
    return work


def tune(folder, *flags: str, budget: str = "p50<2ms") -> int:
    named = ["demo:digits", "--budget", budget, "--val", str(folder / "val.npz"), "-o", str(folder / "run")]
    return cli.tune_main([*named, *FLAGS, *flags])


def test_budgets():
    assert parse_budget("p50<20ms, size <= 1.5GB,memory<200 MB") == Budget(
        (("p50", 20.0), ("size", 1500.0), ("memory", 200.0))
    )
    assert str(parse_budget("p99<0.5s")) == "p99 < 500 ms"
    budget = parse_budget("p50<20ms,size<10MB")
    assert budget.fits({"p50": 20.0, "size": 10.0}) and budget.fits({}) and not budget.fits({"p50": 20.1})
    assert budget.excess({"p50": 10.0, "size": 15.0}) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p50", "'p50' is no limit"),
        ("", "is no limit"),
        ("p50<20ms,", "'' is no limit"),
        ("p50>20ms", "is no limit"),
        ("p50<-1ms", "is no limit"),
        ("p50<nanms", "is no limit"),
        ("p50<20", "has no unit\n  p50 is in us, ms, s"),
        ("p50<20MB", "unit of p50 'MB' is unknown; choose from: us, ms, s"),
        ("p5<20ms", "figure 'p5' is unknown; choose from: p50, p90"),
        ("energy<2mJ", "figure 'energy' is unknown"),
        ("p50<0ms", "is not possible"),
        ("size<1" + "0" * 40 + "MB", "is not possible"),
        ("p50<20ms,p50<10ms", "limits p50 twice"),
    ],
)
def test_bad_budgets_are_named(text, said):
    with pytest.raises(UsageError, match="--budget") as caught:
        parse_budget(text)
    assert said in str(caught.value)


def test_a_space_has_each_choice_once():
    every = SMALL.all()
    assert len(set(every)) == len(every) == 4 + 8  # fp32 is not calibrated
    assert SMALL.starts() == [Choice("onnx:fp32", "64x64", "2"), Choice("onnx:int8", "64x64", "2", "mse", "on")]
    assert str(SMALL.starts()[1]) == "onnx int8, mse, smooth on, 64x64, threads 2"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_proposes_everything_once_and_continues(sampler, tmp_path):
    journal = tmp_path / "search.journal"
    search, seen = Search(SMALL, sampler, name="a", journal=journal), []
    for outcome in (Outcome({"p50": 0.9}, 0.5), Outcome(None), Outcome({"p50": 1.1})):
        seen.append(search.next())
        search.tell(seen[-1], outcome)
    seen.append(search.next())  # its run ends here

    search = Search(SMALL, sampler, name="a", journal=journal)
    assert search.past == seen
    search.tell(seen[0], Outcome({"p50": 0.9}, 0.9))  # known
    search.tell(seen[3], Outcome({"p50": 0.8}, 0.7))
    while (choice := search.next()) is not None:
        seen.append(choice)
        search.tell(choice, Outcome({"p50": 0.9}, 0.1))
    assert sorted(map(str, seen)) == sorted(map(str, SMALL.all()))
    assert Search(SMALL, sampler, name="b", journal=journal).past == []
    journal.write_text("{not a journal\n")
    with pytest.raises(UsageError, match="is damaged"):
        Search(SMALL, sampler, name="a", journal=journal)


def test_the_additive_model_knows_what_it_did_not_see():
    """Smaller and quantised are each half as costly, so both together a quarter; minmax failed where mse did not."""
    model = Additive(SMALL)
    big, small = Choice("onnx:fp32", "64x64", "2"), Choice("onnx:fp32", "32x32", "2")
    model.learn(big, Outcome({"p50": 4}))
    model.learn(small, Outcome({"p50": 2}))
    model.learn(Choice("onnx:int8", "64x64", "2", "mse", "on"), Outcome({"p50": 2}))
    model.learn(Choice("onnx:int8", "64x64", "1", "minmax", "on"), Outcome(None))
    unseen = [each for each in SMALL.all() if each not in model._learned]
    assert model.best(unseen) == Choice("onnx:int8", "32x32", "2", "mse", "on")
    assert model.best(unseen[::-1]) == model.best(unseen)

    model = Additive(SMALL)  # all fit: the most accurate size again, in another precision
    model.learn(big, Outcome({"p50": 0.5}, 0.98))
    model.learn(small, Outcome({"p50": 0.3}, 0.4))
    model.learn(Choice("onnx:int8", "32x32", "2", "mse", "on"), Outcome({"p50": 0.2}, 0.41))
    assert model.best(SMALL.all()[4:]).imgsz == "64x64"


def test_the_default_search_beats_a_random_one(monkeypatch):
    """On the committed table of measured candidates; benchmarks/tune.py has more seeds."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    table = pytest.importorskip("tune")
    _, rows = table.read_table()
    lost = {
        sampler: np.mean(
            [table.lost(rows, budget, sampler, 12, seed) for budget in table.budgets_of(rows) for seed in (0, 1)]
        )
        for sampler in (SAMPLERS[0], "random")
    }
    assert lost[SAMPLERS[0]] < lost["random"]


@pytest.mark.slow
def test_the_most_accurate_within_the_budget_is_found(done, tmp_path, capsys):
    assert tune(tmp_path, *EVERY, "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    trials = [Trial(**each) for each in found["trials"]]
    assert len(trials) == len({each.choice for each in trials}) == 44
    assert shown.err.count("\n") == 44
    assert count(done, "export") == 2 * (3 + 8)  # both numbers of threads share one
    states = Counter(each.state for each in trials)
    assert states[FITS] + states[BEHIND] == 37 and states[OVER] == 7
    chosen = trials[found["chosen"]]
    assert chosen.choice.startswith("onnx int8") and chosen.choice.endswith("64x64, threads 2")
    assert chosen.figure == 1 - WRONG["int8"] / IMAGES and chosen.figures["p50"] == 1.0
    assert all(not each.rungs for each in trials if each.state == OVER)
    assert count(done, "export fp") == 4

    before = Counter(done)
    assert tune(tmp_path, *EVERY) == 0 and done == before
    shown = capsys.readouterr()
    assert "Chosen    onnx int8" in shown.out and "evm-run" in shown.out
    path = tmp_path / "run" / chosen.bundle
    assert f"Saved     {path}" in shown.out and path.is_dir()
    assert tune(tmp_path, "--trials", "30", budget="p50<9ms") == 0 and count(done, "export") == count(before, "export")
    assert "Chosen    onnx fp16, 64x64, threads 2: top-1 99.00 %, p50 3 ms" in capsys.readouterr().out


def test_the_report_shows_the_front(done, tmp_path, capsys):
    assert tune(tmp_path, "--trials", "12") == 0
    capsys.readouterr()
    assert cli.report_main([str(tmp_path / "run"), "--html", str(tmp_path / "report.html")]) == 0
    shown = capsys.readouterr().out
    assert "Tuned    p50 < 2 ms on here, 12 trials\n         chosen: top-1 98.00 %, p50 1 ms" in shown
    assert "<h3>Tuned: p50 &lt; 2 ms on here, 12 trials</h3>" in (tmp_path / "report.html").read_text()
    records = [Record.read(each) for each in (tmp_path / "run" / "records" / "here").iterdir()]
    judged = [each.bundle["accuracy"]["top1"] for each in records if each.bundle["accuracy"]]
    assert max(judged) == 0.98
    content = json.loads((tmp_path / "run" / "tuned.json").read_text())
    for damage in ({"budget": {"p51": 1}}, {"trials": [{"choice": 1}]}, {"of": None}):
        (tmp_path / "run" / "tuned.json").write_text(json.dumps({**content, **damage}))
        assert read_tuned(RunFolder(tmp_path / "run")) is None
        assert cli.report_main([str(tmp_path / "run")]) == 0 and "Tuned" not in capsys.readouterr().out


def test_records_of_other_calibrations_are_other_candidates(demo_bundle):
    made = make_record("onnx", "int8", 1.0)
    other = replace(made, bundle={**made.bundle, "calibration": "minmax, smooth off"})
    assert len(newest([made, other])) == 2 and len(newest([other, other])) == 1
    manifest = demo_bundle.manifest
    assert calibration_text(manifest) == ""
    plan = {**manifest.plan, "calib_method": "minmax", "smooth": "off"}
    assert calibration_text(replace(manifest, plan=plan)) == "minmax, smooth off"


def test_an_interrupted_search_does_the_rest(done, tmp_path, monkeypatch, capsys):
    assert tune(tmp_path, "--trials", "9", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["front"] and len(whole["trials"]) == 9
    (tmp_path / "run").rename(tmp_path / "whole")
    finish, left, kills = RunFolder.finish, [0], 0

    def dying(self, key, facts):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        finish(self, key, facts)

    monkeypatch.setattr(RunFolder, "finish", dying)
    while True:
        left[0] = 4
        try:
            assert tune(tmp_path, "--trials", "9", "--json", "-q") == 0
            break
        except KeyboardInterrupt:
            kills += 1
            require_folder_of(RunFolder(tmp_path / "run"), whole["of"])
    found = json.loads(capsys.readouterr().out)
    assert kills > 3 and len({each["choice"] for each in found["trials"]}) == 9
    assert found["trials"][:4] == whole["trials"][:4]  # the starts


def test_nothing_fits(done, tmp_path, capsys):
    few = [*EVERY, "--imgsz", "64", "--threads", "2", "-q"]
    assert tune(tmp_path, *few, budget="p50<0.8ms,memory<90MB") == 6
    said = capsys.readouterr().err
    assert "no candidate of 11 trials fits the budget p50 < 0.8 ms, memory < 90 MB; nearest is onnx int8" in said
    assert "64x64, threads 2, 25 % over: p50 1 ms, memory 80 MB" in said and "raise the limit" in said
    assert done["images"] == 0
    assert tune(tmp_path, *few, budget="size<1kB") == 6
    assert count(done, "measure") == 11 and "nearest" in capsys.readouterr().err  # the size is known without
    assert cli.report_main([str(tmp_path / "run")]) == 0
    assert "nothing fits the budget\n         nearest: " in capsys.readouterr().out


def test_a_failed_trial_is_not_the_end(done, tmp_path, monkeypatch, capsys):
    fake, broken = units_module.export, ["int8", "w8"]

    def export(source, plan, out, force):
        if plan.precision in broken:
            done["refused"] += 1
            raise BundleError(f"no room for {plan.precision}", "make room")
        return fake(source, plan, out, force)

    monkeypatch.setattr(units_module, "export", export)
    assert tune(tmp_path, "--trials", "6", budget="p50<9ms") == 0
    refused = done["refused"]
    shown = capsys.readouterr()
    assert "failed: no room for int8" in shown.err and "Chosen    onnx fp16" in shown.out and refused
    assert tune(tmp_path, "--trials", "6", "-q", budget="p50<9ms") == 0 and done["refused"] == refused
    broken.clear()
    assert tune(tmp_path, "--trials", "6", "-q", "--retry-failed", budget="p50<9ms") == 0
    assert "failed" not in capsys.readouterr().out.splitlines()[-6]
    broken[:] = ["fp32", "fp16", "int8", "w8"]
    shutil.rmtree(tmp_path / "run")
    assert tune(tmp_path, "--trials", "5", "-q") == BundleError.exit_code
    assert "every one of 5 trials failed; the first: no room for fp32\n  make room" in capsys.readouterr().err


def test_images_are_evaluated_in_rungs():
    assert parts_of(40) == [[(0, 40)]] and parts_of(400) == [[(0, 100)], [(100, 200)], [(200, 400)]]
    assert parts_of(10_000) == [
        [(0, 512), (512, 1024), (1024, 1250)],
        [(1250, 1762), (1762, 2274), (2274, 2500)],
        [(at, min(at + 512, 5000)) for at in range(2500, 5000, 512)],
        [(at, min(at + 512, 10_000)) for at in range(5000, 10_000, 512)],
    ]
    assert [is_behind(figure, 0.98, 100) for figure in (0.98, 0.96, 0.94)] == [False, False, True]
    assert [is_behind(0.97, 1.0, images) for images in (FIRST, 1600)] == [True, True] and not is_behind(0.985, 1.0, 100)


def test_who_is_behind_is_not_evaluated_on_all_images(done, tmp_path, capsys):
    assert tune(tmp_path, *EVERY, "--threads", "2", "--json", "-q", budget="p50<9ms") == 0
    trials = [Trial(**each) for each in json.loads(capsys.readouterr().out)["trials"]]
    behind = [each for each in trials if each.state == BEHIND]
    assert behind and all("32x32" in each.choice and each.rungs[-1][0] < IMAGES for each in behind)
    assert all(each.rungs[-1][0] == IMAGES for each in trials if each.state == FITS)
    assert len(trials) == 22 and not [each for each in trials if each.state == FAILED]
    assert done["images"] == sum(each.rungs[-1][0] for each in trials)


def test_the_front_is_what_no_other_trial_beats():
    def trial(choice, figure, p50, size, state=FITS):
        return Trial(choice, state, {"p50": p50, "size": size}, ((10, figure),), "top1")

    made = [
        trial("a", 0.9, 4.0, 2.0),
        trial("b", 0.9, 4.0, 1.0),
        trial("c", 0.8, 1.0, 3.0),
        trial("d", 0.8, 1.5, 3.0),
        trial("e", 0.99, 0.1, 0.1, BEHIND),
    ]
    found = Tuned("", parse_budget("p50<9ms,size<9MB"), "here", tuple(made))
    assert [each.choice for each in found.front] == ["b", "c"] and found.chosen is made[1]
    assert Tuned("", parse_budget("p50<9ms"), "here", tuple(made)).chosen is made[0]
    assert Tuned("", parse_budget("p50<9ms"), "here", ()).chosen is None


def test_optuna_is_an_extra(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune(tmp_path) == ToolchainError.exit_code and not done
    assert "evm-tune needs Optuna, which is not installed\n  pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trials", "0"], "--trials 0: use a number from 1"),
        (["--limit", "nan"], "--limit nan: use seconds"),
        (["--threads", "1,x"], "--threads 'x': use whole numbers"),
        (["--threads", "0"], "--threads '0': use whole numbers"),
        (["--imgsz", "64,a"], "--imgsz 'a': use 224, or HxW"),
        (["--target", "onyx"], "'onyx' is unknown; choose from"),
        (["--target", "trt"], "target 'trt' cannot be built here"),
        (["--device", "pi6"], "--device 'pi6' is unknown; choose from"),
        (["--device", "pi5"], "its latency cannot be measured here"),
        (["--devices", "fleet.toml"], "--devices needs the board to measure on"),
        (["--devices", "fleet.toml", "--device", "nano"], "no board of this host has the name or class 'nano'"),
        (["--calib", "nowhere"], "nowhere does not exist"),
        (["--val", "nowhere"], "nowhere does not exist"),
        (["--budget", "p50<1"], "has no unit"),
        (["-o", "mine"], "is not empty, and does not hold a sweep"),
    ],
)
def test_bad_input_is_named_before_work_begins(done, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "fleet.toml").write_text('[[board]]\nname = "left"\nhost = "pi@left"\ndevice = "pi5"\n')
    if flags[0] == "--target" and flags[1] == "trt":
        lacking = replace(_trt().environment(), can_build=False)
        monkeypatch.setattr("evm_deploy.export.target.Target.environment", lambda self: lacking)
    assert tune(tmp_path, *flags) in (2, 3) and not done
    assert said in capsys.readouterr().err


def _trt():
    from evm_deploy.export.targets import get_target

    return get_target("trt")


def test_a_dry_run_lists_the_space(done, tmp_path, capsys):
    assert tune(tmp_path, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"] == 44 and found["space"]["threads"] == ["2", "1"] and len(found["starts"]) == 4
    assert tune(tmp_path, "--dry-run") == 0 and not done and not (tmp_path / "run").exists()
    assert "44 candidates, 20 trials" in capsys.readouterr().out
    (tmp_path / "fleet.toml").write_text('[[board]]\nname = "left"\nhost = "pi@left"\ndevice = "pi5"\n')
    flags = ["--devices", str(tmp_path / "fleet.toml"), "--device", "pi5", "--dry-run", "--json"]
    named = ["demo:digits", "--budget", "p50<9ms", "--val", "demo", "-o", str(tmp_path / "run"), "--imgsz", "64"]
    assert cli.tune_main([*named, *flags]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["space"]["threads"] == ["4", "2", "1"] and not [f for f in found["space"]["forms"] if "int8" in f]
    assert "int8 is left out" in shown.err


def test_a_folder_has_one_sweep_or_search(done, tmp_path, capsys):
    assert tune(tmp_path, "--trials", "2", "-q", budget="p50<9ms") == 0
    images, labels = digits("train")
    np.savez(tmp_path / "other.npz", images=images[:40], labels=labels[:40])
    assert tune(tmp_path, "--val", str(tmp_path / "other.npz")) == 2
    assert "has the search of another checkpoint, or on other images" in capsys.readouterr().err
    (tmp_path / "sweep.toml").write_text('checkpoints = "demo:digits"\nforms = "onnx:fp32"\nimgsz = 64')
    assert cli.sweep_main([str(tmp_path / "sweep.toml"), "-o", str(tmp_path / "run")]) == 2
    assert "is the folder of an evm-tune" in capsys.readouterr().err
    assert cli.sweep_main([str(tmp_path / "sweep.toml"), "-o", str(tmp_path / "swept"), "-q"]) == 0
    with pytest.raises(EvmError, match="is the folder of a sweep"):
        require_folder_of(RunFolder(tmp_path / "swept"), "x")
