"""The documents tell the truth: the README's commands run and print what it shows, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from evm_deploy import cli
from evm_deploy.commands import bench, export, report
from evm_deploy.demo import CHECKPOINT

ROOT = Path(__file__).parents[1]
MAINS = {"evm-export": cli.export_main, "evm-run": cli.run_main}
UNSAID = ("-h", "--help", "--version", "--int8", "--out", "--quiet", "--verbose")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readmes_session_runs_and_prints_that(tmp_path, monkeypatch, capsys):
    """Word for word but for numbers."""
    block = re.search(r"(?:^    .*\n)+", (ROOT / "README.md").read_text(), re.M)[0]
    monkeypatch.chdir(tmp_path)
    shown, printed = [], []
    for line in (line[4:] for line in block.splitlines()):
        if line.startswith("$ "):
            program, *flags = shlex.split(line[2:])
            assert MAINS[program](flags) == 0
            printed += capsys.readouterr().out.splitlines()
        else:
            shown.append(line)
    # scan names may differ where two errors are nearly equal
    blank = [re.sub(r"avx512vnni|avx512|avx2|neon|base|[-+]?\d[\d.e+-]*|\(layers.*\)|\s+", " ", line) for line in shown]
    assert [
        re.sub(r"avx512vnni|avx512|avx2|neon|base|[-+]?\d[\d.e+-]*|\(layers.*\)|\s+", " ", line) for line in printed
    ] == blank


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path):
    """In a process of its own: what is imported before decides which names are there."""
    code = re.search(r"```python\n(from evm_deploy.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    code = code.replace("evm_tiny.ckpt", str(CHECKPOINT))
    Image.new("RGB", (70, 50)).save(tmp_path / "cat.jpg")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, len(run.stdout.splitlines())) == (0, 5), run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize(
    ("parser", "page"),
    [(export.export_parser, "export.md"), (bench.bench_parser, "latency.md"), (report.report_parser, "report.md")],
    ids=["export", "bench", "report"],
)
def test_every_flag_is_documented(parser, page):
    text = (ROOT / "docs" / page).read_text()
    for action in parser()._actions:
        for flag in action.option_strings:
            assert flag in text or flag in UNSAID, flag
