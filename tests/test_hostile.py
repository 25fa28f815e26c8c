"""Commands as a hostile newcomer types them: every kind of surprise that was found so, with what happens now."""

from __future__ import annotations

import json
import os
import shutil
from itertools import permutations
from pathlib import Path

import pytest

from evm_deploy import cli
from evm_deploy._util.cores import MAX_THREADS, check_threads
from evm_deploy.bench.run import record_of
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import AccuracyError, BundleError, ParityError, ToolchainError, UsageError
from evm_deploy.export.many import TargetOutcome
from evm_deploy.sweep.fleet import HostOutcome
from evm_deploy.sweep.forms import Form
from evm_deploy.sweep.matrix import FormOutcome
from tests.records import record

COMMANDS = {name: getattr(cli, f"{name}_main") for name in ("export", "run", "bench", "report", "doctor")}


def code_of(command, *argv):
    try:
        return COMMANDS[command]([str(each) for each in argv])
    except SystemExit as error:
        return error.code


# ------------------------------------------------------------------------------------------------ empty arguments


def flags_with_values(command):
    from importlib import import_module

    module = import_module(f"evm_deploy.commands.{command}")
    parser = getattr(module, "export_parser" if command == "export" else f"{command}_parser")()
    return [action.option_strings[-1] for action in parser._actions if action.option_strings and action.nargs is None]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_argument_is_refused_by_every_flag(command, capsys):
    """A variable of a shell that is not set must not become the working directory, or no key at all."""
    for flag in flags_with_values(command):
        if flag.startswith("--"):
            assert code_of(command, f"{flag}=") == 2 and f"{flag}: the value is empty" in capsys.readouterr().err
        assert code_of(command, flag, "") == 2 and f"{flag}: the value is empty" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "doctor"])
def test_an_empty_path_is_not_the_working_directory(command, demo_bundle, capsys, monkeypatch):
    monkeypatch.chdir(demo_bundle.path)
    assert code_of(command, "") == 2
    assert "argument 1: the value is empty" in capsys.readouterr().err


def test_an_unset_key_does_not_switch_the_signature_off(demo_bundle, tmp_path, capsys):
    """The worst of this kind: `--require-signature "$KEY"` measured a bundle that nobody had signed."""
    assert code_of("bench", demo_bundle.path, "--require-signature", "", "-o", tmp_path) == 2
    assert not list(tmp_path.iterdir())


def test_an_empty_value_of_a_config_is_refused(tmp_path, capsys):
    for key in ("target", "sign", "out", "checkpoint"):
        (tmp_path / "c.toml").write_text(f"{key} = ''")
        assert code_of("export", "--config", tmp_path / "c.toml") == 2
        assert f"{key} is empty" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- names with a hyphen


@pytest.mark.parametrize("command", ["run", "bench", "report"])
def test_after_two_hyphens_there_are_no_flags(command, demo_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert code_of(command, "--", "-b") == 2
    assert "-b does not exist" in capsys.readouterr().err or command == "run"
    shutil.copytree(demo_bundle.path, tmp_path / "-b")
    if command == "report":
        assert code_of(command, "--json", "--", "-b") == 0
        assert "evm_digits" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- ignored arguments


@pytest.mark.parametrize(
    "flags",
    [["--dry-run"], ["--int8"], ["-o", "x"], ["--force"], ["--calib", "demo"], ["--zip"], ["--imgsz", "64"], ["a.pt"]],
    ids=lambda flags: flags[0],
)
def test_finish_refuses_what_it_does_not_use(flags, demo_bundle, capsys):
    """`--finish B --dry-run` built the engine."""
    assert code_of("export", "--finish", demo_bundle.path, *flags) == 2
    assert "--finish cannot be combined with" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--force-calib", "--calib-images=3", "--calib-method=minmax"])
def test_settings_of_a_calibration_need_one(flag, capsys):
    assert code_of("export", "--target", "onnx", "--dry-run", flag) == 2
    assert f"{flag.partition('=')[0]} is for int8 and w8" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--python", "--ssh"])
def test_settings_of_a_host_need_one(flag, demo_bundle, capsys):
    assert code_of("bench", demo_bundle.path, flag, "x") == 2
    assert f"{flag} needs --host or --devices" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--weights", "raw"), ("--drop", "aux.*")])
def test_bundles_have_their_weights(flag, value, demo_bundle, tmp_path, capsys):
    for given in (demo_bundle.path, tmp_path / "b.zip"):
        assert code_of("bench", given, flag, value) == 2
        assert f"{flag} is for checkpoints" in capsys.readouterr().err
    assert code_of("bench", "b", flag, value, "--host", "board") == 2


# --------------------------------------------------------------------------------------------------- large numbers


@pytest.mark.parametrize("given", [(10**6, 1), (None, 10**6), (MAX_THREADS, 1000)])
def test_more_threads_than_a_machine_can_bear_are_refused(given, monkeypatch):
    """9999 threads made a machine of two cores unusable for minutes."""
    with pytest.raises(UsageError, match="more than this machine can bear"):
        check_threads(*given)
    check_threads(MAX_THREADS)
    check_threads(None)
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    check_threads(1024)


def test_threads_are_checked_where_the_bundle_runs(demo_bundle, capsys):
    assert code_of("run", demo_bundle.path, "--selftest", "--threads", "100000") == 2
    assert "use at most" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- twice, and old files


def test_a_path_given_twice_is_reported_once(demo_bundle, capsys):
    assert code_of("report", demo_bundle.path, "--json") == 0
    once = capsys.readouterr().out
    assert code_of("report", demo_bundle.path, demo_bundle.path, "--json") == 0
    assert capsys.readouterr().out == once


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "is a record of schema 2"),
        ({"schema_version": 0}, "measure again"),
        ({"schema_version": "1"}, "is not a record"),
        ({"schema_version": True}, "is not a record"),
        ({"more": 1}, "missing or unknown fields: more"),
    ],
)
def test_a_record_of_another_version_is_named(change, says, tmp_path, capsys):
    record().write(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**content, **change}))
    assert code_of("report", tmp_path / "r.json") == 2
    assert says in capsys.readouterr().err


