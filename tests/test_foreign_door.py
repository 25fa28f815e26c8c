"""evm-export --model: a network of a user's own code, from the command line."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from evm_deploy import cli
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.errors import EvmError
from evm_deploy.model.factory import Factory
from evm_deploy.model.foreign.door import network_of

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
HOSTILE = """
import ctypes, os, sys
import torch
from torch import nn


def leaves():
    sys.exit(7)


def endless():
    return endless()


def crash():
    ctypes.string_at(0)


def gone():
    os._exit(0)


def asks():
    return input()


class Leaving(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 1)

    def forward(self, x):
        sys.exit(9)


class Later(Leaving):
    def forward(self, x):
        self.runs = getattr(self, "runs", 0) + 1
        if self.runs > 2 and not torch.compiler.is_compiling():
            raise ValueError("dark")
        return nn.Conv2d.forward(self, x)


class Loud(Leaving):
    def forward(self, x):
        print("hello from forward")
        return nn.Conv2d.forward(self, x)


def loud():
    print("hello", flush=True)
    os.write(1, b"from C")
    torch.set_default_dtype(torch.float64)
    torch.relu = None
    module = Loud()
    return module.float()


def video():
    return nn.Conv3d(3, 4, 1)


def text():
    return nn.Embedding(9, 4)


class Conditioned(nn.Conv2d):
    def forward(self, x, step):
        return super().forward(x)


def grey():
    return nn.Conv2d(1, 4, 3)


if __name__ == "__main__":
    os.abort()
"""


KERNELS = """
import triton
from torch import nn


@triton.jit
def spin_kernel(x, y, BLOCK: int):
    pass


class Net(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 1)
    def forward(self, x):
        spin_kernel[(1,)](x, x, BLOCK=4)
        return x
