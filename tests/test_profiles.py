"""`--device`: profiles that come with the package, files of users, and what they decide of an export."""

from __future__ import annotations

import json

import pytest

from evm_deploy import cli
from evm_deploy.bundle.manifest import Decision, Manifest
from evm_deploy.cli import doctor_main
from evm_deploy.devices.profiles import Profile, find_profile, profile_names
from evm_deploy.errors import UsageError
from evm_deploy.export import pipeline
from evm_deploy.export.device_choice import choose
from evm_deploy.export.plan import ExportPlan
from evm_deploy.toolchain.platforms import PLATFORMS
from tests.test_cross import HOST

OWN = 'description = "our robot"\nplatform = "linux-aarch64"\nprefer = ["onnx int8", "onnx fp32"]\n'
NAMES = ["android", "browser", "iphone", "jetson-agx-orin", "jetson-orin-nano", "mac", "n100", "pi5", "x86-64"]


def chosen(profile: Profile, target=None, precision=None, scan="auto", images=False):
    return choose(profile, target, precision, scan=scan, images=images)


def test_the_profiles_that_come_with_it():
    assert profile_names() == NAMES
    for profile in map(find_profile, NAMES):
        assert profile.description and profile.prefer and profile.verified
    run = [name for name in NAMES if not find_profile(name).verified.startswith(("nothing", "packages were computed"))]
    assert run == ["browser", "x86-64"]


def test_a_file_of_the_user(tmp_path):
    file = tmp_path / "robot.toml"
    file.write_text(OWN + 'threads = 2\nsensors = ["soc"]\n')
    profile = find_profile(str(file))
    assert (profile.name, profile.threads, profile.sensors) == ("robot", 2, ("soc",))
    assert profile.prefer == (("onnx", "int8"), ("onnx", "fp32")) and profile.targets == ("onnx",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (OWN + "thread = 4\n", r"robot\.toml: key 'thread' is unknown(?s:.*)did you mean threads"),
        (OWN + 'threads = "4"\n', r"robot\.toml: threads must be a whole number, got '4'"),
        (OWN + "threads = true\n", r"threads must be a whole number, got True"),
        (OWN + "threads = 0\n", r"robot\.toml: threads is 0"),
        (OWN + "sensors = [1]\n", r"sensors must be a list of texts"),
        (OWN.replace("onnx int8", "onxx int8"), r"robot\.toml: prefer 'onxx int8': target 'onxx'(?s:.*)mean onnx"),
        (OWN.replace("onnx int8", "onnx int4"), r"prefer 'onnx int4': precision 'int4' is unknown; .* fp32, fp16"),
        (OWN.replace("onnx int8", "onnx"), r"prefer 'onnx': precision ''"),
        (OWN.replace("linux-aarch64", "linux-arm"), r"platform 'linux-arm' is unknown; choose from: linux-x86_64"),
        (OWN.replace('["onnx int8", "onnx fp32"]', "[]"), "prefer is empty"),
        ('platform = "browser"\n', "has no 'description'"),
        ("prefer = [", "is not TOML"),
        ("\x00", "is not TOML"),
    ],
)
def test_files_that_are_refused(tmp_path, content, says):
    (tmp_path / "robot.toml").write_text(content)
    with pytest.raises(UsageError, match=says):
        find_profile(str(tmp_path / "robot.toml"))


def test_files_and_names_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"robot\.toml: No such file"):
        find_profile(str(tmp_path / "robot.toml"))
    with pytest.raises(UsageError, match=r"'pi6' is unknown; choose from: android, .*(?s:.*)did you mean pi5"):
        find_profile("pi6")


def test_what_a_profile_chooses():
    pi = find_profile("pi5")
    found = chosen(pi, images=True)
    assert (found.target, found.precision, found.native_library) == ("onnx", "int8", "linux-aarch64")
    assert found.chosen == Decision(
        "onnx int8", "device pi5: its first preference; with the native library for linux-aarch64"
    )
    assert "needs no images (with --calib DIR: onnx int8)" in chosen(pi).chosen.reason
    assert chosen(pi).precision == "fp32"
    assert chosen(pi, target="onnx", precision="fp16").precision == "fp16"


