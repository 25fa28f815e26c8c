"""The C++ SDK when something is wrong: the errors of Python, nothing left behind, nothing that a sanitizer sees."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from evm_deploy import load, plugin_path
from evm_deploy._util.files import sha256
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.signing import private_key, sign
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import EvmError, ImageError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.toolchain.platforms import host_platform
from tests.broken import BROKEN, NO_SELF_TEST, changed_manifest, refusal
from tests.sdk_cpp import ROOT, Model, build, changed, classify, drive, driven
from tests.test_archive import of_a_mac
from tests.test_interface import OTHERS, put_another_model, put_another_scan
from tests.test_native import isas
from tests.test_signing import BAD, write_keys
from tests.test_vectors import CONTENT
from tests.toolchains import need

pytestmark = [pytest.mark.xdist_group("sdk"), pytest.mark.compiler]

DO = ("classify", "selftest")


@pytest.fixture(scope="module")
def packed(demo_bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(demo_bundle.path, folder / "b")
    return write_zip(folder / "b")


def python_says(bundle: Path, **options: object) -> EvmError:
    with pytest.raises(EvmError) as raised:
        load(bundle, **options)
    return raised.value


def cpp_says(bundle: Path, **options: object) -> EvmError:
    with pytest.raises(EvmError) as raised:
        Model(bundle, **options)
    return raised.value


def told(answer: str) -> tuple[str, str, str]:
    """Kind, code and place of the error in an answer of the driver."""
    kind, code, where, text = answer.removeprefix("error: ").split("\t", 3)
    assert answer.startswith("error: ") and text
    return kind, code, where


def test_broken_bundles(demo_bundle, tmp_path):
    """Under AddressSanitizer, each as in Python."""
    bundles = [Path(shutil.copytree(demo_bundle.path, tmp_path / name)) for name in BROKEN]
    for bundle in bundles:
        BROKEN[bundle.name](bundle)
    for bundle, answer in zip(bundles, drive(*(("open", bundle, "portable") for bundle in bundles)), strict=True):
        assert told(answer) == refusal(lambda bundle=bundle: load(bundle)), bundle.name
        cpp = cpp_says(bundle)
        assert f"{type(cpp).__name__}\t" in answer and answer.endswith(str(cpp).replace("\n", "|"))
    done = classify(bundles[0], "cat.png")
    assert (done.returncode, done.stderr) == (2, f"evm-classify: {cpp_says(bundles[0])}\n")


def test_manifests_of_the_vectors(demo_bundle, tmp_path):
    cases = {str(i): case for i, case in enumerate(CONTENT["manifests"])}
    bundles = [changed_manifest(demo_bundle.path, tmp_path / name, case) for name, case in cases.items()]
    for case, answer in zip(cases.values(), drive(*(("open", bundle, "auto") for bundle in bundles)), strict=True):
        assert told(answer) == ("BundleError", case["code"], case["where"]), (case["name"], answer)


def test_other_models_are_refused(demo_bundle, tmp_path):
    """Under AddressSanitizer, each as in Python."""
    bundles = [Path(shutil.copytree(demo_bundle.path, tmp_path / name)) for name in OTHERS]
    answers = drive(*((do, bundle) for bundle in bundles if put_another_model(bundle.name, bundle) for do in DO))

    def predict(bundle: Path) -> None:
        with load(bundle) as model:
            model.predict([np.full((1, 1, 3), 255, np.uint8)])

    for bundle, said, tested in zip(bundles, answers[::2], answers[1::2], strict=True):
        assert told(said) == refusal(lambda bundle=bundle: predict(bundle)), bundle.name
        assert tested == "ok FAILED" or tested.startswith("error: "), bundle.name


def test_self_tests_that_are_none(demo_bundle, tmp_path):
    """Under AddressSanitizer, as in Python."""
    damages = {**NO_SELF_TEST, "another scan": put_another_scan}
    bundles = [Path(shutil.copytree(demo_bundle.path, tmp_path / name)) for name in damages]
    for bundle in bundles:
        damages[bundle.name](bundle)
    for bundle, answer in zip(bundles, drive(*(("selftest", bundle) for bundle in bundles)), strict=True):
        with load(bundle) as model:
            assert told(answer) == refusal(model.selftest), bundle.name


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"scan": "bundled"}, lambda content: None),
        ({"scan": "bundled"}, lambda content: content["scan"].update(plugins={"linux-riscv64": "model.onnx"})),
        ({"scan": "portable"}, lambda content: content["scan"].update(value="plugin")),
        ({"scan": "bundled"}, lambda content: content["scan"].update(value="portable")),
    ],
    ids=["none", "wrong platform", "plugin only", "portable only"],
)
def test_lowerings_that_cannot_be_had(options, change, demo_bundle, tmp_path):
    bundle = changed(demo_bundle.path, tmp_path, change)
    python, cpp = python_says(bundle, **options), cpp_says(bundle, **options)
    assert (type(cpp), cpp.hint) == (type(python), python.hint)
    assert (
        host_platform() in str(cpp) or options["scan"] == "portable" or "native kernels are not available" in str(cpp)
    )


def test_libraries_that_are_none(demo_bundle, tmp_path):
    """A file of the bundle, or a given one, that is no library; and none where there must be one."""
    host = {"plugins": {host_platform(): "model.onnx"}}
    bundle = changed(demo_bundle.path, tmp_path, lambda content: content["scan"].update(host))
    for flags in (
        ["--scan", "bundled"],
        ["--plugin", bundle / "model.onnx"],
        ["--plugin", "/lib/x86_64-linux-gnu/libm.so.6"],
    ):
        done = classify(bundle, "cat.png", *flags)
        assert done.returncode == 3
        assert "the native library cannot be loaded: " in done.stderr and "use scan 'portable'" in done.stderr
    done = classify(bundle, "cat.png", "--scan", "plugin")
    assert done.returncode == 3 and "use scan 'bundled' to trust" in done.stderr


@pytest.mark.parametrize(("target", "runtime"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_forced_instruction_set(target, runtime, micro, bundle_of):
    """EVM_ISA acts in the SDK too: the reason for the scan's form names it, and an unknown name is an error."""
    flags = (bundle_of(micro, ExportPlan(target, imgsz=(64, 64))).path, "--selftest", "--plugin", plugin_path(runtime))
    done = classify(*flags, EVM_ISA=isas()[0])
    assert done.returncode == 0 and f"native kernel, {isas()[0]}, installed" in done.stdout, done.stderr
    done = classify(*flags, EVM_ISA="mmx")
    assert done.returncode == 3 and "EVM_ISA=mmx: the library has no such instruction set" in done.stderr


