"""evm-report of a sweep: matrix, front and failures first, and readable with 500 records."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from evm_deploy import cli
from evm_deploy.errors import ToolchainError
from evm_deploy.report.candidate import Candidate
from evm_deploy.report.overview import SHADES, Overview, overview
from evm_deploy.report.page import page
from evm_deploy.report.table import grouped
from evm_deploy.sweep.folder import RunFolder
from tests.records import JUDGED, record

FORMS = [("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "int8"), ("coreml", "fp16")]


def measured(model: int, form: tuple[str, str], board: int, p50: float, top1: float):
    made = record(*form, p50, accuracy={**JUDGED, "top1": top1})
    bundle = {**made.bundle, "model": f"evm_{model}", "name": f"evm_{model}-{'-'.join(form)}"}
    return replace(made, bundle=bundle, device={**made.device, "at": f"board{board}"})


def seen(records, failed=()) -> tuple[list, Overview]:
    groups = grouped([Candidate.of_record(each) for each in records])
    return groups, overview(groups, failed)


def test_the_front_of_a_board_is_what_no_other_one_beats():
    figures = {("onnx", "fp32"): (4.0, 0.9), ("onnx", "int8"): (1.0, 0.7), ("openvino", "fp32"): (3.0, 0.9)}
    figures[("openvino", "int8")] = (2.0, 0.6)
    records = [measured(0, form, 0, *figure) for form, figure in figures.items()]
    _, found = seen([*records, measured(0, ("onnx", "fp32"), 1, 9.0, 0.9)])
    assert found.boards == ("board0, t1 b1", "board1, t1 b1")
    assert [each.board for each in found.fronts] == list(found.boards)
    assert found.fronts[0].lines == (
        "1.00 ms  70.00 %  evm_0 onnx int8, 64x64",
        "3.00 ms  90.00 %  evm_0 openvino fp32, 64x64",
    )
    cells = {line.label: line.cells for line in found.lines}
    assert cells["evm_0 openvino int8, 64x64"][1] is None and not cells["evm_0 openvino int8, 64x64"][0].front
    shades = [cells[f"evm_0 {' '.join(form)}, 64x64"][0].shade for form in sorted(figures, key=figures.get)]
    assert shades[0] == 0 and shades[-1] == SHADES - 1 and shades == sorted(shades)


@pytest.fixture(scope="module")
def many():
    return [
        measured(model, form, board, 1.0 + model + i * 0.1 + board * 0.3, 0.9 + model * 0.01 - i * 0.001)
        for model in range(10)
        for i, form in enumerate(FORMS)
        for board in range(10)
    ]


def test_500_records_stay_readable(many):
    groups, found = seen(many, [("export evm_7 onnx int8", "int8 is not accurate enough <script>")])
    html = page(groups, found)
    assert len(html) < 500_000
    assert (len(found.lines), len(found.boards), len(found.fronts)) == (50, 10, 10)
    body = html[: html.index("<details><summary>evm_0")]
    assert body.count("<tr>") == 51 and len(re.findall(r'<td class="h\d', body)) == 500  # all on the first table
    assert "50 candidates on 10 boards, 1 failed" in body and "not accurate enough &lt;script&gt;" in body
    assert html.count("<details><summary>") == len(groups) == 100  # the rest is folded
    assert "<details><summary>evm" not in page(groups)


def test_a_sweep_is_reported_with_its_failures(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        planned = {"key": "k", "kind": "export", "title": "evm_1 onnx int8", "after": []}
        folder.write("plan.json", [planned])
        folder.fail("k", "evm_1 onnx int8", ToolchainError("no onnx here", "install it"))
    for board in (0, 1):
        path = tmp_path / "run" / "records" / f"board{board}" / "r.json"
        measured(0, FORMS[0], board, 1.0 + board, 0.9).write(path)
    assert cli.report_main([str(tmp_path / "run"), "--html", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"evm_0 onnx fp32, 64x64 +90.00 % +\*1.00 +\*2.00", out)
    assert "Failed   export evm_1 onnx int8: no onnx here; install it" in out and out.count("Verdict") == 2
    assert "no onnx here" in Path(tmp_path / "r.html").read_text()
    assert cli.report_main([str(tmp_path / "run"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_a_sweep_of_failures_alone_is_reported(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.write("plan.json", [{"key": "k", "kind": "export", "title": "evm_1", "after": []}])
    assert cli.report_main([str(tmp_path / "run")]) == 2
    assert "contains no records and no bundles" in capsys.readouterr().err
    folder.fail("k", "evm_1", ToolchainError("no onnx here"))
    assert cli.report_main([str(tmp_path / "run")]) == 0
    assert "Failed   export evm_1: no onnx here" in capsys.readouterr().out
