"""Packages of others print when they are imported and run: the stdout of --json holds the result alone."""

from __future__ import annotations

import json

from evm_deploy.commands.export import main

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


def test_prints_of_a_network_stay_out_of_the_json(tmp_path, capfd, monkeypatch):
    (tmp_path / "printing_network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    given = ["--model", "printing_network.py:Network", "--target", "onnx", "--imgsz", "8", "--json", "-q"]
    assert main(given) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["bundle"].endswith("network-onnx-fp32-8x8")
    assert all(text in err for text in ("using the slow kernels", "made", "run torch.Size"))
