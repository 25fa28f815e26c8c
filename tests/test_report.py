"""evm-report: what may be compared, what is shipped, what got slower, what is remembered."""

from __future__ import annotations

import csv
import io
import json
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evm_deploy._util.files import sha256
from evm_deploy.bench.record import Record
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.manifest import FILE
from evm_deploy.calib.evaluate import Accuracy
from evm_deploy.cli import bench_main, report_main
from evm_deploy.commands.report import milliseconds, percent
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.report import history
from evm_deploy.report.candidate import Candidate, plain
from evm_deploy.report.collect import candidates, collect
from evm_deploy.report.compare import compare
from evm_deploy.report.gate import Gate
from evm_deploy.report.page import accuracy_figure
from evm_deploy.report.table import facts, filled, grouped, remarks
from evm_deploy.report.terminal import sparkline
from evm_deploy.report.verdict import EVALUATE, verdict
from tests.records import JUDGED, LAYERS, content, record, written

HOSTILE = "<script>alert(1)</script>|`x`\x1b[31m\n=1+1"


def judged(*records: Record, **options: float) -> str:
    return verdict([Candidate.of_record(each) for each in records], **options).sentence


def fresh(name: str, **kwargs) -> dict:
    """Changes for a bundle of this name."""
    return {"bundle": {"name": name, "manifest_sha256": name, **kwargs}}


FP32 = record("onnx", "fp32", 1.0)
INT8 = record("openvino", "int8", 0.5, accuracy=JUDGED)


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([FP32, INT8], "ship openvino int8: 2.00x faster than onnx fp32 at -0.2 points"),
        ([FP32], "ship onnx fp32: the only candidate"),
        ([FP32, record("onnx", "int8", 1.04, accuracy=JUDGED)], "ship onnx fp32: onnx int8 has 0.96x the speed here"),
        (
            [FP32, record("onnx", "int8", 0.99, 0.02, accuracy=JUDGED)],
            "ship onnx fp32: onnx int8 has 1.01x the speed here",
        ),
        ([FP32, record("openvino", "fp32", 2.0)], "ship onnx fp32: nothing is faster"),
        ([FP32, record("onnx", "fp16", 0.5)], "ship onnx fp32: the only candidate of known accuracy"),
        (
            [record("onnx", "fp16", 0.5), record("onnx", "w8", 0.8)],
            f"fastest is onnx fp16: 1.60x faster than onnx w8, accuracy unknown: {EVALUATE}",
        ),
        ([record("onnx", "fp16", 0.5)], f"fastest is onnx fp16: the only candidate, accuracy unknown: {EVALUATE}"),
        (
            [FP32, record("onnx", "int8", 0.5, accuracy={**JUDGED, "drop": 1.2})],
            "ship onnx fp32: the only candidate",
        ),
        (
            [FP32, record("onnx", "int8", 0.5, accuracy={**JUDGED, "ok": False})],
            "ship onnx fp32: the only candidate",
        ),
        ([FP32, replace(INT8, stable=False)], "ship onnx fp32: the only candidate"),
        ([replace(FP32, stable=False)], "nothing to ship: every candidate is excluded"),
        ([record("torch", "fp32", 3.0)], "nothing to ship: every candidate is excluded"),
        ([record("torch", "fp32", 3.0), INT8], "ship openvino int8: 6.00x faster than torch fp32 at -0.2 points"),
        (
            [record("onnx", "int8", 1.0, accuracy=JUDGED), INT8],
            "ship openvino int8: 2.00x faster than onnx int8 at -0.2 points",
        ),
        (
            [FP32, record("onnx", "int8", 0.5, accuracy={**JUDGED, "drop": None, "top1": None})],
            "ship onnx fp32: the only candidate of known accuracy",
        ),
    ],
)
def test_the_verdict(records, says):
    assert judged(*records) == says