def test_a_missing_runtime(demo_bundle, tmp_path):
    done = classify(demo_bundle.path, "cat.png", EVM_ONNXRUNTIME="/nowhere/libonnxruntime.so")
    assert done.returncode == 3 and done.stderr.startswith(
        "evm-classify: onnxruntime is not installed\n  put its library"
    )
    done = classify(demo_bundle.path, "cat.png", EVM_ONNXRUNTIME="/lib/x86_64-linux-gnu/libm.so.6")
    assert done.returncode == 3 and "cannot be used: OrtGetApiBase is missing" in done.stderr
    bundle = changed(demo_bundle.path, tmp_path, lambda content: content.update(target="coreml"))
    said = "target 'coreml' is not in this build of the SDK; available: onnx, openvino"
    assert cpp_says(bundle).args[0] == said


def test_bad_usage(demo_bundle):
    for flags, said in [
        ([], "the following arguments are required: BUNDLE"),
        ([demo_bundle.path], "nothing to do"),
        ([demo_bundle.path, "x.png", "--top", "0"], "--top 0: use a number from 1"),
        ([demo_bundle.path, "x.png", "--threads=-1"], "--threads -1: use a number from 1"),
        (
            [demo_bundle.path, "x.png", "--scan", "fast"],
            'scan "fast" is unknown; choose from: auto, plugin, bundled, portable',
        ),
        ([demo_bundle.path, "--bench", "--batch", "7"], "batch 7 is not supported"),
        ([demo_bundle.path, "x.png", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ]:
        done = classify(*flags)
        assert done.returncode == 2 and done.stderr.replace("scans run in", "\nscans").splitlines()[-1:] != []
        assert f"evm-classify: {said}" in done.stderr


def test_bad_images(demo_bundle, tmp_path):
    shot = Image.fromarray(synthetic_image(90, 120, 1))
    shot.save(tmp_path / "whole.png")
    shot.save(tmp_path / "whole.jpg")
    for suffix in ("png", "jpg"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    narrow = ROOT / "sdk" / "vectors" / "too-narrow.png"
    with load(demo_bundle.path) as model:
        for path in (
            tmp_path / "gone.png",
            narrow,
            *(tmp_path / n for n in ("cut.png", "cut.jpg", "text.png", "folder.png")),
        ):
            done = classify(demo_bundle.path, path)
            with pytest.raises(EvmError) as raised:
                model.predict([path])
            said = done.stderr.splitlines()[-1]
            assert done.returncode == 2 and str(path) in said and type(raised.value) is ImageError, path


def made(path: Path, *entries) -> Path:
    """A zip of (name or ZipInfo, content)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


HOSTILE = {
    "traversal": [("b/../../evil", b"x")],
    "absolute": [("/etc/evil", b"x")],
    "backslash": [("b\\..\\evil", b"x")],
    "drive": [("C:evil", b"x")],
    "link": [(link("b/model.onnx"), b"/etc/passwd")],
    "twice": [("b/manifest.json", b"{}"), ("b/Manifest.json", b"{}")],
    "bomb": [("b/zeros", bytes(8 << 20))],
    "several": [("a/manifest.json", b"{}"), ("b/manifest.json", b"{}")],
    "no bundle": [("b/readme.txt", b"x")],
    "windows device": [("b/NUL", b"x")],
    "windows device with a suffix": [("b/com1.onnx", b"x")],
    "windows alias": [("b/model.onnx.", b"x")],
    "windows pattern": [("b/model?.onnx", b"x")],
    "empty": [],
    "many": [(f"b/{i}", b"") for i in range(10_001)],
}


def test_hostile_zips(packed, tmp_path):
    """Hostile zips: those above, wrong sizes in the directory, a cut zip, an encrypted one, and no zip."""
    whole = packed.read_bytes()
    at = whole.index(b"b/model.onnx", whole.rindex(b"PK\x01\x02", 0, whole.index(b"PK\x05\x06")) - 4000) - 46
    liar, locked = bytearray(whole), bytearray(whole)
    liar[at + 24 : at + 28] = struct.pack("<I", 10)
    locked[at + 8] |= 1
    paths = [made(tmp_path / f"{name}.zip", *entries) for name, entries in HOSTILE.items()]
    for name, content in {"liar": liar, "cut": whole[: len(whole) // 2], "locked": locked, "text": b"text"}.items():
        paths.append(tmp_path / f"{name}.zip")
        paths[-1].write_bytes(content)
    for path, answer in zip(paths, drive(*(("open", path, "portable") for path in paths)), strict=True):
        assert told(answer) == refusal(lambda path=path: load(path)), path.name
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_zip_of_a_mac_opens(packed, tmp_path):
    (answer,) = drive(("open", of_a_mac(packed, tmp_path / "mac.zip"), "portable"))
    (plain,) = drive(("open", packed, "portable"))
    assert answer == plain and answer.startswith("ok ")


def with_library(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle with the native library for this machine in it."""
    name = f"plugins/{host_platform()}/evm_onnxruntime.so"
    library = plugin_path("onnxruntime")

    def add(content: dict[str, Any]) -> None:
        content["files"][name] = {"sha256": sha256(library), "size_bytes": library.stat().st_size}
        content["scan"]["plugins"] = {host_platform(): name}

    copy = changed(bundle, folder, add)
    (copy / name).parent.mkdir(parents=True)
    shutil.copy(library, copy / name)
    return copy


def test_a_zip_is_its_bundle_and_a_killed_process_leaves_nothing(demo_bundle, tmp_path):
    """The native library of a zip included, which loaders take from files only."""
    bundle = with_library(demo_bundle.path, tmp_path)
    path, temporary = write_zip(bundle), tmp_path / "temporary"
    temporary.mkdir()
    image = np.zeros((1, 64, 64, 3), np.uint8)
    with (
        Model(path, scan="bundled") as zipped,
        Model(bundle, scan="bundled") as plain,
        Model(path, scan="bundled") as twice,
    ):
        want = plain.run(image)["logits"]
        assert np.array_equal(zipped.run(image)["logits"], want) and np.array_equal(twice.run(image)["logits"], want)
        assert all(error <= limit for error, limit in zipped.selftest().values())
    command = [build("release") / "sample" / "evm-classify", path, "--bench", "--scan", "bundled"]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)})
    deadline = time.monotonic() + 60
    while "evm-library" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("kind", ["address", "thread"])
