"""Files of class names as people have them, and labels that would not come back from labels.txt."""

from __future__ import annotations

import json

import pytest

from evm_deploy import cli
from evm_deploy.bundle.loaded import load
from evm_deploy.commands import export_plans
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import UsageError
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.families import load_checkpoint

NAMES = ["zero", "one", "two", "drei", "vier", "f\u00fcnf", "\u4e5d", "golden retriever", "crane, bird", "n0 nine"]
BREAKS = ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def dry_run(path, *flags):
    return cli.export_main(["--target", "onnx", "--labels", str(path), "--dry-run", "-o", str(path.parent), *flags])


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n", "\r\n\r\n", "\n \n\t\n"], ids=repr)
@pytest.mark.parametrize("between", ["\n", "\r\n", "\r", "  \n", "\n  "], ids=repr)
@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["", "bom"])
def test_one_name_a_line_however_lines_end(end, between, bom, tmp_path, monkeypatch):
    path = tmp_path / "labels.txt"
    path.write_bytes((bom + between.join(NAMES) + end).encode())
    seen = []
    real = export_plans._labels
    monkeypatch.setattr(export_plans, "_labels", lambda path: seen.append(real(path)) or seen[-1])
    assert dry_run(path) == 0
    assert list(seen[0]) == NAMES


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(NAMES).encode(), "is JSON"),
        (json.dumps(NAMES, indent=1).encode(), "is JSON"),
        (json.dumps(dict(enumerate(NAMES))).encode(), "is JSON"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\na\nb\n", "line 1 is empty"),
        ("a\nb\n".encode("utf-16"), "not UTF-8"),
        ("f\u00fcnf\n".encode("latin-1"), "not UTF-8"),
        (b"a\nb\n", "2 labels for a head of 10 classes"),
        ("\n".join([*NAMES[:9], "a\u2028b"]).encode(), "spans lines"),
    ],
)
def test_other_files_are_refused_by_name(content, says, tmp_path, capsys):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    assert dry_run(path) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("text", ["cat{}", "{}cat", "cat{}dog", "{}", "cat{}{}"])
@pytest.mark.parametrize("line_break", BREAKS, ids=ascii)
def test_labels_with_line_breaks_of_any_kind_are_refused(text, line_break, demo_spec):
    labels = (*NAMES[:9], text.replace("{}", line_break))
    with pytest.raises(UsageError, match="spans lines"):
        complete(ExportPlan("onnx", labels=labels), demo_spec)


@pytest.fixture(scope="module")
def demo_spec():
    return load_checkpoint(CHECKPOINT).spec


def test_every_other_label_comes_back(bundle_of, demo_spec):
    assert complete(ExportPlan("onnx", labels=tuple(NAMES)), demo_spec)[0].labels == tuple(NAMES)
    with load(bundle_of(CHECKPOINT, ExportPlan("onnx", labels=tuple(NAMES))).path) as model:
        assert model.labels == NAMES