def test_no_accuracy_is_given_up_for_a_speed_that_was_not_shown():
    best = record("onnx", "int8", 0.505, 0.02, accuracy={**JUDGED, "drop": 0.1})
    assert judged(FP32, INT8, best).startswith("ship onnx int8")
    apart = record("onnx", "int8", 0.53, 0.02, accuracy={**JUDGED, "drop": 0.1})
    assert judged(FP32, INT8, apart).startswith("ship openvino int8")


def test_the_allowed_drop_is_the_users():
    lossy = record("onnx", "int8", 0.5, accuracy={**JUDGED, "drop": 1.2})
    assert judged(FP32, lossy, max_drop=1.5).startswith("ship onnx int8")
    assert judged(FP32, INT8, max_drop=0.1).startswith("ship onnx fp32")


def test_what_is_out_and_int8_without_a_gain_are_named():
    found = verdict(
        [
            Candidate.of_record(each)
            for each in (FP32, replace(INT8, stable=False), record("onnx", "int8", 1.04, accuracy=JUDGED))
        ]
    )
    assert found.notes == (
        "openvino int8 is excluded: latency not stable: measure again on an idle machine",
        "onnx int8 has 0.96x the speed of onnx fp32 here: int8 gains no speed",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"device": {"model": "another board"}},
        {"device": {"at": "me@board"}},
        {"bundle": {"imgsz": [64, 96]}},
        {"bundle": {"model": "evm_small"}},
        {"settings": {"batch": 4}},
        {"settings": {"threads": None}},
        {"settings": {"streams": 2}},
        {"settings": {"timed": "end-to-end"}},
    ],
    ids=str,
)
def test_what_is_not_alike_is_not_compared(changes):
    other = record("openvino", "int8", 0.5, accuracy=JUDGED, changes=changes)
    groups = grouped([Candidate.of_record(FP32), Candidate.of_record(other)])
    assert len(groups) == 2 and all(len(group.candidates) == 1 for group in groups)
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([record(median=1.0)], [record(median=1.0, changes=changes)])


def test_rows_of_one_group_are_sorted_and_rated():
    (group,) = grouped([Candidate.of_record(each) for each in (record("torch", "fp32", 3.0), FP32, INT8)])
    assert [each.label for each in group.candidates] == ["openvino int8", "onnx fp32", "torch fp32"]
    assert group.verdict.baseline is group.candidates[1]
    assert group.figure(group.verdict.baseline, "top1") == pytest.approx(99.5)


def test_the_columns_are_those_of_the_task():
    figures = {"AP": 0.7508, "AP50": 0.9337, "AP75": 0.8639}
    judged = {
        **{key: value for key, value in JUDGED.items() if not key.startswith("top")},
        "metric": "AP",
        "drop": 0.24,
        **figures,
        **{f"{name}_float": 0.9 for name in figures},
    }
    candidates = [Candidate.of_record(each) for each in (FP32, record("openvino", "int8", 0.5, accuracy=judged))]
    (group,) = grouped(candidates)
    headings, rows = filled(group)
    assert group.metric == "AP" and "top-1" not in headings
    cells = [dict(zip(headings, row.cells, strict=True)) for row in rows]
    assert [row["AP"] for row in cells] == ["75.08 %", "90.00 %"]
    assert [row["AP75"] for row in cells] == ["86.39 %", "90.00 %"]
    assert "AP, %" in str(accuracy_figure(group).image)
    assert facts(group.candidates[0], group)["AP50_percent"] == pytest.approx(93.37)
    (strict,) = grouped(candidates, max_drop=0.1)
    assert any("-0.24 points of AP, limit -0.1" in note for note in strict.verdict.notes)
    assert str(Accuracy.from_dict(judged)).startswith("AP 75.08 % vs 90.00 % float (-14.92")


def test_settings_that_are_a_choice_share_a_group():
    portable = record(median=2.0, changes={"settings": {"scan": "portable"}})
    (group,) = grouped([Candidate.of_record(each) for each in (FP32, portable)])
    assert [each.label for each in group.candidates] == ["onnx fp32", "onnx fp32, scan portable"]


