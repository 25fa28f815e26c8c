"""A bundle as one zip: the same bytes, opened like the folder, and every zip that is no bundle refused."""

from __future__ import annotations

import json
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evm_deploy import cli
from evm_deploy.bundle import archive
from evm_deploy.bundle.archive import unpack, write_zip
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.manifest import inside_bundle, portable
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.export.pipeline import build_engine


@pytest.fixture(scope="module")
def packed(micro_bundle) -> Path:
    return write_zip(micro_bundle.path)


def made(path: Path, *entries) -> Path:
    """A zip of (name or ZipInfo, content)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def test_the_same_bundle_gives_the_same_bytes(micro_bundle, packed):
    before = packed.read_bytes()
    assert write_zip(micro_bundle.path).read_bytes() == before


def test_a_zip_opens_like_its_bundle(micro_bundle, packed, capsys):
    image = np.zeros((1, 64, 64, 3), np.uint8)
    with load(micro_bundle.path) as model:
        expected = model.run({"image": image})["logits"]
    with load(packed) as model:
        folder = model.bundle.path
        assert np.array_equal(model.run({"image": image})["logits"], expected)
        assert all(check.ok for check in model.selftest()) and folder.is_dir()
    del model
    assert not folder.exists()
    assert cli.run_main([str(packed), "--selftest"]) == 0 and "PASSED" in capsys.readouterr().out


def test_a_zip_without_a_folder_opens_too(micro_bundle, tmp_path):
    files = [(f.relative_to(micro_bundle.path).as_posix(), f.read_bytes()) for f in micro_bundle.path.rglob("*.*")]
    path = made(tmp_path / "flat.zip", *(each for each in files if each))
    assert open_bundle(path).manifest == open_bundle(micro_bundle.path).manifest


#: Names that Windows takes for a device, for another file, or for none.
ONLY_ELSEWHERE = [
    "NUL",
    "con",
    "Com1.onnx",
    "lpt9.a.b",
    "aux/x",
    "a.",
    "a ",
    "a./x",
    "a?",
    "a*",
    "<a",
    'a"',
    "a|b",
    "a\x1f",
]
LITTER = {"__MACOSX/b/._model.onnx": b"fork", "__MACOSX/._b": b"fork", ".DS_Store": b"folder", "a/readme.txt": b"x"}


def of_a_mac(packed: Path, path: Path, litter: dict[str, bytes] = LITTER) -> Path:
    """The zip of a bundle with what the Finder and people add beside its folder."""
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(path, "w") as archive:
        for name, content in litter.items():
            archive.writestr(name, content)
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    return path


@pytest.mark.parametrize("name", LITTER)
def test_what_lies_beside_the_folder_does_not_count(packed, tmp_path, name):
    assert load(of_a_mac(packed, tmp_path / "b.zip", {name: LITTER[name]})).manifest.target == "onnx"


@pytest.mark.parametrize("name", ["a:b", "a?", "nul", "a.", "a\\b", "a b [1]", "модель"])
def test_a_zip_of_any_folder_opens(micro_bundle, tmp_path, name):
    folder = shutil.copytree(micro_bundle.path, tmp_path / name)
    assert load(write_zip(folder)).manifest.target == "onnx"
    assert inside_bundle(portable(f"{name}-onnx"))


def test_two_bundles_in_a_zip_are_ambiguous(packed, tmp_path):
    both = of_a_mac(packed, tmp_path / "b.zip", {"a/manifest.json": b"{}"})
    with pytest.raises(BundleError, match="holds several bundles: a, "):
        load(both)


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([("../evil", b"x")], "leaves the bundle"),
        ([("/etc/evil", b"x")], "leaves the bundle"),
        ([("b/../../evil", b"x")], "leaves the bundle"),
        ([("b\\..\\evil", b"x")], "leaves the bundle"),
        ([("C:evil", b"x")], "leaves the bundle"),
        *(([(f"b/{name}", b"x")], "leaves the bundle") for name in ONLY_ELSEWHERE),
        ([(link("b/model.onnx"), b"/etc/passwd")], "link"),
        ([("b/manifest.json", b"{}"), ("b/Manifest.json", b"{}")], "twice"),
        ([("b/x", b"x"), ("b/x/y", b"y")], "cannot be unpacked"),
        ([("b/zeros", bytes(8 << 20))], "possible zip bomb"),
        ([("b/readme.txt", b"x")], "not a bundle"),
        ([], "not a bundle"),
        ([(f"b/{i}", b"") for i in range(10_001)], "at most 10000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_bundle_is_refused(entries, said, tmp_path, recwarn):
    path, into = made(tmp_path / "hostile.zip", *entries), tmp_path / "a" / "b"
    into.mkdir(parents=True)
    with pytest.raises(BundleError, match=said):
        unpack(path, into)
    assert {each.name for each in tmp_path.iterdir()} == {"hostile.zip", "a"} and list((tmp_path / "a").iterdir()) == [
        into
    ]


def test_what_a_zip_says_of_its_sizes_is_not_believed(tmp_path, monkeypatch):
    """The directory claims 10 bytes, 8 MB come out."""
    path = made(tmp_path / "liar.zip", ("b/zeros", bytes(8 << 20)))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 10)
    path.write_bytes(data)
    with pytest.raises(BundleError):
        unpack(path, tmp_path)
    assert sum(file.stat().st_size for file in (tmp_path / "b").rglob("*")) <= 1 << 20
    monkeypatch.setattr(archive, "MAX_BYTES", 1 << 20)
    noise = made(tmp_path / "large.zip", ("b/noise", np.random.default_rng(0).bytes(2 << 20)))
    with pytest.raises(BundleError, match="unpacks to more than"):
        unpack(noise, tmp_path / "c")


def test_a_file_without_a_name_is_refused(tmp_path):
    path = made(tmp_path / "nameless.zip", ("x", b"x"))
    path.write_bytes(path.read_bytes().replace(b"x", b"\0"))  # where a name ends
    with pytest.raises(BundleError):
        unpack(path, tmp_path / "b")


def test_an_encrypted_zip_is_refused(tmp_path):
    path = made(tmp_path / "locked.zip", ("b/x", b"x"))
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="encrypted"):
        unpack(path, tmp_path / "b")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_zip_is_a_bundle_error_or_the_bundle(packed, micro_bundle, tmp_path_factory, data):
    content = bytearray(packed.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # most of a zip is compressed weights: the directory at its end is where damage is interesting
        back = data.draw(st.integers(1, 2000) | st.integers(1, len(content)))
        content[-back] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "damaged.zip"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        assert open_bundle(path).manifest == open_bundle(micro_bundle.path).manifest
    except BundleError as error:
        assert str(path) in str(error) or "evm-bundle-" in str(error)


def test_a_zip_cannot_be_finished(packed):
    with pytest.raises(UsageError, match="would be lost"):
        build_engine(packed)


def test_the_command_writes_it(micro, tmp_path, capsys):
    from evm_deploy import cli

    flags = [str(micro), "--target", "onnx", "--imgsz", "64", "--scan", "portable", "-o", str(tmp_path), "--zip"]
    assert cli.export_main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["zip"]).name == "micro_64-onnx-fp32-64x64.zip"
    with load(said["zip"]) as model:
        assert model.inputs["image"].shape == (1, 64, 64, 3)
