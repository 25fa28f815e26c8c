"""Progress lines and errors of a command in a terminal."""

from __future__ import annotations

import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evm_deploy.cli import export_main
from evm_deploy.commands.console import Steps, guarded_output, print_document


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


#: What a command may end with -> its body, and the exit code.
ENDS = {
    "ok": ("0", 0),
    "a gate": ("fail(errors.LatencyError('slow'))", 6),
    "bad input": ("fail(errors.UsageError('bad'))", 2),
    "no file": ("open('/nowhere/x')", 2),
    "a crash": ("1 / 0", 1),
}
#: Who takes stdout -> the shell's redirection.
READERS = {
    "a file": "> out",
    "nobody": "| true",
    "head": "| head -n 1 > out",
    "closed": ">&-",
    "all closed": ">&- 2>&-",
    "both to head": "2>&1 | head -n 1 > out",
}
COMMAND = """
import sys
from argparse import Namespace
from importlib import import_module
from types import SimpleNamespace
from evm_deploy import cli, errors
from evm_deploy.commands import console

def fail(error):
    raise error

def body():
    print("\\u4e5d " * 100_000)
    console.stdout_console().print("\\u4e5d" * 100_000)
    return END

cli.import_module = lambda name: SimpleNamespace(main=lambda argv: console.run_command("evm-test", body, ARGS))
ARGS = Namespace(verbose="-v" in sys.argv)
sys.exit(cli.run_main())
"""


def piped(code: str, reader: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = f'"$0" -c "$1" {" ".join(flags)} {reader}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, code], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("flags", [(), ("-v",)], ids=["", "-v"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("end", ENDS)
def test_the_exit_code_depends_on_what_was_found_alone(end, reader, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body, code = ENDS[end]
    done = piped(COMMAND.replace("END", body), READERS[reader], *flags)
    assert done.returncode == code, done.stderr
    if reader == "a file" and code:
        assert ("Traceback" in done.stderr) == bool(flags)


@pytest.mark.parametrize("end", ENDS)
def test_results_that_cannot_be_written_are_an_error(end, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.chdir(tmp_path)
    body, code = ENDS[end]
    done = piped(COMMAND.replace("END", body), "> /dev/full")
    assert done.returncode == (code or 2) and "cannot be written to stdout: No space left" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-16", "utf-8"])
def test_every_encoding_takes_every_character(encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = piped(COMMAND.replace("END", "0"), "> out", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0 and not done.stderr
    assert (tmp_path / "out").read_bytes().decode(encoding)[0] == ("\u4e5d" if "utf" in encoding else "?")


COMMANDS = ("export", "run", "bench", "report", "doctor")
FLAGS = ("--help", "--version", "--misspelt", "nowhere\u4e5d\udcff")
CALLS = """
import sys
from evm_deploy import cli
for command, flag in {calls!r}:
    try:
        code = getattr(cli, command + "_main")([flag])
    except SystemExit as end:
        code = end.code
    print(f"\\x1e{{code or 0}}\\x1e", end="", file=sys.stderr, flush=True)
"""


@functools.cache
def answers(encoding):
    """Call every command with every flag, in one process. Returns (command, flag) -> (exit code, text on stderr)."""
    calls = [(command, flag) for command in COMMANDS for flag in FLAGS]
    done = piped(CALLS.format(calls=calls), "", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    *said, end = done.stderr.split("\x1e")
    assert not end and len(said) == 2 * len(calls)
    return {call: (int(code), text) for call, text, code in zip(calls, said[::2], said[1::2], strict=True)}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_command_trips_over_its_own_words(command, flag, encoding):
    code, said = answers(encoding)[command, flag]
    assert code == (0 if flag in ("--help", "--version") else 2)
    assert bool(said) == (code == 2) and "Traceback" not in said and "internal error" not in said


def test_the_streams_are_as_they_were(monkeypatch):
    before = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", before)
    with guarded_output() as out:
        print("\u4e5d")
        print_document("\u4e5d")
    assert sys.stdout is before and (before.encoding, before.errors) == ("ascii", "strict")
    assert before.buffer.getvalue() == b"?\n\xe4\xb9\x9d" and out.exit_code == 0


CONFLICTS = {
    "two shorthands": ("int8 = true\nfp16 = true", "fp16 and int8 set the same"),
    "shorthand and name": ('precision = "w8"\nint8 = true', "set the same"),
    "two spellings": ("max-drop = 1\nmax_drop = 5", "max_drop and max-drop set the same"),
    "a list of one size": ("imgsz = [224, 288]", "imgsz must be one value"),
    "a list of files": ('labels = ["a", "b"]', "labels must be one value"),
    "a list for a switch": ("force = [true]", "force must be true or false"),
    "a table": ("[out]\nx = 1", "out must be a string"),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts_in_a_config_are_refused(name, tmp_path, capsys):
    text, says = CONFLICTS[name]
    (tmp_path / "c.toml").write_text(text)
    assert export_main(["--target", "onnx", "--dry-run", "--config", str(tmp_path / "c.toml")]) == 2
    assert says in capsys.readouterr().err


def test_every_flag_of_a_config_counts(tmp_path, capsys):
    """verbose too, which decides how an error looks."""
    (tmp_path / "c.toml").write_text('verbose = true\ntarget = ["onnx"]\ntol = "much"\nfp16 = false')
    assert export_main(["--dry-run", "--config", str(tmp_path / "c.toml"), "-o", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err
    (tmp_path / "c.toml").write_text("fp16 = true")
    flags = ["--target", "onnx", "--dry-run", "--json", "--config", str(tmp_path / "c.toml"), "-o", str(tmp_path)]
    assert export_main([*flags, "--precision", "w8", "--val", "demo"]) == 0  # the command line overrides the file
    assert " w8," in capsys.readouterr().out