def test_records_and_bundles_belong_together_by_hash(micro_bundle, tmp_path):
    path = micro_bundle.path
    mine = fresh(path.name, manifest_sha256=sha256(path / FILE))
    folder = written(
        tmp_path / "bench", record(changes=mine, date="2026-01-01"), record(median=2.0, changes=mine, date="2026-01-02")
    )
    (folder / "other.json").write_text("{}")
    found = collect([folder, path])
    assert [path.name for path in found.ignored] == ["other.json"] and len(found.records) == 2
    (only,) = candidates(found)
    assert only.p50 == pytest.approx(2.0) and only.record  # the newest counts
    (alone,) = candidates(collect([path.parent]))
    assert alone.record is None and alone.size_bytes == micro_bundle.size_bytes
    assert alone.precision == "fp32" and alone.drop == 0.0
    assert candidates(collect([write_zip(path)])) == [alone]
    older = record(changes=fresh(path.name, manifest_sha256="of an older export"))
    measured, unmeasured = candidates(collect([written(tmp_path / "old", older), path]))
    assert "another export of this bundle" in measured.notes[-1] and unmeasured.record is None


@pytest.mark.parametrize("times", [(1.0, 1.2, "regression"), (1.0, 0.8, "improvement"), (1.0, 1.005, "same")])
def test_comparing(times):
    old, new, says = times
    (pair,) = compare([record(median=old)], [record(median=new)]).pairs
    assert pair.verdict == says and pair.ratio == pytest.approx(new / old, rel=1e-3)
    assert pair.interval[0] < pair.ratio < pair.interval[1]


@pytest.mark.parametrize(
    ("old", "new", "limit", "fails"),
    [
        ((1.0, 0.01), (1.2, 0.01), 5.0, True),
        ((1.0, 0.01), (1.04, 0.01), 5.0, False),  # a difference, within what is allowed
        ((1.0, 0.15), (1.2, 0.15), 5.0, False),  # more than allowed, but the intervals overlap
        ((1.2, 0.01), (1.0, 0.01), 0.0, False),
    ],
)
def test_a_regression_fails_when_it_is_one(old, new, limit, fails):
    pairs = compare([record(median=old[0], spread=old[1])], [record(median=new[0], spread=new[1])]).pairs
    error = Gate(max_regression=limit).check((), pairs)[1]
    assert ("1.20x the old time" in str(error)) if fails else error is None


def test_what_has_no_counterpart_is_listed():
    found = compare([FP32, INT8], [FP32, record("openvino", "int8", 0.5, changes={"device": {"cpu": "other"}})])
    assert len(found.pairs) == 1 and len(found.unmatched) == 2
    assert all(
        "measured on different devices: board: CPU, 4 cores; board: other" in each or "other" in each
        for each in found.unmatched
    )


