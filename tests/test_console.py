"""Progress lines and errors of a command in a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from evm_deploy.commands.console import Steps


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(steps):
    with steps("calibrate", "20 images") as progress:
        for done in range(21):
            progress(done, 20)


def test_a_step_that_says_how_far_it_is_has_a_bar(monkeypatch):
    for name in ("CI", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(Steps(quiet=False))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue())
    assert re.search(r"calibrate  20 images ━+.*20/20", shown)
    assert re.search(r"calibrate  20 images +ok \d+\.\d s\n", shown)


def test_without_a_terminal_there_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(Steps(quiet=False))
    assert re.fullmatch(r"calibrate  20 images +ok \d+\.\d s\n", sys.stderr.getvalue())


def test_quiet_is_silent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(Steps(quiet=True))
    assert sys.stderr.getvalue() == ""


def test_a_failed_step_says_so(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(ValueError), Steps(quiet=False)("build", "onnx"):
        raise ValueError
    assert re.fullmatch(r"build      onnx +failed \d+\.\d s\n", sys.stderr.getvalue())


def test_brackets_of_names_are_no_markup(capsys):
    with Steps(quiet=False)("load", "evm[red]tiny[1].ckpt"):
        pass
    assert "evm[red]tiny[1].ckpt" in capsys.readouterr().err
