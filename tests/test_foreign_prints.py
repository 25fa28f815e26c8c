"""Packages of others print when they are imported and run: the stdout of --json holds the result alone."""

from __future__ import annotations

import json

import pytest

from evm_deploy.commands.export import main
from evm_deploy.export import ExportPlan
from evm_deploy.export.many import specs
from evm_deploy.export.source import Source
from evm_deploy.model.factory import Factory

NETWORK = """
import torch
print("using the slow kernels")

class Network(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 1)
        print("made")

    def forward(self, x):
        print("run", x.shape)
        return super().forward(x)
"""


@pytest.mark.slow
def test_prints_of_a_network_stay_out_of_the_json(tmp_path, capfd, monkeypatch):
    (tmp_path / "printing_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    given = ["--model", "printing_network.py:Network", "--target", "onnx", "--imgsz", "8", "--json", "-q"]
    assert main(given) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["bundle"].endswith("network-onnx-fp32-8x8")
    assert all(text in err for text in ("using the slow kernels", "made", "run torch.Size"))


@pytest.mark.slow
def test_the_process_of_a_network_runs_its_exit_functions_once(tmp_path):
    code = "import atexit, pathlib, time\n\ndef last():\n    time.sleep(0.3)\n    print('x', file=open('{}', 'a'))\n\n"
    said = tmp_path / "said"
    (tmp_path / "parting_network.py").write_text(code.format(said) + "atexit.register(last)\n" + NETWORK)
    factory = Factory(f"{tmp_path}/parting_network.py:Network", imgsz=(8, 8))
    (spec,) = specs(Source(factory), [ExportPlan("onnx")])
    assert spec.outputs == ("output",)
    assert said.read_text() == "x\n"
