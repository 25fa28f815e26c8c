"""evm-bench --matrix: every form measured and evaluated, nothing done twice, one failure stops nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evm_deploy import cli
from evm_deploy.bench import device, worker
from evm_deploy.bench.record import Record, Settings
from evm_deploy.cli import bench_main
from evm_deploy.demo import CHECKPOINT, digits, write_images
from evm_deploy.errors import CheckpointError, ToolchainError, UsageError
from evm_deploy.export.source import Source
from evm_deploy.model.families import load_checkpoint
from evm_deploy.sweep import float_network
from evm_deploy.sweep.folder import RunFolder
from evm_deploy.sweep.forms import FORMS, Form, parse_forms
from evm_deploy.sweep.matrix import Matrix, run_matrix
from evm_deploy.sweep.status import status
from tests.records import record as make_record

pytestmark = pytest.mark.usefixtures("own_cache")
QUICK = ["--threads", "1", "--limit", "20"]


class Ended:
    """Notes the kind and the form of each unit that was done."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, outcome, ended, total):
        _, target, precision, *_ = outcome.unit.title.replace(",", "").split()
        self.seen.append((outcome.unit.kind, f"{target} {precision}"))


def test_forms_are_those_of_targets():
    assert len(parse_forms(FORMS)) == 5
    assert parse_forms("ort,onnx:fp32, coreml") == (Form("onnx", "fp32"), Form("coreml", "fp16"))
    for text, said in (("onnx:int4", "fp32"), ("onyx:fp32", "onnx"), ("torch:int8", "torch:fp32"), ("", "choose")):
        with pytest.raises(UsageError, match=said):
            parse_forms(text)


@pytest.mark.slow
def test_the_forms_of_the_demo_are_compared_and_kept(tmp_path, capsys):
    """In a folder that has other files, too; it is one of a sweep then."""
    (tmp_path / "notes.txt").write_text("mine")
    forms = parse_forms("torch,onnx:fp32,onnx:int8")
    matrix = Matrix(CHECKPOINT, forms, (Settings(1, 1, limit_s=20.0),), tmp_path, None, "demo", "demo")
    first, again = Ended(), Ended()
    outcome = run_matrix(matrix, first)
    records = {each.bundle["target"] + each.bundle["precision"]: each for each in map(Record.read, outcome.records)}
    assert list(records) == ["torchfp32", "onnxfp32", "onnxint8"] and not outcome.failed
    assert first.seen.count(("measure", "onnx int8")) == 1 and ("evaluate", "onnx fp32") in first.seen
    assert ("evaluate", "onnx int8") not in first.seen  # its export has evaluated it
    for name, record in records.items():
        accuracy = record.bundle["accuracy"]
        assert accuracy["images"] == 599 and accuracy["top1"] >= 0.98, name
        assert accuracy["top1_float"] == records["torchfp32"].bundle["accuracy"]["top1"]
    assert records["onnxfp32"].bundle["accuracy"]["sqnr_db"] > 80
    assert records["onnxint8"].bundle["accuracy"]["limit"] == 1.0
    assert records["torchfp32"].runtime["scan"]["value"] in ("native", "torch")
    assert records["onnxint8"].bundle["artifact_bytes"] < records["onnxfp32"].bundle["artifact_bytes"]

    done = next(
        each for each in (tmp_path / "units").iterdir() if "onnx-fp32" in each.read_text() and "p50" in each.read_text()
    )
    facts = json.loads(done.read_text())
    done.write_text(json.dumps({**facts, "result": {**facts["result"], "stable": False}}))
    assert run_matrix(matrix, again).records == outcome.records
    assert again.seen == [("measure", "onnx fp32")]
    assert not status(RunFolder(tmp_path)).failed and (tmp_path / "notes.txt").read_text() == "mine"
    assert cli.report_main([str(tmp_path)]) == 0
    assert "Verdict  ship onnx" in capsys.readouterr().out


def test_damage_is_made_again(timeless, tmp_path):
    matrix = Matrix(CHECKPOINT, parse_forms("onnx:fp32"), (Settings(1, 1),), tmp_path)
    (record,) = run_matrix(matrix).records
    record.unlink()
    ended = Ended()
    assert run_matrix(matrix, ended).records == [record] and record.exists()
    assert ended.seen == [("measure", "onnx fp32")]


