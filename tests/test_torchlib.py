"""The list of onnxscript's functions for torch's exporter: the same functions as onnxscript's own, none parsed."""

from __future__ import annotations

import pytest
from torch.onnx._internal._lazy_import import onnxscript_apis

from evm_deploy.export.hub.torchlib import translations, unparsed_torchlib


def test_the_functions_are_onnxscripts_own():
    own = [(each.qualified_name, each.function, each.is_complex) for each in onnxscript_apis.get_torchlib_ops()]
    ours = [(each.qualified_name, each.function, each.is_complex) for each in translations()]
    assert ours == own and len(ours) > 400


def test_no_function_is_parsed(monkeypatch):
    def parse(self):
        raise AssertionError(f"{self.name} is parsed")

    monkeypatch.setattr("onnxscript.values.TracedOnnxFunction.function_ir", property(parse))
    with pytest.raises(AssertionError, match="is parsed"):
        onnxscript_apis.get_torchlib_ops()
    with unparsed_torchlib():
        assert onnxscript_apis.get_torchlib_ops is translations and onnxscript_apis.get_torchlib_ops()


def test_afterwards_torch_has_onnxscripts_list():
    before = onnxscript_apis.get_torchlib_ops
    with pytest.raises(ZeroDivisionError), unparsed_torchlib():
        1 / 0  # noqa: B018
    assert onnxscript_apis.get_torchlib_ops is before