def test_an_empty_record_and_an_empty_history_are_called_empty(demo_bundle, tmp_path, capsys):
    (tmp_path / "r.json").touch()
    assert code_of("report", tmp_path / "r.json") == 2 and "it is empty" in capsys.readouterr().err
    assert code_of("report", demo_bundle.path, "--db", tmp_path / "h.db") == 0
    capsys.readouterr()
    assert code_of("report", "--history", "--db", tmp_path / "h.db") == 2
    said = capsys.readouterr().err
    assert "has no records" in said and "--model" not in said


def test_a_checkpoint_is_not_converted_to_itself(tmp_path, capsys):
    file = Path(shutil.copyfile(CHECKPOINT, tmp_path / "a.safetensors"))
    before = file.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(file)
    for out in (file, tmp_path / "link.safetensors"):
        assert code_of("export", "convert", file, "-o", out, "--force") == 2
        assert "is the checkpoint itself" in capsys.readouterr().err and file.read_bytes() == before


def test_a_link_given_as_output_of_a_conversion_stays(tmp_path):
    (tmp_path / "old.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "old.safetensors")
    assert code_of("export", "convert", CHECKPOINT, "-o", tmp_path / "link.safetensors", "--force", "-q") == 0
    assert (tmp_path / "link.safetensors").is_symlink() and (tmp_path / "old.safetensors").stat().st_size


def test_a_conversion_that_cannot_be_written_fails_before_it_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evm_deploy.model.convert.convert", lambda *a, **k: pytest.fail("converted"))
    (tmp_path / "file").touch()
    assert code_of("export", "convert", CHECKPOINT, "-o", tmp_path / "file" / "x.safetensors") == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "says"), [(-9, "was ended by SIGKILL"), (-250, "signal 250"), (3, "with code 3")])
def test_a_measurement_that_was_killed_names_the_signal(code, says):
    with pytest.raises(ToolchainError, match=says):
        record_of("", "", code, "b")


def test_forms_are_called_forms(capsys):
    assert code_of("bench", "--matrix", "--forms", "onxx") == 2
    said = capsys.readouterr().err
    assert "--forms 'onxx' is unknown" in said and "did you mean onnx" in said


@pytest.mark.parametrize("command", [["run"], ["bench"], ["report"], ["export", "--finish"]], ids=lambda c: c[-1])
@pytest.mark.parametrize("name", ["manifest.json", "model.onnx"])
def test_a_file_of_a_bundle_is_not_the_bundle(command, name, demo_bundle, tmp_path, capsys, monkeypatch):
    if command == ["bench"]:  # in this process, where the worker would load no torch
        from evm_deploy.bench import worker

        with pytest.raises(BundleError, match="give the folder of the bundle"):
            worker.open_subject(demo_bundle.path / name, worker.Settings())
        return
    more = ["--selftest"] if command == ["run"] else []
    assert code_of(*command, demo_bundle.path / name, *more) == 2
    said = capsys.readouterr().err
    assert "is a file of a bundle" in said and f"give the folder of the bundle:  {demo_bundle.path}" in said


