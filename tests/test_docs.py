"""The documents tell the truth: the README's commands run and print what it shows, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from evm_deploy import cli

ROOT = Path(__file__).parents[1]
MAINS = {"evm-export": cli.export_main, "evm-run": cli.run_main}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    blank = [re.sub(r"avx512|avx2|neon|base|[-+]?\d[\d.e+-]*|\(layers.*\)|\s+", " ", line) for line in shown]
    assert [re.sub(r"avx512|avx2|neon|base|[-+]?\d[\d.e+-]*|\(layers.*\)|\s+", " ", line) for line in printed] == blank


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_flag_is_documented():
    text = (ROOT / "docs" / "export.md").read_text()
    for action in cli.export_parser()._actions:
        for flag in action.option_strings:
            assert flag in text or flag in ("-h", "--help", "--version", "--int8", "--out", "--quiet", "--verbose"), (
                flag
            )
