"""`--device`: profiles that come with the package, files of users, and what they decide of an export."""

from __future__ import annotations

import json

import pytest

from evm_deploy import cli
from evm_deploy.cli_doctor import doctor_main
from evm_deploy.errors import UsageError
from evm_deploy.export import pipeline
from evm_deploy.export.for_device import choose
from evm_deploy.export.manifest import Manifest
from evm_deploy.export.plan import Choice, ExportPlan
from evm_deploy.platforms import PLATFORMS
from evm_deploy.profiles import Profile, find_profile, profile_names
from tests.test_cross import HOST

OWN = 'description = "our robot"\nplatform = "linux-aarch64"\nprefer = ["onnx int8", "onnx fp32"]\n'
NAMES = ["android", "browser", "iphone", "jetson-agx-orin", "jetson-orin-nano", "mac", "n100", "pi5", "x86-64"]


def chosen(profile: Profile, target=None, precision=None, scan="auto", pictures=False):
    return choose(profile, target, precision, scan=scan, pictures=pictures)


def test_the_profiles_that_come_with_it():
    assert profile_names() == NAMES
    for profile in map(find_profile, NAMES):
        assert profile.description and profile.prefer and profile.verified
    unverified = [
        name for name in NAMES if not find_profile(name).verified.startswith(("nothing", "packages computed"))
    ]
    assert run == ["x86-64"]


def test_a_file_of_the_user(tmp_path):
    file = tmp_path / "robot.toml"
    file.write_text(OWN + 'threads = 2\nsensors = ["soc"]\n')
    profile = find_profile(str(file))
    assert (profile.name, profile.threads, profile.sensors) == ("robot", 2, ("soc",))
    assert profile.prefer == (("onnx", "int8"), ("onnx", "fp32")) and profile.targets == ("onnx",)


@pytest.mark.parametrize(
    ("content", "says"),