"""
CONVOLUTION = {"in_channels": 3, "out_channels": 4, "kernel_size": 1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "someones_net.py").write_text(CODE)
    (tmp_path / "needs_more.py").write_text("import no_such_package_anywhere\n")
    (tmp_path / "hostile.py").write_text(HOSTILE)
    (tmp_path / "kernels.py").write_text(KERNELS.strip())
    (tmp_path / "no_python.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("someones_net", "needs_more", "hostile", "kernels"):
        sys.modules.pop(name, None)


def run(*flags):
    return cli.export_main(["--target", "onnx", "--imgsz", "32", "-q", *flags])


@pytest.mark.slow
def test_a_file_and_weights_become_a_bundle(folder, capsys):
    loaded, path = set(sys.modules), list(sys.path)
    module = network_of(Factory("someones_net:Tiny", arguments={"classes": 5}, imgsz=(32, 32))).module
    sys.modules.pop("someones_net")
    sys.path[:] = path
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
    assert len(manifest.parity["scans"]) == 2
    assert sys.path == path and not {"someones_net", "mamba_ssm"} & set(sys.modules) - loaded


@pytest.mark.slow
def test_a_package_its_own_weights_and_names(folder, capsys):
    assert run("--model", "someones_net:build", "--model-arg", "width=8", "--outputs", "scores", "--json") == 0
    manifest = json.loads(capsys.readouterr().out)["manifest"]
    assert [each["name"] for each in manifest["outputs"]] == ["scores"]
    assert any("with its own weights" in note for note in manifest["notes"])


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ({"where": "someones_net"}, "names no factory"),
        ({"where": "absent.py:f"}, "the file absent.py does not exist"),
        ({"where": "absent_package.net:f"}, "cannot be imported: ModuleNotFoundError: No module named"),
        ({"where": "needs_more.py:f"}, "No module named 'no_such_package_anywhere' ("),
        ({"where": "someones_net.py:absent"}, "someones_net has no absent"),
        ({"where": "someones_net.py:build"}, "missing a required argument: 'width'"),
        (
            {"where": "someones_net.py:build", "arguments": {"wide": 3}},
            "build(width) cannot be called with {'wide': 3}",
        ),
        ({"where": "someones_net.py:broken"}, "someones_net.py:broken fails: RuntimeError"),
        ({"where": "someones_net.py:number"}, "is a int, not a function, class or module"),
        ({"where": "someones_net.py:Tiny", "weights": "w.pth"}, "no tensor of it is named mamba.out_proj.weight"),
        ({"where": "hostile.py:leaves"}, "hostile.py:leaves fails: SystemExit: 7 ("),
        ({"where": "hostile.py:endless"}, "fails: RecursionError: maximum recursion depth exceeded"),
        (
            {"where": "hostile.py:Leaving", "imgsz": (32, 32)},
            "an input [1, 3, 32, 32]: SystemExit: 9 (",
        ),
        ({"where": "hostile.py:video"}, "to have 3 channels, but got 1 channels"),
        ({"where": "hostile.py:text"}, "Expected tensor for argument #1 'indices' to have one of the following"),
        (
            {"where": "hostile.py:Conditioned", "arguments": CONVOLUTION},
            "missing 1 required positional argument: 'step'",
        ),
        ({"where": "hostile.py:grey"}, "expected input[1, 3, 224, 224] to have 1 channels, but got 3 channels"),
        ({"where": "kernels.py:Net"}, "the Triton kernel spin_kernel has no form for the CPU; "),
        ({"where": "kernels.py:Net"}, "kernels.py:14 calls it"),
        ({"where": "no_python.py:f"}, "no_python.py:f fails: SyntaxError"),
        ({"where": "timm:hf-hub:a/b"}, "names no factory"),
        ({"where": "timm:x", "arguments": {"pretrained": True}}, "nothing is downloaded"),
    ],
)
def test_bad_input_ends_in_a_message(factory, message, folder):
    torch.save({"state_dict": {"stem.bias": torch.zeros(9)}}, folder / "w.pth")
    with pytest.raises(EvmError) as error:
        network_of(Factory(**factory))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "someones_net.py:build", "--model-arg", "width=open('x')"), "--model-arg \"width=open('x')\""),
        (("--model", "someones_net.py:build", "--model-arg", "**{'width': 8}"), "cannot be read"),
        (("--outputs", "a"), "--outputs needs --model"),
        (("--model", "someones_net.py:Tiny", "--task", "dance"), "dance"),
        (("--model", "someones_net.py:build"), "missing a required argument: 'width'"),
        (("--model", "hostile.py:crash"), "hostile.py:crash: its code ended the process with signal SIGSEGV"),
        (
            ("--model", "hostile.py:gone"),
            "its code ended the process with exit code 0, in step 'load'",
        ),
        (("--model", "hostile.py:asks"), "hostile.py:asks fails: EOFError: EOF when reading a line"),
        (("--model", "hostile.py:Later"), "hostile.py:Later: the export fails: ValueError: dark ("),
    ],
)
def test_bad_flags_and_crashes_end_in_a_message(flags, message, folder, capfd):
    assert run(*flags) in (1, 2)
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.slow
def test_code_that_prints_and_changes_torch_spoils_nothing(folder, capfd):
    before = torch.get_default_dtype()
    assert run("--model", "hostile.py:loud", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["manifest"]["parity"]["ok"] and torch.get_default_dtype() == before
    assert "from C" in err and "hello from forward" in err


def test_a_file_of_a_package_and_a_file_with_the_name_of_another(folder):
    (folder / "theirs").mkdir()
    (folder / "theirs" / "layers.py").write_text("from torch import nn\nLayer = nn.Conv2d\n")
    (folder / "theirs" / "net.py").write_text("from .layers import Layer\ndef make(): return Layer(3, 4, 1)\n")
    (folder / "onnx.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 5, 1)\n")
    import onnx

    assert network_of(Factory("theirs/net.py:make", imgsz=(8, 8))).module.out_channels == 4
    assert network_of(Factory("onnx.py:make", imgsz=(8, 8))).module.out_channels == 5
    assert sys.modules["onnx"] is onnx
    (folder / "torch").mkdir()
    (folder / "torch" / "net.py").write_text("from .layers import Layer\ndef make(): return Layer(3, 4, 1)\n")
    with pytest.raises(EvmError, match=r"torch/net\.py:make cannot be imported"):
        network_of(Factory("torch/net.py:make"))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("theirs", "_own_onnx")]:
        del sys.modules[name]


@pytest.mark.slow
def test_a_dry_run_of_own_code(folder, capfd):
    assert run("--model", "someones_net.py:Tiny", "--dry-run", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["Weights"] == "the module's own" and "no file was given" in facts["Note"]
    assert run("--model", "someones_net.py:build", "--dry-run") == 2
    assert "missing a required argument" in capfd.readouterr().err
