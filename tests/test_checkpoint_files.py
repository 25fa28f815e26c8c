"""Files given as a checkpoint: recognised by content, whatever their names are, and converted if they need code."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import tarfile
import time
import types
import zipfile

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save as to_safetensors
from safetensors.torch import save_file

from evm_deploy import cli
from evm_deploy.commands.convert import main as convert_main
from evm_deploy.errors import CheckpointError
from evm_deploy.model.checkpoint_file import read_content
from evm_deploy.model.families import load_checkpoint
from tests.test_weight_sets import BUFFER, EMA, RAW, holds

KEYS = list(EMA)


def zipped(**files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def saved(content, save=torch.save, **options):
    stream = io.BytesIO()
    save(content, stream, **options)
    return stream.getvalue()


def tarred():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pth"))
    return stream.getvalue()


GOOD = saved(EMA)
LEGACY = saved(EMA, _use_new_zipfile_serialization=False)
SAFE = to_safetensors(EMA)


@pytest.mark.parametrize("data", [GOOD, LEGACY, SAFE], ids=["zip", "legacy", "safetensors"])
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model_best.tar", "A.PTH", "a.Pth.Tar", "none", "v1.5", "epoch=1-acc=0.9.ckpt", "a.onnx"],
)
def test_the_content_decides_not_the_name(data, name, tmp_path):
    (tmp_path / name).write_bytes(data)
    module, spec = load_checkpoint(tmp_path / name)
    assert holds(module.state_dict(), EMA)
    known = ("pytorch_model", "model_best", "A", "a", "none", "v1.5", "epoch=1-acc=0.9", "a.onnx")
    assert spec.name in known


ALIEN = {
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
        "a git-lfs pointer(?s:.*)git lfs pull",
    ),
    "git-lfs of Windows": (b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\r\n", "a git-lfs pointer"),
    "HTML": (b"\n <!DOCTYPE HTML><html>log in", "a page of HTML"),
    "bare HTML": (b"\xef\xbb\xbf<html><body>", "a page of HTML"),
    "XML": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an XML file"),
    "JSON": (b'{"error": "Repository not found"}', "JSON text, and no index"),
    "text": (b"Entry not found", "plain text"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(9000), "zero bytes"),
    "noise": (bytes(range(256)), "unknown file type"),
    "cut": (GOOD[: len(GOOD) // 2], "truncated or damaged"),
    "cut legacy": (LEGACY[: len(LEGACY) // 2], "truncated or damaged"),
    "cut safetensors": (SAFE[: len(SAFE) // 2], "is damaged"),
    "numpy": (saved(np.zeros(3), lambda value, to: np.save(to, value)), "a numpy array"),
    "numpy archive": (saved(np.zeros(3), lambda value, to: np.savez(to, a=value)), "an archive of numpy arrays"),
    "zip": (zipped(model__pth=b"x"), "a zip archive that torch did not write; it holds model.pth"),
    "empty zip": (zipped(), "it holds nothing"),
    "bundle": (zipped(manifest__json=b"{}"), "a bundle: already exported"),
    "tar": (tarred(), "a tar archive"),
    "gzip": (gzip.compress(GOOD[:99]), "a gzip archive"),
    "ONNX": (onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])).SerializeToString(), "an ONNX model"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
    "TorchScript": (saved(torch.jit.script(torch.nn.Linear(2, 3)), torch.jit.save), "TorchScript(?s:.*)convert"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write(?s:.*)convert"),
    "old pickle": (pickle.dumps({"a": 1}, protocol=0), "a pickle that torch.save did not write"),
    "pickle of numpy": (pickle.dumps({"a": np.zeros(3)}), "a pickle that torch.save did not write"),
    "objects": (saved({"a": argparse.Namespace()}), "needs code to load .argparse.Namespace.(?s:.*)convert"),
    "old objects": (saved({"a": argparse.Namespace()}, _use_new_zipfile_serialization=False), "needs code to load"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("name", ALIEN)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(name, suffix, tmp_path):
    data, message = ALIEN[name]
    (tmp_path / f"a{suffix}").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_checkpoint(tmp_path / f"a{suffix}")
    assert ("--trust" in str(refused.value)) == ("convert" in message or "pickle" in name or "objects" in name)


def test_paths_that_are_no_file(tmp_path):
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "absent": "does not exist\n  give the path of a checkpoint file",
        "timm:resnet18": "does not exist\n  a network of Python code:  evm-export --model .*timm:resnet18",
        "run 12:30.pth": "does not exist\n  give the path of a checkpoint file",
        "a\0b": "does not exist",
        "link.pth": "is a link to a file that does not exist",
        "pipe": "device or pipe",
        "x" * 300: "File name too long",
        ".": "is a directory",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)
    (tmp_path / "net.py").write_text("def make(): ...")
    with pytest.raises(CheckpointError, match=r"is Python code, .*\n.*evm-export --model .*net.py:FACTORY"):
        load_checkpoint(tmp_path / "net.py")
    for content, message in ((".metadata", "FSDP"), ("zero_to_fp32.py", "DeepSpeed"), ("a.bin", "such as a.bin")):
        (tmp_path / content).touch()
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)
        (tmp_path / content).unlink()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_any_shard_stands_for_all(suffix, tmp_path):
    names = [f"model-{number:05d}-of-00003.{suffix}" for number in (1, 2, 3)]
    save = save_file if suffix == "safetensors" else torch.save
    for part, name in enumerate(names[:2]):
        save({key: EMA[key] for key in KEYS[part::3]}, tmp_path / name)
    with pytest.raises(CheckpointError, match=re.escape(f"1 are not beside it: {names[2]}")):
        load_checkpoint(tmp_path / names[0])
    save({key: EMA[key] for key in KEYS[2::3]}, tmp_path / names[2])
    index = tmp_path / f"model.{suffix}.index.json"
    digests = set()
    for given in (*names, index.name):
        index.write_text(json.dumps({"weight_map": {key: names[place % 3] for place, key in enumerate(KEYS)}}))
        module, spec = load_checkpoint(tmp_path / given)
        assert holds(module.state_dict(), EMA) and spec.name == "model"
        assert "joined from 3 shards" in spec.notes
        digests.add(spec.checkpoint["sha256"])
    assert len(digests) == 1
    save(EMA, tmp_path / names[2])
    with pytest.raises(CheckpointError, match="two shards hold the tensor"):
        load_checkpoint(tmp_path / names[0])


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": "../a.bin"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": [1]}',
        '{"a":' * 9999,
    ],
)
def test_an_index_cannot_lead_elsewhere(index, tmp_path):
    (tmp_path / "m.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"outside its folder|no index"):
        load_checkpoint(tmp_path / "m.index.json")


@pytest.mark.parametrize("data", [GOOD, SAFE], ids=["zip", "safetensors"])
@pytest.mark.parametrize("name", ["n" * 250, "名" * 80, os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff" * 120)])
def test_a_name_that_bundles_cannot_have_is_changed_aloud(data, name, tmp_path):
    (tmp_path / f"{name}.pt").write_bytes(data)
    _, spec = load_checkpoint(tmp_path / f"{name}.pt")
    assert len(spec.name.encode("utf-8")) <= 96
    assert any("too long, or not UTF-8" in note and spec.name in note for note in spec.notes)
    assert json.dumps(spec.checkpoint).encode("utf-8")
    assert convert(tmp_path / f"{name}.pt", "-q") == 0
    (made,) = tmp_path.glob("*.safetensors")
    assert load_checkpoint(made).spec.name == spec.name
    assert convert(tmp_path / f"{name}.pt", "-q", "-o", tmp_path / f"{'n' * 250}.safetensors") == 2


def convert(*flags):
    return convert_main([str(flag) for flag in flags])


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo it runs; touch {self.path}",)


@pytest.mark.slow
def test_code_runs_with_trust_alone(tmp_path, capsys):
    file, owned = tmp_path / "evil.pth", tmp_path / "owned"
    torch.save({"state_dict": RAW, "state_dict_ema": EMA, "x": Payload(owned)}, file)
    assert convert(file) == 2 and not owned.exists()
    capsys.readouterr()
    assert convert(file, "--trust", "-q") == 0 and owned.exists()
    said = capsys.readouterr()
    assert "WARNING: --trust runs the code" in said.err and "it runs" not in said.out
    assert "'state_dict_ema' (averaged); also in the file: 'state_dict' (raw)" in said.out
    owned.unlink()
    module, spec = load_checkpoint(tmp_path / "evil.safetensors")
    assert holds(module.state_dict(), EMA) and spec.checkpoint["weights"] == "ema"
    assert spec.checkpoint["origin"]["file"] == "evil.pth" and not owned.exists()
    with pytest.raises(CheckpointError, match="has no raw weights"):
        load_checkpoint(tmp_path / "evil.safetensors", weights="raw")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a b (best).pth", "x'); touch owned; #.pth", "-x.pth", "$(touch owned).pth", "`id`.pth"]
)
def test_the_hint_works_as_it_is_printed_from_any_folder(name, tmp_path, monkeypatch):
    """A shell splits it into arguments, with which the command runs here: it is imported already."""
    torch.save({"model_ema": EMA, "model": RAW, "args": argparse.Namespace()}, tmp_path / name)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(tmp_path / name)
    line = str(refused.value).rpartition("once:  ")[2]
    words = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    arguments = subprocess.run(line.replace("evm-export", words, 1), shell=True, check=True, capture_output=True).stdout
    assert cli.export_main(json.loads(arguments)) == 0
    assert [*elsewhere.iterdir()] == [] and not (tmp_path / "owned").exists()
    (converted,) = tmp_path.glob("*.safetensors")
    assert holds(load_checkpoint(converted)[0].state_dict(), EMA)


def network_of(state, module):
    """A module with these tensors, of a class in a package that the converter does not have."""
    root = module.Net()
    for key, value in state.items():
        *path, last = key.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        if BUFFER.search(key):
            at.register_buffer(last, value)
        else:
            at.register_parameter(last, torch.nn.Parameter(value))
    return root


@pytest.fixture
def gone(monkeypatch):
    module = types.ModuleType("a_package_that_is_gone")
    module.Net = type("Net", (torch.nn.Module,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.slow
def test_pickled_networks_convert_without_their_package(gone, tmp_path):
    net = network_of(EMA, gone)
    cycle = {"net": net}
    cycle["self"] = [cycle] * 3
    arrays = {"model": {key: value.numpy() for key, value in EMA.items()}}
    files = {
        "ultralytics.pt": saved({"model": network_of(EMA, gone), "ema": None, "train_args": argparse.Namespace()}),
        "whole.pt": saved(net),
        "cycle.pt": saved(cycle),
        "detectron2.pkl": pickle.dumps(arrays, protocol=2),
        "big endian.pkl": pickle.dumps(
            {k: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for k, v in EMA.items()}
        ),
        "flat.pt": saved({**EMA, "best_acc": np.float64(0.5)}),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert convert(tmp_path / name, "--trust", "-q") == 0, name
        assert holds(load_checkpoint((tmp_path / name).with_suffix(".safetensors"))[0].state_dict(), EMA), name


class Dies:
    def __init__(self, call, *given):
        self.call, self.given = call, given

    def __reduce__(self):
        return self.call, self.given


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "reason"), [(Dies(eval, "1/0"), "ZeroDivisionError"), (Dies(os._exit, 3), "code 3")])
def test_code_that_fails_is_one_message(dies, reason, tmp_path, capsys):
    torch.save({"model": EMA, "x": dies}, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", "--trust") == 2
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_convert_replaces_nothing_by_itself(tmp_path, capsys):
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(EMA, file, metadata={"evm_deploy": json.dumps({"imgsz": 64})})
    out.write_text("mine")
    for flags in (
        (file, "-o", out),
        (file, "-o", file, "--force"),
        (file, "-o", tmp_path / "b.pth"),
        (tmp_path / "no",),
    ):
        assert convert(*flags) == 2
    assert convert(file, "--drop", ",") == 2 and convert(file, "-o", "/proc/b.safetensors") == 2
    assert out.read_text() == "mine" and file.read_bytes() == to_safetensors(
        EMA, {"evm_deploy": json.dumps({"imgsz": 64})}
    )
    assert convert(file) == 0 and load_checkpoint(tmp_path / "a-converted.safetensors").spec.defaults == {"imgsz": 64}
    capsys.readouterr()
    assert cli.export_main(["convert", str(file), "-o", str(out), "--force", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["saved"] == str(out)
    assert holds(load_checkpoint(out)[0].state_dict(), EMA)


def test_the_converters_process_ends_with_its_parent(tmp_path):
    command = [sys.executable, "-m", "evm_deploy.model.trusted", str(tmp_path / "a.pth"), str(tmp_path / "out")]
    torch.save({"x": Dies(time.sleep, 600)}, tmp_path / "a.pth")
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(3)
        child.stdin.close()
        assert child.wait(30) == 130


def test_a_forged_origin_is_none(tmp_path):
    for origin in (
        "[]",
        "{",
        '{"weights": "ema"}',
        json.dumps(dict.fromkeys(("file", "sha256", "container", "weights"), "x")),
    ):
        save_file(EMA, tmp_path / "a.safetensors", metadata={"evm_deploy_origin": origin})
        assert read_content(tmp_path / "a.safetensors").origin == {}
