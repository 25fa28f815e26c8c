"""Signed bundles: what is accepted, and everything that is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from evm_deploy import cli, load
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.signing import SIGNATURE, private_key, public_key, sign
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from tests.toolchains import need

PEM = serialization.Encoding.PEM


def write_keys(folder: Path, name: str, key) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    pkcs8 = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(PEM, pkcs8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "key", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def signed(micro_bundle, keys, tmp_path) -> Path:
    path = tmp_path / micro_bundle.path.name
    shutil.copytree(micro_bundle.path, path)
    sign(path, private_key(keys[0]))
    return path


def test_a_signed_bundle_runs_with_and_without_asking(signed, keys):
    assert (signed / SIGNATURE).stat().st_size == 64
    for required in (keys[1], None):
        with load(signed, require_signature=required) as model:
            assert model.labels is None and model.inputs


def test_a_zip_carries_the_signature(signed, keys):
    packed = write_zip(signed)
    with load(packed, require_signature=keys[1]) as model:
        assert model.inputs


def edit_manifest(bundle: Path) -> None:
    file = bundle / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "notes": ["harmless"]}))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def relist(bundle: Path) -> None:
    """An attacker who changes a file and its hash."""
    from evm_deploy._util.files import sha256

    flip(bundle / "README.md")
    file = bundle / "manifest.json"
    content = json.loads(file.read_text())
    content["files"]["README.md"]["sha256"] = sha256(bundle / "README.md")
    file.write_text(json.dumps(content))


def link(bundle: Path) -> None:
    (bundle / "README.md").rename(bundle.parent / "elsewhere.md")
    (bundle / "README.md").symlink_to(bundle.parent / "elsewhere.md")


CHANGED = "was changed after signing, or was signed with another key"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "not signed": (lambda bundle: (bundle / SIGNATURE).unlink(), "is not signed"),
    "manifest edited": (edit_manifest, CHANGED),
    "file and hash edited": (relist, CHANGED),
    "file edited": (lambda bundle: flip(bundle / "model.onnx"), "model.onnx is damaged"),
    "signature edited": (lambda bundle: flip(bundle / SIGNATURE), CHANGED),
    "signature cut": (lambda bundle: (bundle / SIGNATURE).write_bytes(b"short"), CHANGED),
    "signature is a folder": (
        lambda bundle: ((bundle / SIGNATURE).unlink(), (bundle / SIGNATURE).mkdir()),
        "cannot be read",
    ),
    "signature is longer": (lambda bundle: (bundle / SIGNATURE).write_bytes(bytes(65)), CHANGED),
    "signature is huge": (lambda bundle: (bundle / SIGNATURE).write_bytes(bytes(1 << 20)), CHANGED),
    "signature is empty": (lambda bundle: (bundle / SIGNATURE).write_bytes(b""), CHANGED),
    "good signature and more": (lambda bundle: (bundle / SIGNATURE).open("ab").write(b"\n"), CHANGED),
    "signature is a pipe": (
        lambda bundle: ((bundle / SIGNATURE).unlink(), os.mkfifo(bundle / SIGNATURE)),
        "cannot be read: Not a regular file",
    ),
    "deep in it": (
        lambda bundle: ((bundle / "a" / "b").mkdir(parents=True), (bundle / "a" / "b" / "c.so").write_bytes(b"x")),
        "a/b/c.so is not in the manifest",
    ),
    "a link more": (lambda bundle: (bundle / "x").symlink_to("/etc/hostname"), "x is a link"),
    "a link to a folder": (lambda bundle: (bundle / "x").symlink_to("/etc"), "x is a link"),
    "more in it": (lambda bundle: (bundle / "plugin.so").write_bytes(b"x"), "plugin.so is not in the manifest"),
    "a link": (link, "README.md is a link"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_where_a_signature_is_required(name, signed, keys):
    harm, said = BAD[name]
    harm(signed)
    with pytest.raises(BundleError, match=said):
        load(signed, require_signature=keys[1])


def test_another_key_is_refused(signed, tmp_path, capsys):
    _, other = write_keys(tmp_path, "other", ed25519.Ed25519PrivateKey.generate())
    assert cli.run_main([str(signed), "--selftest", "--require-signature", str(other)]) == 2
    err = capsys.readouterr().err
    assert CHANGED in err and "Traceback" not in err


def test_openssl_checks_and_makes_the_same(signed, keys, tmp_path):
    need("openssl")
    private, public = keys
    manifest, signature = signed / "manifest.json", signed / SIGNATURE
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", manifest]
    subprocess.run([*check, "-sigfile", signature], check=True, capture_output=True)
    made = tmp_path / "made.sig"
    subprocess.run(
        ["openssl", "pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", manifest, "-out", made], check=True
    )
    assert made.read_bytes() == signature.read_bytes()
    edit_manifest(signed)
    assert subprocess.run([*check, "-sigfile", signature], capture_output=True).returncode != 0


def test_export_signs_and_run_checks(micro, keys, tmp_path, capsys):
    flags = ["--target", "onnx", "--imgsz", "64", "-o", str(tmp_path), "--zip", "--json"]
    assert cli.export_main([str(micro), *flags, "--sign", str(keys[0])]) == 0
    facts = json.loads(capsys.readouterr().out)
    for path in (facts["bundle"], facts["zip"]):
        assert cli.run_main([path, "--selftest", "--require-signature", str(keys[1])]) == 0
        assert "PASSED" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_measures_only_what_the_key_signed(signed, keys, tmp_path, capsys):
    flags = [str(signed), "--limit", "0.5", "-o", str(tmp_path / "out"), "--require-signature", str(keys[1])]
    assert cli.bench_main(flags) == 0
    edit_manifest(signed)
    assert cli.bench_main(flags) == 2
    assert "was changed after signing" in capsys.readouterr().err
    (signed / SIGNATURE).unlink()
    assert cli.bench_main(flags) == 2
    assert "is not signed" in capsys.readouterr().err
    checkpoint = tmp_path / "x.safetensors"
    checkpoint.write_bytes(b"")
    assert cli.bench_main([str(checkpoint), *flags[1:]]) == 2  # no bundle, so nobody signed it
    assert "is a file, not a bundle" in capsys.readouterr().err
    assert cli.bench_main(["--matrix", "--require-signature", str(keys[1])]) == 2
    assert cli.bench_main([*flags[:-1], str(tmp_path / "gone.pem")]) == 2
    assert "gone.pem cannot be read" in capsys.readouterr().err


def test_a_key_that_vanishes_signs_nothing(micro, keys, tmp_path):
    """A signature that was asked for is never left out."""
    with pytest.raises(UsageError, match="cannot be read"):
        export(micro, ExportPlan("onnx", imgsz=(64, 64)), tmp_path / "out", sign=tmp_path / "gone.pem")
    assert not (tmp_path / "out").exists()


def encrypted(folder: Path) -> Path:
    file = folder / "encrypted.pem"
    lock = serialization.BestAvailableEncryption(b"secret")
    key = ed25519.Ed25519PrivateKey.generate()
    file.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, lock))
    return file


def not_a_key(folder: Path) -> Path:
    (folder / "no.pem").write_bytes(b"\xff" * 100)
    return folder / "no.pem"


BAD_KEYS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "gone": (lambda folder: folder / "gone.pem", r"cannot be read: No such file or directory\n  create a key:"),
    "no key": (not_a_key, "is not a PEM file of an ed25519 private key"),
    "encrypted": (encrypted, r"is encrypted\n  remove the password:  openssl pkey"),
    "rsa": (lambda folder: write_keys(folder, "rsa", rsa.generate_private_key(65537, 1024))[0], "not an ed25519 key"),
    "public": (
        lambda folder: write_keys(folder, "k", ed25519.Ed25519PrivateKey.generate())[1],
        "is not a PEM file of an ed25519 private key",
    ),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_are_refused_before_any_work(name, micro, tmp_path, capsys):
    make, said = BAD_KEYS[name]
    key = make(tmp_path)
    with pytest.raises(UsageError, match=said):
        private_key(key)
    assert cli.export_main([str(micro), "--target", "onnx", "-o", str(tmp_path / "out"), "--sign", str(key)]) == 2
    assert not (tmp_path / "out").exists() and "Traceback" not in capsys.readouterr().err


def test_a_private_key_is_not_a_public_one(keys):
    said = "is not a PEM file of an ed25519 public key\n  create it from the private key:  openssl"
    with pytest.raises(UsageError, match=said):
        public_key(keys[0])


def test_without_the_package_it_says_so(signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(ToolchainError, match=r"cryptography is not installed\n  pip install .*\[sign\]'"):
        load(signed, require_signature=keys[1])