@pytest.mark.parametrize(
    ("device", "target", "precision", "scan", "expected"),
    [
        ("n100", "onnx", None, "auto", ("onnx", "fp32", "linux-x86_64")),
        ("n100", None, "fp32", "auto", ("openvino", "fp32", None)),
        ("n100", "openvino", "fp16", "auto", ("openvino", "fp16", None)),
        ("pi5", None, None, "portable", ("onnx", "fp32", None)),
        ("android", None, None, "auto", ("onnx", "fp32", "android-aarch64")),
        ("browser", None, None, "auto", ("onnx", "fp32", "browser-wasm32")),
        ("iphone", None, None, "auto", ("coreml", "fp16", None)),
        ("jetson-agx-orin", None, None, "auto", ("trt", "fp16", None)),
    ],
)
def test_what_is_given_wins(device, target, precision, scan, expected):
    found = chosen(find_profile(device), target, precision, scan)
    assert (found.target, found.precision, found.native_library) == expected


def test_impossible_choices_name_what_is_possible():
    with pytest.raises(UsageError, match=r"'iphone' has no target 'onnx'; it has: coreml fp16"):
        chosen(find_profile("iphone"), target="onnx")
    with pytest.raises(UsageError, match=r"'pi5' has no preference with 'int8-fp16'; it has: onnx int8, onnx fp32"):
        chosen(find_profile("pi5"), precision="int8-fp16")


def test_an_engine_for_another_device_is_not_built_here():
    """A GPU of this machine is not the Jetson's."""
    plan = ExportPlan("trt", platform=next(name for name in PLATFORMS if name != HOST))
    assert not pipeline.engine_built_here(plan)
    assert pipeline.engine_built_here(ExportPlan("trt")) and pipeline.engine_built_here(
        ExportPlan("trt", platform=HOST)
    )


@pytest.mark.slow
def test_export_for_a_device(micro, tmp_path, capsys):
    """From a file, so that the library is for this platform and cached by test_cross."""
    (tmp_path / "robot.toml").write_text(OWN.replace("linux-aarch64", HOST))
    flags = ["--device", str(tmp_path / "robot.toml"), "--imgsz", "32", "-o", str(tmp_path / "dist"), "-q"]
    assert cli.export_main([str(micro), *flags]) == 0
    out = capsys.readouterr().out
    (bundle,) = (tmp_path / "dist").iterdir()
    manifest = Manifest.read(bundle)
    assert bundle.name == "micro_64-onnx-fp32-32x32" and HOST in manifest.plugins
    assert manifest.plan["chosen"]["value"] == "onnx fp32" and manifest.plan["platform"] == HOST
    assert f"Chosen    onnx fp32, {manifest.plan['chosen']['reason']}" in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device", "pi6"], "'pi6' is unknown; choose from: android, browser"),
        (["--device", "iphone", "--target", "onnx"], "has no target 'onnx'; it has: coreml fp16"),
        (["--device", "pi5", "--int8"], "int8 needs images to calibrate with"),
        (["--device", "linux-aarch64"], "use --platform linux-aarch64"),
        (["--device", "pi5", "--platform", "linux-aarch64"], "leave --platform out"),
        (["--platform", "linux-aarch64"], "--target is missing"),
    ],
)
def test_the_command_refuses(micro, capsys, flags, says):
    assert cli.export_main([str(micro), *flags, "--dry-run"]) == 2
    assert says in capsys.readouterr().err


def test_all_targets_of_a_device(micro, capsys):
    assert cli.export_main([str(micro), "--device", "n100", "--target", "all", "--dry-run", "--json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["Would"].split(" -> ")[1].split(",")[0] for row in rows] == ["OpenVINO fp32", "ONNX fp32"]


def test_the_doctor_lists_them(capsys):
    assert doctor_main([]) == 0
    assert ", ".join(NAMES) in capsys.readouterr().out
    assert doctor_main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profiles"]["pi5"]["platform"] == "linux-aarch64"
