"""evm-export --model: a network of a user's own code, from the command line."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from evm_deploy import cli
from evm_deploy.bundle.bundle import open_bundle

CODE = """
import torch
from torch import nn
from mamba_ssm import Mamba


class Tiny(nn.Module):
    def __init__(self, width=8, classes=3):
        super().__init__()
        self.stem, self.mamba = nn.Conv2d(3, width, 8, stride=8), Mamba(width, d_state=4)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.mamba(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def build(width):
    return Tiny(width)


def broken():
    return torch.zeros(2) @ torch.zeros(3)


number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "someones_net.py").write_text(CODE)
    (tmp_path / "needs_more.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("someones_net", "needs_more"):
        sys.modules.pop(name, None)


def run(*flags):
    return cli.export_main(["--target", "onnx", "--imgsz", "32", "-q", *flags])


def test_a_file_and_weights_become_a_bundle(folder, capsys):
    from evm_deploy.model.foreign.door import network_of

    path = list(sys.path)
    module = network_of("someones_net:Tiny", arguments={"classes": 5}, imgsz=(32, 32)).module
    torch.save({"state_dict": {f"module.{k}": v for k, v in module.state_dict().items()}}, folder / "w.pth")
    flags = (
        "w.pth",
        "--model",
        "someones_net.py:Tiny",
        "--model-arg",
        "width=8, classes=5",
        "--task",
        "classification",
    )
    assert run(*flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    manifest = open_bundle(found["bundle"]).manifest
    assert manifest.name == "tiny-onnx-fp32" and manifest.model["num_classes"] == 5
    assert manifest.model["checkpoint"]["file"] == "w.pth" and "made by someones_net.py:Tiny" in manifest.notes
    assert len(manifest.parity["scans"]) == 2 and sys.path == path


def test_a_package_its_own_weights_and_names(folder, capsys):
    assert run("--model", "someones_net:build", "--model-arg", "width=8", "--outputs", "scores", "--json") == 0
    manifest = json.loads(capsys.readouterr().out)["manifest"]
    assert [each["name"] for each in manifest["outputs"]] == ["scores"]
    assert any("with its own weights" in note for note in manifest["notes"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "someones_net"), "names no factory"),
        (("--model", "absent.py:f"), "the file absent.py does not exist"),
        (("--model", "absent_package.net:f"), "cannot be imported: ModuleNotFoundError: No module named"),
        (("--model", "needs_more.py:f"), "No module named 'no_such_package_anywhere' ("),
        (("--model", "someones_net.py:absent"), "someones_net has no absent"),
        (("--model", "someones_net.py:build"), "missing a required argument: 'width'"),
        (("--model", "someones_net.py:build", "--model-arg", "width=open('x')"), "--model-arg \"width=open('x')\""),
        (("--model", "someones_net.py:broken"), "someones_net.py:broken fails: RuntimeError"),
        (("--model", "someones_net.py:number"), "is a int, not a function, class or module"),
        (("--model", "someones_net.py:Tiny", "w.pth"), "no tensor of it is named mamba.out_proj.weight"),
        (("--outputs", "a"), "--outputs needs --model"),
        (("--model", "someones_net.py:Tiny", "--task", "dance"), "dance"),
    ],
)
def test_bad_input_ends_in_a_message(flags, message, folder, capsys):
    torch.save({"state_dict": {"stem.bias": torch.zeros(9)}}, folder / "w.pth")
    assert run(*flags) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