def test_threads_classify_at_the_same_time(kind, demo_bundle, tmp_path):
    """8 threads, each the same classes as one alone. ThreadSanitizer sees the SDK, and not into ONNX Runtime."""
    paths = []
    for i in range(4):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(synthetic_image(70 + i, 90 - i, i)).save(paths[-1])
    command = ("threads", demo_bundle.path, "portable", 8, *paths)
    assert drive(command, kind=kind, TSAN_OPTIONS="ignore_noninstrumented_modules=1") == ["ok 0 threads differ"]


def valgrind(*arguments: object) -> subprocess.CompletedProcess[str]:
    need("valgrind")
    flags = [
        "--leak-check=full",
        "--show-leak-kinds=definite",
        "--errors-for-leak-kinds=definite",
        "--error-exitcode=9",
        "-q",
    ]
    known = f"--suppressions={ROOT / 'sdk' / 'cpp' / 'tests' / 'valgrind.supp'}"
    command = ["valgrind", *flags, known, build("release") / "app", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


@pytest.mark.valgrind
def test_valgrind_has_nothing_to_say(micro_bundle):
    done = valgrind(micro_bundle.path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.valgrind
def test_valgrind_would_say_it(tmp_path):
    done = valgrind(tmp_path / "gone", "leak")
    assert done.returncode == 9 and "evm_open" in done.stderr


@pytest.mark.parametrize(("kind", "command"), [("address", "overflow"), ("thread", "race")])
def test_sanitizers_would_say_it(kind, command):
    done = driven([(command,)], kind, {})
    assert done.returncode != 0 and "Sanitizer" in done.stderr


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def mutations(content: bytes, count: int, seed: int, tail: int) -> list[bytes]:
    """Damaged forms of a file: bytes changed in its first or last `tail`, or cut."""
    rng, results = np.random.default_rng(seed), []
    for i in range(count):
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(0, min(tail, len(damaged))))
            damaged[at if i % 2 else -1 - at] = int(rng.integers(256))
        results.append(bytes(damaged[: int(rng.integers(len(damaged)))] if i % 5 == 0 else damaged))
    return results


def test_damaged_files_are_errors(packed, demo_bundle, tmp_path):
    """Zips, safetensors, PNGs and JSON, hundreds of each, under AddressSanitizer in one process."""
    selftest, commands = demo_bundle.path / "selftest", []
    sources = {
        ("safetensors", 150): (selftest / "probes.safetensors", 400),
        ("png", 60): (selftest / "picture.png", 2000),
        ("json", 100): (demo_bundle.path / "manifest.json", 4000),
        ("open", 80): (packed, 1500),
    }
    for (command, count), (source, tail) in sources.items():
        for i, content in enumerate(mutations(source.read_bytes(), count, 7, tail)):
            path = tmp_path / f"{command}{i}.{'zip' if command == 'open' else 'bin'}"
            path.write_bytes(content)
            commands.append((command, path, "portable"))
    deep = tmp_path / "deep.json"
    deep.write_bytes(b"[" * (1 << 20))
    answers = drive(*commands, ("json", deep))
    for (command, path, _), answer in zip(commands, answers, strict=False):
        assert answer.startswith(("ok ", "error: " if command == "open" else "reason: ")), (path, answer)
        assert command != "open" or answer.startswith("ok ") or str(path) in answer
    assert answers[-1] == "reason: nested too deeply"
    assert sum(answer.startswith("ok ") for answer in answers) < len(answers) / 2


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(JSON, min_size=20, max_size=60))
def test_json_of_any_kind_is_read(tmp_path_factory, values):
    """NaN and Infinity too, which Python writes."""
    folder = tmp_path_factory.mktemp("json")
    names = {dict: "object", list: "array", str: "string", type(None): "null", bool: "boolean"}
    commands = []
    for i, value in enumerate(values):
        path = folder / f"{i}.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        commands.append(("json", path))
    for value, answer in zip(values, drive(*commands), strict=True):
        assert answer in (f"ok {names.get(type(value), 'number')}", "ok null" if isinstance(value, float) else "")


