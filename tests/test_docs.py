"""The documents tell the truth: the README's commands run and print what it shows, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from PIL import Image

from evm_deploy import cli
from evm_deploy.bundle import signing
from evm_deploy.commands import bench, doctor, evaluate, export, report, run, sweep, tune, worker
from evm_deploy.demo import CHECKPOINT, digits
from evm_deploy.report.history import append
from evm_deploy.toolchain.compile import read_recipe
from tests.records import record

ROOT = Path(__file__).parents[1]
MAINS = {"evm-export": cli.export_main, "evm-run": cli.run_main}
UNSAID = ("-h", "--help", "--version", "--int8", "--out", "--quiet", "--verbose")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


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
    kernels = "|".join(sorted((kernel.name for kernel in read_recipe().kernels), key=len, reverse=True))
    varies = rf"{kernels}|[-+]?\d[\d.e+-]*|\(layers.*\)|\s+"
    assert [re.sub(varies, " ", line) for line in printed] == [re.sub(varies, " ", line) for line in shown]


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
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize(
    ("parser", "page"),
    [
        (export.export_parser, "export.md"),
        (bench.bench_parser, "latency.md"),
        (report.report_parser, "report.md"),
        (sweep.sweep_parser, "scale.md"),
        (worker.worker_parser, "scale.md"),
        (evaluate.eval_parser, "scale.md"),
        (tune.tune_parser, "scale.md"),
    ],
    ids=["export", "bench", "report", "sweep", "worker", "eval", "tune"],
)
def test_every_flag_is_documented(parser, page):
    text = (ROOT / "docs" / page).read_text()
    for action in parser()._actions:
        for flag in action.option_strings:
            assert flag in text or flag in UNSAID, flag


# ------------------------------------------------------------------------------------------------------------ commands

PROGRAMS = {
    "evm-export": (cli.export_main, export.export_parser),
    "evm-run": (cli.run_main, run.run_parser),
    "evm-bench": (cli.bench_main, bench.bench_parser),
    "evm-report": (cli.report_main, report.report_parser),
    "evm-sweep": (cli.sweep_main, sweep.sweep_parser),
    "evm-eval": (cli.eval_main, evaluate.eval_parser),
    "evm-tune": (cli.tune_main, tune.tune_parser),
    "evm-doctor": (cli.doctor_main, doctor.doctor_parser),
}
LINE = re.compile(r"^ {4}(?:\$ )?(evm-[a-z]+(?: .*)?)$", re.M)
SYNOPSIS = re.compile(r"[][|<>]|\.\.")  # shows what may be given, and is no line to type
#: Parts of commands that need something that is not here: other machines, GPUs, networks and files of others.
MACHINES = ("--host", "--adb", "--devices", "--finish", "--matrix", "--model", "GPU", "NPU", "evm-sweep", "evm-tune")
ELSEWHERE = (*MACHINES, "--provider", "retinanet", "mask_rcnn", "upernet", "scenes", "clip.mp4", "camera:", ".onnx -")


def documented_commands() -> list[str]:
    """Return every command line in the documentation, without its comment, each once."""
    lines = [line for page in PAGES for line in LINE.findall(page.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(re.sub(r"\s+#.*| > \S+$", "", line).strip() for line in lines))


COMMANDS = documented_commands()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, demo_bundle):
    """A folder with everything that the commands in the documentation name."""
    folder = tmp_path_factory.mktemp("workplace")
    images, labels = digits("train")
    for i, (image, label) in enumerate(zip(images[:240], labels[:240], strict=True)):
        for path in (folder / "images" / f"{i}.png", folder / "val" / str(label) / f"{i}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    Image.fromarray(images[0]).save(folder / "cat.jpg")
    key = Ed25519PrivateKey.generate()
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    signing.sign(shutil.copytree(demo_bundle.path, folder / "bundle"), key)
    for name in ("bench", "before", "after"):
        (folder / name).mkdir()
        record("onnx", "fp32", 1.0).write(folder / name / "record.json")
    append(folder / "history.db", [record("onnx", "fp32", 1.0)])
    return folder


def typed(command: str, folder: Path) -> tuple[str, list[str]]:
    """Return a documented command's program and arguments, with files that exist in the place of examples."""
    program, *words = shlex.split(command)
    names = {
        "CKPT": str(CHECKPOINT),
        "evm_tiny.ckpt": str(CHECKPOINT),
        "BUNDLE": str(folder / "bundle"),
        "bench/": "bench",
    }
    return program, [str(folder / "bundle") if word.startswith("dist/") else names.get(word, word) for word in words]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_flags_that_it_is_shown_with(command):
    program, *words = shlex.split(re.sub(r"[][|]", " ", command))
    known = {flag for action in PROGRAMS[program][1]()._actions for flag in action.option_strings}
    assert {word for word in words if word.startswith("-") and word != "-"} <= known


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if not SYNOPSIS.search(each) and not any(flag in each for flag in ELSEWHERE)]
)
def test_every_command_runs(command, workplace, tmp_path, monkeypatch, capsys):
    """Each command runs in a copy: a record of another command may be unstable, which a report refuses."""
    folder = shutil.copytree(workplace, tmp_path / "workplace")
    monkeypatch.chdir(folder)
    program, words = typed(command, folder)
    extra = {"evm-export": ["--dry-run"], "evm-bench": ["--limit", "1"]}.get(program, [])
    assert PROGRAMS[program][0]([*words, *extra]) == 0, capsys.readouterr().err