def test_the_comparing_command(tmp_path, capsys):
    old, new = written(tmp_path / "old", FP32, INT8), written(tmp_path / "new", record(median=1.2), INT8)
    assert report_main(["--compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert "regression" in out and "1.20x" in out and "same" in out
    assert report_main(["--compare", str(old), str(new), "--max-regression", "5%"]) == 6
    assert "1.20x the old time (limit: 5 % more)" in capsys.readouterr().err
    assert report_main(["--compare", str(old), str(new), "--max-regression", "25%", "--json"]) == 0
    assert [pair["verdict"] for pair in json.loads(capsys.readouterr().out)["pairs"]] == ["regression", "same"]
    assert report_main(["--compare", str(old), str(new), "--max-latency", "1ms"]) == 6
    assert report_main([str(old), "--max-latency", "0.9ms"]) == 6
    assert "p50 1.00 ms (limit: 0.9 ms)" in capsys.readouterr().err
    assert report_main([str(old), "--max-latency", "1.1 ms"]) == 0


def test_the_report_in_every_form(tmp_path, capsys):
    layers = record("openvino", "int8", 0.5, accuracy=JUDGED, layers=LAYERS, energy_mj={"package": 1.5})
    folder = str(
        written(
            tmp_path / "bench",
            FP32,
            layers,
            replace(FP32, stable=False, settings={**FP32.settings, "scan": "portable"}),
        )
    )
    assert report_main([folder]) == 0
    out = capsys.readouterr().out
    for text in (
        "ship openvino int8: 2.00x",
        "99.30 %",
        "-0.20",
        "40 %",
        "NOT STABLE",
        "1.5 mJ package",
        "0.495-0.505",
    ):
        assert text in out
    assert report_main([folder, "--markdown", "-"]) == 0
    assert "**ship openvino int8: 2.00x faster than onnx fp32 at -0.2 points**" in capsys.readouterr().out
    assert report_main([folder, "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert (rows[0]["target"], rows[0]["shipped"]) == ("openvino", "True")
    assert float(rows[0]["p50_ms"]) == 0.5 and float(rows[0]["speed"]) == pytest.approx(2.0)
    assert report_main([folder, "--json", "--html", str(tmp_path / "report.html")]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    assert group["ship"] == "evm_tiny-openvino-int8-64x64" and len(group["candidates"]) == 3
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("of_inference", "said"), [(0.95, False), (1.74, True), (0.5, True)])
def test_times_by_layer_that_do_not_add_up_are_named(of_inference, said):
    (group,) = grouped([Candidate.of_record(record(layers={**LAYERS, "of_inference": of_inference}))])
    assert any(f"{100 * of_inference:.0f} % of an inference" in text for text in remarks(group)) == said


def test_a_pipe_is_written_into_and_not_replaced(tmp_path):
    pipe, folder = tmp_path / "pipe", written(tmp_path / "bench", FP32)
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(pipe.read_text)
        assert report_main([str(folder), "--markdown", str(pipe)]) == 0
        assert pipe.is_fifo() and reader.result(5).startswith("# Latency report")


def test_hostile_names_stay_text(tmp_path, capsys):
    named = record(changes={"bundle": {"name": "=1+1", "model": HOSTILE, "target": HOSTILE}}, warnings=[HOSTILE])
    folder = str(written(tmp_path, named))
    assert report_main([folder]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert report_main([folder, "--markdown", "-"]) == 0
    markdown = capsys.readouterr().out
    assert "<script" not in markdown and "\x1b" not in markdown and "\\|\\`x\\`" in markdown
    assert report_main([folder, "--csv", "-"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["name"] == "'=1+1" and "\n" not in row["target"]
    assert report_main([folder, "--html", "-"]) == 0
    page = capsys.readouterr().out
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths to all values in JSON."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, item in items for place in [(*path, key), *places(item, (*path, key))]]
    return []


WHOLE = content("onnx", "int8", accuracy=JUDGED, layers=LAYERS, energy_mj={"package": 1.0})
WRONG = [None, True, -1, 1e400, float("nan"), 10**400, "", "text", [], {}, [[]], {"a": []}, HOSTILE]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(places(WHOLE)), st.sampled_from(WRONG))
def test_a_mutated_record_is_refused_or_reported(tmp_path_factory, place, value):
    """Whatever stands in a record, reading it gives a report or one error that names the file."""
    made = json.loads(json.dumps(WHOLE))
    parent = made
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps(made))
    assert report_main(
        [str(path), "--html", str(path.with_suffix(".html")), "--markdown", str(path.with_suffix(".md"))]
    ) in (0, 2)


@pytest.mark.parametrize("value", [float("nan"), 1e400, -1.0, 10**400, "1", True, None, [1]], ids=str)
@pytest.mark.parametrize(
    "place", [("samples_ms", 3), ("summary_ms", "p50"), ("interval_ms", 0), ("bundle", "artifact_bytes")], ids=str
)
def test_no_number_is_an_error_that_names_file_and_place(tmp_path, capsys, place, value):
    made = content()
    made[place[0]][place[1]] = value
    (tmp_path / "record.json").write_text(json.dumps(made))
    assert report_main([str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "record.json is a damaged record" in message and place[0] in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "nothing to report"),
        (["nowhere"], "nowhere does not exist"),
        (["{empty}"], "contains no records and no bundles"),
        (["{deep}"], "cannot be read"),
        (["--compare", "{old}", "{empty}"], "contains no records and no bundles"),
        (["{old}", "--compare", "{old}", "{old}"], "cannot be combined with paths"),
        (["--compare", "{old}", "{old}", "--max-regression", "much"], "--max-regression much"),
        (["--compare", "{old}", "{old}", "--html", "x"], "--html cannot be combined with --compare"),
        (["{old}", "--max-latency", "0ms"], "--max-latency 0ms"),
        (["{old}", "--max-latency", "-1"], "--max-latency -1: use a time"),
        (["{old}", "--max-regression", "5%"], "needs --compare"),
        (["{old}", "--max-drop", "nan"], "--max-drop nan"),
        (["{old}", "--last", "1"], "need --history"),
        (["--history"], "--history needs --db"),
        (["--history", "--db", "nowhere.db"], "nowhere.db does not exist"),
        (["--history", "--db", "{text}"], "cannot be used as a history"),
        (["{old}", "--db", "{text}"], "cannot be used as a history"),
        (["{old}", "--db", "{foreign}"], "a database of another program"),
        (["{old}", "--db", "{newer}"], "a history of version 2"),
        (["{old}", "--html", "-", "--json"], "only one of"),
        (["{old}", "--html", "{text}/x.html"], "cannot write"),
    ],
)
def test_bad_input(tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    paths = {name: tmp_path / name for name in ("empty", "old", "text", "foreign", "newer")}
    paths["empty"].mkdir()
    written(paths["old"], FP32)
    paths["text"].write_text("no database, but longer than the header of one" * 20)
    paths["deep"] = tmp_path / "deep.json"
    paths["deep"].write_text("[" * 100_000)
    for name, setup in (
        ("foreign", "CREATE TABLE t (x)"),
        ("newer", f"PRAGMA application_id = {history.APPLICATION_ID}"),
    ):
        with sqlite3.connect(paths[name]) as connection:
            connection.execute(setup)
            connection.execute("PRAGMA user_version = 2")
    try:
        code = report_main([flag.format(**paths) for flag in flags])
    except SystemExit as exit:  # argparse
        code = exit.code
    message = capsys.readouterr().err
    assert code == 2 and says in message and "Traceback" not in message


def test_amounts():
    assert [milliseconds(said) for said in ("20ms", "0.02s", "20", None)] == [20.0, 20.0, 20.0, None]
    assert [percent(said) for said in ("5%", "5", "0.5 %", None)] == [5.0, 5.0, 0.5, None]


def test_the_history(tmp_path, capsys):
    db = tmp_path / "history.db"
    runs = [record(median=ms, date=f"2026-11-{day}T00:00:00+00:00") for day, ms in ((20, 1.0), (21, 1.005), (22, 1.3))]
    folder = written(tmp_path / "bench", *runs, INT8)
    assert report_main([str(folder), "--db", str(db)]) == 0
    assert report_main([str(folder), "--db", str(db)]) == 0  # the same records again
    assert len(history.read(db)) == 4
    capsys.readouterr()
    assert report_main(["--history", "--db", str(db), "--target", "onnx"]) == 0
    out = capsys.readouterr().out
    assert "openvino" not in out and "▁▁█" in out
    assert [word for word in out.split() if word in ("same", "regression", "improvement")] == ["same", "regression"]
    assert report_main(["--history", "--db", str(db), "--target", "onnx", "--last", "2", "--json"]) == 0
    ((first, second),) = json.loads(capsys.readouterr().out)
    assert (first["change"], second["change"]["verdict"]) == (None, "regression")
    assert report_main(["--history", "--db", str(db), "--model", "nothing"]) == 2
    assert "has no records of this model and target" in capsys.readouterr().err
    assert [read.samples_ms for read in history.read(db, target="onnx")] == [run.samples_ms for run in runs]


def test_a_history_takes_many_writers(tmp_path):
    db = tmp_path / "history.db"
    records = [record(median=1.0 + i / 100) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda each: history.append(db, [each, records[0]]), records)) == 16
    assert len(history.read(db)) == 16


def test_a_history_takes_all_or_nothing(tmp_path):
    db = tmp_path / "history.db"
    history.append(db, [FP32])
    broken = replace(INT8, bundle={**INT8.bundle, "model": None})
    with pytest.raises(UsageError, match="cannot be used as a history"):
        history.append(db, [record(median=2.0), broken])
    assert len(history.read(db)) == 1


def test_a_damaged_history(tmp_path, capsys):
    db = tmp_path / "history.db"
    history.append(db, [FP32])
    with sqlite3.connect(db) as connection:
        connection.execute("UPDATE records SET content = '{'")
    with pytest.raises(UsageError, match=r"history\.db, row .* is damaged"):
        history.read(db)
    assert report_main(["--history", "--db", str(db)]) == 2  # it holds nothing else
    history.append(db, [INT8])
    damaged: list[EvmError] = []
    assert len(history.read(db, damaged=damaged)) == 1 == len(damaged)
    assert report_main(["--history", "--db", str(db)]) == 0
    assert "left out" in capsys.readouterr().err


def test_small_things():
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert (
        plain("a\x1b[0m\nb") == "a\N{REPLACEMENT CHARACTER}[0m\N{REPLACEMENT CHARACTER}b"
        and len(plain("x" * 999)) == 200
    )


@pytest.mark.slow
def test_the_bench_adds_to_a_history(micro_bundle, tmp_path, capsys, monkeypatch):
    db = tmp_path / "history.db"
    flags = [str(micro_bundle.path), "--limit", "1", "-q", "-o", str(tmp_path / "bench"), "--db"]
    assert bench_main([*flags, str(db)]) == 0
    (found,) = history.read(db)
    assert found.bundle["name"] == micro_bundle.path.name
    monkeypatch.setattr("evm_deploy.bench.run.bench", lambda *_: pytest.fail("measured for nothing"))
    assert bench_main([*flags, str(micro_bundle.path / FILE)]) == 2
    assert "cannot be used as a history" in capsys.readouterr().err


def ruled(records, *flags, tmp_path, capsys):
    code = report_main([str(written(tmp_path / "rec", *records)), *flags])
    return code, capsys.readouterr().err


SLOW_TORCH = record("torch", "fp32", 9.0)


@pytest.mark.parametrize(
    ("records", "flags", "code", "says"),
    [
        ([FP32, SLOW_TORCH], ["--max-latency", "2ms"], 0, "checked: evm_tiny-onnx-fp32-64x64"),
        ([FP32, SLOW_TORCH], ["--max-latency", "0.5ms"], 6, "p50 1.00 ms (limit: 0.5 ms)"),
        ([SLOW_TORCH], ["--max-latency", "20ms"], 2, "no measured bundle to check"),
        ([replace(FP32, stable=False)], ["--max-latency", "2ms"], 6, "not stable"),
        ([FP32, record("onnx", "int8", 9.0, accuracy={**JUDGED, "drop": 5.0})], ["--max-latency", "2ms"], 0, "-5.00"),
        ([FP32, record("onnx", "int8", 9.0)], ["--max-latency", "2ms"], 6, "onnx-int8"),
        ([FP32, record("onnx", "int8", 9.0)], ["--max-latency", "2ms", "--select", "onnx,fp32"], 0, "not selected"),
        ([FP32, record("openvino", "fp32", 9.0)], ["--max-latency", "2ms", "--select", "openvino"], 6, "openvino"),
        ([FP32], ["--max-latency", "2ms", "--select", "trt"], 2, "no measured bundle"),
        ([FP32], ["--select", "onnx"], 2, "--select needs"),
    ],
)
def test_a_latency_gate_checks_the_bundles_that_can_ship(records, flags, code, says, tmp_path, capsys):
    found, err = ruled(records, *flags, tmp_path=tmp_path, capsys=capsys)
    assert found == code and says in err


def test_a_latency_gate_needs_a_measurement(micro_bundle, tmp_path, capsys):
    assert report_main([str(micro_bundle.path), "--max-latency", "0.001ms"]) == 2
    assert "not measured" in capsys.readouterr().err
    folder = written(tmp_path, FP32)
    assert report_main([str(folder), str(micro_bundle.path), "--max-latency", "2ms"]) == 0
    assert "not measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "flags", "code", "says"),
    [
        ([FP32, INT8], [FP32], [], 0, ""),
        ([FP32, INT8], [FP32], ["--max-regression", "5%"], 6, "measured in OLD, missing in NEW"),
        ([FP32, INT8], [FP32], ["--max-regression", "5%", "--select", "onnx"], 0, "checked"),
        ([FP32, SLOW_TORCH], [FP32], ["--max-regression", "5%"], 0, "checked"),
        ([FP32, record("torch", "fp32", 1.0)], [FP32, SLOW_TORCH], ["--max-regression", "5%"], 0, "a baseline"),
        ([FP32], [replace(FP32, stable=False)], ["--max-regression", "5%"], 6, "not stable"),
        ([FP32], [record("onnx", "fp32", 1.5)], ["--max-regression", "5%"], 6, "1.50x"),
        ([FP32], [record(median=1.5, changes={"device": {"system": "Linux 7"}})], ["--max-regression", "5%"], 6, "1.5"),
        ([FP32], [record(median=1.5, changes={"device": {"memory_mb": 7990}})], ["--max-regression", "5%"], 6, "1.5"),
    ],
)
def test_a_comparison_with_a_limit(old, new, flags, code, says, tmp_path, capsys):
    folders = [str(written(tmp_path / name, *records)) for name, records in (("old", old), ("new", new))]
    assert report_main(["--compare", *folders, *flags]) == code
    assert says in capsys.readouterr().err


def test_one_damaged_file_of_a_folder_is_left_out_with_a_note(micro_bundle, tmp_path, capsys):
    folder = written(tmp_path / "bench", FP32)
    (folder / "cut.json").write_text('{"samples_ms": [1')
    (folder / "nan.json").write_text(json.dumps({**content(), "first_ms": float("nan")}))
    for name, change in (("bad", {"plan": 1}), ("old", {"schema_version": 99}), ("empty", None)):
        (folder / name).mkdir()
        kept = json.loads((micro_bundle.path / FILE).read_text())
        (folder / name / FILE).write_text(json.dumps({**kept, **change}) if change else "{")
    (folder / "closed").mkdir()
    (folder / "closed" / FILE).symlink_to("manifest.json")  # a loop
    assert report_main([str(folder), "--json"]) == 0
    shown = capsys.readouterr()
    assert [group["ship"] for group in json.loads(shown.out)] == ["evm_tiny-onnx-fp32-64x64"]
    for name in ("cut.json", "nan.json", "bad", "old", "empty"):
        assert f"{name}" in shown.err and "left out" in shown.err
    assert report_main([str(folder / "cut.json")]) == 2  # named itself
    assert report_main([str(folder / "bad")]) == 2


@pytest.mark.parametrize("flag", ["--html", "--csv", "--markdown", "--db"])
@pytest.mark.parametrize("place", ["a_file/x", "/proc/x", "a_folder"])
def test_outputs_are_refused_before_work(flag, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder").mkdir()
    monkeypatch.setattr("evm_deploy.report.collect.collect", lambda paths: pytest.fail("work was begun"))
    assert report_main([str(written(tmp_path / "rec", FP32)), flag, place]) == 2
    assert f"cannot write {place}" in capsys.readouterr().err


def test_an_output_replaces_no_input_and_no_other_output(tmp_path, capsys):
    folder = written(tmp_path / "rec", FP32)
    before = (folder / "0.json").read_bytes()
    assert report_main([str(folder / "0.json"), "--html", str(folder / "0.json")]) == 2
    assert (folder / "0.json").read_bytes() == before
    assert report_main([str(folder), "--html", str(tmp_path / "x"), "--csv", str(tmp_path / "x")]) == 2


def test_energy_is_given_in_millijoules(tmp_path, capsys):
    assert report_main([str(written(tmp_path, replace(FP32, energy_mj={"a ms": 1.0}))), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["candidates"][0]["energy"] == "a ms 1 mJ"
