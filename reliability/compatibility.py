"""Test the oldest and the newest supported releases: export, self-test and classify the demo with each.

    python -m reliability.compatibility [NAME..] [-o dist/reliability]

Each environment is a new virtual environment for this Python, with packages from the package index. `oldest` has every
package at the lower bound of pyproject.toml; `newest` has the newest releases of the index. torch is always the release
of constraints.txt. A weekly run finds breaking releases before users do. Exit code 1 if an environment fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

from reliability import chosen

ROOT = Path(__file__).resolve().parents[1]
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
BASE = (
    "numpy==1.26.4",
    "pillow==10.0.0",
    "safetensors==0.4.0",
    "rich==13.0.0",
    "jinja2==3.1.0",
    "fastjsonschema==2.21.0",
)
LONGEST_S = 600  # longest time of one command, in seconds
# 2026.4 is the lower bound: an extension is compiled for one release, and the portable IR has operators of opset 16.
OPENVINO = "openvino==2026.4.0"
ONNX = ("onnx==1.20.0", "onnxscript==0.7.0", "onnx-ir==0.1.16", "onnxsim==0.8.1", "onnxruntime==1.20.0")


@dataclass(frozen=True)
class Environment:
    """An environment to test.

    extra: extra of evm-deploy to install. pins: further requirements for pip. exports: whether the environment can
    export; if not, it runs a bundle that the current environment exports.
    """

    extra: str
    pins: tuple[str, ...] = ()
    exports: bool = False


ENVIRONMENTS = {
    "run-onnx oldest": Environment("run-onnx", (*BASE, "onnxruntime==1.17.3")),
    "run-onnx newest": Environment("run-onnx"),
    "run-openvino oldest": Environment("run-openvino", (*BASE, OPENVINO)),
    "run-openvino newest": Environment("run-openvino"),
    "onnx oldest": Environment("onnx", (*ONNX, TORCH), exports=True),
    "onnx newest": Environment("onnx", (TORCH,), exports=True),
}


def attempt(environment: Environment, folder: Path) -> list[str]:
    """Install, export, self-test and classify; return the versions of the packages. Raises CalledProcessError."""
    venv.create(folder / "venv", with_pip=True)
    bin_, target = folder / "venv" / "bin", "openvino" if "openvino" in environment.extra else "onnx"
    call([bin_ / "python", "-m", "pip", "install", "--quiet", f"{ROOT}[{environment.extra}]", *environment.pins])
    exporter = bin_ if environment.exports else Path(sys.executable).parent
    scan = ["--scan", "portable"] if target == "openvino" else []
    call([exporter / "evm-export", "--target", target, "-q", "-o", folder / "out", *scan])
    (bundle,) = (folder / "out").iterdir()
    call([bin_ / "evm-run", bundle, "--selftest"])
    mine = call([bin_ / "evm-run", bundle, bundle / "selftest" / "picture.png", "--json"])
    ours = call([Path(sys.executable).parent / "evm-run", bundle, bundle / "selftest" / "picture.png", "--json"])
    classes = [[each["label"] for each in json.loads(said)[0]["top"]] for said in (mine, ours)]
    if classes[0] != classes[1]:
        raise subprocess.CalledProcessError(1, "evm-run", stderr=f"classes differ: {classes}")
    versions = call([bin_ / "python", "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"])
    shown = ("onnxruntime", "openvino", "onnx", "torch", "numpy", "pillow", "safetensors")
    return [f"{each['name']} {each['version']}" for each in json.loads(versions) if each["name"].lower() in shown]


def call(command: list[object]) -> str:
    """Run a command and return its stdout. Raises CalledProcessError or TimeoutExpired."""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=LONGEST_S)
    done.check_returncode()
    return done.stdout


def main() -> int:
    """Test the chosen environments; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("-o", "--out", type=Path, default=Path("dist/reliability"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in chosen(parser, args.names, ENVIRONMENTS):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[name] = {"ok": True, "versions": attempt(ENVIRONMENTS[name], Path(folder))}
            except subprocess.TimeoutExpired as error:
                results[name] = {"ok": False, "said": f"{error.cmd}: hangs"}
            except subprocess.CalledProcessError as error:
                said = [line for line in (error.stderr or "").splitlines() if "WARNING" not in line][-4:]
                results[name] = {"ok": False, "said": f"{error.cmd}: {' | '.join(said)}"}
        print(f"{name:<20} {time.monotonic() - start:4.0f} s  {results[name]}", flush=True)
    (args.out / "compatibility.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(not all(each["ok"] for each in results.values()))


if __name__ == "__main__":
    sys.exit(main())
