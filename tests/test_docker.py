"""release/docker: what the Dockerfiles say, and their steps taken on this system, without Docker."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tomllib

from evm_deploy.bundle.loaded import load
from evm_deploy.export.plan import ExportPlan
from release import wheels
from tests import dockerfile
from tests.toolchains import need

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "release" / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_installs_a_wheel_and_runs_a_command_of_it(path):
    steps = dockerfile.steps(path)
    assert steps[0].word == "FROM" and re.search(r":(?!latest)[\w.-]+$", steps[0].rest)  # a release
    assert next(each.rest for each in steps if each.word == "COPY") == "dist/wheels /tmp/wheels"  # of release.wheels
    installed = "".join(each.rest for each in steps if each.word == "RUN")
    assert {*re.findall(r"\[([\w-]+)\]\"", installed)} <= {*PROJECT["optional-dependencies"]}
    assert Path(dockerfile.entry_point(steps)[0]).name in PROJECT["scripts"]
    commands = re.findall(r"^#     (.+)", path.read_text(encoding="utf-8"), re.M)
    assert commands[0] == "python -m release.wheels" and f"-f release/docker/{path.name}" in commands[1]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A folder with dist/wheels: the wheel for this system, and empty files in place of the others."""
    need("root and Debian 12")
    folder = tmp_path_factory.mktemp("context")
    bare = wheels.bare_wheel(tmp_path_factory.mktemp("bare"))
    wheel = wheels.write_wheel(bare, "linux-x86_64", folder / "dist" / "wheels")
    for tag in {*wheels.TAGS.values()} - {wheels.TAGS["linux-x86_64"]}:
        wheel.with_name(re.sub(r"none-.+", f"none-{tag}.whl", wheel.name)).touch()
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("cross")
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("onnxruntime", ExportPlan("onnx", imgsz=(32, 32))),
        ("openvino", ExportPlan("openvino", imgsz=(32, 32), scan="portable")),
    ],
)
def test_the_steps_of_a_dockerfile_make_an_image_that_predicts(name, plan, context, micro, bundle_of, tmp_path):
    bundle = bundle_of(micro, plan)
    steps = dockerfile.steps(ROOT / "release" / "docker" / f"{name}.Dockerfile")
    assert steps[0].rest == "debian:bookworm-slim"
    shutil.copytree(bundle.path, context / name)
    (tmp_path / "work").mkdir()
    predict = ("/opt/bundle/selftest/picture.png", "--json")
    done = dockerfile.run(steps, context, tmp_path / "work", {"BUNDLE": name}, *predict)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
    assert name == "openvino" or "native kernel" in done.stdout
    with load(bundle.path) as model:
        (want,) = model.predict(bundle.path / "selftest" / "picture.png", top=5)
    assert re.findall(r'"label": "(.+)"', done.stdout) == [each.label for each in want]
    assert not Path("/opt/bundle").exists() and not [*(tmp_path / "work").iterdir()]  # nothing is left here