# Signatures


@pytest.fixture(scope="module")
def signing_keys(tmp_path_factory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "key", Ed25519PrivateKey.generate())


@pytest.fixture
def signed_bundle(micro_bundle, signing_keys, tmp_path) -> Path:
    path = Path(shutil.copytree(micro_bundle.path, tmp_path / "signed"))
    sign(path, private_key(signing_keys[0]))
    return path


def bad_keys(folder: Path) -> dict[str, Path]:
    """Files that hold no ed25519 public key."""
    (folder / "empty.pem").touch()
    (folder / "bytes.pem").write_bytes(b"\xff" * 100)
    rsa_private, rsa_public = write_keys(folder, "rsa", rsa.generate_private_key(65537, 1024))
    return {
        "gone": folder / "gone.pem",
        "a folder": folder,
        "empty": folder / "empty.pem",
        "no PEM": folder / "bytes.pem",
        "rsa": rsa_public,
        "private": rsa_private,
        "private ed25519": write_keys(folder, "other", Ed25519PrivateKey.generate())[0],
    }


def test_signatures_as_in_python(signed_bundle, signing_keys, tmp_path):
    """Under AddressSanitizer: every change of a signed bundle, folder and zip, is refused, with Python's words."""
    public = signing_keys[1]
    good = [signed_bundle, write_zip(signed_bundle)]
    changed_bundles = []
    for name, (change, _) in BAD.items():
        bundle = Path(shutil.copytree(signed_bundle, tmp_path / f"changed {len(changed_bundles)}"))
        change(bundle)
        changed_bundles.append((name, bundle))
    in_zips = [name for name in BAD if "link" not in name]
    zips = [(name, write_zip(bundle)) for name, bundle in changed_bundles if name in in_zips]
    broken = [*changed_bundles, *zips]
    answers = drive(*(("signed", path, public) for path in [*good, *(path for _, path in broken)]))
    assert all(answer.startswith("ok ") for answer in answers[: len(good)]), answers
    for (name, path), answer in zip(broken, answers[len(good) :], strict=True):
        assert told(answer)[0] == "BundleError", (name, answer)
        python = python_says(path, require_signature=public)
        if path.is_dir():  # Python's message has the temporary folder of a zip
            said = [
                text.replace("its sha256", "sha256")
                for text in (answer.split("\t")[3], "|".join(str(python).split("\n")))
            ]
            assert said[0] == said[1], name