@pytest.mark.parametrize("flag", ["--html", "--csv", "--markdown"])
def test_a_report_replaces_no_data(flag, demo_bundle, tmp_path, capsys):
    """`--html bench/x.json` replaced a record that the report had read; `--csv h.db --db h.db` the whole history."""
    folder = tmp_path / "bench"
    folder.mkdir()
    record().write(folder / "r.json")
    assert code_of("report", folder, "--db", tmp_path / "h.db") == 0
    files = [folder / "r.json", tmp_path / "h.db", demo_bundle.path / "manifest.json"]
    before = [file.read_bytes() for file in files]
    for file in files:
        assert code_of("report", folder, flag, file) == 2
        assert "would replace" in capsys.readouterr().err
    assert code_of("report", folder, flag, tmp_path / "new.db", "--db", tmp_path / "new.db") == 2
    assert [file.read_bytes() for file in files] == before
    for _ in range(2):
        assert code_of("report", folder, flag, tmp_path / "report.txt") == 0  # an older report is replaced


def test_a_device_is_neither_a_file_nor_a_folder(capsys):
    assert code_of("report", "/dev/null") == 2 and "neither a file nor a folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ exit codes

ERRORS = (BundleError("a"), ParityError("b"), AccuracyError("c"))


def several_targets(errors, monkeypatch, tmp_path):
    names = ("onnx", "openvino", "coreml")[: len(errors)]

    def export_all(source, plans, *a, **k):
        return [TargetOutcome(plan, 0.0, error=error) for plan, error in zip(plans, errors, strict=True)]

    monkeypatch.setattr("evm_deploy.export.many.export_all", export_all)
    return code_of("export", "--target", ",".join(names), "-o", tmp_path)


def several_bundles(errors, monkeypatch, tmp_path):
    waiting = list(errors)

    def measured(*a):
        raise waiting.pop(0)

    monkeypatch.setattr("evm_deploy.bench.sweep.Sweep.measured", measured)
    return code_of("bench", *"abc"[: len(errors)], "-o", tmp_path, "-q")


def several_forms(errors, monkeypatch, tmp_path):
    failed = {Form("onnx", str(i)): error for i, error in enumerate(errors)}
    monkeypatch.setattr("evm_deploy.sweep.matrix.run_matrix", lambda *a: FormOutcome([], failed))
    return code_of("bench", "--matrix", "-o", tmp_path, "-q", "--json")


def several_boards(errors, monkeypatch, tmp_path):
    boards = "".join(f"[[board]]\nname = 'b{i}'\nhost = 'h{i}'\n" for i, _ in enumerate(errors))
    (tmp_path / "fleet.toml").write_text(boards)
    outcomes = [HostOutcome(str(i), [], error) for i, error in enumerate(errors)]
    monkeypatch.setattr("evm_deploy.sweep.fleet.run_fleet", lambda *a: outcomes)
    return code_of("bench", "b", "--devices", tmp_path / "fleet.toml", "-o", tmp_path, "-q")


@pytest.mark.parametrize("command", [several_targets, several_bundles, several_forms, several_boards])
def test_of_several_results_the_largest_exit_code_counts(command, monkeypatch, tmp_path, capsys):
    for errors in permutations(ERRORS):
        assert command(errors, monkeypatch, tmp_path) == 5
    assert command(ERRORS[:2], monkeypatch, tmp_path) == 4
    assert command(ERRORS[:1], monkeypatch, tmp_path) == 2


def test_a_matrix_without_a_result_is_json_too(monkeypatch, tmp_path, capsys):
    assert several_forms(ERRORS, monkeypatch, tmp_path) == 5
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_says_which_code_counts(command, capsys):
    assert code_of(command, "--help") == 0
    assert "the largest code" in capsys.readouterr().out


def test_a_history_that_is_only_read_need_not_be_writable(tmp_path, capsys, monkeypatch):
    from evm_deploy.report.history import append

    append(tmp_path / "h.db", [record()])
    monkeypatch.setattr("evm_deploy.commands.report.require_writable", lambda *a, **k: pytest.fail("asked to write"))
    assert code_of("report", "--history", "--db", tmp_path / "h.db") == 0
