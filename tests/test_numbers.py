"""Weights that break careless exports, a few of them; `python -m reliability.numbers` tries all, for every target."""

from __future__ import annotations

import pytest

from reliability import numbers

pytestmark = pytest.mark.slow

FEW = [
    ("nan weight", "onnx:fp32"),
    ("inf weight", "coreml:fp16"),
    ("A_logs 95", "openvino:fp32"),
    ("negative variance", "onnx:fp32"),
    ("weight over fp16", "onnx:fp16"),
    ("dt bias +-30", "onnx:fp32"),
    ("A_logs +-20", "openvino:fp32"),
    ("activation over fp16", "openvino:fp16"),
]


@pytest.mark.parametrize(("name", "form"), FEW)
def test_refused_or_exact(name, form, tmp_path):
    outcome, said = numbers.attempt(numbers.CASES[name], form, tmp_path)
    assert outcome in numbers.expected(numbers.CASES[name], form), said


def test_a_refusal_that_does_not_name_the_tensor_is_noticed(tmp_path, monkeypatch):
    write = numbers.write
    monkeypatch.setattr(numbers, "write", lambda case, path: f"another.{write(case, path)}")
    with pytest.raises(AssertionError, match=r"refused without naming another\.layers\.0.*holds NaN"):
        numbers.attempt(numbers.CASES["nan weight"], "onnx:fp32", tmp_path)