def test_without_a_signature_or_with_another_key(micro_bundle, signed_bundle, signing_keys, tmp_path):
    other = write_keys(tmp_path, "other", Ed25519PrivateKey.generate())[1]
    for bundle, key in ((micro_bundle.path, signing_keys[1]), (signed_bundle, other)):
        (answer,) = drive(("signed", bundle, key))
        assert answer.split("\t")[3] == str(python_says(bundle, require_signature=key)).replace("\n", "|")


def test_keys_that_are_none(signed_bundle, tmp_path):
    keys = bad_keys(tmp_path)
    answers = drive(*(("signed", signed_bundle, key) for key in keys.values()))
    for (name, key), answer in zip(keys.items(), answers, strict=True):
        assert told(answer)[0] == "UsageError", name
        python = python_says(signed_bundle, require_signature=key)
        assert answer.split("\t")[3] == str(python).replace("\n", "|"), name


def test_signatures_through_c_and_the_sample(signed_bundle, signing_keys, demo_bundle):
    with Model(signed_bundle, require_signature=signing_keys[1]) as model:
        assert model.run(np.zeros((1, 64, 64, 3), np.uint8))
    assert "is not signed" in str(cpp_says(demo_bundle.path, require_signature=signing_keys[1]))
    done = classify(signed_bundle, "--selftest", "--require-signature", signing_keys[1])
    assert done.returncode == 0 and "PASSED" in done.stdout
    done = classify(demo_bundle.path, "--selftest", "--require-signature", signing_keys[1])
    assert done.returncode == 2 and "is not signed\n  sign it with evm-export --sign" in done.stderr