@pytest.mark.slow
def test_a_form_that_fails_stops_no_other(micro, tmp_path, capsys):
    flags = ["--matrix", str(micro), "--imgsz", "64", "-o", str(tmp_path), *QUICK]
    assert bench_main([*flags, "--forms", "onnx:int8,torch"]) == 2  # no images to calibrate with
    out, err = capsys.readouterr()
    assert "onnx int8: int8 needs images to calibrate with" in err
    assert len(list(tmp_path.glob("records/here/*-torch-fp32-64x64-*.json"))) == 1 and "torch" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no bundle is given"),
        (["x", "--forms", "onnx"], "--forms needs --matrix"),
        (["--matrix", "a.ckpt", "b.ckpt"], "one checkpoint"),
        (["--matrix", "missing.ckpt"], "missing.ckpt does not exist"),
        (["--matrix", "--val", "nowhere"], "nowhere does not exist"),
        (["--matrix", "--calib", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_compared_is_said(flags, said, capsys, tmp_path):
    assert bench_main([*flags, "-o", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def timeless(monkeypatch):
    """Measurements without the measuring, each stable. Returns the subjects that were measured."""
    measured = []

    def bench(path, settings):
        measured.append(Path(path).name)
        with worker.open_subject(Path(path), settings) as subject:
            facts, runtime = json.loads(json.dumps([subject.facts(), subject.runtime()]))
        made = make_record(device=device.facts())
        kept = {**settings.as_dict(), "batch": 1}
        return replace(made, bundle=facts, runtime=runtime, settings=kept)

    monkeypatch.setattr("evm_deploy.sweep.boards.bench", bench)
    return measured


def digits_of(path: Path, turned: int, count: int = 40) -> str:
    """Digits with labels that are `turned` further."""
    images, labels = digits("heldout")
    np.savez(path, images=images[:count], labels=(labels[:count] + turned) % 10)
    return str(path)


def accuracies(outcome) -> list[float | None]:
    assert not outcome.failed
    found = [Record.read(path).bundle["accuracy"] for path in outcome.records]
    return [each and each["top1"] for each in found]


def test_the_accuracy_is_that_of_the_images_asked_about(timeless, tmp_path):
    """By content: other labels, other images under the same path, no images; what is the same is not done again."""
    matrix = Matrix(CHECKPOINT, parse_forms("torch,onnx:fp32"), (Settings(1, 1),), tmp_path / "out")
    val = digits_of(tmp_path / "val.npz", 0)
    assert accuracies(run_matrix(matrix)) == [None, None]
    right = accuracies(run_matrix(replace(matrix, val=val)))
    assert min(right) > 0.9
    assert accuracies(run_matrix(replace(matrix, val=digits_of(tmp_path / "other.npz", 1)))) < [0.1, 0.1]
    assert accuracies(run_matrix(replace(matrix, val=val))) == right
    digits_of(tmp_path / "val.npz", 1)
    assert accuracies(run_matrix(replace(matrix, val=val))) < [0.1, 0.1]
    assert accuracies(run_matrix(matrix)) == [None, None]
    assert len(timeless) == 2  # the latencies stay


@pytest.mark.slow
def test_a_bundle_is_exported_again_for_other_images(timeless, tmp_path):
    """Also if they lie under the same path."""
    images = write_images(tmp_path / "calib", "train", 120) and str(tmp_path / "calib")
    val = digits_of(tmp_path / "val.npz", 0)
    matrix = Matrix(
        CHECKPOINT, parse_forms("onnx:int8,onnx:w8"), (Settings(1, 1),), tmp_path / "out", None, images, val
    )
    exported = []
    for change in (None, None, "val", None, "calib", None):
        if change == "val":
            digits_of(tmp_path / "val.npz", 0, 41)
        if change == "calib":
            next((tmp_path / "calib").rglob("*.png")).unlink()
        ended = Ended()
        assert not run_matrix(matrix, ended).failed
        exported.append([form for name, form in ended.seen if name == "export"])
    both = ["onnx int8", "onnx w8"]
    assert exported == [both, [], both, [], ["onnx int8"], []]


@pytest.mark.parametrize("what", ["torch", "gpu", "system"])
def test_a_record_of_another_version_or_device_is_not_reused(what, timeless, tmp_path, monkeypatch):
    matrix = Matrix(CHECKPOINT, parse_forms("torch"), (Settings(1, 1),), tmp_path / "out")
    assert not run_matrix(matrix).failed and not run_matrix(matrix).failed
    assert len(timeless) == 1
    if what == "torch":
        monkeypatch.setattr(float_network, "package_versions", lambda names: {"torch": "99.9.0"})
    else:
        changed = {"gpu": {"gpus": ["NVIDIA T9"]}, "system": {"system": "Linux 99"}}[what]
        facts = {**device.facts(), **changed}
        monkeypatch.setattr(device, "facts", lambda: facts)
    assert not run_matrix(matrix).failed
    assert len(timeless) == 2


@pytest.fixture
def two_sets(tmp_path):
    """A file with averaged and raw weights, and a tensor beside the network."""
    averaged = load_file(str(CHECKPOINT))
    bias = "classifier.head.bias"
    raw = {name: value + (name == bias) for name, value in averaged.items()}
    raw["aux.weight"] = torch.ones(2)
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "two.pt")
    return tmp_path / "two.pt", raw[bias], averaged[bias]


def test_the_weights_of_a_comparison_are_those_that_were_asked_for(two_sets, timeless, tmp_path, monkeypatch):
    file, raw, averaged = two_sets
    exported, real = [], Source.network
    monkeypatch.setattr(Source, "network", lambda self, plan: exported.append(real(self, plan)) or exported[-1])
    forms, settings = parse_forms("torch,onnx:fp32"), (Settings(1, 1),)
    for weights, drop, want in (("raw", ("aux.*",), raw), ("ema", (), averaged)):
        outcome = run_matrix(Matrix(file, forms, settings, tmp_path / "o", "64", weights=weights, drop=drop))
        assert not outcome.failed and len(outcome.records) == 2
        assert Record.read(outcome.records[0]).settings["weights"] == (None if weights == "ema" else weights)
        for network in exported:
            assert torch.equal(dict(network.module.named_parameters())[next_bias(network.module)], want)
        exported.clear()
    with pytest.raises(CheckpointError, match="fits no key"):
        run_matrix(Matrix(file, forms, settings, tmp_path / "o", "64", drop=("nothing.*",)))


def next_bias(network):
    return next(name for name, _ in network.named_parameters() if name.endswith("classifier.head.bias"))


@pytest.mark.parametrize("matrix", [True, False])
def test_weights_are_flags_of_evm_bench(matrix, two_sets, tmp_path, monkeypatch, capsys):
    """With --matrix they go into the exports, and into the settings of torch; else into those of the checkpoint."""
    seen = []

    def stop(subject, settings=None, *rest):
        seen.append((subject, settings))
        raise ToolchainError("stop")

    monkeypatch.setattr("evm_deploy.bench.remote.hosts.bench", stop)
    monkeypatch.setattr("evm_deploy.sweep.boards.bench", stop)
    monkeypatch.setattr("evm_deploy.sweep.units.export", lambda source, plan, *a, **k: stop("export", plan))
    flags = ["--weights", "raw", "--drop", "aux.*, loss.*", "-o", str(tmp_path / "o"), "-q"]
    more = ["--matrix", "--forms", "torch,onnx", "--imgsz", "64"] if matrix else []
    monkeypatch.setattr("evm_deploy.export.source.load_checkpoint", lambda path, **k: load_checkpoint(path))
    assert cli.bench_main([str(two_sets[0]), *flags, *more]) == 3
    (in_torch,) = [each for subject, each in seen if subject != "export"]
    exported = [each for each in seen if each[0] == "export"]
    assert (in_torch.weights, in_torch.drop) == ("raw", "aux.*,loss.*")
    assert [(plan.weights, plan.drop) for _, plan in exported] == [("raw", ("aux.*", "loss.*"))] * matrix