def test_built_without_openssl_a_required_signature_is_an_error(tmp_path):
    """Compiled alone: no silent pass where the library is missing."""
    program = tmp_path / "main.cpp"
    program.write_text(
        '#include "signature.h"\n#include <cstdio>\n'
        'int main() { try { evm::check_signature(*evm::open_source("."), "", "k"); } '
        "catch (const evm::ToolchainError &error) { return std::puts(error.what()), 3; } return 0; }\n"
    )
    sources = [
        ROOT / "sdk" / "cpp" / "src" / f"{name}.cpp" for name in ("signature", "source", "sha256", "text", "platform")
    ]
    stub = tmp_path / "stub.cpp"
    stub.write_text(
        '#include "archive.h"\n'
        "std::unique_ptr<evm::Source> evm::open_zip(const std::filesystem::path &) { return {}; }\n"
    )
    command = ["g++", "-std=c++17", f"-I{ROOT}/sdk/cpp/include", f"-I{ROOT}/sdk/cpp/src", program, stub, *sources]
    subprocess.run([*map(str, command), "-o", str(tmp_path / "main")], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert (
        done.returncode == 3
        and "built without OpenSSL and cannot check signatures\n  install libssl-dev" in done.stdout
    )


SHELL_NAMES = ["a b", "x; touch y", "$(touch y)", "`touch y`", "it's", 'a"b', "-rf", "~", "*", "a|b", "#a", "\\", "é"]


def test_paths_in_hints_are_one_word_of_a_shell():
    for text, answer in zip(SHELL_NAMES, drive(*(("word", text) for text in SHELL_NAMES)), strict=True):
        word = answer.removeprefix("ok ")
        assert shlex.split(word) == [f"./{text}" if text.startswith("-") else text]
        shown = subprocess.run(["sh", "-c", f"printf %s {word}"], capture_output=True, text=True).stdout
        assert shown == shlex.split(word)[0]


@pytest.mark.parametrize("thing", ["pipe", "device"])
def test_files_without_an_end_are_refused(thing, micro_bundle, tmp_path):
    names = ("manifest.json", "README.md", "model.onnx")
    bundles = [Path(shutil.copytree(micro_bundle.path, tmp_path / name)) for name in names]
    for bundle, name in zip(bundles, names, strict=True):
        (bundle / name).unlink()
        os.mkfifo(bundle / name) if thing == "pipe" else (bundle / name).symlink_to("/dev/zero")
    for bundle, answer in zip(bundles, drive(*(("open", bundle, "auto") for bundle in bundles)), strict=True):
        assert told(answer) == refusal(lambda bundle=bundle: load(bundle)), bundle.name


@pytest.mark.parametrize("change", ["nothing", "bit", "cut", "unsealed", "other checksum"])
def test_a_cached_model_that_was_changed_is_compiled_again(change, bundle_of, tmp_path):
    """OpenVINO itself would load most of these, and compute something else."""
    bundle = bundle_of(CHECKPOINT, ExportPlan("openvino", scan="portable")).path
    image, cache = synthetic_image(64, 64, seed=3), tmp_path / "cache"
    with Model(bundle, cache=cache) as model:
        want = model.classify([image])
    (blob,) = cache.rglob("*.blob")
    checksum, content = blob.with_name(f"{blob.name}.sha256"), blob.read_bytes()
    assert checksum.read_text() == sha256(blob)
    broken = bytearray(content)
    broken[len(content) // 2] ^= 0x40
    if change in ("bit", "cut"):
        blob.write_bytes(broken if change == "bit" else content[: len(content) // 2])
    if change == "unsealed":
        checksum.unlink()
    if change == "other checksum":
        checksum.write_bytes(b"\xff")
    written = blob.stat().st_mtime_ns
    with Model(bundle, cache=cache) as model:
        assert model.classify([image]) == want
    assert (blob.stat().st_mtime_ns == written) == (change == "nothing")
    assert checksum.read_text() == sha256(blob)
    assert len(list(blob.parent.iterdir())) == 2


def test_a_cache_of_cpp_that_cannot_be_used_is_an_error(bundle_of, tmp_path):
    bundle = bundle_of(CHECKPOINT, ExportPlan("openvino", scan="portable")).path
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        error = cpp_says(bundle, cache=cache)
        assert "cannot be used" in str(error) and "another folder" in error.hint
